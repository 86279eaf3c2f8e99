"""Scores from a confusion matrix that stays on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from data.taxonomy import ClassSet
from utils.engine import distributed


class ConfusionMatrix:
    """Pixel counts, true class by predicted class: int64 (K, K), on the device of the maps that it counts."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count integer maps of one shape; pixels whose label is `IGNORE` are left out."""
        k = len(self.counts)
        rows = label.long().clamp(max=k)  # ignored pixels go to a row of their own: selecting pixels would synchronise
        counts = torch.bincount(rows.mul_(k).add_(prediction).flatten(), minlength=(k + 1) * k)
        self.counts += counts[: k * k].view(k, k)

    def gather(self) -> None:
        """Add up the counts of all processes."""
        self.counts = distributed.total(self.counts)

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
        counts = self.counts.cpu().double()
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
    if not missing:
        return ""
    return f"mIoU over {len(iou) - len(missing)} of {len(iou)} classes: no pixel of {', '.join(missing)}"


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """Rows of texts below a head, in columns as wide as their widest text; the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = (
        "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()
        for name, *cells in [head, *rows]
    )
    return "\n".join(lines)


def cell(value: float | dict | None, digits: int = 1) -> str:
    """A number of a table, whole numbers without digits; "-" for None.

    {"mean", "std"} over seeds is shown as "mean ± std"; as the mean alone if the deviation is 0, as with one seed.
    """
    if value is None:
        return "-"
    if isinstance(value, dict):
        if value["mean"] is None:  # NaN, which JSON stores as null
            return "-"
        deviation = f" ± {value['std']:.{digits}f}" if value["std"] else ""
        return f"{value['mean']:.{digits}f}{deviation}"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def class_table(scores: dict, classes: ClassSet) -> str:
    """IoU, accuracy and pixels of each class, then their averages and the sum of pixels."""
    pixels = scores["pixels"]
    rows = [[n, cell(scores["iou"][n], 2), cell(scores["accuracy"][n], 2), cell(pixels[n])] for n in pixels]
    rows.append(["mean", cell(scores["miou"], 2), cell(scores["macc"], 2), str(sum(pixels.values()))])
    rows += [[key, cell(scores[key], 2), "", ""] for key in classes.subsets]
    rows.append(["pixel accuracy", "", cell(scores["pixel_accuracy"], 2), ""])
    return "\n".join(filter(None, [text_table(["percent", "IoU", "accuracy", "pixels"], rows), left_out_note(scores)]))
