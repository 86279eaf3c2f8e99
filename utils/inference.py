"""Whole images through a network: predictions, scores, BatchNorm statistics of the target."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

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
from utils.config import Config
from utils.metrics import ConfusionMatrix


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Forward passes in `precision`; losses cast to float32 themselves."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def normalized(images: Tensor, model: nn.Module) -> Tensor:
    """uint8 (N, 3, H, W) -> float32, by the network's own input statistics."""
    return F.normalize(images.float().div_(255), list(model.mean), list(model.std))


def predict(model: nn.Module, images: Tensor, flip: bool = False, precision: str = "float32") -> Tensor:
    """Class probabilities at image size, float32 (N, K, H, W).

    Args:
        model: in eval mode.
        images: uint8 (N, 3, H, W), on the model's device.
        flip: average with the prediction of the mirrored images (ProDA).
        precision: of the forward pass.
    """
    x = normalized(images, model)
    with torch.no_grad(), autocast(x.device, precision):
        views = [model(x)["logits"]]
        if flip:
            views.append(model(x.flip(-1))["logits"].flip(-1))
    maps = [upsample(z.float(), x.shape[2:]).softmax(1) for z in views]
    return maps[0] if len(maps) == 1 else torch.stack(maps).mean(0)


def same_size_batches(loader: DataLoader, device: torch.device) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """(indices, images uint8 (N, 3, H, W), labels uint8 (N, H, W) or None) from lists of samples of any sizes."""
    for samples in loader:
        for _, run in itertools.groupby(samples, key=lambda s: s["image"].shape):
            group = list(run)
            images = torch.stack([s["image"] for s in group]).to(device, non_blocking=True)
            labels = torch.stack([s["label"] for s in group]).to(device) if "label" in group[0] else None
            yield [s["index"] for s in group], images, labels


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    classes: ClassSet,
    cfg: Config,
    device: torch.device,
    see: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> dict:
    """Scores of a network on a labelled dataset; see `ConfusionMatrix.scores`.

    Args:
        see: called with (index, image, prediction, label) of each image, e.g. to draw it.
    """
    was_training = model.training
    model.eval()
    confusion = ConfusionMatrix(len(classes))
    loader = whole_images(dataset, cfg.test.batch, cfg.data.workers)
    progress = tqdm(total=len(dataset), desc="validate", unit="img", leave=False, dynamic_ncols=True, disable=None)
    for indices, images, labels in same_size_batches(loader, device):
        prediction = predict(model, images, cfg.test.flip, cfg.train.precision).argmax(1)
        confusion.update(prediction, labels)
        for i, index in enumerate(indices):
            if see:
                see(index, images[i], prediction[i], labels[i])
        progress.update(len(indices))
    progress.close()
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
