"""Networks: `build_model`, `load_weights`, `PatchDiscriminator`, classifier prototypes."""

from __future__ import annotations

from torch import nn

from models.backbone import IMAGENET_MEAN, IMAGENET_STD
from models.deeplab import DeepLabV2, upsample
from models.discriminator import PatchDiscriminator
from models.prototypes import classifier_prototypes
from models.weights import load_weights

__all__ = [
    "PatchDiscriminator",
    "build_model",
    "classifier_prototypes",
    "load_weights",
    "parameter_groups",
    "upsample",
]

NORMALIZATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def build_model(
    arch: str,
    num_classes: int,
    backbone: str = "resnet101",
    output_stride: int = 8,
    dropout: float = 0.1,
    normalization: str = "auto",
) -> nn.Module:
    """A segmentation network with random weights.

    Args:
        arch: "deeplabv2".
        num_classes: K.
        backbone: resnet18 … resnet152, or timm/NAME.
        output_stride: 8 or 16.
        dropout: before the classifier.
        normalization: "auto" (what the backbone's weights expect), "imagenet", "half" or "none".

    Returns:
        A module that maps normalised images (N, 3, H, W) to {"feat": (N, 256, h, w), "logits": (N, K, h, w)}; its
        `classifier` is the 1x1 convolution, `mean` and `std` the input statistics.

    Raises:
        ValueError: an unknown architecture or backbone.
    """
    if arch != "deeplabv2":
        raise ValueError(f"unknown architecture {arch!r}; known is 'deeplabv2'")
    model = DeepLabV2(num_classes, backbone, output_stride, dropout)
    if normalization != "auto":
        model.mean, model.std = NORMALIZATIONS[normalization]
    return model


def parameter_groups(model: nn.Module, lr: float, head_factor: float) -> list[dict]:
    """Named optimiser groups as released: the backbone at lr, all else at head_factor * lr; each parameter once."""
    backbone = list(model.backbone.parameters())
    inside = {id(p) for p in backbone}
    head = [p for p in model.parameters() if id(p) not in inside]
    return [
        {"name": "backbone", "params": backbone, "lr": lr},
        {"name": "head", "params": head, "lr": lr * head_factor},
    ]
