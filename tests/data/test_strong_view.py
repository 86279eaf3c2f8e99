"""ProDA's strong view and ClassMix: images and labels move together."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from data import transforms
from data.taxonomy import IGNORE
from data.transforms import Views, class_mix
from utils.config import Config

HEIGHT, WIDTH = 48, 96


def grid():
    """Label blocks, and an image whose channels are the block's number: they agree wherever both are shown."""
    rows, columns = torch.arange(HEIGHT)[:, None] // 12, torch.arange(WIDTH)[None] // 12
    label = (rows * 8 + columns).byte()
    return label.expand(3, -1, -1).clone() * 4 + 4, label


@pytest.mark.parametrize("kind", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("v", [-0.9, 0.1, 0.9])
def test_geometry_moves_image_and_label_alike(kind, v):
    """Ramps: bilinear sampling keeps them, so the image says within half a pixel where the label must be from."""
    for ramp in (torch.arange(HEIGHT)[:, None].expand(-1, WIDTH), torch.arange(WIDTH).expand(HEIGHT, -1)):
        image, label = transforms._moved((2 * ramp).byte().expand(3, -1, -1), ramp.byte(), kind, v)
        shown = (label != IGNORE).float()[None]
        inside, outside = (-F.max_pool2d(-x, 3, 1) > 0 for x in (shown, 1 - shown))  # at the seam, grey is mixed in
        image, label = image[:, 1:-1, 1:-1], label[1:-1, 1:-1]
        assert (image / 2 - label)[inside.expand(3, -1, -1)].abs().max() <= 0.75  # 1/4 by rounding
        assert (image[outside.expand(3, -1, -1)] == transforms.GREY).all()
        assert inside.float().mean() > 0.35 and (v == 0.1 or outside.any())


@pytest.mark.parametrize(
    ("kind", "v", "column", "row"), [("translate_x", 0.5, 0.15 * WIDTH, 0), ("translate_y", -0.5, 0, -0.15 * HEIGHT)]
)
def test_translation_is_three_tenths_of_the_side(kind, v, column, row):
    image, label = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8), torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    _, moved = transforms._moved(image, label, kind, v)
    assert (moved == IGNORE).sum() == pytest.approx(abs(column) * HEIGHT + abs(row) * WIDTH, rel=0.1)


def test_rotation_is_thirty_degrees():
    image, label = grid()
    turned, _ = transforms._moved(image, label, "rotate", 1.0)
    how = {"interpolation": InterpolationMode.BILINEAR, "fill": transforms.GREY}
    assert any(torch.equal(turned, TF.rotate(image, angle, **how)) for angle in (30.0, -30.0))


@pytest.mark.parametrize("kind", ["shear_x", "shear_y"])
def test_shear_is_three_tenths(kind):
    """A border through the middle is moved by 0.3 pixels for each pixel away from the corner."""
    across = kind == "shear_x"
    length, along = (WIDTH, HEIGHT) if across else (HEIGHT, WIDTH)
    label = (torch.arange(length) >= length // 2).byte().expand(along, length)
    label = label if across else label.T
    image = label.expand(3, -1, -1).clone()
    _, moved = transforms._moved(image, label.clone(), kind, 0.5)
    lines = moved if across else moved.T
    distance = along // 2
    border = (lines[distance] == 1).nonzero()[0].item()
    assert abs(border - length // 2) == pytest.approx(0.15 * distance, abs=1.1)  # whole pixels, centres at 1/2


def test_half_of_the_operations_are_left_out_and_strengths_end_below_the_magnitude(monkeypatch):
    strengths = []
    monkeypatch.setattr(transforms, "_COLOURS", (lambda image, v: strengths.append(v) or image,))
    image, label = grid()
    torch.manual_seed(0)
    transforms._randaugmented(image, label, 2000, 10, False)
    assert 900 < len(strengths) < 1100
    assert sorted(set(strengths)) == [s / 10 for s in range(1, 10)]


@pytest.mark.parametrize("v", [0.1, 0.9])
def test_colour_operations_reach_the_released_strengths(v):
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [
        image,
        TF.autocontrast(image),
        TF.equalize(image),
        TF.posterize(image, {0.1: 4, 0.9: 7}[v]),
        TF.solarize(image, {0.1: 231, 0.9: 26}[v]),
        TF.adjust_sharpness(image, {0.1: 0.14, 0.9: 0.86}[v]),
        TF.adjust_brightness(image, {0.1: 0.14, 0.9: 0.86}[v]),
        TF.adjust_contrast(image, {0.1: 0.14, 0.9: 0.86}[v]),
        TF.adjust_saturation(image, {0.1: 0.14, 0.9: 0.86}[v]),
    ]
    found = [operation(image, v) for operation in transforms._COLOURS]
    assert len(found) + len(transforms._GEOMETRY) == 14  # ProDA's pool
    for here, there in zip(found, expected, strict=True):
        assert torch.equal(here, there)


def test_released_view_holds_labels_to_the_image():
    data = dataclasses.replace(Config().data, strong_geometry=True, cutout=1 / 3, randaugment=[0, 10])
    views = Views(data, (0.0,) * 3, (1.0,) * 3)
    images, labels = (x[None].repeat(64, *[1] * x.dim()) for x in grid())
    torch.manual_seed(0)
    out, seen = views.distill(images, labels)
    out = (out * 255).round()
    hidden = seen == IGNORE
    side = round(min(HEIGHT, WIDTH) / 3)
    assert hidden.sum((1, 2)).max() == side**2 and hidden.sum((1, 2)).min() < side**2  # cut off at the border
    assert (out[:, 0][hidden] == 127).all() and (out[:, 0][~hidden] == seen[~hidden] * 4 + 4).all()
    mirrored = (seen[:, 0, 0] != labels[0, 0, 0]) & ~hidden[:, 0, 0]
    assert 10 < mirrored.sum() < 54


def test_class_mix_pastes_half_the_classes_with_their_labels():
    torch.manual_seed(0)
    source = torch.full((1, 3, 8, 8), 9, dtype=torch.uint8)
    source_labels = torch.arange(4, dtype=torch.uint8).repeat_interleave(2)[None, :, None].repeat(1, 1, 8)
    source_labels[0, 0] = IGNORE
    images, labels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 7, dtype=torch.uint8)
    mixed, mixed_labels, pasted = class_mix(source, source_labels, images, labels)
    for i in range(3):
        classes = mixed_labels[i][pasted[i]].unique()
        assert len(classes) == 2 and IGNORE not in classes
        assert torch.equal(pasted[i], torch.isin(source_labels[0], classes))
        assert (mixed[i][:, pasted[i]] == 9).all() and (mixed[i][:, ~pasted[i]] == 0).all()
        assert (mixed_labels[i][~pasted[i]] == 7).all()
    assert len({tuple(mixed_labels[i][pasted[i]].unique().tolist()) for i in range(3)}) > 1  # each draws its own
