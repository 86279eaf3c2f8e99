"""Scores from a confusion matrix that stays on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from data.taxonomy import ClassSet
from utils.engine import distributed


class ConfusionMatrix:
    """Pixel counts, true class by predicted class: int64 (K, K), on the device of the first update."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.counts: Tensor | None = None

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count integer maps of one shape; pixels whose label is `IGNORE` are left out."""
        k = self.num_classes
        rows = label.long().clamp(max=k)  # ignored pixels go to a row of their own: selecting pixels would synchronise
        counts = torch.bincount(rows.mul_(k).add_(prediction).flatten(), minlength=(k + 1) * k)[: k * k].view(k, k)
        self.counts = counts if self.counts is None else self.counts.add_(counts)

    def gather(self, device: torch.device) -> None:
        """Add up the counts of all processes, some of which may have none."""
        if self.counts is None:
            self.counts = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=device)
        self.counts = distributed.total(self.counts.contiguous())

    def scores(self, classes: ClassSet) -> dict:
        """Scores in percent, by name.

        Returns:
            miou: mean of iou; further averages of the class set (miou16, miou13) beside it.
            iou: {class: intersection over union}; None of a class that is neither in the labels nor predicted.
            left_out: classes whose IoU is None; no average counts them.
            accuracy: {class: recall}, None of a class that is not in the labels; macc: their mean.
            pixel_accuracy: share of the labelled pixels that is correct.
            pixels: {class: labelled pixels}.
            confusion: K rows of K pixel counts, true class by predicted class.
        """
        counts = self.counts.double().cpu()
        hit, pixels = counts.diag(), counts.sum(1)
        iou, accuracy = (
            {name: (100 * hit[k] / of[k]).item() if of[k] > 0 else None for k, name in enumerate(classes.names)}
            for of in (counts.sum(0) + pixels - hit, pixels)
        )
        return {
            "miou": mean_over(iou, classes.names),
            "iou": iou,
            "left_out": [name for name, value in iou.items() if value is None],
            **{key: mean_over(iou, names) for key, names in classes.subsets.items()},
            "accuracy": accuracy,
            "macc": mean_over(accuracy, classes.names),
            "pixel_accuracy": (100 * hit.sum() / counts.sum()).item(),
            "pixels": dict(zip(classes.names, self.counts.sum(1).tolist())),
            "confusion": self.counts.tolist(),
        }


def mean_over(values: dict[str, float | None], names: tuple[str, ...]) -> float:
    """Mean over some classes; those without a value are left out."""
    values = [values[n] for n in names if values[n] is not None]
    return sum(values) / len(values) if values else float("nan")


def left_out_note(scores: dict) -> str:
    """'mIoU over 17 of 19 classes: no pixel of train, bus', or '' if the mean counts every class."""
    iou = scores["iou"]
    missing = [name for name, value in iou.items() if value is None]
    return (
        f"mIoU over {len(iou) - len(missing)} of {len(iou)} classes: no pixel of {', '.join(missing)}"
        if missing
        else ""
    )


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
    notes = dict.fromkeys(note for s in columns.values() if (note := left_out_note(s)))
    return "\n".join([*rows, *notes])


def class_table(scores: dict, classes: ClassSet) -> str:
    """IoU, accuracy and pixels of each class, then their averages and the sum of pixels."""
    width = max(len(n) for n in (*classes.names, "pixel accuracy"))

    def line(name: str, *values: float | int | str | None) -> str:
        cells = ("-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values)
        return f"{name:{width}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (8, 10, 14)))

    rows = [line("percent", "IoU", "accuracy", "pixels")]
    rows += [line(n, scores["iou"][n], scores["accuracy"][n], scores["pixels"][n]) for n in classes.names]
    rows.append("-" * len(rows[0]))
    rows.append(line("mean", scores["miou"], scores["macc"], sum(scores["pixels"].values())))
    rows += [line(key, scores[key]) for key in classes.subsets]
    rows.append(line("pixel accuracy", "", scores["pixel_accuracy"]))
    return "\n".join(filter(None, [*rows, left_out_note(scores)]))


def confusion_table(scores: dict, classes: ClassSet) -> str:
    """Predictions of each class's pixels, in percent: a row per true class, a column per predicted train id."""
    width = max(len(n) for n in classes.names)
    rows = [f"{'true':{width}}    " + "".join(f"{k:>4}" for k in range(len(classes))) + "  predicted, percent"]
    for k, (name, counts) in enumerate(zip(classes.names, scores["confusion"])):
        total = sum(counts)
        cells = (f"{100 * c / total:4.0f}" if 200 * c >= total > 0 else "   ." for c in counts)
        rows.append(f"{name:{width}}{k:4}" + "".join(cells))
    return "\n".join(rows)
