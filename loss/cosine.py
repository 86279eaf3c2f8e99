"""Cosines between features and prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_map(feat: Tensor, prototypes: Tensor) -> Tensor:
    """cos(f_i, p_k) for every pixel i and class k; 0 where a vector is 0.

    Args:
        feat: float (N, C, h, w).
        prototypes: float (K, C), of any length.

    Returns:
        (N, K, h, w), float32 or float64: half precision is raised, under autocast too. Gradient reaches feat, and
        prototypes unless detached.
    """
    exact = torch.promote_types(feat.dtype, torch.float32)
    with torch.autocast(feat.device.type, enabled=False):
        unit_feat, unit_prototypes = F.normalize(feat.to(exact), dim=1), F.normalize(prototypes.to(exact), dim=1)
        return torch.einsum("nchw,kc->nkhw", unit_feat, unit_prototypes)
