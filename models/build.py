"""A network from its description, and its optimiser groups."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.backbone import NORMALIZATIONS, check_backbone
from models.deeplab import DeepLabPBAL, DeepLabV2

ARCHITECTURES = {"deeplabv2": DeepLabV2, "deeplab_pbal": DeepLabPBAL}
OUTPUT_STRIDE = {"deeplabv2": 8, "deeplab_pbal": 16}  # as released
DILATIONS = {"deeplabv2": (6, 12, 18, 24), "deeplab_pbal": (6, 12, 18)}  # as released, at the stride above


def default_stride(arch: str, backbone: str) -> int:
    """The released stride. A timm network that cannot be dilated has its own: a plain transformer its patch size,
    another 16 (deeplab_pbal: 32, as its decoder has a finer map too).

    Raises ValueError if timm has no such backbone.
    """
    return check_backbone(backbone, coarsest=2 * OUTPUT_STRIDE[arch]) or OUTPUT_STRIDE[arch]


def released_dilations(arch: str, output_stride: int) -> list[int]:
    """Dilations, in pixels of the backbone's output, that cover the same part of the image as the released ones."""
    return [max(1, d * OUTPUT_STRIDE[arch] // output_stride) for d in DILATIONS[arch]]


def build_model(
    arch: str,
    num_classes: int,
    backbone: str = "resnet101",
    output_stride: int | None = None,
    dropout: float = 0.1,
    normalization: str = "auto",
    bn_clr: bool = False,
    dilations: Sequence[int] | None = None,
) -> nn.Module:
    """A segmentation network with random weights, initialised as released (`models.initialization`).

    Args:
        arch: "deeplabv2" (ProDA) or "deeplab_pbal" (PBAL's release).
        num_classes: K, 1 to 255: 255 is the label of pixels without a class.
        backbone: resnet18 … resnet152, or timm/NAME.
        output_stride: of the backbone, 8 or 16, or what a network of timm's has; None = `default_stride`.
        dropout: probability before the classifier, in 0..1.
        normalization: of the input: "auto" (as the backbone's ImageNet weights need it), "imagenet", "half", "none".
        bn_clr: add a BatchNorm behind deeplabv2's backbone, as ProDA's students from SimCLR have it.
        dilations: of the head's 3x3 convolutions, in pixels of the backbone's output; None = `released_dilations`.

    Returns:
        A module that maps normalised images (N, 3, H, W) to {"feat": (N, 256, h, w), "logits": (N, K, h, w)}. Its
        `classifier` is the 1x1 convolution; `mean` and `std` are the input statistics for images in [0, 1].

    Raises:
        ValueError: an unknown architecture, backbone, output stride or normalization; too many classes; bn_clr with
            another architecture.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(ARCHITECTURES)}")
    if not 1 <= num_classes <= 255:
        raise ValueError(f"num_classes={num_classes} must be in 1..255")
    if normalization not in ("auto", *NORMALIZATIONS):
        raise ValueError(f"unknown normalization {normalization!r}; known are auto, {', '.join(NORMALIZATIONS)}")
    if bn_clr and arch != "deeplabv2":
        raise ValueError(f"bn_clr is a variant of deeplabv2, not of {arch}")
    variant = {"bn_clr": True} if bn_clr else {}
    output_stride = output_stride or default_stride(arch, backbone)
    dilations = released_dilations(arch, output_stride) if dilations is None else list(dilations)
    model = ARCHITECTURES[arch](num_classes, backbone, output_stride, dropout, dilations, **variant)
    model.output_stride, model.dilations = output_stride, dilations
    if normalization != "auto":
        model.mean, model.std = NORMALIZATIONS[normalization]
    return model


def parameter_groups(model: nn.Module, lr: float, head_factor: float, spare_vectors: bool = False) -> list[dict]:
    """Named optimiser groups: the backbone at lr, all else at head_factor * lr (as released); each parameter once.

    With `spare_vectors`, norms and biases are groups of their own, without weight decay, as transformers are trained.
    """
    head = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [
        {"name": "backbone", "params": list(model.backbone.parameters()), "lr": lr},
        {"name": "head", "params": head, "lr": lr * head_factor},
    ]
    if not spare_vectors:
        return groups
    matrices = [g | {"params": [p for p in g["params"] if p.ndim > 1]} for g in groups]
    vectors = [g | {"params": [p for p in g["params"] if p.ndim <= 1], "weight_decay": 0.0} for g in groups]
    return matrices + vectors
