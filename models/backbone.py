"""Feature extractors: torchvision's ResNets, re-strided and dilated to output stride 8 or 16, or timm's networks.

Every backbone maps (N, 3, H, W) to {"low": the map at stride 4 (or the finest), "out": the last stage's output} and has
`channels` (of "out"), `low_channels`, and `mean` and `std`, the input statistics of its ImageNet weights.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZATIONS = {  # mean and std of images in [0, 1], by the name that model.normalization has for them
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
SEGMENT = 3  # blocks that are computed again together: in a ResNet-101, the fewest activations at once


@contextlib.contextmanager
def statistics_kept(*networks: nn.Module) -> Iterator[None]:
    """Inside, training-mode BatchNorm leaves its running statistics alone.

    For backward passes through networks with checkpointing: a batch would be counted again when it is computed again.
    """
    norms = [m for network in networks for m in network.modules() if isinstance(m, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in before:  # by weight 0: without running statistics at all, a layer would save other tensors
        norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros_like(count)
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def _recomputed(stage: nn.Sequential, x: Tensor) -> Tensor:
    """`stage(x)`, of which only the inputs of every few blocks are kept for the backward pass."""
    for start in range(0, len(stage), SEGMENT):
        x = checkpoint(stage[start : start + SEGMENT], x, use_reentrant=False)
    return x


class ResNet(nn.Module):
    """torchvision's ResNet without its pooling and classifier.

    Args:
        name: resnet18 … resnet152.
        output_stride: 8 or 16; strides of the last stages become dilations.
        caffe: as ProDA's DeepLabV2: the stride of a bottleneck sits on its first 1x1 convolution, and max-pooling
            rounds up. Otherwise as torchvision: on the 3x3 convolution, rounding down.
        last_dilations: dilations of the last stage's blocks, in place of those that the output stride implies.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, name: str, output_stride: int = 8, caffe: bool = False, last_dilations: tuple = ()):
        super().__init__()
        net = getattr(torchvision.models, name)(weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.channels, self.low_channels = net.fc.in_features, net.fc.in_features // 8
        self.checkpointing = False
        self.maxpool.ceil_mode = caffe
        stride3, dilation3, dilation4 = {8: (1, 2, 4), 16: (2, 1, 2)}[output_stride]
        _set_geometry(self.layer2, 2, [1], caffe)
        _set_geometry(self.layer3, stride3, [dilation3], caffe)
        _set_geometry(self.layer4, 1, list(last_dilations) or [dilation4], caffe)

    def set_checkpointing(self) -> None:
        """Compute activations again in the backward pass, which then belongs inside `statistics_kept`."""
        self.checkpointing = True

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """float (N, 3, H, W) -> {"low": (N, low_channels, ~H/4, ~W/4), "out": (N, channels, ~H/os, ~W/os)}."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = _recomputed(stage, x) if self.checkpointing and torch.is_grad_enabled() else stage(x)
            maps.append(x)
        return {"low": maps[0], "out": x}


def _set_geometry(stage: nn.Sequential, stride: int, dilations: list[int], caffe: bool) -> None:
    """Give a ResNet stage its stride (first block) and the dilation of each block's 3x3 convolutions."""
    for i, block in enumerate(stage):
        block_stride = stride if i == 0 else 1
        dilation = dilations[min(i, len(dilations) - 1)]
        convs = [m for m in block.children() if isinstance(m, nn.Conv2d)]
        strided = convs[0] if caffe or len(convs) == 2 else convs[1]
        for conv in convs:
            conv.stride = (block_stride, block_stride) if conv is strided else (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation, dilation)
        if block.downsample is not None:
            block.downsample[0].stride = (block_stride, block_stride)


def import_timm(name: str = "") -> ModuleType:
    """timm, which networks timm/NAME and .safetensors files need; ValueError if it, or such a network, is missing."""
    try:
        import timm
    except ImportError:
        what = f"model.backbone=timm/{name}" if name else "a .safetensors file"
        raise ValueError(f"{what} needs timm: pip install timm") from None
    if name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 1, 0)
        raise ValueError(f"model.backbone: timm {timm.__version__} has no model {name!r}; nearest is {near[0]!r}")
    return timm


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


class TimmBackbone(nn.Module):
    """Any timm network that gives feature maps of images of any size.

    Networks that timm can dilate are brought to the output stride. Others end at the stage that has it.
    The maps of a plain transformer all have the stride of its patches; its last norm is applied to each. "low" is the
    map at stride 4, or the finest one if all are coarser.

    Args:
        name: timm's, with or without the tag of its weights.
        output_stride: of "out"; None = 16 if the network can be dilated, else its own: the coarsest up to `coarsest`.

    Attributes:
        dilated: whether timm brought the network to the output stride.
        patch: images are padded to multiples of it, on the right and below; 1 = never.

    Raises:
        ValueError: timm is not installed or does not know the name; the network has no maps, or none at that stride.
    """

    def __init__(self, name: str, output_stride: int | None = 16, coarsest: int = 16):
        super().__init__()
        timm = import_timm(name)
        self.name, self.dilated, self.patch = name, True, 1
        try:
            self.net = timm.create_model(name, features_only=True, output_stride=output_stride or 16)
        except Exception:  # timm's networks refuse in many ways
            self.dilated = False
            try:
                self.net = self._undilated(timm, output_stride, coarsest)
            except Exception as error:
                raise ValueError(f"model.backbone=timm/{name} cannot give feature maps: {_reason(error)}") from None
        reductions, channels = self.net.feature_info.reduction(), self.net.feature_info.channels()
        self.output_stride = reductions[-1]
        if output_stride not in (None, self.output_stride):
            own = ", ".join(str(r) for r in sorted(set(reductions)) if r >= 4)
            raise ValueError(
                f"model.backbone=timm/{name} cannot give features at stride {output_stride}: timm cannot dilate it, "
                f"and its own strides are {own}"
            )
        self.low_index = next(i for i, reduction in enumerate(reductions) if reduction >= 4)
        self.channels, self.low_channels = channels[-1], channels[self.low_index]
        data = timm.get_pretrained_cfg(name)
        self.mean, self.std = (tuple(data.mean), tuple(data.std)) if data else (IMAGENET_MEAN, IMAGENET_STD)

    def _undilated(self, timm: ModuleType, output_stride: int | None, coarsest: int) -> nn.Module:
        """The network up to its last map at the output stride, or all of it if it has none there."""
        options = {"features_only": True, "dynamic_img_size": True}
        with torch.device("meta"):
            try:
                net = timm.create_model(self.name, **options)
            except TypeError:  # networks that take images of any size unasked do not know the word
                del options["dynamic_img_size"]
                net = timm.create_model(self.name, **options)
        reductions = net.feature_info.reduction()
        self.patch = reductions[0]
        if hasattr(net, "model") and len(set(reductions)) == 1:  # timm cuts off the last norm of a plain transformer
            whole = timm.create_model(self.name, **options | {"features_only": False, "num_classes": 0})
            return type(net)(whole, out_indices=len(reductions), norm=True)
        fits = [i for i, r in enumerate(reductions) if (r <= coarsest if output_stride is None else r == output_stride)]
        last = fits[-1] if fits else len(reductions) - 1
        return timm.create_model(self.name, **options, out_indices=tuple(net.feature_info.out_indices[: last + 1]))

    def set_checkpointing(self) -> None:
        """As `ResNet.set_checkpointing`, in the way that timm has for the network; ValueError if it has none."""
        try:
            getattr(self.net, "model", self.net).set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise ValueError("train.checkpointing: timm offers none for this model.backbone") from None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """As `ResNet.forward`."""
        if self.patch > 1:
            x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        maps = self.net(x)
        if getattr(self.net, "output_fmt", "") == "NHWC":
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return {"low": maps[self.low_index], "out": maps[-1]}


@functools.lru_cache
@torch.no_grad()
def check_backbone(name: str, output_stride: int | None = None, coarsest: int = 16) -> int | None:
    """Raise ValueError if timm has no such network, or one that cannot be used: only building and using it shows.

    Arguments are those of `TimmBackbone`.

    Returns:
        The output stride of a network that cannot be dilated, None for all others.
    """
    if not name.startswith("timm/"):
        return None
    name = name.removeprefix("timm/")
    try:
        with torch.device("meta"):  # shapes alone: takes no time, and leaves the random streams alone
            net = TimmBackbone(name, output_stride, coarsest).eval()
            net(torch.zeros(1, 3, 65, 99))
    except ValueError:
        raise
    except Exception as error:  # timm's networks refuse in many ways
        raise ValueError(
            f"model.backbone=timm/{name} cannot give features of images of any size: {_reason(error)}"
        ) from None
    return None if net.dilated else net.output_stride


def build_backbone(name: str, output_stride: int, **resnet_options) -> nn.Module:
    """`resnet50` or `timm/NAME`; other options are `ResNet`'s alone. Raises ValueError if there is no such network."""
    if name.startswith("timm/"):
        return TimmBackbone(name.removeprefix("timm/"), output_stride)
    if output_stride not in (8, 16):
        raise ValueError(f"output_stride={output_stride!r} is neither 8 nor 16")
    if not (re.fullmatch(r"resnet\d+", name) and hasattr(torchvision.models, name)):
        raise ValueError(f"unknown backbone {name!r}: resnet18 to resnet152, or timm/NAME")
    return ResNet(name, output_stride, **resnet_options)
