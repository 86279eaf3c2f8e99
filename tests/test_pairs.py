"""Shipped pairs of domains, on small trees in the layouts of the real data sets."""

import numpy as np
import pytest
from conftest import CITYSCAPES_IDS, NAMES
from PIL import Image

import train_bpl
from data import verify
from data.datasets import build_dataset
from data.taxonomy import class_set
from utils import pipeline
from utils.config import ROOT
from utils.engine.setup import checked_config

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
    verify.main(checked_config(ROOT / "configs" / "stage1_BPL.yml", given))
    assert "no fault" in capsys.readouterr().out
    rows = pipeline.run(
        [*given, "model.backbone=resnet18", "train.iterations=2", "train.horizon=4", "train.lr=1e-3"]
        + ["train.val_every=2", "train.batch_source=2", "train.batch_target=2", "model.init=scratch"]
        + ["data.crop=[64,32]", "pseudo.threshold=0"]  # after two steps it is sure of nothing
    )["stages"]
    assert list(rows["pst"]["iou"]) == ["road", "sidewalk", "living", "vehicle", "static", "sky"]


TRAIN_IDS, SYNTHIA_OUT = [*range(19), 255], ("terrain", "truck", "train")
# Public layouts: source tree, target's root, its image and label with {split} and {i}, splits on disk, ids on disk, and
# of some ids the class that the data set's own table has for them.
PUBLIC = {
    "cityscapes_to_acdc": (
        *("cityscapes", "rgb_anon"),
        "{part}/{split}/GOPR{i}/GOPR{i}_frame_00000{i}_rgb_anon.png",
        "../gt/{part}/{split}/GOPR{i}/GOPR{i}_frame_00000{i}_gt_labelTrainIds.png",
        *(("train", "val"), ("fog", "night", "rain", "snow"), TRAIN_IDS, dict(enumerate(NAMES))),
    ),
    "cityscapes_to_dark_zurich": (
        *("cityscapes", "rgb_anon"),
        "{split}/{part}/GOPR{i}/GOPR{i}_frame_00000{i}_rgb_anon.png",
        "../gt/{split}/{part}/GOPR{i}/GOPR{i}_frame_00000{i}_gt_labelTrainIds.png",
        *(("train", "val"), ("night", "night"), TRAIN_IDS, dict(enumerate(NAMES))),
    ),
    "cityscapes_to_foggy_cityscapes": (
        *("cityscapes", "Cityscapes"),
        "leftImg8bit_foggy/{split}/ulm/ulm_00000{i}_000019_leftImg8bit_foggy_beta_0.02.png",
        "gtFine/{split}/ulm/ulm_00000{i}_000019_gtFine_labelIds.png",
        *(("train", "val"), ("",), [*range(34), 255], {i: name for name, i in CITYSCAPES_IDS.items()}),
    ),
    "gta5_to_bdd100k": (
        *("gta5", "bdd100k"),
        *("images/10k/{split}/0000f77c-{i}.jpg", "labels/sem_seg/masks/{split}/0000f77c-{i}.png"),
        *(("train", "val"), ("",), TRAIN_IDS, dict(enumerate(NAMES))),
    ),
    "gta5_to_mapillary": (
        *("gta5", "Mapillary"),
        *("{split}/images/a-_{i}.jpg", "{split}/v1.2/labels/a-_{i}.png"),
        *(("training", "validation"), ("",), range(66)),
        {13: "road", 24: "road", 15: "sidewalk", 17: "building", 19: "person", 20: "rider", 21: "rider", 27: "sky"}
        | {30: "vegetation", 45: "pole", 48: "traffic light", 50: "traffic sign", 52: "bicycle", 54: "bus", 55: "car"}
        | {57: "motorcycle", 58: "train", 61: "truck", 3: "fence", 6: "wall", 29: "terrain"}
        | dict.fromkeys([0, 5, 25, 31, 44, 49, 53, 56, 62, 63, 64, 65]),
    ),
    "synthia_to_bdd100k": (
        *("synthia", "bdd100k"),
        *("images/10k/{split}/0000f77c-{i}.jpg", "labels/sem_seg/masks/{split}/0000f77c-{i}.png"),
        *(("train", "val"), ("",), TRAIN_IDS),
        {i: None if name in SYNTHIA_OUT else name for i, name in enumerate(NAMES)},
    ),
}


@pytest.mark.parametrize("pair", PUBLIC)
def test_public_pairs_are_verified_and_train(trees, tmp_path, capsys, pair):
    """On a small tree in the data set's public layout, of which the target's training labels are never needed."""
    source, root, image, label, splits, parts, ids, names = PUBLIC[pair]
    rng, root = np.random.default_rng(0), tmp_path / root
    for split in splits:
        for i, part in enumerate(parts * (4 // len(parts))):
            path = {"split": split, "i": i, "part": part}
            write(root, image.format(**path), label.format(**path), (120, 80), ids, rng)
            if split == splits[0]:
                (root / label.format(**path)).unlink()
    given = [f"data.source.root={trees[source].root}", f"data.target.root={root}", f"data.val.root={root}"]
    given += [f"runs={tmp_path / 'runs'}", "device=cpu", "data.workers=0", "data.source.size=[96, 64]"]
    given += ["data.base_width=120", "data.crop=[64, 32]", "model.backbone=resnet18", "model.output_stride=16"]
    given += ["train.iterations=2", "train.horizon=4", "train.batch_source=2", "train.batch_target=2"]
    given += [f"benchmark={pair}", "model.init=scratch"]
    cfg = checked_config(ROOT / "configs" / "stage1_BPL.yml", given)
    reports = verify.main(cfg)
    assert "no fault" in capsys.readouterr().out
    assert [r.images for r in reports.values()] == [5, 4, 4] and reports["target"].labels == 0

    dataset = build_dataset(cfg.data.val, class_set(cfg.data))
    table = [*class_set(cfg.data).names, *[None] * 240]
    assert {i: table[dataset.lookup_table[i]] for i in names} == names
    assert train_bpl.main(cfg)["last"]["iteration"] == 2
