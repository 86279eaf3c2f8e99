"""Thresholds of pseudo labels, and how they become the target's labels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data import pseudo_labels as store
from data.datasets import build_dataset, fingerprint
from data.taxonomy import CLASS_SETS, IGNORE
from utils.config import UserError
from utils.config.keys import DatasetConfig


@pytest.fixture
def histogram():
    """A sure class, an unsure one, one of few pixels, one never predicted."""
    rng, rows = np.random.default_rng(0), np.zeros((4, 256), np.int64)
    for row, levels in zip(rows, (rng.integers(200, 256, 5000), rng.integers(40, 160, 3000), rng.integers(90, 256, 7))):
        np.add.at(row, levels, 1)
    return rows


def kept(histogram, limits):
    return np.array([counts[limit:].sum() for counts, limit in zip(histogram, limits)])


def test_constant_threshold(histogram):
    limits = store.level_limits(histogram, 0.8, "constant", 0.66)
    assert limits.tolist() == [204] * 4  # 0.8 of 255
    assert store.level_limits(histogram, 0.95, "constant", 0.66).tolist() == [243] * 4  # 242.25, rounded up
    assert store.level_limits(histogram, 0.0, "constant", 0.66).tolist() == [0] * 4


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.66, 1.0])
def test_class_balanced_threshold(histogram, keep):
    constant = store.level_limits(histogram, 0.95, "constant", keep)
    limits = store.level_limits(histogram, 0.95, "class_balanced", keep)
    assert (limits <= constant).all()
    total = histogram.sum(1)
    assert (kept(histogram, limits) >= keep * total).all()
    # As high as that allows: one level more would keep too little, or be above the constant threshold.
    one_more = kept(histogram, limits + 1) < keep * total
    assert (one_more | (limits == constant))[total > 0].all()
    if keep == 0.66:
        assert limits[1] < 160 and kept(histogram, constant)[1] == 0  # the unsure class would have vanished


@pytest.mark.parametrize("selection", ["constant", "class_balanced"])
def test_what_is_dropped_is_what_was_counted(tmp_path, selection):
    rng, shape, names = np.random.default_rng(0), (40, 50), ("a", "b/c")
    maps = {name: rng.integers(3, size=shape) for name in names}
    levels = {name: (rng.random(shape) * (100, 180)[i]).astype(np.uint8) for i, name in enumerate(names)}
    counts = np.zeros((3, 256), np.int64)
    for name, labels in maps.items():
        np.add.at(counts, (labels, levels[name]), 1)
        store.write_png(store.path_of(tmp_path, "labels", name), labels.astype(np.uint8))
        store.write_png(store.path_of(tmp_path, "confidence", name), levels[name])
    limits = store.level_limits(counts, 0.5, selection, 0.5)
    store.drop_unsure(tmp_path, names, limits)
    said, pixels = store.statistics(counts, limits, ["x", "y", "z"], 0.5, 0.7)["classes"], np.zeros(3, int)
    for name, labels in maps.items():
        written = np.array(Image.open(store.path_of(tmp_path, "labels", name)))
        np.testing.assert_array_equal(written, np.where(levels[name] >= limits[labels], labels, IGNORE))
        pixels += [(written == k).sum() for k in range(3)]
    assert pixels.tolist() == [c["kept"] for c in said.values()] and (pixels > 0).all()
    assert pixels.sum() < sum(c["predicted"] for c in said.values()) == 2 * 40 * 50


def test_attached_labels_are_train_ids_as_they_stand(trees, tmp_path):
    section = {"size": [], "images": [], "labels": "", "strip": "", "id_map": {}} | trees["cityscapes"].section
    target = build_dataset(DatasetConfig(**section), CLASS_SETS["cityscapes19"], with_labels=False)
    written = {}
    for i, sample in enumerate(target.samples):
        written[i] = np.random.default_rng(i).choice([0, 7, 18, IGNORE], (64, 96)).astype(np.uint8)
        store.write_png(store.path_of(tmp_path, "labels", sample.name), written[i])
    with pytest.raises(
        UserError, match=r"manifest\.json does not exist; make them with `python gen_pseudo_labels\.py name=test_\w+`"
    ):
        store.attach(target, tmp_path, CLASS_SETS["cityscapes19"])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        store.attach(target, tmp_path, CLASS_SETS["cityscapes19"])
    manifest = {"classes": dict.fromkeys(CLASS_SETS["cityscapes19"].names)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"are of other images \(None, not 5 images"):
        store.attach(target, tmp_path, CLASS_SETS["cityscapes19"])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"files": fingerprint(target.samples)}))
    store.attach(target, tmp_path, CLASS_SETS["cityscapes19"])
    for i, labels in written.items():
        np.testing.assert_array_equal(target[i]["label"], labels)
    store.path_of(tmp_path, "labels", target.samples[3].name).unlink()
    with pytest.raises(UserError, match=f"1 of 5 pseudo labels are missing .* first {target.samples[3].name}"):
        store.attach(target, tmp_path, CLASS_SETS["cityscapes19"])


def test_threshold_is_compared_before_rounding():
    threshold = 0.95  # 242.25 of 255
    confidence = torch.tensor([0.0, 0.3, 0.9499, 0.94999, 0.95, 0.9501, 0.9999, 1.0])
    levels = store.confidence_levels(confidence, threshold)
    limit = store.level_limits(np.zeros((1, 256), np.int64), threshold, "constant", 0.5)
    assert ((levels.numpy() >= limit) == (confidence >= threshold).numpy()).all()
    assert levels.tolist()[:2] == [0, 76] and levels[-1] == 255
    assert store.thresholds_of(limit, threshold) == [threshold]


def test_threshold_of_a_class_is_the_one_used():
    confidence = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) ** 2
    levels = store.confidence_levels(confidence, 0.95)
    limits = store.level_limits(np.bincount(levels.numpy(), minlength=256)[None], 0.95, "class_balanced", 0.5)
    (used,) = store.thresholds_of(limits, 0.95)
    assert used < 0.5 and ((levels.numpy() >= limits) == (confidence >= used).numpy()).all()


def test_full_disk_is_one_line(tmp_path):
    (tmp_path / "x.png").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"^cannot write .*x\.png: No space left on device$"):
        store.write_png(tmp_path / "x.png", np.zeros((64, 64), np.uint8))
