"""Pseudo labels on disk: a label *source* for the target dataset.

    <run>/labels/<image path below root>.png        train ids, IGNORE where the network was unsure
    <run>/confidence/<image path below root>.png    softmax maximum, 0..255
    <run>/manifest.json                             the checkpoint and its hash, config, thresholds and counts by class

The manifest is written last: a folder without it is unfinished.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from data.datasets import Sample, SegmentationDataset, mark_unknown
from data.taxonomy import IGNORE, ClassSet
from utils.config import UserError

MANIFEST = "manifest.json"
THREADS = min(8, os.cpu_count() or 1)  # that write files: compression is all they do, outside of Python's lock


def label_path(folder: Path, name: str) -> Path:
    """Where the label of image `name` (its path below root, no ending) is kept."""
    return folder / "labels" / f"{name}.png"


def confidence_path(folder: Path, name: str) -> Path:
    """Where the confidence of image `name` is kept."""
    return folder / "confidence" / f"{name}.png"


def write_png(path: Path, array: np.ndarray) -> None:
    """Save a uint8 array (H, W) or (H, W, 3); raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Runs are what label maps are made of: smaller than by the default search, confidences 6 % larger in a fifth of
        # the time.
        Image.fromarray(array).save(path, compress_type=zlib.Z_RLE)
    except OSError as error:  # a full disk, a read-only folder
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


class Beside:
    """Calls that threads work on while the caller goes on, a few at a time: `with Beside() as beside: beside(call, *args)`.

    The first error of a call is raised by a later one or at the end of the block, where all are waited for; what has
    not begun by then is dropped. If the queue is full, the caller waits: memory does not depend on how many calls
    there are.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(THREADS)
        self._pending: deque[Future] = deque()

    def __call__(self, call: Callable, *args: object) -> None:
        while len(self._pending) >= 2 * THREADS or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(call, *args))

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, error: type | None, *_: object) -> None:
        try:
            while self._pending and error is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


def clear(folder: Path) -> None:
    """Delete pseudo labels, finished or not; raises UserError if the folder holds anything else."""
    if not folder.exists():
        return
    foreign = sorted({p.name for p in folder.iterdir() if p.name[0] != "."} - {"labels", "confidence", MANIFEST})
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which is no pseudo label: choose another name=")
    (folder / MANIFEST).unlink(missing_ok=True)  # first: what is half deleted is unfinished
    for kind in ("labels", "confidence"):
        shutil.rmtree(folder / kind, ignore_errors=True)


def refuse_double_names(samples: list[Sample]) -> None:
    """UserError if two images differ in their endings alone: their pseudo labels would be one file."""
    first: dict[str, Path] = {}
    for sample in samples:
        if (other := first.setdefault(sample.name, sample.image)) != sample.image:
            raise UserError(f"{other} and {sample.image} would share one pseudo label: rename one of them")


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


def drop_unsure(folder: Path, name: str, limits: np.ndarray) -> None:
    """Make `IGNORE` of the pixels of one label whose confidence is below its class's limit, uint8 (K,)."""
    path = label_path(folder, name)
    labels = read_png(path)
    labels[read_png(confidence_path(folder, name)) < limits[labels]] = IGNORE
    write_png(path, labels)


def read_manifest(folder: Path) -> dict:
    """The manifest of finished pseudo labels; raises UserError if there is none or it cannot be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"no pseudo labels: {path} does not exist; make them with `python gen_pseudo_labels.py` (same benchmark=, "
            f"runs=), or name the run that holds them with pseudo_labels="
        ) from None
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not valid JSON; delete the folder and make the pseudo labels again")
    return manifest


def attach(target: SegmentationDataset, folder: Path, classes: ClassSet) -> None:
    """Make a target dataset's pseudo labels its labels; images that the generator left out are left out here too.

    Raises:
        UserError: they are unfinished, one is missing, two images share one, or they are of other classes.
    """
    manifest = read_manifest(folder)
    again = "make them again with `python gen_pseudo_labels.py train.restart=true`"
    if list(manifest.get("classes", {})) != list(classes.names):
        raise UserError(f"the pseudo labels in {folder} are of other classes; {again}")
    refuse_double_names(target.samples)
    left_out = set(manifest.get("left_out", []))
    samples = [s for s in target.samples if s.name not in left_out]
    missing = [s.name for s in samples if not _is_there(label_path(folder, s.name))]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(samples)} pseudo labels are missing in {folder}, first {missing[0]}; {again}"
        )
    target.samples = [dataclasses.replace(s, label=label_path(folder, s.name)) for s in samples]
    target.lookup_table = mark_unknown(np.arange(2**16).astype(np.uint8), {*range(len(classes)), IGNORE})  # train ids


def _is_there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
