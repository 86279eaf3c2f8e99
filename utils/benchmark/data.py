"""A training sample: this code beside the plain form that releases use, its parts, and several worker processes."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.datasets import SegmentationDataset, build_dataset
from data.images import read_label_ids, read_picture
from data.loaders import training_batches
from data.taxonomy import CLASS_SETS, IGNORE
from data.transforms import RandomScaleCropFlip, Views
from models.backbone import IMAGENET_MEAN, IMAGENET_STD
from utils.benchmark.timing import Timing, compare, report, seconds_of
from utils.config import Config
from utils.config.keys import DataConfig, DatasetConfig

SIZE = (1914, 1052)  # of GTA5's images
IDS = 35  # that its labels may hold
CPU = torch.device("cpu")
BATCHES, ROUNDS = 8, 3  # of the loaders


def write_pair(root: Path) -> None:
    """A GTA5 folder of one picture and its label map, as large as the real ones in pixels and, about, on disk."""
    rng, (width, height) = np.random.default_rng(0), SIZE
    pixels = rng.normal(110, 4, (height, width, 3))  # a sensor's noise, under detail of every size
    for grain in (4, 8, 16, 64, 256):
        coarse = rng.integers(0, 256, (height // grain + 2, width // grain + 2, 3)).astype(np.uint8)
        pixels += (np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)) - 128.0) / 4
    ids = rng.integers(0, IDS, (height // 32, width // 32)).astype(np.uint8)
    label = Image.fromarray(ids).resize(SIZE, Image.Resampling.NEAREST)
    for name, picture in (("images", Image.fromarray(pixels.clip(0, 255).astype(np.uint8))), ("labels", label)):
        (root / name).mkdir()
        picture.save(root / name / "00001.png")


def plain_sample(dataset: SegmentationDataset, cfg: DataConfig, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Weak and strong view float32 (3, H, W), and label int64 (H, W): everything is resized, then cropped, ids are
    mapped one after another, colours and statistics are changed on the CPU."""
    sample, jitter = dataset.samples[0], (tuple(cfg.jitter_factor),) * 3
    image, label = Image.open(sample.image).convert("RGB"), Image.open(sample.label)
    width = round(rng.uniform(*cfg.scale) * (cfg.base_width or image.width))
    size = (width, round(width * image.height / image.width))
    image, label = image.resize(size, Image.Resampling.BICUBIC), label.resize(size, Image.Resampling.NEAREST)
    left, top = (int(rng.integers(max(0, s - c) + 1)) for s, c in zip(size, cfg.crop))
    box = (left, top, left + cfg.crop[0], top + cfg.crop[1])
    image, label = image.crop(box), label.crop(box)
    if rng.random() < cfg.hflip:
        image, label = (p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in (image, label))
    ids = np.asarray(label)
    train_ids = np.full(ids.shape, IGNORE, np.float32)
    for i in range(IDS):
        train_ids[ids == i] = dataset.lookup_table[i]
    pictures = (image, v2.ColorJitter(*jitter, cfg.jitter_hue)(image))
    views = (F.to_dtype(F.pil_to_tensor(picture), torch.float32, scale=True) for picture in pictures)
    weak, strong = (F.normalize(view, IMAGENET_MEAN, IMAGENET_STD) for view in views)
    return weak, strong, torch.from_numpy(train_ids).long()


def run(cfg: Config, device: torch.device) -> None:
    """Print the tables; crop, scale and colours are those of the configuration, files are as large as GTA5's."""
    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder))
        section = DatasetConfig(**vars(cfg.data.source) | {"format": "gta5", "root": folder, "size": [*SIZE]})
        dataset = build_dataset(section, CLASS_SETS["cityscapes19"], transform=RandomScaleCropFlip(cfg.data))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker
        _one_sample(dataset, cfg.data)
        torch.set_num_threads(threads)
        _workers(dataset, cfg.train.batch_source)
    _strong_views(cfg, device)


def _one_sample(dataset: SegmentationDataset, cfg: DataConfig) -> None:
    views = Views(cfg, IMAGENET_MEAN, IMAGENET_STD)
    sample, transform = dataset.samples[0], dataset.transform
    picture, ids = read_picture(sample.image), read_label_ids(sample.label)
    some = dataset[0, 0]["image"][None]
    draws = [itertools.count() for _ in range(5)]  # the n-th call of each is of the same scale and place

    def rng(k: int) -> np.random.Generator:
        return np.random.default_rng([dataset.seed, next(draws[k]), 1])

    def decode() -> None:
        depth = transform(dataset.size, rng(4)).depth
        read_picture(sample.image, lambda _: depth), read_label_ids(sample.label)

    def crop() -> None:
        part = transform(dataset.size, rng(3))
        part.of_image(picture), part.of_label(ids, dataset.lookup_table.take)

    def both(images: Tensor) -> None:
        views.weak(images), views.strong(images)

    variants = {
        "plain, views included": lambda: plain_sample(dataset, cfg, rng(0)),
        "ours, views on the CPU": lambda: both(dataset[0, next(draws[1])]["image"][None]),
        "ours, a worker's share": lambda: dataset[0, next(draws[2])],
        "of it: decoding": decode,
        "of it: crop": crop,
        "views on the CPU": lambda: both(some),
    }
    report("sample, one process", compare(variants, CPU, 31), images=1)


def _workers(dataset: SegmentationDataset, batch: int) -> None:
    """Samples that processes deliver when nothing else happens."""

    def one_round(n: int) -> float:
        stream = training_batches(dataset, batch, n)  # ends with the round: its workers would go on reading ahead
        for _ in range(2 * n + 1):
            next(stream)  # what was read ahead
        return seconds_of(lambda: [next(stream) for _ in range(BATCHES)], CPU)

    seconds: dict[int, list[float]] = {n: [] for n in (0, 1, 2)}
    for n in [*seconds] * ROUNDS:
        seconds[n].append(one_round(n))
    names = {0: "no worker", 1: "1 worker", 2: "2 workers"}
    report("loader", {names[n]: Timing(s, 0) for n, s in seconds.items()}, images=BATCHES * batch)


def _strong_views(cfg: Config, device: torch.device) -> None:
    d, batch = cfg.data, cfg.train.batch_source
    images = torch.randint(0, 256, (batch, 3, *d.crop[::-1]), dtype=torch.uint8).to(device)
    views, jitter = Views(d, IMAGENET_MEAN, IMAGENET_STD), v2.ColorJitter(*(tuple(d.jitter_factor),) * 3, d.jitter_hue)

    def library() -> Tensor:
        out = torch.stack([jitter(image) for image in images])
        return F.normalize(out.float().div_(255), IMAGENET_MEAN, IMAGENET_STD)

    variants = {"torchvision": library, "ours": lambda: views.strong(images)}
    report(f"strong view {batch}x{d.crop[0]}x{d.crop[1]}", compare(variants, device), images=batch)
