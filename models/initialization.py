"""Initial weights of all layers outside the backbone, by architecture, as released.

Call as `module.apply(as_pbal)`. Both set layer by layer what torch's defaults would make several times smaller or
larger; normalisation layers keep torch's weight 1 and bias 0. Backbones keep torchvision's or timm's own initial
values, which pretrained weights replace; networks from scratch (toy) train with them.
"""

from __future__ import annotations

from torch import nn


def as_pbal(layer: nn.Module) -> None:
    """PBAL's release, segmentation head and discriminator: weights N(0, 2 / fan-in), biases 0."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def as_proda(layer: nn.Module) -> None:
    """ProDA: weights of convolutions N(0, 0.01²); biases, and squeeze-excitation's linear layers, torch's default."""
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, std=0.01)
