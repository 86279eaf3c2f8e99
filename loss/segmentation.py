"""Cross-entropy at image resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from data.taxonomy import IGNORE
from models.deeplab import upsample

LEAST = 1e-6  # divisor of an empty sum; a mean over parts of at least one labelled pixel is larger


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (N, K, ...) and labels (N, ...), summed over labelled pixels."""
    if torch.are_deterministic_algorithms_enabled():  # on GPUs, maps have no deterministic kernel, rows have
        logits, labels = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def segmentation_loss(logits: Tensor, labels: Tensor, labelled: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over labelled pixels; 0 with zero gradient if there is none.

    Args:
        logits: float (N, K, h, w) at any resolution; brought to the labels' bilinearly.
        labels: integer (N, H, W), train ids or `IGNORE`.
        labelled: what to divide the sum by in place of the labelled pixels counted here, float scalar: for one part of
            a batch their mean over the parts, so that the mean of the parts' losses is the loss of the whole.

    Returns:
        float scalar. Source: CE(z_s, y_s) and CE(z_t, ŷ_t) of every stage.
    """
    labels = labels.long()
    total = summed_cross_entropy(upsample(logits.float(), labels.shape[1:]), labels)
    if labelled is None:
        labelled = (labels != IGNORE).sum()
    return total / labelled.clamp(min=LEAST)  # where nothing is labelled, the sum is 0
