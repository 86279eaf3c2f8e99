"""mIoU of a network on the labelled split of the target domain.

    python test.py                                                         distilled model, GTA5 -> Cityscapes
    python test.py checkpoint=bpl                                          another run of the benchmark
    python test.py checkpoint=my.pth batchnorm.statistics=target
    python test.py checkpoint=pretrain_model/published.pkl                 architecture and classes follow from it
    python test.py --config configs/test_from_synthia_to_city.yml          16 and 13 classes from one model

Prints IoU per class and writes metrics.json and panels/ into runs/<benchmark>/test/.
"""

from __future__ import annotations

from data.datasets import build_dataset
from utils import checkpoint
from utils.config import Config, UserError, run_cli
from utils.inference import evaluate
from utils.logging import RunLog, show_path
from utils.metrics import table
from utils.setup import check_inputs, choose_device, load_network, prepare_data, settle
from utils.visual import Gallery, spread


def main(cfg: Config) -> dict:
    """Evaluate `checkpoint`; returns what is written to metrics.json."""
    device = choose_device(cfg)
    if (cfg.run_dir / "checkpoints").exists():
        raise UserError(f"{show_path(cfg.run_dir)} is a training run: choose another name= for its test")
    prepare_data(cfg)
    recompute = cfg.batchnorm.statistics == "target"
    _, weights, target = check_inputs(
        lambda: build_dataset(cfg.data.val, cfg.classes),
        lambda: checkpoint.find_checkpoint(cfg, cfg.checkpoint, cfg.model.published),
        lambda: build_dataset(cfg.data.target, cfg.classes, with_labels=False) if recompute else None,
    )
    file = checkpoint.open_file(weights)
    cfg = settle(cfg, file)
    model, message = load_network(cfg, file, device, target)
    val = build_dataset(cfg.data.val, cfg.classes)  # by as many classes as the checkpoint has
    log = RunLog(cfg)
    log.say(message)
    gallery = Gallery(spread(len(val), cfg.test.panels), cfg.classes)
    scores = evaluate(model, val, cfg.classes, cfg, device, gallery)
    if gallery.shown:
        gallery.save(log.folder / "panels" / "test.png")
    result = {
        "checkpoint": str(weights),
        "checkpoint_hash": checkpoint.file_hash(weights),
        "statistics": cfg.batchnorm.statistics,
        "images": len(val),
    } | scores
    checkpoint.write_json(log.folder / "metrics.json", result)
    log.say(table({"IoU": scores}, cfg.classes))
    log.say(f"written to {show_path(log.folder)}")
    log.close()
    return result


if __name__ == "__main__":
    run_cli(main, "test_from_gta_to_city.yml", __doc__, ("test",))
