"""Bidirectional prototype learning (PBAL stage I)."""

from __future__ import annotations

import torch
from torch import Tensor

from loss.cosine import cosine_map
from utils import distributed


def bidirectional_prototype_loss(feat: Tensor, logits: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Transport cost between target pixels and prototypes, in both directions.

    With c_ik = 1 - cos(f_i, p_k) and i over all pixels of the batch:

        s2t = mean_i Σ_k softmax_k(z_i)_k c_ik      every pixel spreads itself over the classes
        t2s = mean_k Σ_i softmax_i(z_·k)_i c_ik     every class spreads itself over the pixels, so that a rare
                                                    class weighs as much as road

    Where several processes train together, i runs over the pixels of all of them in t2s, as on one: its value is the
    same in each, and the mean over processes of its gradients is its gradient.

    Args:
        feat: float (N, C, h, w), target features.
        logits: float (N, K, h, w), their logits, at the same resolution.
        prototypes: float (K, C), of any length.

    Returns:
        (s2t, t2s), float scalars in [0, 2]. Gradient reaches feat and logits, and prototypes unless detached.
    """
    cosine = cosine_map(feat, prototypes.flatten(1))  # (N, K, h*w)
    logits = logits.to(cosine.dtype).flatten(2)
    s2t = 1 - (logits.softmax(1) * cosine).sum(1).mean()  # softmaxes sum to 1
    over_pixels = logits.transpose(0, 1).flatten(1).softmax(1)  # (K, N*h*w)
    of_class = (over_pixels * cosine.transpose(0, 1).flatten(1)).sum(1)  # (K,)
    if distributed.world_size() > 1:  # a softmax over parts is the parts' softmaxes, weighted by their sums of exp
        mass = logits.transpose(0, 1).flatten(1).logsumexp(1)
        masses, of_classes = distributed.rows(torch.stack([mass, of_class])).unbind(1)  # (processes, K)
        of_class = distributed.shared((masses.softmax(0) * of_classes).sum(0))
    t2s = 1 - of_class.mean()
    return s2t, t2s
