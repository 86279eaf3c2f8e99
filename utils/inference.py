"""Whole images through a network: predictions, scores, BatchNorm statistics of the target."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from data.datasets import SegmentationDataset
from data.loaders import whole_images
from data.taxonomy import ClassSet
from models import upsample
from utils.config import Config, UserError
from utils.metrics import ConfusionMatrix


def default_precision(device: torch.device) -> str:
    """What `train.precision=auto` stands for: half precision where the device computes in it natively."""
    if device.type != "cuda":
        return "float32"
    with torch.cuda.device(device):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Forward passes in `precision`, a value of `train.precision`; losses cast to float32 themselves."""
    precision = default_precision(device) if precision == "auto" else precision
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    return torch.autocast(device.type, half, enabled=half is not None)


def normalized(images: Tensor, model: nn.Module) -> Tensor:
    """uint8 (N, 3, H, W) -> float32, by the network's own input statistics."""
    return F.normalize(images.float().div_(255), list(model.mean), list(model.std))


def predict(
    model: nn.Module,
    images: Tensor,
    flip: bool = False,
    precision: str = "float32",
    scales: Sequence[float] = (1.0,),
    window: Sequence[int] = (),
    overlap: float = 0.5,
) -> Tensor:
    """Class probabilities at image size, float32 (N, K, H, W): the mean over scales, mirrors and windows.

    Args:
        model: in eval mode.
        images: uint8 (N, 3, H, W), on the model's device.
        flip: average with the prediction of the mirrored images (ProDA).
        precision: of the forward pass.
        scales: factors by which the images are resized for the network, one prediction each.
        window: [width, height] in pixels of the resized images that the network sees at once; () = all.
        overlap: least share of a window that its neighbour sees too, in 0..1.
    """
    size = images.shape[2:]
    x, total = normalized(images, model), None
    for scale in scales:
        scaled_size = [max(1, round(side * scale)) for side in size]
        scaled = x if scaled_size == list(size) else F.resize(x, scaled_size, antialias=True)
        places = list(_windows(scaled_size, size, window, overlap))
        seen = x.new_zeros(size)  # how often the network sees each pixel at this scale
        for _, place in places:
            seen[place] += 1 + flip
        for (crop, place), mirrored in itertools.product(places, (False, True)[: 1 + flip]):
            view = scaled[:, :, *crop]
            with torch.no_grad(), autocast(x.device, precision):
                logits = model(view.flip(-1) if mirrored else view)["logits"].float()
            if total is None:
                total = x.new_zeros(len(x), logits.shape[1], *size)
            for i in range(len(x)):  # one by one: maps at image size are what fills the memory
                part = upsample(logits[i : i + 1], seen[place].shape)[0].softmax(0)
                total[i, :, *place] += (part.flip(-1) if mirrored else part).div_(seen[place])
    return total.div_(len(scales))


def _windows(
    scaled: Sequence[int], size: Sequence[int], window: Sequence[int], overlap: float
) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """(rows, columns) of each window in the scaled image and in the image itself, evenly spread and flush with its borders.

    Sizes are (height, width), `window` is [width, height] or empty.
    """
    axes = []
    for length, whole, most in zip(scaled, size, window[::-1] or scaled):
        side = min(length, most)
        count = 1 + math.ceil((length - side) / max(1, side * (1 - overlap)))
        starts = [round(i * (length - side) / max(1, count - 1)) for i in range(count)]
        axes.append(
            [
                (
                    slice(start, start + side),
                    slice(round(start * whole / length), round((start + side) * whole / length)),
                )
                for start in starts
            ]
        )
    for (rows, own_rows), (columns, own_columns) in itertools.product(*axes):
        yield (rows, columns), (own_rows, own_columns)


def same_size_batches(loader: DataLoader, device: torch.device) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """(indices, images uint8 (N, 3, H, W), labels uint8 (N, H, W) or None) from lists of samples of any sizes."""
    for samples in loader:
        for _, run in itertools.groupby(samples, key=lambda s: s["image"].shape):
            group = list(run)
            images = torch.stack([s["image"] for s in group]).to(device, non_blocking=True)
            labels = torch.stack([s["label"] for s in group]).to(device) if "label" in group[0] else None
            yield [s["index"] for s in group], images, labels


def predictions(
    model: nn.Module, dataset: SegmentationDataset, cfg: Config, device: torch.device, doing: str
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """(index, image uint8 (3, H, W), prediction uint8 (H, W), label uint8 (H, W) or None) of every image, in order.

    Args:
        model: in eval mode.
        cfg: `test` says how to predict.
        doing: a word for the progress bar.

    Raises:
        UserError: an image cannot be read, or is too large for the device.
    """
    t = cfg.test
    loader = whole_images(dataset, t.batch, cfg.data.workers)
    with tqdm(total=len(dataset), desc=doing, unit="img", leave=False, dynamic_ncols=True, disable=None) as progress:
        for indices, images, labels in same_size_batches(loader, device):
            try:
                maps = predict(model, images, t.flip, cfg.train.precision, t.scales, t.window, t.overlap)
                found = maps.argmax(1).byte()
            except torch.OutOfMemoryError:
                size = f"{images.shape[3]}x{images.shape[2]}"
                raise UserError(
                    f"{dataset.samples[indices[0]].image} ({size}) does not fit into the memory of {device}: "
                    "a smaller test.window or test.batch needs less"
                ) from None
            del maps  # before the caller works on
            for i, index in enumerate(indices):
                yield index, images[i], found[i], None if labels is None else labels[i]
            progress.update(len(indices))


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    classes: ClassSet,
    cfg: Config,
    device: torch.device,
    *see: Callable[[int, Tensor, Tensor, Tensor], None],
) -> dict:
    """Scores of a network on a labelled dataset; see `ConfusionMatrix.scores`.

    Args:
        see: each is called with (index, image, prediction, label) of each image, e.g. to draw it.
    """
    was_training = model.training
    model.eval()
    confusion = ConfusionMatrix(len(classes))
    for index, image, prediction, label in predictions(model, dataset, cfg, device, "validate"):
        confusion.update(prediction, label)
        for look in see:
            look(index, image, prediction, label)
    model.train(was_training)
    return confusion.scores(classes)


def batchnorm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every running statistic of the network's BatchNorm layers, by state-dict key."""
    keys = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith(keys)}


def set_batchnorm_statistics(model: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Undo `batchnorm_statistics`."""
    model.load_state_dict(statistics, strict=False)


def recompute_batchnorm(model: nn.Module, target: SegmentationDataset, cfg: Config, device: torch.device) -> None:
    """Replace the running statistics by those of unlabelled target training images, whole and unaugmented.

    Training alternates source and target batches, so running averages mix both domains and fit neither. Costs one
    forward pass over `batchnorm.images` images, evenly spread over the dataset.
    """
    plain = copy.copy(target)
    plain.transform = None
    wanted = min(cfg.batchnorm.images or len(plain), len(plain))
    indices = torch.linspace(0, len(plain) - 1, wanted).round().long().tolist()
    loader = whole_images(plain, cfg.train.batch_target, cfg.data.workers, indices)
    was_training = model.training
    with autocast(device, cfg.train.precision):
        update_bn((normalized(images, model) for _, images, _ in same_size_batches(loader, device)), model)
    model.train(was_training)
