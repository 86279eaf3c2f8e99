"""Pseudo labels on disk: a label *source* for the target dataset.

    <run>/labels/<image path below root>.png        train ids, IGNORE where the network was unsure
    <run>/confidence/<image path below root>.png    softmax maximum, 0..255
    <run>/manifest.json                             thresholds, kept fraction per class, checkpoint hash

The manifest is written last: a folder without it is unfinished.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from data.datasets import SegmentationDataset
from utils.config import UserError


def label_path(folder: Path, name: str) -> Path:
    """Where the label of image `name` (its path below root, no ending) is kept."""
    return folder / "labels" / f"{name}.png"


def confidence_path(folder: Path, name: str) -> Path:
    """Where the confidence of image `name` is kept."""
    return folder / "confidence" / f"{name}.png"


def write_png(path: Path, array: np.ndarray) -> None:
    """Save a uint8 (H, W) array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def clear(folder: Path) -> None:
    """Delete pseudo labels, finished or not; raises UserError if the folder holds anything else."""
    if not folder.exists():
        return
    foreign = sorted({p.name for p in folder.iterdir()} - {"labels", "confidence", "manifest.json"})
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which is no pseudo label: choose another name=")
    shutil.rmtree(folder)


def read_png(path: Path) -> np.ndarray:
    """The uint8 (H, W) array that `write_png` saved."""
    with Image.open(path) as picture:
        return np.array(picture)


def thresholds(histogram: np.ndarray, threshold: float, selection: str, keep: float) -> np.ndarray:
    """Least confidence, on the 0..255 scale, that a pixel of each class must have.

    Args:
        histogram: int (K, 256), pixels by predicted class and rounded confidence.
        threshold: the constant one, in 0..1 (ProDA, CAG: 0.95).
        selection: "constant", or "class_balanced": min(threshold, the level above which `keep` of the
            class's own pixels lie), so that a class that is never sure does not vanish.
        keep: that share, in 0..1.

    Returns:
        int (K,).
    """
    constant = np.full(len(histogram), np.ceil(threshold * 255), np.int64)
    if selection == "constant":
        return constant
    at_least = histogram[:, ::-1].cumsum(1)[:, ::-1]  # pixels with confidence >= level
    wanted = keep * histogram.sum(1, keepdims=True)
    # The highest level that still keeps the wanted share; level 0 keeps everything.
    own = 255 - np.argmax((at_least >= wanted)[:, ::-1], axis=1)
    return np.minimum(constant, own)


def read_manifest(folder: Path) -> dict:
    """The manifest of finished pseudo labels; raises UserError if there is none or it cannot be read."""
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"no pseudo labels: {path} does not exist; make them with `python gen_pseudo_labels.py` (same benchmark=, "
            f"runs=), or name the run that holds them with pseudo_labels="
        ) from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON; delete the folder and make the pseudo labels again") from None


def attach(target: SegmentationDataset, folder: Path) -> None:
    """Make a target dataset's pseudo labels its labels.

    Raises UserError if they are unfinished or one is missing.
    """
    read_manifest(folder)
    missing = [s.name for s in target.samples if not label_path(folder, s.name).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(target)} pseudo labels are missing in {folder}, first {missing[0]}")
    target.samples = [dataclasses.replace(s, label=label_path(folder, s.name)) for s in target.samples]
    target.lookup_table = np.arange(256, dtype=np.uint8)  # they are train ids already
