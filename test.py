"""mIoU of a network on a labelled split, or its predictions for any images.

    python test.py                                                         distilled model, GTA5 -> Cityscapes
    python test.py checkpoint=bpl                                          another run of the benchmark
    python test.py checkpoint=my.pth batchnorm.statistics=target
    python test.py checkpoint=pretrain_model/published.pkl                 architecture and classes follow from it
    python test.py --config configs/test_from_synthia_to_city.yml          16 and 13 classes from one model
    python test.py test.flip=true 'test.scales=[0.75,1,1.25]'              averaged predictions
    python test.py 'test.window=[1024,1024]'                               sliding window
    python test.py test.dataset=target data.target.split=train             another labelled split
    python test.py 'test.images=photos/*.jpg'                              an image, a folder or a glob, without labels

Prints IoU and accuracy per class and writes metrics.json and panels/ into runs/<benchmark>/test/; for images, or with
test.export=true, predictions/ in colour, over the image, as train ids and as label ids.
"""

from __future__ import annotations

import shutil

from data.check import check_samples
from data.datasets import SegmentationDataset, build_dataset, find_images, fingerprint
from data.loaders import spread
from data.pseudo_labels import MANIFEST
from data.taxonomy import class_set, label_ids
from models import read_weights
from utils.config import Config, UserError
from utils.engine import checkpoint
from utils.engine.command_line import run_cli
from utils.engine.distributed import is_main
from utils.engine.log import open_log, show_path
from utils.engine.run_folder import run_lock
from utils.engine.setup import check_inputs, choose_device, load_network, prepare_data, resolve_auto
from utils.evaluation.export import Exporter
from utils.evaluation.metrics import class_table
from utils.evaluation.pictures import Gallery, Worst
from utils.evaluation.prediction import evaluate, predictions
from utils.report.page import write_report


def mode(cfg: Config) -> dict:
    """How images are predicted, for the record."""
    return {key: getattr(cfg.test, key) for key in ("flip", "scales", "window", "overlap")}


def main(cfg: Config) -> dict:
    """Evaluate `checkpoint`; returns what is written to metrics.json, for `test.images` what was predicted."""
    for holds, what in (("checkpoints", "a training run"), (MANIFEST, "a folder of pseudo labels")):
        if (cfg.run_dir / holds).exists():
            raise UserError(f"{cfg.run_dir} is {what}: choose another name= for its test")
    with run_lock(cfg.run_dir):
        return _evaluated(cfg)


def _evaluated(cfg: Config) -> dict:
    device = choose_device(cfg)
    prepare_data(cfg)
    section, images = getattr(cfg.data, cfg.test.dataset), cfg.test.images
    dataset, weights = check_inputs(
        lambda: (
            SegmentationDataset(find_images(images, cfg.runs))
            if images
            else build_dataset(section, class_set(cfg.data))
        ),
        lambda: checkpoint.find_checkpoint(cfg, cfg.checkpoint, cfg.model.published),
    )
    file = read_weights(weights)
    model, message = load_network(cfg, file, device)
    cfg = resolve_auto(cfg, file)
    classes = class_set(cfg.data)
    if not images:
        dataset = check_samples(build_dataset(section, classes), cfg.test.dataset, cfg)  # with the checkpoint's classes
    export, folder = None, cfg.run_dir / "predictions"
    places = {sample.image.parent for sample in dataset.samples} if images or cfg.test.export else ()
    if any(folder.resolve() in place.resolve().parents for place in places):
        raise UserError(f"the images lie in {folder}, which this test overwrites: choose another name=")
    log = open_log(cfg)
    for line in (*dataset.notes, message):
        log.info(line)
    result = {
        "checkpoint": str(weights),
        "checkpoint_hash": checkpoint.file_hash(weights),
        "statistics": cfg.batchnorm.statistics,
        "dataset": cfg.test.dataset,
        "images": len(dataset),
        "files": fingerprint(dataset.samples),
        "labels": None if images else fingerprint(dataset.samples, labels=True),
        "mode": mode(cfg),
    }
    if is_main():  # no scores of an earlier test stay beside this one's settings
        for name in ("metrics.json", "report.html"):
            (cfg.run_dir / name).unlink(missing_ok=True)
        shutil.rmtree(cfg.run_dir / "panels", ignore_errors=True)
    if images or cfg.test.export:
        export = Exporter(folder, dataset, classes, label_ids(section, classes))
    elif folder.exists():
        log.info(f"{show_path(folder)} is of an earlier call")
    if images:
        for prediction in predictions(model, dataset, cfg, device, "predict"):
            export(*prediction)
        export.finish()
        log.info(f"{len(dataset)} predictions written to {show_path(export.folder)}")
    else:
        gallery = Gallery(spread(len(dataset), cfg.test.panels), classes)
        worst = Worst(cfg.test.panels, [s.name for s in dataset.samples], classes)
        callbacks = [gallery, worst, export] if export else [gallery, worst]
        scores = evaluate(model, dataset, cfg, device, *callbacks)
        if export:
            export.finish()
        for name, pictures in (("test", gallery), ("worst", worst)):
            if pictures.shown:
                pictures.save(cfg.run_dir / "panels" / f"{name}.png")
        result |= scores | {"worst": list(worst.scores.values())}
        checkpoint.write_json(cfg.run_dir / "metrics.json", result)
        log.info("\n".join(["worst images:", *(f"mIoU {w['miou']:6.2f}  {w['image']}" for w in result["worst"])]))
        log.info(class_table(scores, classes))
        write_report(cfg.run_dir)
        log.info(f"written to {show_path(cfg.run_dir)}")
    log.close()
    return result


if __name__ == "__main__":
    run_cli(main, "test_from_gta_to_city.yml", __doc__, ("test",))
