"""Scores from a confusion matrix that stays on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from data.taxonomy import IGNORE, ClassSet


class ConfusionMatrix:
    """Pixel counts, true class by predicted class: int64 (K, K), on the device of the first update."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.counts: Tensor | None = None

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count integer maps of one shape; pixels whose label is `IGNORE` are left out."""
        known = label != IGNORE
        pairs = label[known].long() * self.num_classes + prediction[known].long()
        counts = torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, -1)
        self.counts = counts if self.counts is None else self.counts + counts

    def scores(self, classes: ClassSet) -> dict:
        """{"miou", "iou": {class: value}, "pixel_accuracy"} and the class set's further averages, in percent,
        and "pixels" {class: labelled pixels}.

        A class that is neither in the labels nor predicted has IoU None and is left out of the averages.
        """
        counts = self.counts.double().cpu()
        hit, union = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
        iou = {name: (100 * hit[k] / union[k]).item() if union[k] > 0 else None for k, name in enumerate(classes.names)}
        result = {"miou": mean_over(iou, classes.names), "iou": iou}
        result |= {key: mean_over(iou, names) for key, names in classes.subsets.items()}
        pixels = dict(zip(classes.names, self.counts.sum(1).tolist()))
        return result | {"pixel_accuracy": (100 * hit.sum() / counts.sum()).item(), "pixels": pixels}


def mean_over(iou: dict[str, float | None], names: tuple[str, ...]) -> float:
    """Mean IoU over some classes, those without pixels left out."""
    values = [iou[n] for n in names if iou[n] is not None]
    return sum(values) / len(values) if values else float("nan")


def table(columns: dict[str, dict], classes: ClassSet) -> str:
    """Scores side by side: a row per class, then the averages, a column per entry of `columns`."""
    width = max(len(n) for n in (*classes.names, "pixel accuracy"))
    column_width = max(8, *(len(c) for c in columns))

    def line(name: str, values: list) -> str:
        cells = ("-" if v is None else v if isinstance(v, str) else f"{v:.1f}" for v in values)
        return f"{name:{width}}  " + "  ".join(f"{c:>{column_width}}" for c in cells)

    rows = [line("IoU in percent", list(columns))]
    rows += [line(name, [s["iou"][name] for s in columns.values()]) for name in classes.names]
    rows.append("-" * len(rows[0]))
    averages = {"mIoU": "miou", **{key: key for key in classes.subsets}, "pixel accuracy": "pixel_accuracy"}
    rows += [line(title, [s[key] for s in columns.values()]) for title, key in averages.items()]
    return "\n".join(rows)
