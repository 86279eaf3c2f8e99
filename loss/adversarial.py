"""Output-space adversarial alignment: binary cross-entropy (PBAL stage I; ADVENT) or least squares (ProDA, LSGAN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE, TARGET = 0.0, 1.0


def _is(logits: Tensor, domain: float, form: str) -> Tensor:
    loss = {"bce": F.binary_cross_entropy_with_logits, "ls": F.mse_loss}[form]
    return loss(logits.float(), torch.full_like(logits, domain, dtype=torch.float32))


def generator_loss(target_patches: Tensor, form: str = "bce") -> Tensor:
    """What the segmenter minimises: the discriminator should call its target output "source".

    Args:
        target_patches: discriminator logits (N, 1, h, w) of target softmax maps.
        form: "bce", or "ls": mean squared distance of the logits to the label.
    """
    return _is(target_patches, SOURCE, form)


def discriminator_loss(source_patches: Tensor, target_patches: Tensor, form: str = "bce") -> Tensor:
    """What the discriminator minimises: the mean of its two halves, on detached softmax maps.

    Args:
        source_patches, target_patches: discriminator logits (N, 1, h, w).
        form: as for `generator_loss`.
    """
    return 0.5 * (_is(source_patches, SOURCE, form) + _is(target_patches, TARGET, form))
