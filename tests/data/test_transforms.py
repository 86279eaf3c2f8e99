"""Geometry moves image and label alike; views have the shapes and ranges that the networks expect."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, kstest
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data import transforms
from data.taxonomy import IGNORE
from data.transforms import Crop, RandomScaleCropFlip, Views
from utils.config import ROOT
from utils.engine.setup import checked_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = torch.arange(16, dtype=torch.uint8)[:, None, None].expand(16, 32, 48)


def data_config(**changes):
    cfg = checked_config(ROOT / "configs/stage1_BPL.yml").data
    for key, value in ({"base_width": 0, "crop": [64, 48]} | changes).items():
        setattr(cfg, key, value)
    return cfg


def pixels_of(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def photograph(rng, height=210, width=380):
    """Detail at every scale, hard edges, sensor noise; and ids of regions that follow the edges."""
    octaves = [rng.normal(size=(height // n + 2, width // n + 2, 3)) for n in (2, 4, 8, 16, 32, 64)]
    pixels = sum(
        np.stack([np.array(Image.fromarray(c).resize((width, height), 3)) for c in o.astype("f4").T.swapaxes(1, 2)], 2)
        * 10 * (i + 1) ** 0.7 for i, o in enumerate(octaves)
    )  # fmt: skip
    ids = (pixels[..., 0] // 25).astype(int) % 19
    shade = rng.integers(-50, 50, (19, 3))[ids]
    pixels = (pixels + shade + rng.normal(size=pixels.shape) * 4 + 120).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8)), ids.astype(np.uint8)


def painted(rng, height=80, width=120, block=10):
    """A label map in blocks, and a picture that shows label k as the grey value k."""
    label = np.kron(rng.integers(0, 200, (height // block, width // block)), np.ones((block, block)))
    label = label.astype(np.uint8)
    return Image.fromarray(label).convert("RGB"), label


def take(transform, picture, ids, seed):
    crop = transform(picture.size, np.random.default_rng(seed))
    return crop.of_image(picture), crop.of_label(ids, lambda x: x)


def resize_then_crop(crop, picture, ids):
    """The plain form: all of the image at the new scale, a part of it, mirrored, padded."""
    scaled, (width, height) = crop.scaled[::-1], crop.covered
    image = F.resize(pixels_of(picture), scaled, antialias=True)
    label = F.resize(torch.from_numpy(ids)[None], scaled, interpolation=InterpolationMode.NEAREST_EXACT)
    out = []
    for whole, fill in ((image, 0), (label, IGNORE)):
        part = F.crop(whole, crop.top, crop.left, height, width)
        part = part.flip(-1) if crop.flip else part
        out.append(F.pad(part, [0, 0, crop.size[0] - width, crop.size[1] - height], fill=fill))
    return out[0], out[1][0]


@pytest.mark.parametrize("scale", [[0.15, 0.3], [0.5, 1.5], [0.97, 1.03], [2.5, 4.0]])
def test_crop_is_what_resizing_the_whole_and_cropping_gives(scale):
    picture, ids = photograph(np.random.default_rng(0))
    transform, wrong = RandomScaleCropFlip(data_config(scale=scale, base_width=picture.width + 7, crop=[96, 64])), []
    for draw in range(25):
        crop = transform(picture.size, np.random.default_rng(draw))
        image, label = crop.of_image(picture), crop.of_label(ids, lambda x: x)
        plain, plain_label = resize_then_crop(crop, picture, ids)
        assert image.shape == (3, 64, 96) and label.shape == (64, 96) and image.dtype == label.dtype == torch.uint8
        difference = (image.float() - plain).abs()
        assert difference.mean() < 0.1 and difference.max() <= 2  # grey levels of 255: rounding alone
        wrong.append((label != plain_label).float().mean().item())
    # torchvision's coordinates are float32: where a centre falls on the border of two pixels, it may take the other.
    assert np.mean(wrong) < 0.002 and max(wrong) < 0.01


def test_crop_is_far_from_the_same_crop_half_a_pixel_aside():
    """What the bounds of the test above can tell apart."""
    picture, ids = photograph(np.random.default_rng(0))
    crop = Crop((570, 315), 100, 60, (96, 64), False)
    aside = Crop((1140, 630), 201, 120, (192, 128), False)
    plain, plain_label = resize_then_crop(crop, picture, ids)
    image, label = F.resize(aside.of_image(picture), [64, 96], antialias=True), aside.of_label(ids, lambda x: x)
    assert (image.float() - plain).abs().mean() > 2 and (label[::2, ::2] != plain_label).float().mean() > 0.02


@pytest.mark.parametrize(("base_width", "size"), [(2200, (1914, 1052)), (0, (1280, 760)), (480, (2048, 1024))])
def test_scale_offset_and_mirror_are_those_of_the_recipe(base_width, size):
    transform = RandomScaleCropFlip(data_config(base_width=base_width, scale=[0.5, 1.5], crop=[300, 200], hflip=0.3))
    crops = [transform(size, np.random.default_rng([5, draw, 1])) for draw in range(4000)]
    widths, heights = np.array([c.scaled for c in crops]).T
    scale = widths / (base_width or size[0])
    assert kstest(scale, "uniform", (0.5, 1.0)).pvalue > 0.01
    assert (abs(heights - widths * size[1] / size[0]) <= 1).all()  # both are rounded
    for start, side, part in (("left", widths, 300), ("top", heights, 200)):
        places = np.maximum(side - part, 0) + 1
        starts = np.array([getattr(c, start) for c in crops])
        assert ((starts >= 0) & (starts < places)).all()
        assert (starts[places == 1] == 0).all()
        many = places >= 40  # where a tenth of them is whole positions enough
        counts = np.bincount((10 * (starts + 0.5) / places)[many].astype(int), minlength=10)
        assert chisquare(counts).pvalue > 0.01
        assert starts[many].min() == 0 and (starts == places - 1)[many].any()  # both ends are reached
        assert abs(np.corrcoef(starts[many] / places[many], scale[many])[0, 1]) < 0.06  # independent of the scale
    flips = sum(c.flip for c in crops)
    assert abs(flips - 1200) < 4 * np.sqrt(4000 * 0.3 * 0.7)


def test_picture_and_label_of_other_sizes_than_the_nominal_one():
    """`size` names what the crop is drawn in; image and label are each resampled from their own pixels."""
    picture, ids = photograph(np.random.default_rng(0))
    large = np.kron(ids, np.ones((2, 3), np.uint8))
    crop = RandomScaleCropFlip(data_config(scale=[0.8, 1.2]))((400, 200), np.random.default_rng(1))
    assert torch.equal(crop.of_label(large, lambda x: x), crop.of_label(ids, lambda x: x))
    plain, plain_label = resize_then_crop(crop, picture, ids)
    assert (crop.of_image(picture).float() - plain).abs().max() <= 2
    assert (crop.of_label(ids, lambda x: x) != plain_label).float().mean() < 0.005


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (64, 48), (65, 48)])
@pytest.mark.parametrize("base_width", [0, 1, 2200])
def test_smallest_images(size, base_width):
    picture = Image.new("RGB", size, (9, 90, 200))
    transform = RandomScaleCropFlip(data_config(base_width=base_width))
    for draw in range(10):
        crop = transform(size, np.random.default_rng(draw))
        image, label = crop.of_image(picture), crop.of_label(np.full(size[::-1], 7, np.uint16), lambda x: x)
        width, height = crop.covered
        assert width >= 1 and height >= 1 and ((label == 7).sum() == width * height)
        assert (image[:, label == 7] == torch.tensor([[9], [90], [200]])).all() and (image[:, label != 7] == 0).all()


def test_only_the_ids_of_the_crop_are_mapped():
    ids, seen = np.arange(200 * 300, dtype=np.uint16).reshape(200, 300), []
    crop = Crop((300, 200), 20, 30, (64, 48), True)
    label = crop.of_label(ids, lambda part: seen.append(part) or (part % 251).astype(np.uint8))
    np.testing.assert_array_equal(seen[0], ids[30:78, 20:84][:, ::-1])
    np.testing.assert_array_equal(label, seen[0] % 251)


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
        picture, label = painted(rng)
        moved, moved_label = take(transform, picture, label, draw)
        aligned = mean_difference(moved, moved_label)
        for shift in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            assert aligned < mean_difference(moved, moved_label, *shift)
        # Block edges are blurred, at most three pixels in ten; blocks differ by 67 grey levels on average.
        assert aligned < 20
        assert torch.equal(moved, take(transform, picture, label, draw)[0])  # the generator decides


def test_flip_happens_as_often_as_asked():
    picture, label = painted(np.random.default_rng(0))
    image, mirrored = pixels_of(picture), torch.from_numpy(label).flip(-1)
    kept, flipped, half = (RandomScaleCropFlip(data_config(scale=[1, 1], crop=[120, 80], hflip=p)) for p in (0, 1, 0.5))
    assert torch.equal(take(kept, picture, label, 0)[0], image)
    moved, moved_label = take(flipped, picture, label, 0)
    assert torch.equal(moved, image.flip(-1)) and torch.equal(moved_label, mirrored)
    times = sum(not torch.equal(take(half, picture, label, i)[0], image) for i in range(200))
    assert 70 < times < 130  # four standard deviations of a fair coin


def test_what_the_scaled_image_does_not_cover_is_ignored():
    _, label = painted(np.random.default_rng(0))
    picture = Image.fromarray(label + 1).convert("RGB")
    transform = RandomScaleCropFlip(data_config(scale=[0.25, 0.25], hflip=1.0))
    moved, moved_label = take(transform, picture, label, 0)
    assert (moved_label[20:] == IGNORE).all() and (moved_label[:, 30:] == IGNORE).all()
    assert (moved_label[:20, :30] != IGNORE).all()
    assert (moved[:, 20:] == 0).all() and (moved[:, :, 30:] == 0).all() and (moved[:, :20, :30] > 0).all()


def test_crop_is_filled_where_the_scaled_image_is_larger():
    transform = RandomScaleCropFlip(data_config(scale=[1.0, 2.5]))
    for draw in range(100):
        moved = take(transform, Image.new("RGB", (120, 80)), np.zeros((80, 120), np.uint8), draw)[1]
        assert not (moved == IGNORE).any()


def test_scale_one_stands_for_the_base_width():
    transform = RandomScaleCropFlip(data_config(base_width=48, scale=[1, 1]))
    moved = take(transform, Image.new("RGB", (60, 40)), np.zeros((40, 60), np.uint8), 0)[1]
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
    views = Views(data_config(cutout=0.0), (0,) * 3, (1,) * 3)
    out = views.strong(images) if view == "strong" else views.distill(images, LABELS[:8])[0]
    assert out.shape == images.shape and out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1
    assert len({image.numpy().tobytes() for image in out}) > 4  # each image has colours of its own
    assert torch.equal(images, before)


def test_strong_view_is_torchvisions_operations_in_the_released_order(monkeypatch):
    images = torch.randint(0, 256, (6, 3, 32, 48), dtype=torch.uint8)
    images[0, :, :8], images[1, 1:, :8], images[2, 1] = 77, 0, images[2, 0]  # grey, pure red, two equal channels
    images[3] = torch.tensor([0, 255])[torch.randint(0, 2, (3, 32, 48))]
    jittered, drawn = transforms._jittered, []
    monkeypatch.setattr(transforms, "_jittered", lambda x, a, *given: drawn.append(a) or jittered(x, a, *given))
    torch.manual_seed(0)
    for _ in range(5):
        out = Views(data_config(jitter_hue=0.5), (0,) * 3, (1,) * 3).strong(images)
        for image, view, amounts in zip(images, out, zip(*drawn.pop())):
            expected = image.double() / 255
            for change, amount in zip(("hue", "brightness", "contrast", "saturation"), amounts, strict=True):
                expected = getattr(F, f"adjust_{change}")(expected, amount.item())
            torch.testing.assert_close(view.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{"jitter_hue": 0.0}, {"jitter_factor": [1.0, 1.0]}])
def test_parts_of_the_jitter_can_be_off(changes):
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    torch.manual_seed(0)
    out = Views(data_config(**changes), (0,) * 3, (1,) * 3).strong(images)
    assert out.isfinite().all() and not torch.equal(out, images / 255)


def test_views_are_equal_without_jitter():
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    views = Views(data_config(jitter=False), MEAN, STD)
    assert torch.equal(views.strong(images), views.weak(images))


def test_cutout_is_one_square_grey_hole_that_the_border_may_cut():
    images, labels = torch.zeros(32, 3, 40, 60, dtype=torch.uint8), torch.full((32, 40, 60), 3, dtype=torch.uint8)
    torch.manual_seed(0)
    cfg = data_config(cutout=0.25, randaugment=[0, 5], strong_geometry=False)
    out, seen = Views(cfg, (0,) * 3, (1,) * 3).distill(images, labels)
    holes = out[:, 0] > 0
    sides = [(hole.any(1).sum().item(), hole.any(0).sum().item()) for hole in holes]
    assert all(hole.sum() == rows * columns for hole, (rows, columns) in zip(holes, sides))
    assert max(sides) == (10, 10) and all(5 <= side <= 10 for pair in sides for side in pair)  # of 40 x 0.25
    assert torch.equal(seen == IGNORE, holes) and (seen[~holes] == 3).all() and (labels == 3).all()
    assert len({hole.numpy().tobytes() for hole in holes}) > 16


@pytest.mark.parametrize("randaugment", [[2, 2], [2, 5], [2, 10], [0, 0]])
def test_every_strength_of_randaugment_works(randaugment):
    images = torch.randint(0, 256, (16, 3, 32, 48), dtype=torch.uint8)
    torch.manual_seed(0)
    cfg = data_config(randaugment=randaugment, cutout=0.0, strong_geometry=False)
    views = Views(cfg, (0,) * 3, (1,) * 3)
    out, labels = views.distill(images, LABELS)
    assert out.isfinite().all() and torch.equal(labels, LABELS)
    unchanged = [torch.equal(*pair) for pair in zip(out, views.weak(images))]
    assert all(unchanged) if randaugment[0] == 0 else 0 < sum(unchanged) < len(unchanged)
