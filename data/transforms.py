"""Random geometry on the CPU, on uint8; colour and normalisation on the device, a batch at a time.

One crop serves both views: the *weak* view is the crop normalised, the *strong* view is colour-jittered first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.taxonomy import IGNORE
from utils.schema import DataConfig


class RandomScaleCropFlip:
    """Resize by a random scale, crop, mirror; image and label alike.

    As released: width = U(scale) * base_width, aspect kept, then a crop, then a mirror with probability hflip.
    The crop is taken before the resize, so that only pixels that end in it are resampled. Where the scaled
    image is smaller than the crop, the right and lower rest is black and `IGNORE`.
    """

    def __init__(self, cfg: DataConfig):
        self.base_width, self.scale, self.crop, self.hflip = cfg.base_width, cfg.scale, cfg.crop, cfg.hflip

    def __call__(self, image: Tensor, label: Tensor | None, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """uint8 image (3, H, W) and label (H, W) or None -> the same at crop size."""
        height, width = image.shape[1:]
        factor = rng.uniform(*self.scale) * (self.base_width or width) / width
        crop_w, crop_h = self.crop
        # The crop, or as much of it as the scaled image fills; then the same part in the image's own pixels.
        out_w, out_h = (max(1, min(c, round(s * factor))) for c, s in ((crop_w, width), (crop_h, height)))
        box_w, box_h = (max(1, min(s, round(o / factor))) for s, o in ((width, out_w), (height, out_h)))
        left, top = rng.integers(0, width - box_w + 1), rng.integers(0, height - box_h + 1)
        flip = rng.random() < self.hflip

        image = image[:, top : top + box_h, left : left + box_w]
        image = F.resize(image, [out_h, out_w], antialias=True)
        image = image.flip(-1) if flip else image
        padding = [0, 0, crop_w - out_w, crop_h - out_h]
        if label is not None:
            label = label[None, top : top + box_h, left : left + box_w]
            label = F.resize(label, [out_h, out_w], interpolation=InterpolationMode.NEAREST_EXACT)
            label = label.flip(-1) if flip else label
            label = F.pad(label, padding, fill=IGNORE)[0]
        return F.pad(image, padding), label


class Views:
    """Network inputs from uint8 batches, on the batch's device.

    Args:
        cfg: strengths of the strong view.
        mean, std: per-channel input statistics of the network, for images in [0, 1].
    """

    def __init__(self, cfg: DataConfig, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std, self.cutout = list(mean), list(std), cfg.cutout
        low, high = cfg.jitter_factor
        jitter = v2.ColorJitter((low, high), (low, high), (low, high), cfg.jitter_hue)
        self.jitter = jitter if cfg.jitter else v2.Identity()
        number, magnitude = cfg.randaugment
        self.randaugment = _randaugment(number, magnitude)

    def weak(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32, normalised."""
        return F.normalize(images.float().div_(255), self.mean, self.std)

    def strong(self, images: Tensor) -> Tensor:
        """As `weak`, each image with colours of its own."""
        return self.weak(torch.stack([self.jitter(image) for image in images]))

    def distill(self, images: Tensor) -> Tensor:
        """As `weak`, after RandAugment's colour operations and cutout (ProDA's strong view); geometry stays."""
        out = torch.stack([self.randaugment(image) for image in images])
        if self.cutout:
            height, width = out.shape[2:]
            hole_h, hole_w = round(height * self.cutout), round(width * self.cutout)
            for image in out:
                top = int(torch.randint(height - hole_h + 1, ()))
                left = int(torch.randint(width - hole_w + 1, ()))
                image[:, top : top + hole_h, left : left + hole_w] = 127  # grey: about the mean after normalisation
        return self.weak(out)


def renormalize(images: Tensor, before: nn.Module, after: nn.Module) -> Tensor:
    """Float (N, 3, H, W) by the input statistics of one network -> by those of another."""
    if (tuple(before.mean), tuple(before.std)) == (tuple(after.mean), tuple(after.std)):
        return images
    mean = np.subtract(after.mean, before.mean) / before.std
    return F.normalize(images, mean.tolist(), np.divide(after.std, before.std).tolist())


def _randaugment(number: int, magnitude: int) -> v2.Transform:
    """RandAugment's colour operations (its geometric ones would part an image from its label).

    `number` operations in a row, each drawn anew; `magnitude` 0..10 scales their strength (FixMatch's ranges).
    """
    share = magnitude / 10
    factors = (1 - 0.95 * share, 1 + 0.9 * share)
    operations = [
        v2.Identity(),
        v2.RandomAutocontrast(1),
        v2.RandomEqualize(1),
        v2.RandomPosterize(8 - round(4 * share), 1),
        v2.RandomSolarize(255 - 127 * share, 1),
        v2.RandomAdjustSharpness(1 + 0.9 * share, 1),
        v2.ColorJitter(brightness=factors),
        v2.ColorJitter(contrast=factors),
        v2.ColorJitter(saturation=factors),
    ]
    return v2.Compose([v2.RandomChoice(operations) for _ in range(number)] or [v2.Identity()])
