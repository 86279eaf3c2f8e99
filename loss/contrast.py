"""Prototypical contrast (PBAL stage II)."""

from __future__ import annotations

from torch import Tensor

from loss.cosine import cosine_map
from loss.segmentation import labels_at, summed_cross_entropy


def prototype_contrast_loss(feat: Tensor, labels: Tensor, prototypes: Tensor, temperature: float = 0.07) -> Tensor:
    """Cross-entropy of cosine similarities to the prototypes: L_pst.

        (1/M) Σ_{i labelled} -log( exp(cos(f_i, p_yi)/τ) / Σ_k exp(cos(f_i, p_k)/τ) )

    Args:
        feat: float (N, C, h, w).
        labels: integer (N, H, W), train ids or `IGNORE`; brought to feature resolution by nearest neighbour.
        prototypes: float (K, C), of any length.
        temperature: τ > 0.

    Returns:
        float scalar. M counts all pixels of the map, ignored ones included (as released), so an image with few pseudo
        labels weighs less.

    Example:
        >>> feat, labels = torch.randn(2, 256, 8, 16), torch.randint(0, 19, (2, 64, 128))
        >>> prototype_contrast_loss(feat, labels, torch.randn(19, 256)).backward()
    """
    labels = labels_at(labels, feat.shape[2:]).long()
    similarity = cosine_map(feat, prototypes) / temperature
    return summed_cross_entropy(similarity, labels) / labels.numel()
