"""Pseudo labels on disk: a label *source* for the target dataset.

    <run>/labels/<image path below root>.png        train ids, IGNORE where the network was unsure
    <run>/confidence/<image path below root>.png    largest class probability, 0..255
    <run>/manifest.json                             the checkpoint and its hash, config, thresholds and counts by class

The manifest is written last: a folder without it is unfinished.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.datasets import SegmentationDataset, fingerprint
from data.images import save_picture
from data.taxonomy import IGNORE, ClassSet
from utils.config import UserError

MANIFEST = "manifest.json"
KINDS = ("labels", "confidence")
UNFINISHED = ".unfinished"  # folder below the run's, in which they are made
THREADS = min(8, os.cpu_count() or 1)  # that write files: PNG compression runs outside of Python's lock


def path_of(folder: Path, kind: str, name: str) -> Path:
    """File of one of `KINDS` of image `name` (its path below root, no ending)."""
    return folder / kind / f"{name}.png"


def write_png(path: Path, array: np.ndarray) -> None:
    """Save an array uint8 or uint16 (H, W), or uint8 (H, W, 3); raises UserError if it cannot be written."""
    # Label maps consist of runs: run-length encoding makes them smaller than the default search does. Confidences get
    # 6 % larger, in a fifth of the time.
    save_picture(path, Image.fromarray(array), compress_type=zlib.Z_RLE)


def begin(folder: Path) -> None:
    """Empty `UNFINISHED`; finished labels beside it stay. UserError if `folder` holds anything else."""
    foreign = sorted({p.name for p in folder.iterdir() if p.name[0] != "."} - {*KINDS, MANIFEST})
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which is not a pseudo label: choose another name=")
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def finish(folder: Path) -> None:
    """Put the labels in `UNFINISHED` in place of those that were there; the manifest is still to be written."""
    (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-replaced folder must count as unfinished
    put_in_place(folder, KINDS)


def put_in_place(folder: Path, kinds: Iterable[str]) -> None:
    """Move the folders `kinds` from `UNFINISHED` to `folder`, in place of those that were there."""
    for kind in kinds:
        shutil.rmtree(folder / kind, ignore_errors=True)
        os.replace(folder / UNFINISHED / kind, folder / kind)
    (folder / UNFINISHED).rmdir()


def confidence_levels(confidence: Tensor, threshold: float) -> Tensor:
    """Confidences in 0..1, float (...), as uint8 levels 0..255.

    A level says exactly whether the confidence reaches `threshold`: from `ceil(255 threshold)` on it does. All other
    levels are rounded, so level l stands for a confidence of at least (l - 0.5) / 255.
    """
    limit = math.ceil(255 * threshold)
    levels = confidence.mul(255).round_()
    return torch.where(confidence >= threshold, levels.clamp(min=limit), levels.clamp(max=limit - 1)).to(torch.uint8)


def level_limits(histogram: np.ndarray, threshold: float, selection: str, keep: float) -> np.ndarray:
    """Least confidence level, 0..255, that a pixel of each class must have.

    Args:
        histogram: int (K, 256), pixels by predicted class and level, see `confidence_levels`.
        threshold: the constant one, in 0..1 (ProDA, CAG: 0.95).
        selection: "constant", or "class_balanced": min(threshold, the level above which `keep` of the class's own
            pixels lie), so that a class of low confidence does not vanish.
        keep: that share, in 0..1.

    Returns:
        int (K,).
    """
    constant = np.full(len(histogram), math.ceil(255 * threshold), np.int64)
    if selection == "constant":
        return constant
    at_least = histogram[:, ::-1].cumsum(1)[:, ::-1]  # pixels with confidence >= level
    wanted = keep * histogram.sum(1, keepdims=True)
    # The highest level that still keeps the wanted share; level 0 keeps everything.
    own = 255 - np.argmax((at_least >= wanted)[:, ::-1], axis=1)
    return np.minimum(constant, own)


def thresholds_of(limits: np.ndarray, threshold: float) -> list[float]:
    """The confidences, in 0..1, that levels from `level_limits` stand for."""
    own = np.maximum(0, (limits - 0.5) / 255)
    return np.where(limits == math.ceil(255 * threshold), threshold, own).tolist()


def drop_unsure(folder: Path, names: Iterable[str], limits: np.ndarray) -> None:
    """Set the pixels of labels to `IGNORE` whose confidence level is below the limit of their class, int (K,)."""

    def drop(name: str) -> None:
        labels, levels = (np.array(Image.open(path_of(folder, kind, name))) for kind in KINDS)
        labels[levels < limits[labels]] = IGNORE
        write_png(path_of(folder, "labels", name), labels)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(drop, names))  # raises what a call raised


def statistics(
    histogram: np.ndarray, limits: np.ndarray, names: Sequence[str], threshold: float, highest: float
) -> dict:
    """Thresholds and pixel counts by class, as the manifest has them.

    Args:
        histogram, limits, threshold: see `level_limits`.
        highest: the highest confidence of all pixels.

    Raises:
        UserError: no pixel is kept.
    """
    predicted = histogram.sum(1)
    kept = (histogram * (np.arange(256) >= limits[:, None])).sum(1)
    if not kept.any():
        raise UserError(
            f"no pixel of any class reaches pseudo.threshold={threshold}; the highest confidence is {highest:.6g}: "
            "lower the threshold, or take pseudo.selection=class_balanced"
        )
    columns = zip(names, thresholds_of(limits, threshold), predicted.tolist(), kept.tolist())
    by_class = {name: {"threshold": t, "predicted": p, "kept": k} for name, t, p, k in columns}
    return {"kept": kept.sum() / predicted.sum(), "classes": by_class}


def read_manifest(folder: Path) -> dict:
    """The manifest of finished pseudo labels; raises UserError if there is none or it cannot be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        name = "" if folder.name == "pseudo_labels" else f" name={folder.name}"
        raise UserError(
            f"no pseudo labels: {path} does not exist; make them with `python gen_pseudo_labels.py{name}` (same "
            "benchmark=, runs=), or name the run that holds them with pseudo_labels="
        ) from None
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not valid JSON; delete the folder and make the pseudo labels again")
    return manifest


def finished(folder: Path, wanted: dict, replace: bool) -> dict | None:
    """The manifest of a finished folder made with the settings `wanted`, None if there is nothing to keep.

    Raises UserError if the folder holds pseudo labels of other settings, unless `replace`.
    """
    if replace or not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    changes = ", ".join(f"{k}: {manifest.get(k)} -> {v}" for k, v in wanted.items() if manifest.get(k) != v)
    if changes:
        raise UserError(
            f"{folder} holds other pseudo labels ({changes}); choose a name=, or replace them with train.restart=true"
        )
    return manifest


def attach(target: SegmentationDataset, folder: Path, classes: ClassSet) -> None:
    """Make the pseudo labels the labels of a target dataset, without the images that the generator left out.

    Raises:
        UserError: they are unfinished, one is missing, or they are of other images or classes.
    """
    manifest = read_manifest(folder)
    again = "delete this folder and make them again, by the command that made them"
    if list(manifest.get("classes", {})) != list(classes.names):
        raise UserError(f"the pseudo labels in {folder} are of other classes; {again}")
    made_of, found = manifest.get("files"), fingerprint(target.samples)
    if made_of != found:
        raise UserError(f"the pseudo labels in {folder} are of other images ({made_of}, not {found}); {again}")
    left_out = set(manifest.get("left_out", []))
    kept = [s for s in target.samples if s.name not in left_out]
    samples = [dataclasses.replace(s, label=path_of(folder, "labels", s.name)) for s in kept]
    missing = [s.name for s in samples if not (s.label.is_file() and s.label.stat().st_size)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(samples)} pseudo labels are missing in {folder}, first {missing[0]}; {again}"
        )
    target.samples, target.has_pseudo_labels = samples, True
    train_ids = dict(enumerate(classes.names))
    target.lookup_table = classes.lookup_table(train_ids, {*train_ids, IGNORE})
