"""Bidirectional prototype learning (PBAL stage I)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from loss.cosine import cosine_map


def bidirectional_prototype_loss(
    feat: Tensor, logits: Tensor, prototypes: Tensor, merge: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Transport cost between target pixels and prototypes, in both directions.

    With c_ik = 1 - cos(f_i, p_k), i over all pixels of the batch and k over the classes:

        s2t = mean_i Σ_k softmax_k(z_i)_k c_ik      each pixel weighs the classes by its softmax over them
        t2s = mean_k Σ_i softmax_i(z_·k)_i c_ik     each class weighs the pixels by its softmax over them, so that
                                                    a rare class counts as much as road

    Args:
        feat: float (N, C, h, w), target features.
        logits: float (N, K, h, w), their logits, at the same resolution.
        prototypes: float (K, C), of any length.
        merge: for a batch that is spread over several processes: `merge(mass, mean)` turns each process's
            logsumexp_i(z_·k) and Σ_i softmax_i(z_·k)_i cos_ik, both (K,), into the latter over all pixels.

    Returns:
        (s2t, t2s), float scalars in [0, 2]. Gradient reaches feat and logits, and prototypes unless detached.

    Example:
        >>> feat, logits = torch.randn(2, 256, 8, 16), torch.randn(2, 19, 8, 16)
        >>> s2t, t2s = bidirectional_prototype_loss(feat, logits, torch.randn(19, 256))
    """
    cosine = cosine_map(feat, prototypes)
    logits = logits.to(cosine.dtype)
    s2t = 1 - (logits.softmax(1) * cosine).sum(1).mean()  # softmaxes sum to 1
    logits_by_class, cosine_by_class = (x.transpose(0, 1).flatten(1) for x in (logits, cosine))  # (K, N*h*w)
    of_class = (logits_by_class.softmax(1) * cosine_by_class).sum(1)
    if merge:
        of_class = merge(logits_by_class.logsumexp(1), of_class)
    return s2t, 1 - of_class.mean()
