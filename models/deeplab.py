"""DeepLabV2 as ProDA and PBAL use it: dilated ASPP, squeeze-excitation, a 256-channel feature, a linear classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import build_backbone

FEATURE_CHANNELS = 256
GROUPS = 32  # of GroupNorm in the head (as released)


class SqueezeExcitation(nn.Module):
    """Channel attention from the global mean, reduction 16 (as released)."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.se = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x.mean((2, 3)))[:, :, None, None]


class ASPP(nn.Module):
    """Parallel 1x1 and dilated 3x3 convolutions -> squeeze-excitation -> 3x3 convolution to the feature."""

    def __init__(self, in_channels: int, dilations: tuple[int, ...]):
        super().__init__()
        width = FEATURE_CHANNELS

        def norm_relu(conv: nn.Conv2d) -> nn.Sequential:
            return nn.Sequential(conv, nn.GroupNorm(GROUPS, width), nn.ReLU(inplace=True))

        self.branches = nn.ModuleList([norm_relu(nn.Conv2d(in_channels, width, 1))])
        self.branches.extend(norm_relu(nn.Conv2d(in_channels, width, 3, padding=d, dilation=d)) for d in dilations)
        channels = width * len(self.branches)
        self.bottleneck = nn.Sequential(
            SqueezeExcitation(channels), nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(GROUPS, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([branch(x) for branch in self.branches], 1))


class DeepLabV2(nn.Module):
    """The default architecture.

    Args:
        num_classes: K.
        backbone: see `models.backbone.build_backbone`.
        output_stride: 8 (as released) or 16.
        dropout: probability of dropping a whole feature channel before the classifier.

    Attributes:
        classifier: 1x1 convolution without bias; its weight holds the prototypes.
        mean, std: input statistics that the weights expect, for images in [0, 1].
    """

    def __init__(self, num_classes: int, backbone: str = "resnet101", output_stride: int = 8, dropout: float = 0.1):
        super().__init__()
        options = {} if backbone.startswith("timm/") else {"caffe": True}
        self.backbone = build_backbone(backbone, output_stride, **options)
        self.mean, self.std = self.backbone.mean, self.backbone.std
        # Dilations are in feature pixels: at stride 16, half of the released ones see the same part of the image.
        dilations = tuple(d * 8 // output_stride for d in (6, 12, 18, 24))
        self.head = ASPP(self.backbone.channels, dilations)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(FEATURE_CHANNELS, num_classes, 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised float (N, 3, H, W) -> {"feat": (N, 256, h, w), "logits": (N, K, h, w)}, h ~ H / output_stride.

        In training, "feat" is the feature after dropout (as released): it is what the classifier sees.
        """
        feat = self.dropout(self.head(self.backbone(x)["out"]))
        return {"feat": feat, "logits": self.classifier(feat)}


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear, align_corners=True: the one way in which maps reach image size (as released)."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)
