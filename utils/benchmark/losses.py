"""The losses of features, beside their plain form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.taxonomy import IGNORE
from loss import bidirectional_prototype_loss, prototype_contrast_loss
from utils.benchmark.timing import compare, report
from utils.config import Config

CLASSES, BATCH, CHANNELS = 19, 4, 256
FEATURES, LABELS = (64, 112), (512, 896)  # a crop of the released recipe at stride 8


def plain_bidirectional(feat: Tensor, logits: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """`bidirectional_prototype_loss` as one writes the equation down, as releases have it: pixels as rows, all
    normalised."""
    rows = F.normalize(feat.permute(0, 2, 3, 1).reshape(-1, feat.shape[1]), dim=1)
    cost = 1 - rows @ F.normalize(prototypes, dim=1).T  # (N*h*w, K)
    scores = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
    s2t = (scores.softmax(1) * cost).sum(1).mean()
    t2s = (scores.softmax(0) * cost).sum(0).mean()
    return s2t, t2s


def plain_contrast(feat: Tensor, labels: Tensor, prototypes: Tensor, temperature: float = 0.07) -> Tensor:
    """`prototype_contrast_loss` as one writes the equation down: pixels as rows, labels one-hot."""
    rows = F.normalize(feat.permute(0, 2, 3, 1).reshape(-1, feat.shape[1]), dim=1)
    similarity = rows @ F.normalize(prototypes, dim=1).T / temperature
    labels = F.interpolate(labels[:, None].float(), size=feat.shape[2:], mode="nearest").long().flatten()
    labelled = labels != IGNORE
    one_hot = F.one_hot(labels.where(labelled, 0), len(prototypes)).to(rows.dtype) * labelled[:, None]
    return -(one_hot * similarity.log_softmax(1)).sum() / len(rows)


def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and logits that ask for gradients, labels with a fifth ignored, prototypes."""
    draw = torch.Generator().manual_seed(0)
    feat = torch.randn(BATCH, CHANNELS, *FEATURES, generator=draw).to(device)
    logits = torch.randn(BATCH, CLASSES, *FEATURES, generator=draw).to(device)
    labels = torch.randint(0, CLASSES, (BATCH, *LABELS), generator=draw, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=draw) < 0.2] = IGNORE
    prototypes = torch.randn(CLASSES, CHANNELS, generator=draw)
    return feat, logits, labels.to(device), prototypes.to(device)


def run(cfg: Config, device: torch.device, repeats: int = 9) -> None:
    """Print a table for each loss and layout of the features: forward and backward."""
    feat, logits, labels, prototypes = inputs(device)
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        f, z = (x.detach().contiguous(memory_format=layout).requires_grad_() for x in (feat, logits))

        def trained(loss: Callable[[], Tensor], leaves: tuple[Tensor, Tensor] = (f, z)) -> Callable[[], None]:
            def call() -> None:
                loss().backward()
                for leaf in leaves:
                    leaf.grad = None

            return call

        def bidirectional(form: Callable, f: Tensor = f, z: Tensor = z) -> Callable[[], None]:
            return trained(lambda: sum(form(f, z, prototypes)))

        def contrast(form: Callable, f: Tensor = f) -> Callable[[], None]:
            return trained(lambda: form(f, labels, prototypes))

        pairs = {
            "bidirectional": [bidirectional(form) for form in (plain_bidirectional, bidirectional_prototype_loss)],
            "contrast": [contrast(form) for form in (plain_contrast, prototype_contrast_loss)],
        }
        for loss, (plain, here) in pairs.items():
            report(f"{loss}, {name}", compare({"plain": plain, "here": here}, device, repeats))
