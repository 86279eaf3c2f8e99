"""Output-space adversarial alignment, binary cross-entropy form (PBAL eq. of stage 0; ADVENT)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE, TARGET = 0.0, 1.0


def _is(logits: Tensor, domain: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, domain, dtype=torch.float32))


def generator_loss(target_patches: Tensor) -> Tensor:
    """What the segmenter minimises: the discriminator should call its target output "source".

    Args:
        target_patches: discriminator logits (N, 1, h, w) of target softmax maps.
    """
    return _is(target_patches, SOURCE)


def discriminator_loss(source_patches: Tensor, target_patches: Tensor) -> Tensor:
    """What the discriminator minimises: the mean of its two halves, on detached softmax maps.

    Args:
        source_patches, target_patches: discriminator logits (N, 1, h, w).
    """
    return 0.5 * (_is(source_patches, SOURCE) + _is(target_patches, TARGET))
