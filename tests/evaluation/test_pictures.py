"""Panels: the colours of the class set, in the order of the captions."""

import numpy as np
import torch
from PIL import Image

from data.loaders import spread
from data.taxonomy import IGNORE, custom_class_set
from utils.evaluation.pictures import Gallery, Worst, colorize, save_panel

CLASSES = custom_class_set(["a", "b"], [[10, 20, 30], [40, 50, 60]])


def test_colours_of_a_label_map():
    label = torch.tensor([[0, 1, IGNORE]], dtype=torch.uint8)
    assert colorize(label, CLASSES).tolist() == [[[10, 20, 30], [40, 50, 60], [0, 0, 0]]]


def test_gallery_saves_image_prediction_and_truth_side_by_side(tmp_path):
    gallery = Gallery([1, 3], CLASSES)
    for index in range(5):
        image = torch.full((3, 8, 16), 50 * index, dtype=torch.uint8)
        gallery(index, image, torch.zeros(8, 16, dtype=torch.long), torch.ones(8, 16, dtype=torch.uint8))
    sheet = gallery.save(tmp_path / "panels" / "x.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "panels" / "x.png")), sheet)
    height, width = sheet.shape[:2]
    rows = [sheet[y] for y in (height // 2 - 40, height - 40)]  # inside the first and the second picture
    for row, grey in zip(rows, (50, 150)):
        assert [row[int(width * x)].tolist() for x in (1 / 6, 1 / 2, 5 / 6)] == [[grey] * 3, [10, 20, 30], [40, 50, 60]]


def test_a_panel_of_lines(tmp_path):
    sheet = save_panel(
        tmp_path / "x.png", [[np.zeros((2, 1400, 3), np.uint8)], [np.zeros((1400, 2, 3), np.uint8)]], ["a"]
    )
    assert 1 + 1280 < len(sheet) < 1400


def test_worst_images_are_kept_the_worst_first(tmp_path):
    worst, image = Worst(2, [*"abcd", "caf\udce9"], CLASSES), torch.zeros(3, 8, 16, dtype=torch.uint8)
    right = [128, 32, 0, 96, 64]  # pixels
    for index, count in enumerate(right):
        prediction = torch.where(torch.arange(128).view(8, 16) < count, 0, 1).byte()
        label = torch.full((8, 16), IGNORE if index == 2 else 0, dtype=torch.uint8)  # nothing to be wrong about
        worst(index, image, prediction, label)
    assert list(worst.scores.values()) == [
        {"image": "b", "miou": 12.5, "pixel_accuracy": 25},  # the class that is not there has IoU 0
        {"image": r"caf\xe9", "miou": 25, "pixel_accuracy": 50},  # a file name that is not UTF-8
    ]
    assert list(worst.shown) == [1, 4] and worst.save(tmp_path / "worst.png").shape[2] == 3
    nothing = Worst(0, ["a"], CLASSES)
    nothing(0, image, prediction, torch.zeros(8, 16, dtype=torch.uint8))
    assert not nothing.shown


def test_spread_is_even_without_the_ends():
    assert spread(500, 4) == [62, 187, 312, 437]
    assert spread(3, 8) == [0, 1, 2] and spread(7, 0) == []
