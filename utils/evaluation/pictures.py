"""Pictures: label maps in colour, and panels with captions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.images import save_picture, show_name
from data.taxonomy import ClassSet
from utils.engine import distributed
from utils.evaluation.metrics import ConfusionMatrix


def colorize(label: Tensor, classes: ClassSet) -> np.ndarray:
    """uint8 (H, W) of train ids -> uint8 (H, W, 3) on the CPU, in the class set's palette; `IGNORE` is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes)] = classes.palette
    return table[label.cpu().numpy()]


def to_picture(image: Tensor) -> np.ndarray:
    """uint8 (3, H, W) -> uint8 (H, W, 3) on the CPU."""
    return image.permute(1, 2, 0).cpu().numpy()


def save_panel(path: Path, rows: list[list[np.ndarray]], captions: list[str], width: int = 320) -> np.ndarray:
    """Draw rows of equally many pictures under captions, each picture scaled to `width` px, and save the sheet as PNG.

    Args:
        rows: pictures, uint8 (H, W, 3); the first of each row is a photograph, the others are label maps.
        captions: one per column.

    Returns:
        The sheet, uint8 (H, W, 3).
    """
    gap, size = 4, 12 + 2 * len(captions)  # a page shrinks a wide sheet: its captions must stay legible
    head = size + 8
    shapes = [row[0].shape for row in rows]
    heights = [min(max(1, round(width * height / w)), 4 * width) for height, w, _ in shapes]  # some are but a line
    sheet_size = (len(captions) * (width + gap) - gap, head + sum(heights) + gap * (len(rows) - 1))
    sheet = Image.new("RGB", sheet_size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size)
    for column, caption in enumerate(captions):
        draw.text((column * (width + gap) + 4, 3), caption, fill="black", font=font)
    top = head
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            # Interpolation would mix the colours of a label map.
            resample = Image.Resampling.BILINEAR if column == 0 else Image.Resampling.NEAREST
            sheet.paste(Image.fromarray(picture).resize((width, height), resample), (column * (width + gap), top))
        top += height + gap
    if distributed.is_main():
        save_picture(path, sheet)
    return np.asarray(sheet)


class Gallery:
    """Collects the images of some dataset indices; a callback of `evaluate`."""

    def __init__(self, indices: list[int], classes: ClassSet):
        self.indices, self.classes = set(indices), classes
        self.shown: dict[int, list[np.ndarray]] = {}  # index -> [image, prediction, truth]

    def __call__(self, index: int, image: Tensor, prediction: Tensor, label: Tensor) -> None:
        if index in self.indices:
            self.draw(index, image, prediction, label)

    def draw(self, index: int, image: Tensor, prediction: Tensor, label: Tensor) -> None:
        """Take in an image."""
        self.shown[index] = [to_picture(image), colorize(prediction, self.classes), colorize(label, self.classes)]

    def gather(self) -> None:
        """Bring together the images of all processes."""
        self.shown = dict(sorted(entry for part in distributed.gathered(self.shown) for entry in part.items()))

    def save(self, path: Path) -> np.ndarray:
        """Panel of image | prediction | truth."""
        return save_panel(path, list(self.shown.values()), ["image", "prediction", "truth"])


class Worst(Gallery):
    """Collects the `count` images whose own mIoU is lowest, the worst first; `names` are those of all images."""

    def __init__(self, count: int, names: list[str], classes: ClassSet):
        super().__init__([], classes)
        self.count, self.names = count, names
        self.scores: dict[int, dict] = {}  # index -> {"image": name, "miou", "pixel_accuracy"}

    def __call__(self, index: int, image: Tensor, prediction: Tensor, label: Tensor) -> None:
        confusion = ConfusionMatrix(len(self.classes), prediction.device)
        confusion.update(prediction, label)
        scores = confusion.scores(self.classes)
        if math.isnan(scores["miou"]):  # no labelled pixel
            return
        shown = {key: scores[key] for key in ("miou", "pixel_accuracy")}
        self.scores[index] = {"image": show_name(self.names[index])} | shown
        self.draw(index, image, prediction, label)
        self._keep_worst()

    def _keep_worst(self) -> None:
        ranked = sorted(self.scores, key=lambda i: (self.scores[i]["miou"], i))[: self.count]
        self.scores, self.shown = ({i: entries[i] for i in ranked} for entries in (self.scores, self.shown))

    def gather(self) -> None:
        """Keep the worst images of all processes."""
        super().gather()
        self.scores = {i: score for part in distributed.gathered(self.scores) for i, score in part.items()}
        self._keep_worst()
