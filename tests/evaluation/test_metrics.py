"""Scores against computations by hand."""

import math

import pytest
import torch

from data.taxonomy import CLASS_SETS, IGNORE, custom_class_set
from utils.evaluation.metrics import ConfusionMatrix, class_table, left_out_note

THREE = custom_class_set(["a", "b", "c"], [])


def confusion_of(classes, *pairs):
    confusion = ConfusionMatrix(len(classes))
    for prediction, label in pairs:
        confusion.update(torch.tensor([prediction]), torch.tensor([label], dtype=torch.uint8))
    return confusion


def test_scores_by_hand():
    confusion = confusion_of(THREE, ([0, 0, 1, 1], [0, 1, 1, IGNORE]), ([2, 2, 2, 0], [0, 0, 2, IGNORE]))
    assert confusion.counts.tolist() == [[1, 0, 2], [1, 1, 0], [0, 0, 1]]  # true by predicted
    assert confusion.counts.dtype == torch.int64
    scores = confusion.scores(THREE)
    assert scores["iou"] == pytest.approx({"a": 100 / 4, "b": 100 / 2, "c": 100 / 3})
    assert scores["miou"] == pytest.approx((25 + 50 + 100 / 3) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(100 * 3 / 6)
    assert scores["pixels"] == {"a": 3, "b": 2, "c": 1}
    assert scores["accuracy"] == pytest.approx({"a": 100 / 3, "b": 50, "c": 100})
    assert scores["macc"] == pytest.approx((100 / 3 + 50 + 100) / 3)
    assert scores["confusion"] == [[1, 0, 2], [1, 1, 0], [0, 0, 1]]


def test_counting_leaves_the_labels_alone():
    label = torch.tensor([0, 2, IGNORE])
    ConfusionMatrix(3).update(torch.tensor([1, 2, 0]), label)
    assert label.tolist() == [0, 2, IGNORE]


def test_class_without_pixels_is_left_out_and_a_false_one_is_zero():
    scores = confusion_of(THREE, ([0, 0], [0, 0])).scores(THREE)
    assert scores["iou"] == {"a": 100, "b": None, "c": None} and scores["miou"] == 100
    assert scores["left_out"] == ["b", "c"] and left_out_note(scores) == "mIoU over 1 of 3 classes: no pixel of b, c"
    scores = confusion_of(THREE, ([0, 1], [0, 0])).scores(THREE)
    assert scores["iou"] == {"a": 50, "b": 0, "c": None} and scores["miou"] == 25
    assert scores["left_out"] == ["c"]  # b is predicted
    assert scores["accuracy"] == {"a": 50, "b": None, "c": None} and scores["macc"] == 50  # b is not in the labels
    assert math.isnan(confusion_of(THREE, ([0, 1], [IGNORE, IGNORE])).scores(THREE)["miou"])


def test_sixteen_and_thirteen_classes_from_one_model():
    sixteen = CLASS_SETS["cityscapes16"]
    labels = list(range(16))
    hit = [k if name not in ("wall", "fence", "pole") else 0 for k, name in enumerate(sixteen.names)]
    scores = confusion_of(sixteen, (hit, labels)).scores(sixteen)
    assert scores["iou"]["road"] == 25 and scores["iou"]["wall"] == 0  # road takes three pixels that are not its own
    assert scores["miou"] == scores["miou16"] == pytest.approx((25 + 12 * 100) / 16)
    assert scores["miou13"] == pytest.approx((25 + 12 * 100) / 13)


def test_class_table_names_iou_accuracy_and_pixels():
    sixteen = CLASS_SETS["cityscapes16"]
    lines = class_table(confusion_of(sixteen, ([0, 1, 0], [0, 1, 1])).scores(sixteen), sixteen).splitlines()
    rows = {line[:15].strip(): line[15:].split() for line in lines}
    assert rows["percent"] == ["IoU", "accuracy", "pixels"]
    assert rows["road"] == ["50.00", "100.00", "1"] and rows["sidewalk"] == ["50.00", "50.00", "2"]
    assert rows["sky"] == ["-", "-", "0"] and rows["mean"] == ["50.00", "75.00", "3"]
    assert rows["miou16"] == rows["miou13"] == ["50.00"] and rows["pixel accuracy"] == ["66.67"]
    assert lines[-1].startswith("mIoU over 2 of 16 classes")
