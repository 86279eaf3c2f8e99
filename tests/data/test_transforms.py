"""Geometry moves image and label alike; views have the shapes and ranges that the networks expect."""

import numpy as np
import pytest
import torch

from data.taxonomy import IGNORE
from data.transforms import RandomScaleCropFlip, Views
from utils.config import ROOT, load_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def data_config(**changes):
    cfg = load_config(ROOT / "configs/stage1_BPL.yml").data
    for key, value in ({"base_width": 0, "crop": [64, 48]} | changes).items():
        setattr(cfg, key, value)
    return cfg


def painted(rng, height=80, width=120, block=10):
    """A label map in blocks, and an image that shows label k as the grey value k."""
    label = np.kron(rng.integers(0, 200, (height // block, width // block)), np.ones((block, block)))
    label = torch.from_numpy(label.astype(np.uint8))
    return label.expand(3, -1, -1), label


def mean_difference(image, label, down=0, right=0):
    """Between a grey image and a label map shifted by at most one pixel, where the map is known."""
    known = label != IGNORE
    label = label[: known.any(1).sum(), : known.any(0).sum()]
    height, width = label.shape
    shifted = label[1 + down : height - 1 + down, 1 + right : width - 1 + right]
    return (image[0, 1 : height - 1, 1 : width - 1].float() - shifted).abs().mean()


@pytest.mark.parametrize("scale", [[0.4, 0.9], [0.9, 1.1], [1.1, 2.5]])
def test_image_and_label_stay_aligned(scale):
    transform, rng = RandomScaleCropFlip(data_config(scale=scale)), np.random.default_rng(0)
    for draw in range(40):
        image, label = painted(rng)
        moved, moved_label = transform(image, label, np.random.default_rng(draw))
        assert moved.shape == (3, 48, 64) and moved_label.shape == (48, 64)
        assert moved.dtype == moved_label.dtype == torch.uint8
        aligned = mean_difference(moved, moved_label)
        for shift in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            assert aligned < mean_difference(moved, moved_label, *shift)
        # Block edges are blurred, at most three pixels in ten; blocks differ by 67 grey levels on average.
        assert aligned < 20
        assert torch.equal(moved, transform(image, label, np.random.default_rng(draw))[0])  # the generator decides


def test_flip_happens_as_often_as_asked():
    image, label = painted(np.random.default_rng(0))
    kept, flipped, half = (RandomScaleCropFlip(data_config(scale=[1, 1], crop=[120, 80], hflip=p)) for p in (0, 1, 0.5))
    assert torch.equal(kept(image, label, np.random.default_rng(0))[0], image)
    moved, moved_label = flipped(image, label, np.random.default_rng(0))
    assert torch.equal(moved, image.flip(-1)) and torch.equal(moved_label, label.flip(-1))
    times = sum(not torch.equal(half(image, label, np.random.default_rng(i))[0], image) for i in range(200))
    assert 70 < times < 130  # four standard deviations of a fair coin


def test_what_the_scaled_image_does_not_cover_is_ignored():
    image, label = painted(np.random.default_rng(0))
    transform = RandomScaleCropFlip(data_config(scale=[0.25, 0.25], hflip=1.0))
    moved, moved_label = transform(image + 1, label, np.random.default_rng(0))
    assert (moved_label[20:] == IGNORE).all() and (moved_label[:, 30:] == IGNORE).all()
    assert (moved_label[:20, :30] != IGNORE).all()
    assert (moved[:, 20:] == 0).all() and (moved[:, :, 30:] == 0).all() and (moved[:, :20, :30] > 0).all()


def test_crop_is_filled_where_the_scaled_image_is_larger():
    transform = RandomScaleCropFlip(data_config(scale=[1.0, 2.5]))
    label = torch.zeros(80, 120, dtype=torch.uint8)
    for draw in range(100):
        moved = transform(label.expand(3, -1, -1), label, np.random.default_rng(draw))[1]
        assert not (moved == IGNORE).any()


def test_scale_one_stands_for_the_base_width():
    label = torch.zeros(40, 60, dtype=torch.uint8)
    transform = RandomScaleCropFlip(data_config(base_width=48, scale=[1, 1]))
    moved = transform(label.expand(3, -1, -1), label, np.random.default_rng(0))[1]
    assert (moved == 0).sum() == 48 * 32  # 60x40 brought to width 48, aspect kept


def test_weak_view_is_the_normalised_image():
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    weak = Views(data_config(), MEAN, STD).weak(images)
    expected = (images.double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert weak.dtype == torch.float32
    torch.testing.assert_close(weak.double(), expected, rtol=0, atol=1e-5)  # float32 against float64


@pytest.mark.parametrize("view", ["strong", "distill"])
def test_strong_views_change_colours_and_stay_in_range(view):
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8).expand(8, -1, -1, -1)
    before = images.clone()
    torch.manual_seed(0)
    out = getattr(Views(data_config(cutout=0.0), (0,) * 3, (1,) * 3), view)(images)
    assert out.shape == images.shape and out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1
    assert len({image.numpy().tobytes() for image in out}) > 4  # each image has colours of its own
    assert torch.equal(images, before)


def test_views_are_equal_without_jitter():
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    views = Views(data_config(jitter=False), MEAN, STD)
    assert torch.equal(views.strong(images), views.weak(images))


def test_cutout_is_one_grey_hole_of_the_asked_size():
    images = torch.zeros(4, 3, 40, 60, dtype=torch.uint8)
    views = Views(data_config(cutout=0.25, randaugment=[1, 5]), (0,) * 3, (1,) * 3)
    views.randaugment = lambda image: image
    holes = views.distill(images)[:, 0] > 0
    for hole in holes:
        assert hole.any(1).sum() == 10 and hole.any(0).sum() == 15 and hole.sum() == 10 * 15
    assert len({hole.numpy().tobytes() for hole in holes}) > 1


@pytest.mark.parametrize("randaugment", [[2, 0], [2, 5], [2, 10], [0, 10]])
def test_every_strength_of_randaugment_works(randaugment):
    images = torch.randint(0, 256, (16, 3, 32, 48), dtype=torch.uint8)
    torch.manual_seed(0)
    views = Views(data_config(randaugment=randaugment, cutout=0.0), (0,) * 3, (1,) * 3)
    out = views.distill(images)
    assert out.isfinite().all()
    if randaugment[0] == 0:
        assert torch.equal(out, views.weak(images))
