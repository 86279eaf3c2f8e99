"""Predictions of whole images: forward passes, class maps at image size, scores of a dataset."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from data.datasets import SegmentationDataset
from data.loaders import whole_images
from data.taxonomy import class_set
from models.deeplab import upsampled_rows
from models.prediction import normalized
from utils.config import Config, UserError, out_of_memory
from utils.engine import distributed
from utils.engine.log import progress
from utils.evaluation.metrics import ConfusionMatrix


def default_precision(device: torch.device) -> str:
    """The value that `train.precision=auto` stands for: half precision where the device supports it natively."""
    if device.type != "cuda":
        return "bfloat16" if _cpu_computes_bfloat16() else "float32"
    with torch.cuda.device(device):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def _cpu_computes_bfloat16() -> bool:
    """Whether the CPU has AVX512_BF16, AMX or Arm's BF16 instructions, and oneDNN, which uses them: else bfloat16 is
    slower than float32."""
    found = torch.cpu.get_capabilities() if torch.backends.mkldnn.is_available() else {}
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Forward passes in `precision`, a value of `train.precision`; losses cast to float32 themselves."""
    precision = default_precision(device) if precision == "auto" else precision
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    return torch.autocast(device.type, half, enabled=half is not None)


class View(NamedTuple):
    """The network's output for one part of the images."""

    logits: Tensor  # float32 (N, K, h, w)
    rows: slice  # of the images, that the network saw
    columns: slice
    mirrored: bool  # whether it saw them mirrored
    weight: Tensor  # float32 (H, W), the view's share in the mean at each pixel


def forward_views(
    model: nn.Module,
    images: Tensor,
    flip: bool = False,
    precision: str = "float32",
    scales: Sequence[float] = (1.0,),
    window: Sequence[int] = (),
    overlap: float = 0.5,
) -> list[View]:
    """One forward pass for each scale, window and mirrored copy of the images.

    Args:
        model: in eval mode.
        images: uint8 (N, 3, H, W), on the model's device.
        flip: predict the mirrored images too (ProDA).
        precision: of the forward passes.
        scales: factors by which the images are resized.
        window: [width, height] in pixels of the resized images that the network sees at once; () = all.
        overlap: least share of a window that its neighbour covers too, in 0..1.
    """
    size = images.shape[2:]
    x, views = normalized(images, model), []
    for scale in scales:
        scaled_size = [max(1, round(side * scale)) for side in size]
        scaled = F.resize(x, scaled_size)
        windows = list(_windows(scaled_size, size, window, overlap))
        weight = x.new_zeros(size)
        for _, place in windows:
            weight[place] += (1 + flip) * len(scales)
        weight.reciprocal_()
        for (crop, place), mirrored in itertools.product(windows, (False, True)[: 1 + flip]):
            view = scaled[:, :, *crop]
            with torch.no_grad(), autocast(x.device, precision):
                logits = model(view.flip(-1) if mirrored else view)["logits"].float()
            views.append(View(logits, *place, mirrored, weight))
    return views


def _windows(
    scaled: Sequence[int], size: Sequence[int], window: Sequence[int], overlap: float
) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """(rows, columns) of each window in the scaled image, and in the image itself; evenly spaced from border to border.

    Sizes are (height, width), `window` is [width, height] or empty.
    """
    axes = []
    for length, whole, most in zip(scaled, size, window[::-1] or scaled):
        side = min(length, most)
        count = 1 + math.ceil((length - side) / max(1, side * (1 - overlap)))
        starts = [round(i * (length - side) / max(1, count - 1)) for i in range(count)]
        own = [slice(round(start * whole / length), round((start + side) * whole / length)) for start in starts]
        axes.append([(slice(start, start + side), part) for start, part in zip(starts, own)])
    for (rows, own_rows), (columns, own_columns) in itertools.product(*axes):
        yield (rows, columns), (own_rows, own_columns)


def mean_probabilities(views: list[View], i: int, softmax_first: bool = False) -> Tensor:
    """Class probabilities of image `i` at image size, float32 (K, H, W): the mean over the views.

    Args:
        softmax_first: take the softmax at the network's resolution, as ProDA's pseudo labels do. Pixels between two
            confident regions then get a lower confidence than with a softmax at image size.
    """
    total = views[0].weight.new_zeros(views[0].logits.shape[1], *views[0].weight.shape)
    for view in views:
        part, weight = total[:, view.rows, view.columns], view.weight[view.rows, view.columns]
        small = view.logits[i].softmax(0) if softmax_first else view.logits[i]
        for rows, maps in upsampled_rows(small, weight.shape):
            maps = maps if softmax_first else maps.softmax(0)
            part[:, rows] += (maps.flip(-1) if view.mirrored else maps).mul_(weight[rows])
    return total


def predict_labels(model: nn.Module, images: Tensor, **options: object) -> Tensor:
    """The most probable class of each pixel, uint8 (N, H, W).

    Options are those of `forward_views`. Memory beyond the forward passes: of a single view a few rows, of several
    K floats a pixel of one image.
    """
    views = forward_views(model, images, **options)
    labels = images.new_empty(len(images), *images.shape[2:])
    for i, label in enumerate(labels):
        if len(views) == 1:  # a softmax does not change which class is the largest
            for rows, maps in upsampled_rows(views[0].logits[i], label.shape):
                label[rows] = maps.max(0).indices  # on a CPU faster than argmax
        else:
            label.copy_(mean_probabilities(views, i).max(0).indices)
    return labels


def predict_confidence(
    model: nn.Module, images: Tensor, *, softmax_first: bool = False, **options: object
) -> tuple[Tensor, Tensor]:
    """The most probable class of each pixel, uint8 (N, H, W), and its probability, float32 (N, H, W).

    Options are those of `forward_views`; for `softmax_first` see `mean_probabilities`.
    """
    views = forward_views(model, images, **options)
    labels = images.new_empty(len(images), *images.shape[2:])
    confidence = torch.empty(labels.shape, device=images.device)
    for i in range(len(images)):
        confidence[i], labels[i] = mean_probabilities(views, i, softmax_first).max(0)
    return labels, confidence


def same_size_batches(
    loader: Iterator[list[dict]], device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """(indices, images uint8 (N, 3, H, W), labels uint8 (N, H, W) or None) from lists of samples of any sizes."""
    for samples in loader:
        for _, run in itertools.groupby(samples, key=lambda s: s["image"].shape):
            group = list(run)
            images = torch.stack([s["image"] for s in group]).to(device, non_blocking=True)
            labels = torch.stack([s["label"] for s in group]).to(device) if "label" in group[0] else None
            yield [s["index"] for s in group], images, labels


def own_batches(
    dataset: SegmentationDataset, cfg: Config, device: torch.device, title: str, leave: bool = False
) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """As `same_size_batches`, of this process's share of a dataset, in batches of `test.batch`; with a progress bar."""
    mine = distributed.shard_indices(len(dataset), cfg.test.batch)
    loader = whole_images(dataset, cfg.test.batch, cfg.data.workers, mine)
    with progress(total=len(mine), desc=title, unit="img", leave=leave) as bar:
        for indices, images, labels in same_size_batches(loader, device):
            yield indices, images, labels
            bar.update(len(indices))


def predictions(
    model: nn.Module, dataset: SegmentationDataset, cfg: Config, device: torch.device, title: str
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """(index, image uint8 (3, H, W), prediction uint8 (H, W), label uint8 (H, W) or None) of every image, in order.

    Several processes share the images.

    Args:
        model: in eval mode.
        cfg: its section `test` says how to predict.
        title: of the progress bar.

    Raises:
        UserError: an image cannot be read, or is too large for the device.
    """
    t = cfg.test
    options = {"flip": t.flip, "scales": t.scales, "window": t.window, "overlap": t.overlap}
    for indices, images, labels in own_batches(dataset, cfg, device, title):
        try:
            found = predict_labels(model, images, precision=cfg.train.precision, **options)
        except Exception as error:
            if not out_of_memory(error):
                raise
            size = f"{images.shape[3]}x{images.shape[2]}"
            raise UserError(
                f"{dataset.samples[indices[0]].image} ({size}) does not fit into the memory of {device}: "
                "a smaller test.window or test.batch needs less"
            ) from None
        for i, index in enumerate(indices):
            yield index, images[i], found[i], None if labels is None else labels[i]


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    cfg: Config,
    device: torch.device,
    *callbacks: Callable[[int, Tensor, Tensor, Tensor], None],
) -> dict:
    """Scores of a network on a dataset with labels of `data.class_set`; see `ConfusionMatrix.scores`.

    Args:
        callbacks: each is called with (index, image, prediction, label) of each image. Several processes share the
            images: the scores are those of all, and a callback with a method `gather` is brought together by it.
    """
    was_training = model.training
    model.eval()
    classes = class_set(cfg.data)
    confusion = ConfusionMatrix(len(classes), device)
    for index, image, prediction, label in predictions(model, dataset, cfg, device, "validate"):
        confusion.update(prediction, label)
        for callback in callbacks:
            callback(index, image, prediction, label)
    model.train(was_training)
    confusion.gather()
    for callback in callbacks:
        if hasattr(callback, "gather"):
            callback.gather()
    return confusion.scores(classes)
