"""Predictions as files: in colour, over the image, as train ids and as label ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image
from torch import Tensor

from data.datasets import SegmentationDataset, resize_label
from data.images import read_image, save_picture
from data.pseudo_labels import UNFINISHED, put_in_place, write_png
from data.taxonomy import ClassSet
from utils.engine.distributed import is_main, wait
from utils.evaluation.pictures import colorize, to_picture

KINDS = ("color", "overlay", "train_ids", "label_ids")


class Exporter:
    """Writes each prediction at the size of its image file; a callback of `evaluate`.

        <folder>/color/<name>.png            the class set's palette
        <folder>/overlay/<name>.jpg          the same, half transparent over the image
        <folder>/train_ids/<name>.png        8-bit, as the network numbers the classes
        <folder>/train_ids/classes.json      {train id: class name}
        <folder>/label_ids/<name>.png        8-bit, or 16-bit for ids above 255, as the dataset does; Cityscapes'
                                             server and scorer read these

    A name is the image's path below its root, without ending. Photographs that EXIF turns are written upright.

    Args:
        folder: maps of an earlier export in it are replaced by `finish`.
        dataset: where the predicted images are from.
        id_to_name: numbering of label_ids, {label id: class name}.
    """

    def __init__(self, folder: Path, dataset: SegmentationDataset, classes: ClassSet, id_to_name: dict[int, str]):
        self.folder, self.dataset, self.classes = folder, dataset, classes
        self.unfinished = folder / UNFINISHED
        self.label_ids = classes.inverse_table(id_to_name)
        if is_main():
            shutil.rmtree(self.unfinished, ignore_errors=True)
            (self.unfinished / "train_ids").mkdir(parents=True)
            names = json.dumps(dict(enumerate(classes.names)), indent=2, ensure_ascii=False)
            (self.unfinished / "train_ids" / "classes.json").write_text(f"{names}\n", encoding="utf-8")
        wait()

    def finish(self) -> None:
        """Put the maps in place of an earlier export's, when every process has written its own."""
        wait()
        if is_main():
            put_in_place(self.folder, KINDS)
        wait()

    def __call__(self, index: int, image: Tensor, prediction: Tensor, label: Tensor | None = None) -> None:
        sample = self.dataset.samples[index]
        prediction = prediction.cpu()
        if self.dataset.size:  # the network saw a resized image
            image = read_image(sample.image)
            prediction = resize_label(prediction, image.shape[1:])
        train_ids, color = prediction.numpy(), colorize(prediction, self.classes)
        for kind, array in (("color", color), ("train_ids", train_ids), ("label_ids", self.label_ids[train_ids])):
            write_png(self.unfinished / kind / f"{sample.name}.png", array)
        blend = Image.blend(Image.fromarray(to_picture(image)), Image.fromarray(color), 0.5)
        save_picture(self.unfinished / "overlay" / f"{sample.name}.jpg", blend, quality=90)
