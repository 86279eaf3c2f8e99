"""Labels in another numbering are said, with the numbers; labels that are right are not."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import CITYSCAPES_IDS, CUSTOM, SYNTHIA_IDS
from PIL import Image

from data.check import Labels, check_samples, sample_facts
from data.datasets import Sample, build_dataset
from data.images import read_label_ids
from data.taxonomy import CLASS_SETS, class_set, custom_class_set
from data.transforms import RandomScaleCropFlip
from utils.config import UserError
from utils.config.keys import DatasetConfig

NINETEEN, SIXTEEN = CLASS_SETS["cityscapes19"], CLASS_SETS["cityscapes16"]
OWN = custom_class_set(CUSTOM["class_names"], CUSTOM["palette"])
TWO, STREETS = custom_class_set(["road", "crack"], []), custom_class_set(["building", "road"], [])
STREET = dict(zip(NINETEEN.names, (33, 6, 20, 1, 1, 1, 1, 1, 15, 1, 8, 1, 1, 6, 1, 1, 1, 1, 1)))  # pixels in a hundred


def section(kind="folder", **changes):
    empty = {"split": "all", "size": [], "images": ["*"], "labels": "", "strip": "", "id_map": {}}
    return DatasetConfig(**{"format": kind, "root": "d"} | empty | changes)


def labels(cfg, classes, ids):
    found = Labels(cfg, classes)
    found.add(Sample(Path("i.png"), Path("l.png"), "i"), {"ids": ids, "stored": "L"})
    return found


def street(id_of, void):
    """A street's pixels by label id; `void` is what is none of the classes."""
    return {id_of[name]: n for name, n in STREET.items()} | {void: 8}


TRAIN = {name: i for i, name in enumerate(NINETEEN.names)}
RIGHT = [
    (section("gta5"), NINETEEN, street(CITYSCAPES_IDS, 4)),
    (section("cityscapes"), SIXTEEN, street(CITYSCAPES_IDS, 0)),
    (section("synthia"), SIXTEEN, street(SYNTHIA_IDS, 0)),
    (section(), NINETEEN, street(TRAIN, 255)),
    (section(id_map={0: "road", 255: "crack"}), TWO, {0: 90, 255: 10}),
    (section(), TWO, {0: 90, 1: 5, 255: 5}),
    (section(id_map={0: "ignore", 1: "building", 2: "road"}), STREETS, {0: 60, 1: 30, 2: 10}),  # no train ids
    (section(id_map={0: "ignore", 1: "road", 2: "crack"}), TWO, {0: 60, 1: 35, 2: 5}),
]
SURE = [  # nothing that stops training
    (section(), TWO, {0: 100}),
    (section(id_map={0: "road", 1: "crack"}), TWO, {0: 90, 255: 10}),
    (section(id_map={10: "sky", 20: "street", 30: "car"}), OWN, {10: 50, 20: 30, 30: 19, 40: 1}),
]
WRONG = [
    (section("gta5"), NINETEEN, street(TRAIN, 255), "train ids"),
    (section("gta5"), NINETEEN, street(TRAIN, 255) | {255: 900}, "train ids"),
    (section("cityscapes"), SIXTEEN, street(TRAIN, 255), "train ids"),
    (section("gta5"), NINETEEN, street(SYNTHIA_IDS, 0), "SYNTHIA's ids"),
    (section("synthia"), SIXTEEN, street(TRAIN, 255), "train ids"),
    (section("synthia"), SIXTEEN, street(CITYSCAPES_IDS, 0), "Cityscapes' label ids"),
    (section("synthia"), SIXTEEN, {0: 100}, "cut to 8 bits"),
    (section(), NINETEEN, street(CITYSCAPES_IDS, 0), "Cityscapes' label ids"),
    (section(id_map={i: n for n, i in CITYSCAPES_IDS.items()}), NINETEEN, street(TRAIN, 255), "train ids"),
    (section(), TWO, {0: 90, 255: 10}, "mask of 0 and 255"),
    (section(), OWN, {1: 10, 2: 20, 3: 10, 4: 5}, "begin at 1"),
    (section(), custom_class_set(["sky", "road", "car"], []), {1: 10, 2: 20, 3: 10}, "begin at 1"),
    (section(), OWN, {0: 10, 257: 20, 514: 20, 771: 5}, "multiples of 257"),
    (section(), OWN, {0: 10, 80: 20, 160: 20, 240: 5}, "multiples of 80"),
]


@pytest.mark.parametrize(("cfg", "classes", "ids"), RIGHT)
def test_right_labels_have_neither_fault_nor_warning(cfg, classes, ids):
    found = labels(cfg, classes, ids)
    assert not found.faults() and not found.warnings(every_class=True)


@pytest.mark.parametrize(("cfg", "classes", "ids"), SURE)
def test_what_may_be_right_does_not_stop_training(cfg, classes, ids):
    found = labels(cfg, classes, ids)
    assert not found.faults() and "no pixel of class" in found.warnings(every_class=True)[0]


@pytest.mark.parametrize(("cfg", "classes", "ids", "looks"), WRONG)
def test_other_numberings_are_named(cfg, classes, ids, looks):
    ((_, text),) = labels(cfg, classes, ids).faults()
    assert looks in text and "%" in text


def test_what_may_be_meant_is_a_warning():
    cfg = section(id_map={0: "sky", 1: "building", 3: "street", 4: "ignore", 8: "car"})
    found = labels(cfg, OWN, {0: 4, 1: 3, 3: 3, 4: 60, 9: 30}).warnings(every_class=True)
    for line, words in zip(found, ("90% of the pixels are ignored", "no pixel of class car (8)", "ignored: 9 (30.0%)")):
        assert words in line
    assert len(found) == 3


def test_a_class_that_no_label_can_hold_is_named():
    found = labels(section(id_map={0: "sky", 1: "building", 3: "street"}), OWN, {0: 4, 1: 3, 3: 3, 26: 3})
    assert found.warnings(every_class=False)[-1] == "no label id stands for class car: the IoU is 0 if predicted"


def test_dark_and_turned_images_are_named(configure, copied, tmp_path):
    cfg = configure("gta5_to_city", "stage1_BPL.yml", tmp_path / "runs")
    cfg.data.source.root = str(copied("gta5").root)
    for number, path in enumerate(sorted(Path(cfg.data.source.root).glob("images/*.png"))[:2]):
        picture, exif = Image.open(path), Image.Exif()
        exif[274] = 3
        if number:
            picture.save(path, exif=exif)
        else:
            picture.point(lambda value: value // 16).save(path)
    notes = check_samples(build_dataset(cfg.data.source, class_set(cfg.data)), "source", cfg).notes
    for words in (
        r"1 images are nearly black, the first is .*png: 12 bits",
        r"1 labelled images are turned upright by",
    ):
        assert any(re.search(words, note) for note in notes)


def test_ids_that_are_all_named_and_all_there_are_no_fault():
    """Two classes of a street, of which most is background."""
    two = custom_class_set(["road", "car"], [])
    found = labels(section(id_map={1: "road", 2: "car"}), two, {0: 69, 1: 20, 2: 11})
    assert not found.faults() and "look like train ids" in found.mostly_ignored()[0]
    assert labels(section(id_map={1: "road", 7: "car"}), two, {0: 69, 1: 20, 2: 11}).faults()


def test_ids_that_are_all_named_are_no_fault_though_one_is_rare():
    three = custom_class_set(["car", "person", "bicycle"], [])
    found = labels(
        section(id_map={8: "car", 9: "person", 10: "bicycle"}), three, {**dict.fromkeys(range(8), 9), 8: 9, 9: 2}
    )
    ((_, text),) = found.faults()
    assert "look like train ids (0 to 18, 255) (if they are meant as they are, name every id" in text
    named = {i: "ignore" for i in range(8)} | {8: "car", 9: "person", 10: "bicycle"}
    found = labels(section(id_map=named), three, {**dict.fromkeys(range(8), 9), 8: 9, 9: 2})
    assert not found.faults()


def test_what_looks_odd_is_noted_before_training(configure, copied, tmp_path):
    cfg = configure("synthia_to_city", "stage1_BPL.yml", tmp_path / "runs")
    tree = copied("synthia")
    cfg.data.source.root = str(tree.root)
    labels = sorted(tree.root.glob("GT/LABELS/*.png"))
    for path in labels:
        Image.fromarray(read_label_ids(path).astype(np.uint8)).save(path)
    image = next(tree.root.glob("RGB/*.png"))
    Image.fromarray(np.eye(64, 96, dtype=np.uint8) * 9).resize(Image.open(image).size).save(image)
    notes = check_samples(build_dataset(cfg.data.source, class_set(cfg.data)), "source", cfg).notes
    assert [any(words in note for note in notes) for words in ("has 8: are its ids", "looks like a label map")] == [
        True
    ] * 2


def test_optimised_labels_among_others():
    sample, found = Sample(Path("i.png"), Path("l.png"), "i"), labels(section(), TWO, {0: 90, 1: 10})
    found.add(sample, {"ids": {0: 1}, "stored": "1"})
    assert not found.faults()  # as any optimiser writes a label of nothing
    found.add(sample, {"ids": {0: 1, 1: 1}, "stored": "1"})
    assert "grey of few bits" in found.faults()[0][0]
    found = labels(section(), TWO, {0: 90, 1: 10})
    for colour in ((1, 2, 3), (4, 5, 6)):
        found.add(sample, {"ids": {0: 1}, "stored": "P", "palette": {0: colour}})
    assert "palettes differ" in found.faults()[0][0]


@pytest.mark.parametrize("layout", ["gta5_to_city", "synthia_to_city", "day_to_dusk"])
def test_training_stops_at_train_ids_and_is_silent_otherwise(configure, copied, tmp_path, layout):
    cfg = configure(layout, "stage1_BPL.yml", tmp_path / "runs")
    for name in ("source", "val"):
        dataset = build_dataset(getattr(cfg.data, name), class_set(cfg.data))
        assert check_samples(dataset, name, cfg).notes == []
    if layout != "gta5_to_city":
        return
    tree, wrong = copied("gta5"), copy.deepcopy(cfg)
    wrong.data.source.root = str(tree.root)
    table = class_set(cfg.data).lookup_table({i: n for n, i in CITYSCAPES_IDS.items()})
    for path in tree.root.glob("labels/*.png"):
        Image.fromarray(table[np.array(Image.open(path))]).save(path)
    with pytest.raises(UserError, match=r"label ids of another numbering: .*%.*train ids.*5 labels of data\.source"):
        check_samples(build_dataset(wrong.data.source, class_set(cfg.data)), "source", wrong)


def test_one_image_that_fills_the_crop_is_enough(configure, tmp_path):
    given = (
        "data.target.split=all",
        "data.target.format=folder",
        "data.target.images=['*.png']",
        f"data.target.root={tmp_path}",
    )
    sizes = ("data.base_width=100", "data.scale=[1,1]", "data.crop=[100,50]", "train.batch_target=1")
    cfg = configure("gta5_to_city", "stage1_BPL.yml", tmp_path / "runs", *given, *sizes)

    def check():
        target = build_dataset(cfg.data.target, class_set(cfg.data), False, RandomScaleCropFlip(cfg.data))
        return check_samples(target, "target", cfg)

    Image.new("RGB", (400, 60)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match=r"data\.crop=\[100, 50\] is larger than the images .*: 400x60 .* is 100x15"):
        check()
    cfg.data.target.size = [200, 200]  # what crops are taken of, whatever the file's own shape
    check()
    cfg.data.target.size = []
    Image.new("RGB", (58, 58)).save(tmp_path / "small.png")  # 100x100 at scale 1
    check()
    cfg.data.target.size = [200, 20]
    with pytest.raises(UserError, match=r"larger than the images .*: 200x20 .* is 100x10"):
        check()


def test_a_broken_link_is_named_or_left_out(configure, copied, tmp_path):
    cfg, tree = configure("gta5_to_city", "stage1_BPL.yml", tmp_path / "runs"), copied("gta5")
    cfg.data.source.root = str(tree.root)
    image = sorted(tree.root.glob("images/*.png"))[0]
    image.unlink()
    image.symlink_to(tmp_path / "gone.png")
    dataset = build_dataset(cfg.data.source, class_set(cfg.data))
    with pytest.raises(UserError, match=f"{image}"):
        check_samples(dataset, "source", cfg)
    dataset.skips = True
    assert check_samples(dataset, "source", cfg) is dataset


def test_look_at_a_sample(trees):
    tree = trees["gta5"]
    (name, ids), path = next(iter(tree.ids.items())), tree.root / "labels/00001.png"
    found = sample_facts(Sample(tree.root / f"{name}.png", path, name))
    assert found["size"] == found["label_size"] == (96, 64) and not found["problems"] and not found["label_map"]
    assert found["ids"] == {int(i): int((ids == i).sum()) for i in np.unique(ids)} and found["stored"] == "P"


def test_a_size_that_changes_the_images_shape_is_told(configure, tmp_path):
    cfg = configure("gta5_to_city", "stage1_BPL.yml", tmp_path / "runs", "data.val.size=[64,96]")
    (note,) = check_samples(build_dataset(cfg.data.val, class_set(cfg.data)), "val", cfg).notes
    assert note.startswith("data.val: ") and note.endswith("are squeezed to size=[64, 96] (width, height)")
