"""Running statistics of BatchNorm: copied, put back, and recomputed on the target domain."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from data.datasets import SegmentationDataset
from data.loaders import whole_images
from models import DeepLabPBAL
from models.prediction import normalized
from utils.config import Config, UserError
from utils.evaluation.prediction import autocast, same_size_batches


def batchnorm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every running statistic of the network's BatchNorm layers, by state-dict key."""
    keys = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith(keys)}


def set_batchnorm_statistics(model: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Put back what `batchnorm_statistics` returned."""
    model.load_state_dict(statistics, strict=False)


def recompute_batchnorm(model: nn.Module, target: SegmentationDataset, cfg: Config, device: torch.device) -> None:
    """Replace the running statistics by those of unlabelled target training images, whole and unaugmented.

    Training alternates source and target batches, so running averages mix both domains and fit neither. This costs
    one forward pass over `batchnorm.images` images, evenly spread over the dataset.

    Raises:
        UserError: "deeplab_pbal", which normalises pooled features over a batch, finds no two images of one size.
    """
    if not batchnorm_statistics(model):
        return
    images = [dataclasses.replace(sample, label=None) for sample in target.samples]
    plain = dataclasses.replace(target, samples=images, transform=None)
    wanted = min(cfg.batchnorm.images or len(plain), len(plain))
    indices = torch.linspace(0, len(plain) - 1, wanted).round().long().tolist()
    loader = whole_images(plain, cfg.train.batch_target, cfg.data.workers, indices)
    least = 2 if isinstance(model, DeepLabPBAL) else 1  # a single image has no variance of pooled features
    batches = (images for _, images, _ in same_size_batches(loader, device) if len(images) >= least)
    first = next(batches, None)
    if first is None:
        raise UserError(
            "batchnorm.statistics=target needs two target images of one size in a batch with model.arch=deeplab_pbal: "
            "see train.batch_target, data.target.size"
        )
    with autocast(device, cfg.train.precision):
        update_bn((normalized(images, model) for images in itertools.chain([first], batches)), model)
