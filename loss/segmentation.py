"""Cross-entropy: CE(z_s, y_s) and CE(z_t, ŷ_t) of every stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255  # label of pixels without a class


def labels_at(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Train ids, integer (N, H, W), at (height, width) `size`, by nearest neighbour; in the same type."""
    values = labels if labels.dtype == torch.uint8 else labels.float()  # the types that torch resizes
    return F.interpolate(values[:, None], size=tuple(size), mode="nearest")[:, 0].to(labels.dtype)


def summed_cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (N, K, ...) and labels (N, ...), times `weight` (N, ...), summed over labelled pixels."""
    if torch.are_deterministic_algorithms_enabled():  # CUDA has a deterministic kernel for rows, not for maps
        logits, labels = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
    if weight is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    each = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return (each * weight.reshape(each.shape)).sum()


def segmentation_loss(
    logits: Tensor, labels: Tensor, normalizer: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over labelled pixels; 0 with zero gradient if there is none.

    Args:
        logits: float (N, K, H, W), at the labels' size.
        labels: integer (N, H, W), train ids or `IGNORE`.
        normalizer: divides the sum in place of the number of labelled pixels; float scalar. For one part of a batch,
            give the mean number over the parts: the mean of the parts' losses is then the loss of the whole.
        weight: float (N, H, W), by which each pixel's loss is multiplied; 1 by default.

    Returns:
        float scalar.
    """
    labels = labels.long()
    if normalizer is None:
        normalizer = (labels != IGNORE).sum()
    # Where nothing is labelled, the sum is 0. A mean over parts may be any positive number, so the floor is small.
    return summed_cross_entropy(logits.float(), labels, weight) / normalizer.clamp(min=1e-6)
