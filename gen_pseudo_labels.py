"""Pseudo labels of the target's training images, by the BPL model.

    python gen_pseudo_labels.py                                            GTA5 -> Cityscapes
    python gen_pseudo_labels.py benchmark=synthia_to_cityscapes
    python gen_pseudo_labels.py checkpoint=my.pth pseudo.selection=class_balanced

Softmax, upsampled to image size, averaged over the image and its mirror image, argmax; pixels below a confidence become
ignore (as ProDA does it). Writes label and confidence PNGs and manifest.json into runs/<benchmark>/pseudo_labels/; a
finished folder is left as it is.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import pseudo_labels as store
from data.check import check_samples
from data.datasets import UNREADABLE, SegmentationDataset, build_dataset, fingerprint
from data.taxonomy import class_set
from utils.config import Config, UserError, to_dict
from utils.config.keys import MAX_SKIPPED
from utils.engine import checkpoint, distributed
from utils.engine.command_line import run_cli
from utils.engine.log import show_path
from utils.engine.run_folder import run_lock
from utils.engine.setup import check_inputs, choose_device, load_network, prepare_data
from utils.evaluation.metrics import text_table
from utils.evaluation.prediction import own_batches, predict_confidence


def main(cfg: Config) -> dict:
    """Write the pseudo labels that `cfg` asks for, unless they are there; returns their manifest."""
    with run_lock(cfg.run_dir):
        device = choose_device(cfg)
        prepare_data(cfg)
        target, weights = check_inputs(
            lambda: _target(cfg),
            lambda: checkpoint.find_checkpoint(cfg, cfg.checkpoint, cfg.model.published),
        )
        wanted = _settings(cfg, weights, target)
        finished = store.finished(cfg.run_dir, wanted, cfg.train.restart)
        distributed.wait()  # no process deletes the folder before all have read it
        if finished:
            print(f"{show_path(cfg.run_dir)} is complete: {len(target) - len(finished['left_out'])} pseudo labels")
            return finished
        model, message = load_network(cfg, weights, device, target)
        if distributed.is_main():
            store.begin(cfg.run_dir)
        distributed.wait()
        print(*target.notes, message, sep="\n")
        folder = cfg.run_dir / store.UNFINISHED
        own, histogram, highest = _predict(model, target, cfg, device, folder)
        written = set().union(*distributed.gathered(own))
        left_out = [sample.name for sample in target.samples if sample.name not in written]
        if len(left_out) > MAX_SKIPPED:
            raise UserError(
                f"{len(left_out)} target images cannot be used, more than {MAX_SKIPPED}; the first is {left_out[0]}"
            )
        for index, sample in enumerate(target.samples):
            if sample.name in left_out and distributed.is_main():
                print(f"left out: {target[index].get(UNREADABLE, sample.image)}")
        limits = store.level_limits(histogram, cfg.pseudo.threshold, cfg.pseudo.selection, cfg.pseudo.keep)
        statistics = store.statistics(histogram, limits, class_set(cfg.data).names, cfg.pseudo.threshold, highest)
        store.drop_unsure(folder, own, limits)
        os.sync()  # all labels are on the disk before the manifest says so
        distributed.wait()
        if distributed.is_main():
            store.finish(cfg.run_dir)
        made_by = os.path.relpath(weights, cfg.run_dir)  # holds where all runs are moved together
        manifest = wanted | statistics | {"weights": made_by, "left_out": left_out, "config": to_dict(cfg)}
        checkpoint.write_json(cfg.run_dir / store.MANIFEST, manifest)
        distributed.wait()
        print(_table(statistics["classes"]))
        images = f"{len(target) - len(left_out)} pseudo labels in {show_path(cfg.run_dir)}"
        print(f"{images}: {statistics['kept']:.1%} of all pixels kept")
        return store.read_manifest(cfg.run_dir)


def _target(cfg: Config) -> SegmentationDataset:
    skips = cfg.data.on_error == "skip"
    target = build_dataset(cfg.data.target, class_set(cfg.data), with_labels=False, skips=skips)
    return check_samples(target, "target", cfg)


def _settings(cfg: Config, weights: Path, target: SegmentationDataset) -> dict:
    """What the pseudo labels depend on; the manifest records it."""
    return {
        "checkpoint": checkpoint.file_hash(weights),
        "images": len(target),
        "files": fingerprint(target.samples),
        "size": list(cfg.data.target.size),
        "statistics": cfg.batchnorm.statistics,
        "statistics_of": cfg.batchnorm.images if cfg.batchnorm.statistics == "target" else None,
        "flip": True,
        **{key: getattr(cfg.pseudo, key) for key in ("threshold", "selection", "keep")},
    }


def _table(by_class: dict[str, dict]) -> str:
    """The manifest's `classes` for the terminal."""
    total, rows = sum(c["predicted"] for c in by_class.values()), []
    for name, c in by_class.items():
        kept = f"{c['kept'] / c['predicted']:.1%}" if c["predicted"] else "-"
        rows.append([name, f"{c['predicted'] / total:.2%}", f"{c['threshold']:.4f}", kept])
    return text_table(["class", "share", "threshold", "kept"], rows)


def _predict(
    model: nn.Module, target: SegmentationDataset, cfg: Config, device: torch.device, folder: Path
) -> tuple[set[str], np.ndarray, float]:
    """Write the label and the confidence of every image into `folder`.

    Returns:
        The names of the images of this process; of all processes, int (K, 256) pixels by class and confidence level,
        and the highest confidence.
    """
    threshold = cfg.pseudo.threshold
    counts = torch.zeros(len(class_set(cfg.data)) * 256, dtype=torch.int64, device=device)
    highest, own, writing = torch.zeros((), device=device), set(), ()
    with ThreadPoolExecutor(store.THREADS) as pool:
        for indices, images, _ in own_batches(target, cfg, device, "predict", leave=True):
            labels, confidence = predict_confidence(
                model, images, flip=True, precision=cfg.train.precision, softmax_first=True
            )
            levels = store.confidence_levels(confidence, threshold)
            highest = torch.maximum(highest, confidence.max())
            counts += torch.bincount((labels.long() * 256 + levels).flatten(), minlength=len(counts))
            names = [target.samples[index].name for index in indices]
            paths = [store.path_of(folder, kind, name) for kind in store.KINDS for name in names]
            list(writing)  # waits for the files of the batch before
            writing = pool.map(store.write_png, paths, [*labels.cpu().numpy(), *levels.cpu().numpy()])
            own.update(names)
        list(writing)
    histogram = distributed.total(counts).view(-1, 256).cpu().numpy()
    return own, histogram, max(distributed.gathered(highest.item()))


if __name__ == "__main__":
    run_cli(main, "pseudo_labels.yml", __doc__, ("pseudo_labels",))
