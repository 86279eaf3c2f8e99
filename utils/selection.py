"""Scores of a network that need no target label, recorded beside each validation."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from data.datasets import SegmentationDataset
from data.loaders import whole_images
from models import classifier_prototypes
from utils.config import Config
from utils.inference import autocast, normalized, same_size_batches
from utils.visual import spread

IMAGES = 16  # unlabelled target training images that are looked at, spread evenly: a small part of a validation


@torch.no_grad()
def target_free_scores(
    model: nn.Module, target: SegmentationDataset, cfg: Config, device: torch.device
) -> dict[str, float]:
    """How sure a network is on unlabelled target training images, at feature resolution.

    Returns:
        entropy: mean softmax entropy over log K, 0 (sure) to 1; margin: mean gap of the cosines between a pixel's
        feature and its two nearest prototypes, 0 to 2. Sureness is no correctness: a network that calls everything
        road is sure too.
    """
    was_training = model.training
    model.eval()
    prototypes = classifier_prototypes(model.classifier)
    plain = copy.copy(target)
    plain.transform = None
    loader = whole_images(plain, cfg.test.batch, cfg.data.workers, spread(len(plain), IMAGES))
    entropy, margin, pixels = 0.0, 0.0, 0
    for _, images, _ in same_size_batches(loader, device):
        with autocast(device, cfg.train.precision):
            out = model(normalized(images, model))
        log_p = out["logits"].float().log_softmax(1)
        cosine = torch.einsum("kc,nchw->nkhw", prototypes, F.normalize(out["feat"].float(), dim=1))
        two = cosine.topk(2, dim=1).values
        entropy += -(log_p.exp() * log_p).sum().item() / math.log(log_p.shape[1])
        margin += (two[:, 0] - two[:, 1]).sum().item()
        pixels += two[:, 0].numel()
    model.train(was_training)
    return {"entropy": entropy / max(pixels, 1), "margin": margin / max(pixels, 1)}
