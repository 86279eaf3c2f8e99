"""Whole images through a network: predictions, scores, BatchNorm statistics of the target."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from data.datasets import SegmentationDataset
from data.loaders import whole_images
from data.taxonomy import ClassSet
from models import DeepLabPBAL, upsample
from utils.config import Config, UserError
from utils.engine import distributed
from utils.engine.log import progress
from utils.evaluation.metrics import ConfusionMatrix

# Of logits at image size that are worked on at once, (CPU, GPU): a core's cache holds the one, few kernels are started
# for the other.
STRIP_BYTES = (2 * 2**20, 64 * 2**20)


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
    softmax_first: bool = False,
) -> Tensor:
    """Class probabilities at image size, float32 (N, K, H, W): the mean over scales, mirrors and windows.

    For labels alone, `predict_labels` is faster and needs a fraction of the memory.

    Args:
        model: in eval mode.
        images: uint8 (N, 3, H, W), on the model's device.
        flip: average with the prediction of the mirrored images (ProDA).
        precision: of the forward pass.
        scales: factors by which the images are resized for the network, one prediction each.
        window: [width, height] in pixels of the resized images that the network sees at once; () = all.
        overlap: least share of a window that its neighbour sees too, in 0..1.
        softmax_first: take the softmax before the maps are brought to image size, as ProDA's pseudo labels do, not
            after: pixels between two regions that are sure of themselves are then less sure.
    """
    views = _see(model, images, flip, precision, scales, window, overlap, softmax_first)
    size = images.shape[2:]
    strips = list(_strips(size, views[0].maps))
    return torch.stack([torch.cat([_probabilities(views, i, r) for r in strips], 1) for i in range(len(images))])


def predict_labels(
    model: nn.Module,
    images: Tensor,
    flip: bool = False,
    precision: str = "float32",
    scales: Sequence[float] = (1.0,),
    window: Sequence[int] = (),
    overlap: float = 0.5,
    softmax_first: bool = False,
    with_confidence: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The likeliest class of each pixel, uint8 (N, H, W), and its probability as round(255 p), uint8 too, or None.

    Strip by strip: neither logits nor probabilities ever exist at image size. Arguments are those of `predict`.
    """
    views = _see(model, images, flip, precision, scales, window, overlap, softmax_first)
    size = images.shape[2:]
    labels = images.new_empty(len(images), *size)
    confidence = images.new_empty(len(images), *size) if with_confidence else None

    def label(place: tuple[int, slice]) -> None:
        i, rows = place
        if len(views) == 1 and not with_confidence:  # a softmax of these does not change which class is largest
            labels[i, rows] = _largest(views[0].at_image_size(i, rows))[1]
            return
        largest, labels[i, rows] = _largest(_probabilities(views, i, rows))
        if with_confidence:
            confidence[i, rows] = largest.mul_(255).round_()

    _each(label, [(i, rows) for i in range(len(images)) for rows in _strips(size, views[0].maps)], images.device)
    return labels, confidence


@dataclass(frozen=True)
class _View:
    """What the network says of one part of the images, at its own resolution.

    Attributes:
        maps: float32 (N, K, h, w), logits, or probabilities where `softmaxed`.
        place: rows and columns of the images that it was shown.
        mirrored: whether it was shown them mirrored.
        seen: float32 (H, W), in how many views of this scale each pixel is.
        softmaxed: whether the softmax was taken at this resolution.
    """

    maps: Tensor
    place: tuple[slice, slice]
    mirrored: bool
    seen: Tensor
    softmaxed: bool

    def at_image_size(self, i: int, rows: slice) -> Tensor:
        """Maps (K, R, W') of image `i` in some of its rows, which lie within the view: as `upsample` has them."""
        maps, (view_rows, columns) = self.maps[i], self.place
        steps, last = view_rows.stop - view_rows.start - 1, maps.shape[1] - 1
        at = torch.arange(rows.start, rows.stop, device=maps.device, dtype=torch.float32) - view_rows.start
        at = at * (last / max(1, steps))
        above = at.long().clamp_(max=max(0, last - 1))
        below = (above + 1).clamp_(max=last)
        strip = torch.lerp(maps[:, above], maps[:, below], (at - above)[:, None])
        return upsample(strip[None], (strip.shape[1], columns.stop - columns.start))[0]


def _see(
    model: nn.Module,
    images: Tensor,
    flip: bool,
    precision: str,
    scales: Sequence[float],
    window: Sequence[int],
    overlap: float,
    softmax_first: bool,
) -> list[_View]:
    """Every forward pass that `predict` asks for."""
    size = images.shape[2:]
    x, views = normalized(images, model), []
    for scale in scales:
        scaled_size = [max(1, round(side * scale)) for side in size]
        scaled = x if scaled_size == list(size) else F.resize(x, scaled_size, antialias=True)
        places = list(_windows(scaled_size, size, window, overlap))
        seen = x.new_zeros(size)
        for _, place in places:
            seen[place] += 1 + flip
        for (crop, place), mirrored in itertools.product(places, (False, True)[: 1 + flip]):
            view = scaled[:, :, *crop]
            with torch.no_grad(), autocast(x.device, precision):
                logits = model(view.flip(-1) if mirrored else view)["logits"].float()
            maps = logits.softmax(1) if softmax_first else logits
            views.append(_View(maps, place, mirrored, seen, softmax_first))
    return views


def _probabilities(views: list[_View], i: int, rows: slice) -> Tensor:
    """Of image `i` in some of its rows, float32 (K, R, W)."""
    scales, width = len({id(view.seen) for view in views}), views[0].seen.shape[1]
    total = views[0].maps.new_zeros(views[0].maps.shape[1], rows.stop - rows.start, width)
    for view in views:
        view_rows, columns = view.place
        inside = slice(max(rows.start, view_rows.start), min(rows.stop, view_rows.stop))
        if inside.start < inside.stop:
            part = view.at_image_size(i, inside)
            part = part if view.softmaxed else part.softmax(0)
            part = (part.flip(-1) if view.mirrored else part).div_(view.seen[inside, columns])
            total[:, inside.start - rows.start : inside.stop - rows.start, columns] += part
    return total.div_(scales)


def _each(work: Callable[[tuple[int, slice]], None], strips: list[tuple[int, slice]], device: torch.device) -> None:
    """Work on every strip. On a CPU a thread takes a strip as a whole: threads that share each operation on so few
    numbers wait for each other more than they work, above all beside loaders and writers."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or min(threads, len(strips)) == 1:
        for strip in strips:
            work(strip)
        return
    try:
        with ThreadPoolExecutor(min(threads, len(strips)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, strips))  # raises what a strip raised
    finally:
        torch.set_num_threads(threads)  # for threads that start later; this one's number has not changed


def _strips(size: Sequence[int], logits: Tensor) -> Iterator[slice]:
    """Rows of an image of (height, width) whose logits at image size fill `STRIP_BYTES`."""
    height, width = size
    rows = max(1, STRIP_BYTES[logits.device.type != "cpu"] // (logits.shape[1] * width * logits.element_size()))
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the classes of (K, R, W), and the first class that has it, uint8: `max(0)`, but several times faster
    on a CPU, where searching an index is not vectorised and comparing bytes is."""
    largest = scores.amax(0)
    ids = torch.arange(len(scores), dtype=torch.uint8, device=scores.device)[:, None, None]
    return largest, (scores < largest).byte().mul_(255).bitwise_or_(ids).amin(0)


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

    Several processes share the images.

    Args:
        model: in eval mode.
        cfg: `test` says how to predict.
        doing: a word for the progress bar.

    Raises:
        UserError: an image cannot be read, or is too large for the device.
    """
    t = cfg.test
    mine = distributed.shard_indices(len(dataset), t.batch)
    loader = whole_images(dataset, t.batch, cfg.data.workers, mine)
    with progress(total=len(mine), desc=doing, unit="img", leave=False) as bar:
        for indices, images, labels in same_size_batches(loader, device):
            try:
                found, _ = predict_labels(model, images, t.flip, cfg.train.precision, t.scales, t.window, t.overlap)
            except torch.OutOfMemoryError:
                size = f"{images.shape[3]}x{images.shape[2]}"
                raise UserError(
                    f"{dataset.samples[indices[0]].image} ({size}) does not fit into the memory of {device}: "
                    "a smaller test.window or test.batch needs less"
                ) from None
            for i, index in enumerate(indices):
                yield index, images[i], found[i], None if labels is None else labels[i]
            bar.update(len(indices))


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
        see: each is called with (index, image, prediction, label) of each image, e.g. to draw it. Several processes
            share the images; the scores are those of all, and a `see` that has a method `gather` has seen all.
    """
    was_training = model.training
    model.eval()
    confusion = ConfusionMatrix(len(classes))
    for index, image, prediction, label in predictions(model, dataset, cfg, device, "validate"):
        confusion.update(prediction, label)
        for look in see:
            look(index, image, prediction, label)
    model.train(was_training)
    confusion.gather(device)
    for look in see:
        if hasattr(look, "gather"):
            look.gather()
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

    Raises:
        UserError: "deeplab_pbal", which normalises pooled features over a batch, finds no two images of one size.
    """
    if not batchnorm_statistics(model):
        return
    plain = copy.copy(target)
    plain.transform = None
    wanted = min(cfg.batchnorm.images or len(plain), len(plain))
    indices = torch.linspace(0, len(plain) - 1, wanted).round().long().tolist()
    loader = whole_images(plain, cfg.train.batch_target, cfg.data.workers, indices)
    was_training = model.training
    least, batches = 2 if isinstance(model, DeepLabPBAL) else 1, 0

    def inputs() -> Iterator[Tensor]:
        nonlocal batches
        for _, images, _ in same_size_batches(loader, device):
            if len(images) >= least:  # an image that is left over alone has no deviation
                batches += 1
                yield normalized(images, model)

    with autocast(device, cfg.train.precision):
        update_bn(inputs(), model)
    model.train(was_training)
    if not batches:
        raise UserError(
            "batchnorm.statistics=target needs two target images of one size in a batch with model.arch=deeplab_pbal: "
            "see train.batch_target, data.target.size"
        )
