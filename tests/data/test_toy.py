"""The toy cities: layouts as on the real disks, reproducible bytes, and safe handling of folders."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from torchvision.io import decode_image

from data import toy, toy_scene
from data.taxonomy import CITYSCAPES_LABEL_IDS, CITYSCAPES_PALETTE, SYNTHIA_LABEL_IDS

# An independent reader of 16-bit colour; torchvision announces its end.
DECODED = pytest.mark.filterwarnings("ignore:The image decoding")
COUNTS = {"GTA5": 9, "SYNTHIA": 9, "Cityscapes/train": 9, "Cityscapes/val": 2}  # nine show every rare class


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return toy.generate(tmp_path_factory.mktemp("toy") / "cities", seed=3, counts=COUNTS)


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def class_shares(labels, class_ids):
    """Share of the pixels for each of the 19 classes."""
    pixels = np.concatenate([label.ravel() for label in labels])
    return np.array([(pixels == class_id).mean() for class_id in class_ids])


def check_shares(shares):
    assert (shares > 0).all()
    assert shares[toy_scene.ROAD] > 5 * shares[list(toy_scene.RARE)].max()


def test_gta5_layout(root):
    images, labels = (sorted((root / "GTA5" / kind).iterdir()) for kind in ("images", "labels"))
    assert [path.name for path in images] == [f"{i:05d}.png" for i in range(1, 10)]
    assert [path.name for path in labels] == [path.name for path in images]
    images, labels = [Image.open(path) for path in images], [Image.open(path) for path in labels]
    assert {image.mode for image in images} == {"RGB"} and {label.mode for label in labels} == {"P"}
    palette = np.array(labels[0].getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(palette[list(CITYSCAPES_LABEL_IDS)], CITYSCAPES_PALETTE)
    mismatched = [i for i in range(9) if images[i].size != labels[i].size]
    assert mismatched == [toy.MISMATCHED]
    assert len({image.size for image in images}) == 2 and len({label.size for label in labels}) == 1
    check_shares(class_shares([np.asarray(label) for label in labels], CITYSCAPES_LABEL_IDS))


@DECODED
def test_synthia_layout(root):
    images, labels = (sorted((root / "SYNTHIA" / kind).iterdir()) for kind in ("RGB", "GT/LABELS"))
    assert [path.name for path in images] == [f"{i:07d}.png" for i in range(9)]
    assert [path.name for path in labels] == [path.name for path in images]
    labels = [decode_image(str(path), mode="UNCHANGED").numpy() for path in labels]
    assert labels[0].dtype == np.uint16 and labels[0].shape == (3, *Image.open(images[0]).size[::-1])
    assert all((label[2] == 0).all() for label in labels)
    assert all(set(np.unique(label[0])) <= {0, *SYNTHIA_LABEL_IDS} for label in labels)
    check_shares(class_shares([label[0] for label in labels], SYNTHIA_LABEL_IDS))


def test_cityscapes_layout(root):
    base = root / "Cityscapes"
    for part, count in (("train", 9), ("val", 2)):
        images = sorted((base / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"))
        labels = sorted((base / "gtFine" / part).glob("*/*_gtFine_labelIds.png"))
        assert len(images) == len(labels) == count
        for image, label in zip(images, labels):
            assert image.parent.name == label.parent.name in toy.CITIES[part]
            assert image.name.replace("leftImg8bit", "gtFine_labelIds") == label.name
            image, label = Image.open(image), Image.open(label)
            assert (image.mode, label.mode) == ("RGB", "L") and image.size == label.size
    labels = (base / "gtFine" / "train").glob("*/*")
    check_shares(class_shares([np.asarray(Image.open(path)) for path in labels], CITYSCAPES_LABEL_IDS))


@DECODED
def test_16_bit_png_keeps_every_value(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3)).astype(np.uint16)
    (tmp_path / "x.png").write_bytes(toy.png16(pixels))
    read = decode_image(str(tmp_path / "x.png"), mode="UNCHANGED").numpy()
    np.testing.assert_array_equal(read, pixels.transpose(2, 0, 1))


def test_same_seed_same_bytes_whatever_the_counts(root, tmp_path):
    fewer = contents(toy.generate(tmp_path / "fewer", seed=3, counts={name: 2 for name in COUNTS}))
    other = contents(toy.generate(tmp_path / "other", seed=4, counts={name: 2 for name in COUNTS}))
    all_of_them = contents(root)
    assert len(fewer) == 17
    for path in fewer:
        if path.name != "toy.json":
            assert fewer[path] == all_of_them[path]
            assert fewer[path] != other[path]


def test_complete_folder_is_left_as_it_is(root, monkeypatch):
    monkeypatch.setattr(toy, "write_pair", None)  # any drawing would fail
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert toy.generate(root, seed=3, counts=COUNTS) == root
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_interrupted_drawing_leaves_nothing_and_recovers(tmp_path, monkeypatch):
    counts, root = {name: 1 for name in COUNTS}, tmp_path / "toy"
    write_pair = toy.write_pair

    def interrupted(root, split, index, seed):
        if split == "SYNTHIA":
            raise KeyboardInterrupt
        write_pair(root, split, index, seed)

    monkeypatch.setattr(toy, "write_pair", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.generate(root, counts=counts)
    assert not root.exists()
    assert (tmp_path / ".toy.partial").exists()
    (tmp_path / ".toy.partial" / "stale.png").touch()
    monkeypatch.undo()
    assert len(contents(toy.generate(root, counts=counts))) == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == [".toy.lock", "toy"]


def test_other_counts_draw_the_folder_again(tmp_path):
    counts = {name: 1 for name in COUNTS}
    root = toy.generate(tmp_path / "toy", counts=counts)
    toy.generate(root, counts=counts | {"GTA5": 3})
    assert len(list((root / "GTA5" / "images").iterdir())) == 3
    assert json.loads((root / "toy.json").read_text())["counts"]["GTA5"] == 3


def test_tuned_style_draws_the_folder_again(tmp_path, monkeypatch):
    counts = {name: 1 for name in COUNTS}
    before = contents(toy.generate(tmp_path / "toy", counts=counts))
    hazy = dataclasses.replace(toy.STYLES["GTA5"], haze=0.1)
    monkeypatch.setattr(toy, "STYLES", toy.STYLES | {"GTA5": hazy})
    after = contents(toy.generate(tmp_path / "toy", counts=counts))
    changed = sorted(str(path) for path in after if after[path] != before[path])
    assert changed == ["GTA5/images/00001.png", "toy.json"]  # the label map does not depend on the optics


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"toy\.json"):
        toy.generate(tmp_path / "photos")
    assert (tmp_path / "photos" / "mine.txt").read_text() == "keep"
    with pytest.raises(ValueError, match="Mapillary"):
        toy.generate(tmp_path / "toy", counts={"Mapillary": 3})
