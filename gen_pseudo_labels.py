"""Pseudo labels of the target's training images, by the BPL model.

    python gen_pseudo_labels.py                                            GTA5 -> Cityscapes
    python gen_pseudo_labels.py benchmark=synthia_to_cityscapes
    python gen_pseudo_labels.py checkpoint=my.pth pseudo.selection=class_balanced

Softmax, brought to image size, averaged with the mirrored image's, argmax; pixels below a confidence become ignore (as
ProDA has it). Writes label and confidence PNGs and manifest.json into runs/<benchmark>/pseudo_labels/; a finished
folder is left as it is.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from data import pseudo_labels as store
from data.check import check_samples
from data.datasets import SegmentationDataset, build_dataset
from data.loaders import whole_images
from data.taxonomy import class_set
from utils.config import Config, UserError, to_dict
from utils.engine import checkpoint, distributed
from utils.engine.command_line import run_cli
from utils.engine.log import progress, show_path
from utils.engine.run_folder import run_lock
from utils.engine.setup import check_inputs, choose_device, load_network, prepare_data
from utils.evaluation.prediction import predict_labels, same_size_batches


def main(cfg: Config) -> dict:
    """Write the pseudo labels that `cfg` asks for, unless they are there; returns their manifest."""
    with run_lock(cfg.run_dir):
        return _generate(cfg)


def _target(cfg: Config) -> SegmentationDataset:
    target = build_dataset(cfg.data.target, class_set(cfg.data), with_labels=False)
    target.skips = cfg.data.on_error == "skip"
    store.refuse_double_names(target.samples)
    return check_samples(target, "target", cfg)


def _generate(cfg: Config) -> dict:
    device = choose_device(cfg)
    prepare_data(cfg)
    target, weights = check_inputs(
        lambda: _target(cfg),
        lambda: checkpoint.find_checkpoint(cfg, cfg.checkpoint, cfg.model.published),
    )
    folder = cfg.run_dir
    asked = {
        "checkpoint": checkpoint.file_hash(weights),
        "images": len(target),
        "statistics": cfg.batchnorm.statistics,
        "statistics_of": cfg.batchnorm.images if cfg.batchnorm.statistics == "target" else None,
        **vars(cfg.pseudo),
    }
    if (folder / store.MANIFEST).is_file():
        manifest = store.read_manifest(folder)
        differs = [k for k in asked if manifest.get(k) != asked[k]]
        if not differs:
            print(f"{show_path(folder)} is complete: {len(target)} pseudo labels")
            return manifest
        if not cfg.train.restart:
            changes = ", ".join(f"{k}: {manifest.get(k)} -> {asked[k]}" for k in differs)
            raise UserError(
                f"{show_path(folder)} holds other pseudo labels ({changes}); choose a name=, or replace "
                "them with train.restart=true"
            )
    distributed.wait()  # until all have looked
    if distributed.is_main():
        store.clear(folder)  # unfinished, or to be replaced
    distributed.wait()
    model, message = load_network(cfg, weights, device, target)
    print(*target.notes, message, sep="\n")

    # First pass: predictions and confidences; the thresholds of classes are known at its end.
    counts = torch.zeros(len(class_set(cfg.data)) * 256, dtype=torch.int64, device=device)
    mine, own = distributed.shard_indices(len(target), cfg.test.batch), set()  # indices, and names of what is written
    loader = whole_images(target, cfg.test.batch, cfg.data.workers, mine)
    bar = progress(total=len(mine), desc="predict", unit="img")
    with store.Beside() as beside:
        for indices, images, _ in same_size_batches(loader, device):
            found = predict_labels(
                model, images, cfg.pseudo.flip, cfg.train.precision, softmax_first=True, with_confidence=True
            )
            counts += torch.bincount((found[0].long() * 256 + found[1]).flatten(), minlength=len(counts))
            labels, levels = (maps.cpu().numpy() for maps in found)
            for i, index in enumerate(indices):
                name = target.samples[index].name
                own.add(name)
                beside(store.write_png, store.confidence_path(folder, name), levels[i])
                beside(store.write_png, store.label_path(folder, name), labels[i])
            bar.update(len(indices))
    bar.close()
    histogram = distributed.total(counts).view(-1, 256).cpu().numpy()
    written = set().union(*distributed.gathered(own))
    left_out = [s.name for s in target.samples if s.name not in written]
    if len(left_out) > cfg.data.max_skipped:
        raise UserError(
            f"{len(left_out)} target images cannot be used, more than data.max_skipped={cfg.data.max_skipped}; "
            f"the first is {left_out[0]}"
        )

    # Second pass: what is below its class's threshold becomes ignore.
    limits = store.thresholds(histogram, cfg.pseudo.threshold, cfg.pseudo.selection, cfg.pseudo.keep)
    with store.Beside() as beside:
        for name in progress(sorted(own), desc="select", unit="img"):
            beside(store.drop_unsure, folder, name, limits.astype(np.uint8))

    predicted = histogram.sum(1)
    kept = np.array([counts[limit:].sum() for counts, limit in zip(histogram, limits)])
    if not kept.any():
        raise UserError(
            f"no pixel of any class is as sure as pseudo.threshold={cfg.pseudo.threshold}: lower it, or take "
            "pseudo.selection=class_balanced"
        )
    manifest = asked | {
        "weights": str(weights),
        "kept": kept.sum() / predicted.sum(),
        "classes": {
            name: {"threshold": limits[k] / 255, "predicted": int(predicted[k]), "kept": int(kept[k])}
            for k, name in enumerate(class_set(cfg.data).names)
        },
        "left_out": left_out,
        "config": to_dict(cfg),
    }
    if hasattr(os, "sync"):
        os.sync()  # all labels are on the disk before the manifest says so
    distributed.wait()
    checkpoint.write_json(folder / store.MANIFEST, manifest)
    print(f"{'class':16} {'share':>7} {'threshold':>9} {'kept':>7}")
    for k, name in enumerate(class_set(cfg.data).names):
        fraction = f"{kept[k] / predicted[k]:7.1%}" if predicted[k] else "      -"
        print(f"{name:16} {predicted[k] / predicted.sum():7.2%} {limits[k] / 255:9.3f} {fraction}")
    print(f"{len(written)} pseudo labels in {show_path(folder)}: {manifest['kept']:.1%} of all pixels kept")
    distributed.wait()
    return store.read_manifest(folder)


if __name__ == "__main__":
    run_cli(main, "pseudo_labels.yml", __doc__, ("pseudo_labels",))
