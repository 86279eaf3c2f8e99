"""Shipped pairs of domains, on small trees in the layouts of the real data sets."""

import numpy as np
import pytest
from PIL import Image

from data import verify
from utils import pipeline
from utils.config import ROOT
from utils.engine.setup import load_config

SIZES = {"camvid": (480, 360), "idd": (320, 227)}


def write(root, image, label, size, ids, rng):
    """A photograph and its label map in blocks."""
    for path in (root / image, root / label):
        path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / image)
    blocks = rng.choice(np.array(ids, np.uint8), (height // 20 + 1, width // 20 + 1))
    Image.fromarray(np.kron(blocks, np.ones((20, 20), np.uint8))[:height, :width]).save(root / label)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """CamVid in the public copy's layout, and IDD-Lite in its own."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for i in range(3):
            name = f"0006R0_f{i:05d}.png"
            paths = f"CamVid/{split}/{name}", f"CamVid/{split}annot/{name}"
            write(folder, *paths, SIZES["camvid"], range(12), rng)
    for split in ("train", "val"):
        for i in range(4):
            paths = (
                f"idd20k_lite/leftImg8bit/{split}/{i % 2}/frame{i:04d}_image.jpg",
                f"idd20k_lite/gtFine/{split}/{i % 2}/frame{i:04d}_label.png",
            )
            write(folder, *paths, SIZES["idd"], [*range(7), 255], rng)
    return folder


@pytest.mark.slow
def test_camvid_to_idd_lite(roots, tmp_path, capsys):
    given = [f"data.source.root={roots / 'CamVid'}", f"runs={tmp_path / 'runs'}", "device=cpu", "data.workers=0"]
    given += [f"data.{name}.root={roots / 'idd20k_lite'}" for name in ("target", "val")]
    given += ["benchmark=camvid_to_idd_lite"]
    verify.main(load_config(ROOT / "configs" / "stage1_BPL.yml", given))
    assert "no fault" in capsys.readouterr().out
    rows = pipeline.run(
        [*given, "model.backbone=resnet18", "train.iterations=2", "train.horizon=4", "train.lr=1e-3"]
        + ["train.val_every=2", "model.init=scratch"]
    )["stages"]
    assert list(rows["pst"]["iou"]) == ["road", "sidewalk", "living", "vehicle", "static", "sky"]
