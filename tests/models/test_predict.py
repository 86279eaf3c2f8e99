"""Labels of one image from Python."""

import numpy as np
import pytest
from PIL import Image

from data.toy import png16
from models import build_model, predict


def test_deep_colour_without_a_value_above_255_is_not_black(tmp_path):
    model, values = build_model("deeplabv2", 19, "resnet18").eval(), np.zeros((32, 48, 3), np.uint16)
    for high, name in ((200, "low.png"), (200 << 8, "deep.png")):
        values[:, 24:] = high
        (tmp_path / name).write_bytes(png16(values))
    with pytest.raises(ValueError, match="not colours of 16 bits without a value above 255"):
        predict(model, tmp_path / "low.png")
    plain = Image.fromarray((values >> 8).astype(np.uint8))
    assert predict(model, tmp_path / "deep.png").equal(predict(model, plain))
