"""Prototypes are the classifier's own weights: no pass over the data, always in step with the network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def classifier_prototypes(classifier: nn.Conv2d, stop_gradient: bool = True) -> Tensor:
    """Unit-length prototypes p_k = W_k / ||W_k||, float (K, C).

    Args:
        classifier: 1x1 convolution with weight (K, C, 1, 1).
        stop_gradient: True as in the paper: losses move features towards prototypes, not the reverse.
    """
    weight = classifier.weight.detach() if stop_gradient else classifier.weight
    return F.normalize(weight.flatten(1).float(), dim=1)
