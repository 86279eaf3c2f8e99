"""Labels of one image from Python."""

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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


def test_exif_alone_turns_an_image(tmp_path):
    model, exif = build_model("deeplabv2", 19, "resnet18").eval(), Image.Exif()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    exif[0x0112] = 6
    picture.save(tmp_path / "exif.png", exif=exif)
    xmp, broken = PngInfo(), PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    broken.add_text("Raw profile type exif", "\nexif\n 10\nzzzz")
    picture.save(tmp_path / "xmp.png", pnginfo=xmp)
    picture.save(tmp_path / "exif.tif", exif=exif)
    picture.save(tmp_path / "xmp.tif", tiffinfo={700: b'<rdf:Description tiff:Orientation="6"/>'})
    assert predict(model, tmp_path / "exif.tif").equal(predict(model, picture.rotate(-90, expand=True)))
    assert predict(model, tmp_path / "xmp.tif").equal(predict(model, picture))
    picture.save(tmp_path / "broken.png", pnginfo=broken)
    assert predict(model, tmp_path / "exif.png").equal(predict(model, picture.rotate(-90, expand=True)))
    for name in ("xmp", "broken"):
        opened = Image.open(tmp_path / f"{name}.png")
        assert predict(model, opened).equal(predict(model, picture))
        assert ("XML:com.adobe.xmp" in opened.info) == (name == "xmp")  # the user's image is left as it is
