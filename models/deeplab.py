"""The two published architectures: a backbone, a head that gives a 256-channel feature, a linear classifier.

`DeepLabV2` is ProDA's and the default; `DeepLabPBAL` is what PBAL's published checkpoints hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import Conv2dNormActivation

from models.backbone import build_backbone
from models.initialization import as_pbal, as_proda

FEATURE_CHANNELS = 256
GROUPS = 32  # of GroupNorm in DeepLabV2's head (as released)
LOW_CHANNELS = 48  # that DeepLabPBAL's decoder takes from the first stage (as released)


class SqueezeExcitation(nn.Module):
    """Channel attention from the global mean, reduction 16 (as released)."""

    def __init__(self, channels: int):
        super().__init__()
        less = channels // 16
        self.se = nn.Sequential(
            nn.Linear(channels, less), nn.ReLU(inplace=True), nn.Linear(less, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x.mean((2, 3)))[:, :, None, None]


class ASPP(nn.Module):
    """Parallel 1x1 and dilated 3x3 convolutions -> squeeze-excitation -> 3x3 convolution to the feature.

    With `bn_clr`, one more BatchNorm on the backbone's output: it brings SimCLR's features to a scale (ProDA).
    """

    def __init__(self, in_channels: int, dilations: Sequence[int], bn_clr: bool = False):
        super().__init__()
        width = FEATURE_CHANNELS
        options = {"norm_layer": functools.partial(nn.GroupNorm, GROUPS), "bias": True}
        self.bn_clr = nn.BatchNorm2d(in_channels) if bn_clr else nn.Identity()
        self.branches = nn.ModuleList([Conv2dNormActivation(in_channels, width, 1, **options)])
        self.branches.extend(Conv2dNormActivation(in_channels, width, 3, dilation=d, **options) for d in dilations)
        channels = width * len(self.branches)
        self.bottleneck = nn.Sequential(
            SqueezeExcitation(channels), nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(GROUPS, width)
        )

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        """The backbone's maps -> (N, 256, h, w) at the resolution of "out"."""
        x = self.bn_clr(maps["out"])
        return self.bottleneck(torch.cat([branch(x) for branch in self.branches], 1))


class ASPPDecoder(nn.Module):
    """ASPP with image pooling, then a decoder that joins it with the first stage's output at stride 4."""

    def __init__(self, in_channels: int, low_channels: int, dilations: Sequence[int]):
        super().__init__()
        width = FEATURE_CHANNELS
        self.branches = nn.ModuleList([Conv2dNormActivation(in_channels, width, 1)])
        self.branches.extend(Conv2dNormActivation(in_channels, width, 3, dilation=d) for d in dilations)
        self.pooled = Conv2dNormActivation(in_channels, width, 1)
        self.project = Conv2dNormActivation(width * (len(self.branches) + 1), width, 1)
        self.low = Conv2dNormActivation(low_channels, LOW_CHANNELS, 1)
        self.fuse = Conv2dNormActivation(width + LOW_CHANNELS, width, 3)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        """The backbone's maps -> (N, 256, h, w) at the resolution of "low"."""
        x, low = maps["out"], self.low(maps["low"])
        pooled = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        x = self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))
        return self.fuse(torch.cat([upsample(x, low.shape[2:]), low], 1))


class DeepLab(nn.Module):
    """What both architectures share.

    Attributes:
        backbone: see `models.backbone`.
        classifier: 1x1 convolution; its weight holds the prototypes.
        mean, std: input statistics that the weights expect, for images in [0, 1].
    """

    initialize: Callable[[nn.Module], None]  # of one layer outside the backbone; see `models.initialization`
    class_names: list[str] | None = None  # in train-id order, where `load_model`'s file holds them

    def __init__(self, backbone: nn.Module, head: nn.Module, dropout: nn.Module, classifier: nn.Conv2d):
        super().__init__()
        self.backbone, self.head, self.dropout, self.classifier = backbone, head, dropout, classifier
        self.mean, self.std = backbone.mean, backbone.std
        for part in (head, classifier):
            part.apply(self.initialize)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised float (N, 3, H, W) -> {"feat": (N, 256, h, w), "logits": (N, K, h, w)}.

        In training, "feat" is the feature after dropout (as released): it is what the classifier sees.
        """
        feat = self.dropout(self.head(self.backbone(x)))
        logits = self.classifier(feat).contiguous()  # no longer channels_last: losses at full size are faster so
        return {"feat": feat, "logits": logits}


class DeepLabV2(DeepLab):
    """ProDA's DeepLabV2, the default: Caffe-style ResNet, GroupNorm head, classifier without bias; h ~ H / stride.

    Arguments are those of `build_model`. Dropout drops whole channels of the feature.
    """

    arch = "deeplabv2"
    initialize = staticmethod(as_proda)

    def __init__(
        self,
        num_classes: int,
        backbone: str,
        output_stride: int,
        dropout: float,
        dilations: Sequence[int],
        bn_clr: bool = False,
    ):
        net = build_backbone(backbone, output_stride, caffe=True)
        head = ASPP(net.channels, dilations, bn_clr)
        super().__init__(net, head, nn.Dropout2d(dropout), nn.Conv2d(FEATURE_CHANNELS, num_classes, 1, bias=False))


class DeepLabPBAL(DeepLab):
    """The network of PBAL's release: ASPP and decoder with BatchNorm, classifier with bias; h ~ H / 4.

    Arguments are those of `build_model`. Dropout drops single values of the feature. At output stride 16, the blocks of
    the ResNet's last stage have dilations 2, 4, 8.
    """

    arch = "deeplab_pbal"
    initialize = staticmethod(as_pbal)

    def __init__(self, num_classes: int, backbone: str, output_stride: int, dropout: float, dilations: Sequence[int]):
        finer = 16 // output_stride
        net = build_backbone(backbone, output_stride, last_dilations=tuple(d * finer for d in (2, 4, 8)))
        head = ASPPDecoder(net.channels, net.low_channels, dilations)
        super().__init__(net, head, nn.Dropout(dropout), nn.Conv2d(FEATURE_CHANNELS, num_classes, 1))


ROWS = 64  # image rows whose class maps exist at one time


def upsampled_rows(maps: Tensor, size: tuple[int, int] | torch.Size) -> Iterator[tuple[slice, Tensor]]:
    """`upsample` of float maps (K, h, w) to (height, width): yields a slice of rows, `ROWS` at most, and their maps,
    float (K, rows, W)."""
    height, width = size
    tall = upsample(maps[None], (height, maps.shape[2]))
    for start in range(0, height, ROWS):
        rows = slice(start, min(start + ROWS, height))
        yield rows, upsample(tall[:, :, rows], (rows.stop - rows.start, width))[0]


def upsample(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Float maps (N, K, h, w) as (N, K, H, W) of `size` (H, W): bilinear, align_corners=True.

    The one way in which maps reach another size (as released).
    """
    # In channels_last, which decoders have, torch's own gradient is fast; torch.jit cannot save a Function.
    if torch.is_grad_enabled() and maps.requires_grad and maps.is_contiguous() and not torch.jit.is_tracing():
        return _Upsample.apply(maps, tuple(size))
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


class _Upsample(torch.autograd.Function):
    """With the gradient as two matrix products: torch's own takes several times as long, and its sums are not
    repeatable on a GPU."""

    @staticmethod
    def forward(ctx, maps: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.before = maps.shape[2:]
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        exact = torch.promote_types(gradient.dtype, torch.float32)
        rows, columns = (  # [i, j]: weight of old row, or column, i in new one j
            F.interpolate(
                torch.eye(old, dtype=exact, device=gradient.device)[None], size=new, mode="linear", align_corners=True
            )[0]
            for old, new in zip(ctx.before, gradient.shape[2:])
        )
        with torch.autocast(gradient.device.type, enabled=False):
            return (rows @ (gradient.to(exact) @ columns.T)).to(gradient.dtype), None
