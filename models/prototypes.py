"""Prototypes are the classifier's own weights: no pass over the data, always in step with the network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.deeplab import FEATURE_CHANNELS


def classifier_prototypes(classifier: nn.Conv2d, stop_gradient: bool = True) -> Tensor:
    """Unit-length prototypes p_k = W_k / ||W_k||, float (K, C).

    Args:
        classifier: 1x1 convolution with weight (K, C, 1, 1).
        stop_gradient: True as in the paper: losses move features towards prototypes, not the reverse.
    """
    weight = classifier.weight.detach() if stop_gradient else classifier.weight
    return F.normalize(weight.flatten(1).float(), dim=1)


class Projection(nn.Module):
    """The paper's G: features and prototypes go through the same map before they are contrasted.

    No layer has a bias, so cosines behind it do not depend on the lengths of features and prototypes before it.

    Args:
        kind: "linear", or "mlp" with one hidden layer.
        channels: of features, prototypes, and the projection of both.
    """

    def __init__(self, kind: str, channels: int = FEATURE_CHANNELS):
        super().__init__()
        layers = [nn.Linear(channels, channels, bias=False)]
        if kind == "mlp":
            layers += [nn.ReLU(inplace=True), nn.Linear(channels, channels, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, feat: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, h, w) and (K, C) -> the same shapes."""
        return self.layers(feat.movedim(1, -1)).movedim(-1, 1), self.layers(prototypes)
