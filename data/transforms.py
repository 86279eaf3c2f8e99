"""Random geometry on the CPU, on uint8; colour and normalisation on the device, a batch at a time.

One crop serves every view: *weak* is the crop normalised, *strong* is colour-jittered first (warm-up, BPL, PST),
*distill* goes through RandAugment and cutout (distillation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.taxonomy import IGNORE
from utils.config.keys import DataConfig

GREY = 127  # of what distillation's strong view hides or does not cover (as ProDA has it)


@dataclass(frozen=True)
class Crop:
    """Parameters of a crop of a scaled and mirrored image. Only the cropped region is resampled."""

    scaled: tuple[int, int]  # (width, height) of the whole image after scaling
    left: int  # whole pixels of the scaled image, as top
    top: int
    size: tuple[int, int]  # (width, height) of the crop; beyond a smaller image, the rest lies at the right and below
    flip: bool  # whether the crop is mirrored

    @property
    def covered(self) -> tuple[int, int]:
        """(width, height) of the part of the crop that the scaled image covers."""
        return min(self.scaled[0], self.size[0]), min(self.scaled[1], self.size[1])

    @property
    def depth(self) -> float:
        """Share of an image's height, from the top, that the crop needs."""
        return (self.top + self.covered[1] + 1) / self.scaled[1]  # the filter reaches one pixel further

    def of_image(self, picture: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """RGB picture of any size -> uint8 (3, H, W), black where not covered.

        `size` is the whole picture's (width, height); `picture` may hold only its rows down to `depth`.

        Equal to scaling the whole picture (bilinear, antialiased) and then cropping: the box has fractions of a pixel,
        and the filter sees the picture beyond it.
        """
        width, height = self.covered
        x, y = (side / scaled for side, scaled in zip(size or picture.size, self.scaled))
        box = (self.left * x, self.top * y, (self.left + width) * x, (self.top + height) * y)
        part = picture.resize((width, height), Image.Resampling.BILINEAR, box)
        if self.flip:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out = torch.zeros(3, *self.size[::-1], dtype=torch.uint8)
        out[:, :height, :width] = F.pil_to_tensor(part)
        return out

    def of_label(self, ids: np.ndarray, train_ids: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        """Label ids (H, W) of any size -> train ids uint8 (H, W), `IGNORE` where not covered; nearest neighbour.

        `train_ids` maps the label ids of the crop alone to train ids.
        """
        (width, height), (rows, columns) = self.covered, ids.shape
        # Pixel i of n has its centre at (i + 1/2) / n of the way; in integers, so that no rounding moves one.
        row = (2 * np.arange(self.top, self.top + height) + 1) * rows // (2 * self.scaled[1])
        column = (2 * np.arange(self.left, self.left + width) + 1) * columns // (2 * self.scaled[0])
        out = torch.full(self.size[::-1], IGNORE, dtype=torch.uint8)
        part = ids[row][:, column[::-1] if self.flip else column]
        out[:height, :width] = torch.from_numpy(train_ids(part))
        return out


class RandomScaleCropFlip:
    """Draws crops: a random scale, a random place, a random mirror.

    As released: width = U(scale) * base_width, aspect kept; then a crop anywhere in the scaled image; then a mirror
    with probability hflip. A scaled image that is smaller than the crop is taken whole.
    """

    def __init__(self, cfg: DataConfig):
        self.base_width, self.scale, self.crop, self.hflip = cfg.base_width, cfg.scale, cfg.crop, cfg.hflip

    def __call__(self, size: Sequence[int], rng: np.random.Generator) -> Crop:
        """A crop of an image of (width, height)."""
        factor = rng.uniform(*self.scale) * (self.base_width or size[0]) / size[0]
        scaled = tuple(max(1, round(side * factor)) for side in size)
        left, top = (int(rng.integers(max(0, s - c) + 1)) for s, c in zip(scaled, self.crop))
        return Crop(scaled, left, top, tuple(self.crop), rng.random() < self.hflip)


class Views:
    """Network inputs from uint8 batches, on the batch's device.

    Random numbers are drawn on the host. Nothing here waits for the GPU, except RandAugment's sharpness and geometry,
    which copy a filter and a matrix.

    Args:
        cfg: strengths of the strong view.
        mean, std: per-channel input statistics of the network, for images in [0, 1].
    """

    def __init__(self, cfg: DataConfig, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std, self.cutout = mean, std, cfg.cutout
        ranges = [[-cfg.jitter_hue, cfg.jitter_hue], *[cfg.jitter_factor] * 3]
        self.jitter = torch.tensor(ranges) if cfg.jitter else None  # of hue, brightness, contrast, saturation
        self.randaugment, self.geometry = cfg.randaugment, cfg.strong_geometry
        self.change_colours = _jittered

    def compile(self) -> None:
        """torch.compile of the strong view: a few passes over memory in place of a hundred."""
        self.change_colours = torch.compile(_jittered)

    def weak(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32, normalised."""
        return _normalize(images.float().div_(255), self.mean, self.std)

    def strong(self, images: Tensor) -> Tensor:
        """As `weak`, after hue, brightness, contrast and saturation are changed in this order (as released).

        Amounts are drawn for each image, uniformly from their ranges.
        """
        if self.jitter is None:
            return self.weak(images)
        low, high = self.jitter[:, :, None, None, None, None].unbind(1)
        amounts = low + (high - low) * torch.rand(4, len(images), 1, 1, 1)
        return self.change_colours(images, amounts.to(images.device, non_blocking=True), self.mean, self.std)

    def distill(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `weak`, after RandAugment and cutout; with `data.strong_geometry` also mirrored (ProDA's strong view).

        Args:
            labels: uint8 (N, H, W).

        Returns:
            The view, and labels that follow its geometry, `IGNORE` where the image is uncovered or hidden.
        """
        views, kept = torch.empty_like(images), torch.empty_like(labels)
        for image, label, view, ids in zip(images, labels, views, kept):
            if self.geometry and torch.rand(()) < 0.5:
                image, label = image.flip(-1), label.flip(-1)
            image, label = _randaugmented(image, label, *self.randaugment, self.geometry)
            view.copy_(image)
            ids.copy_(label)
            if self.cutout:
                hole = self._hole(*label.shape)
                view[:, *hole] = GREY
                ids[hole] = IGNORE
        return self.weak(views), kept

    def _hole(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of a square hole around a random pixel (as released).

        At the top and left, it is shifted inside; at the bottom and right, it is cut off.
        """
        side = round(self.cutout * min(height, width))
        top, left = (max(0, int(torch.randint(length, ())) - side // 2) for length in (height, width))
        return slice(top, top + side), slice(left, left + side)


def renormalize(images: Tensor, before: nn.Module, after: nn.Module) -> Tensor:
    """Float (N, 3, H, W), normalised for network `before` -> normalised for network `after`."""
    if (tuple(before.mean), tuple(before.std)) == (tuple(after.mean), tuple(after.std)):
        return images
    mean = np.subtract(after.mean, before.mean) / before.std
    return _normalize(images.clone(), mean.tolist(), np.divide(after.std, before.std).tolist())


def _normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """In place. torchvision's call copies the statistics to the device every time, and waits for it."""
    for channel, m, s in zip(images.unbind(1), mean, std):
        channel.sub_(m).div_(s)
    return images


def _jittered(images: Tensor, amounts: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (N, 3, H, W) after torchvision's `adjust_*` with each image's own amounts, (4, N, 1, 1, 1); normalised.

    torchvision's functions take one amount for all images, and one call an image keeps a GPU waiting for the host.
    """
    hue, brightness, contrast, saturation = amounts.unbind(0)
    images = _turn_hue(images.float().div_(255), hue[:, 0]).mul_(brightness).clamp_(max=1)
    grey = F.rgb_to_grayscale(images).mean((2, 3), keepdim=True)
    images.mul_(contrast).add_((1 - contrast) * grey).clamp_(0, 1)
    grey = F.rgb_to_grayscale(images)
    images.mul_(saturation).add_((1 - saturation) * grey).clamp_(0, 1)
    return _normalize(images, mean, std)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] with their HSV hues turned by shares (N, 1, 1) of the circle.

    The result of torchvision's `adjust_hue` for floats, with a third of its passes over memory. Hue runs from 0 to 6.
    Each channel is a wave of the hue with a flat top and bottom; the three waves lie a third of the circle apart.
    """
    red, green, blue = images.unbind(1)
    low, high = torch.aminmax(images, dim=1)
    chroma = high - low
    to_blue, to_red = (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    hue = torch.where(high == red, green - blue, torch.where(high == green, to_blue, to_red))
    hue.div_(chroma.clamp(min=1e-6))  # -1..5; of grey, whose chroma is 0, any hue will do
    out = torch.stack([hue + ((6 * turn + shift) % 6 - 6) for shift in (0, 4, 2)], 1)
    return out.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])


def class_mix(source: Tensor, source_labels: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Paste half the classes of source images, drawn at random, onto target images (ClassMix, DACS).

    Args:
        source, images: uint8 (M, 3, H, W) and (N, 3, H, W); target image i gets classes of source image i mod M.
        source_labels, labels: uint8 (M, H, W) and (N, H, W).

    Returns:
        Images and labels of the mix, and bool (N, H, W), which pixels are pasted.
    """
    of = torch.arange(len(images), device=images.device) % len(source)
    source, source_labels = source[of], source_labels[of]
    pixels = source_labels.flatten(1).long()
    present = torch.zeros(len(pixels), IGNORE + 1, dtype=torch.bool, device=pixels.device).scatter_(1, pixels, True)
    present[:, IGNORE] = False
    draw = torch.rand(present.shape).to(pixels.device, non_blocking=True)
    rank = draw.masked_fill(~present, 2).argsort(1).argsort(1)  # of each class in a random order; absent ones are last
    chosen = rank < (present.sum(1, keepdim=True) + 1) // 2
    pasted = chosen.gather(1, pixels).view(labels.shape)
    return source.where(pasted[:, None], images), source_labels.where(pasted, labels), pasted


# ProDA's pool, which is FixMatch's; `v` is 0.1 to 0.9 at magnitude 10.
_COLOURS = (
    lambda image, v: image,
    lambda image, v: F.autocontrast(image),
    lambda image, v: F.equalize(image),
    lambda image, v: F.posterize(image, 4 + int(4 * v)),
    lambda image, v: F.solarize(image, 256 - int(256 * v)),
    lambda image, v: F.adjust_sharpness(image, 0.05 + 0.9 * v),
    lambda image, v: F.adjust_brightness(image, 0.05 + 0.9 * v),
    lambda image, v: F.adjust_contrast(image, 0.05 + 0.9 * v),
    lambda image, v: F.adjust_saturation(image, 0.05 + 0.9 * v),
)
_GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def _moved(image: Tensor, label: Tensor, kind: str, v: float) -> tuple[Tensor, Tensor]:
    """A uint8 image (3, H, W), grey where it is uncovered, and its label (H, W), `IGNORE` there, after one operation.

    Up to 30 degrees, a shear of 0.3, or 0.3 of the side, bilinear (as ProDA has it); `v` is -1 to 1.
    """
    height, width = label.shape
    shear = math.degrees(math.atan(0.3 * v))
    change = {
        "rotate": {"angle": 30 * v},
        "shear_x": {"shear": [shear, 0.0], "center": [0, 0]},
        "shear_y": {"shear": [0.0, shear], "center": [0, 0]},
        "translate_x": {"translate": [int(0.3 * v * width), 0]},
        "translate_y": {"translate": [0, int(0.3 * v * height)]},
    }[kind]
    how = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | change
    label = F.affine(label[None], **how, interpolation=InterpolationMode.NEAREST, fill=IGNORE)[0]
    return F.affine(image, **how, interpolation=InterpolationMode.BILINEAR, fill=GREY), label


def _randaugmented(image: Tensor, label: Tensor, number: int, magnitude: int, geometry: bool) -> tuple[Tensor, Tensor]:
    """A uint8 image (3, H, W) and its label (H, W) after `number` operations, each drawn anew with a strength below
    `magnitude` (2..10), and left out half of the time (as ProDA has it)."""
    for _ in range(number):
        drawn = int(torch.randint(len(_COLOURS) + (len(_GEOMETRY) if geometry else 0), ()))
        strength = int(torch.randint(1, magnitude, ())) / 10
        if torch.rand(()) >= 0.5:
            continue
        if drawn < len(_COLOURS):
            image = _COLOURS[drawn](image, strength)
        else:
            sign = 1 if torch.rand(()) < 0.5 else -1
            image, label = _moved(image, label, _GEOMETRY[drawn - len(_COLOURS)], sign * strength)
    return image, label
