"""Cross-entropy at image resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from data.taxonomy import IGNORE
from models.deeplab import upsample


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (N, K, ...) and labels (N, ...), summed over labelled pixels."""
    if torch.are_deterministic_algorithms_enabled():  # on GPUs, maps have no deterministic kernel, rows have
        logits, labels = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over labelled pixels; 0 with zero gradient if there is none.

    Args:
        logits: float (N, K, h, w) at any resolution; brought to the labels' bilinearly.
        labels: integer (N, H, W), train ids or `IGNORE`.

    Returns:
        float scalar. Source: CE(z_s, y_s) and CE(z_t, ŷ_t) of every stage.
    """
    labels = labels.long()
    total = summed_cross_entropy(upsample(logits.float(), labels.shape[1:]), labels)
    return total / (labels != IGNORE).sum().clamp(min=1)
