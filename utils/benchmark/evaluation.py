"""Evaluation and pseudo labels of one image: strip by strip against maps at image size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.pseudo_labels import Beside, write_png
from data.taxonomy import IGNORE
from models import build_model, upsample
from utils.benchmark.timing import compare, report
from utils.config import Config
from utils.evaluation.metrics import ConfusionMatrix
from utils.evaluation.prediction import normalized, predict_labels

CLASSES = 19
SIZE = (1024, 2048)  # of Cityscapes: height, width
IMAGES = 2  # one after the other, so that one's files can be written beside the next one's prediction


class FixedLogits(nn.Module):
    """In place of a network: logits that are there already, at the resolution of a real one's."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits}


def run(cfg: Config, device: torch.device) -> None:
    """Print what evaluation and pseudo labels cost behind a network (K = 19, 2048x1024, logits at stride 8), and with one
    in front, each with the network's own part as the last row.

    On a CPU the networks see a sixteenth of the area, to be done within a minute.
    """
    size = SIZE if device.type == "cuda" else tuple(side // 4 for side in SIZE)
    _compare(FixedLogits(_logits(device)), "nothing", SIZE, device, 3, True)
    for backbone in ("resnet18", "resnet101"):
        model = build_model("deeplabv2", CLASSES, backbone).to(device, memory_format=torch.channels_last).eval()
        _compare(model, backbone, size, device, 2, backbone == "resnet18")


def _logits(device: torch.device) -> Tensor:
    """Regions with soft borders, (1, K, 129, 257), as a ResNet at output stride 8 has them for 2048x1024."""
    random = torch.Generator().manual_seed(0)
    regions = torch.randn(1, CLASSES, 9, 17, generator=random) * 6
    return (upsample(regions, (129, 257)) + 0.3 * torch.randn(1, CLASSES, 129, 257, generator=random)).to(device)


def _compare(
    model: nn.Module, name: str, size: tuple[int, int], device: torch.device, repeats: int, pseudo_labels: bool
) -> None:
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=random).to(device)
    label = torch.randint(0, CLASSES + 1, (1, *size), dtype=torch.uint8, generator=random).to(device)
    label[label == CLASSES] = IGNORE

    def network(passes: int) -> None:
        for _ in range(passes):
            with torch.no_grad():
                model(normalized(image, model))

    what = f"{size[1]}x{size[0]}, network: {name}"
    variants = _evaluations(model, image, label) | {"network alone": lambda: network(1)}
    report(f"evaluation of one image, {what}", compare(variants, device, repeats), 1)
    if pseudo_labels:
        with tempfile.TemporaryDirectory() as folder:
            variants = _pseudo_labels(model, image, Path(folder)) | {"network alone": lambda: network(2 * IMAGES)}
            report(f"pseudo labels of {IMAGES} images, {what}", compare(variants, device, repeats), IMAGES)


def _probabilities(model: nn.Module, image: Tensor, mirrored: bool = False) -> Tensor:
    """At image size, in one piece."""
    x = normalized(image, model)
    with torch.no_grad():
        logits = model(x.flip(-1) if mirrored else x)["logits"]
    found = upsample(logits, image.shape[2:]).softmax(1)
    return found.flip(-1) if mirrored else found


def _evaluations(model: nn.Module, image: Tensor, label: Tensor) -> dict[str, Callable[[], object]]:
    def plain() -> np.ndarray:
        prediction = _probabilities(model, image).argmax(1).cpu().numpy()
        true = label.cpu().numpy()
        known = true != IGNORE
        return np.bincount(true[known].astype(np.int64) * CLASSES + prediction[known], minlength=CLASSES**2)

    confusion = ConfusionMatrix(CLASSES)

    def strips() -> None:
        prediction, _ = predict_labels(model, image)
        confusion.update(prediction, label)

    return {"at image size, counted by NumPy": plain, "in strips": strips}


def _pseudo_labels(model: nn.Module, image: Tensor, folder: Path) -> dict[str, Callable[[], object]]:
    def plain() -> None:
        for i in range(IMAGES):
            mean = (_probabilities(model, image) + _probabilities(model, image, True)) / 2
            confidence, label = (array.cpu().numpy()[0] for array in mean.max(1))
            for kind, array in (("confidence", np.round(255 * confidence)), ("label", label)):
                Image.fromarray(array.astype(np.uint8)).save(folder / f"plain_{kind}_{i}.png")

    def strips(write: Callable) -> None:
        for i in range(IMAGES):
            label, confidence = predict_labels(model, image, True, with_confidence=True)
            for kind, array in (("confidence", confidence), ("label", label)):
                write(write_png, folder / f"{kind}_{i}.png", array[0].cpu().numpy())

    def beside() -> None:
        with Beside() as write:
            strips(write)

    return {
        "at image size, files in between": plain,
        "in strips, files in between": lambda: strips(lambda call, *args: call(*args)),
        "in strips, files beside": beside,
    }
