"""Every stage of a benchmark in order, then a table and a picture.

    python -m utils.pipeline benchmark=toy
    python -m utils.pipeline benchmark=path/to/mine.yml train.iterations=2000 seed=1 runs=runs/seed1

Runs source-only, warm-up, BPL, pseudo labels, PST, distillation and the tests. Started again, it goes on where it
stopped. Writes runs/<benchmark>/summary.json and panel.png (image | each stage | truth). A key=value reaches every
stage; what differs between stages belongs into the benchmark's `stages:` section.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np
from torch import Tensor

import distill
import gen_pseudo_labels
import test
import train_bpl
import train_pst
from data.datasets import build_dataset
from data.taxonomy import IGNORE, ClassSet
from utils import checkpoint
from utils.config import ROOT, Config, guarded, load_config
from utils.inference import evaluate
from utils.logging import show_path
from utils.metrics import mean_over
from utils.setup import choose_device, load_network
from utils.visual import Gallery, save_panel

# (stage, its script, its config, what sets it apart), in order.
STEPS = (
    ("source_only", train_bpl, "stage0_warmup.yml", ["name=source_only", "loss.adversarial=0"]),
    ("warmup", train_bpl, "stage0_warmup.yml", []),
    ("bpl", train_bpl, "stage1_BPL.yml", []),
    ("pseudo_labels", gen_pseudo_labels, "pseudo_labels.yml", []),
    ("pst", train_pst, "stage2_PST.yml", []),
    ("distill", distill, "stage3_distill.yml", []),
)
RAREST = 6  # classes that the tail score averages over


def run(overrides: list[str]) -> dict:
    """Run or resume the pipeline; returns what is written to summary.json."""
    # Every config is checked before the first stage starts.
    configs = {stage: load_config(ROOT / "configs" / file, [*overrides, *own]) for stage, _, file, own in STEPS}
    benchmark = f"benchmark={configs['bpl'].benchmark}"  # named in any case: the tests' file has one of its own
    tests = load_config(ROOT / "configs" / "test_from_gta_to_city.yml", [*overrides, benchmark])
    final_run = {}
    rows: dict[str, dict] = {}
    for stage, script, _, _ in STEPS:
        cfg = configs[stage]
        print(f"== {stage}", flush=True)
        metrics = script.main(cfg)
        if stage == "pseudo_labels":
            continue
        name = cfg.name or cfg.stage
        final_run[stage] = f"{name}/round{cfg.distill.rounds[-1]}" if stage == "distill" else name
        own = cfg.batchnorm.statistics
        scores = {own: metrics["last"]}  # the other kind is measured here
        other = "target" if own == "running" else "running"
        scores[other] = _test(tests, final_run[stage], other)
        rows[stage] = _row(scores[own], tests.classes) | {
            "statistics": own,
            "miou_running": scores["running"]["miou"],
            "miou_target_bn": scores["target"]["miou"],
            "best_miou": metrics["best"]["miou"],
        }
        if stage == "source_only":
            rows["source_only_target_bn"] = _row(scores["target"], tests.classes) | {"statistics": "target"}
    folder = tests.sibling_run("")
    summary = {"benchmark": tests.benchmark, "seed": tests.seed, "stages": rows}
    checkpoint.write_json(folder / "summary.json", summary)
    _panel(tests, final_run, folder / "panel.png")
    print(format_summary(rows))
    print(f"written to {show_path(folder / 'summary.json')} and {show_path(folder / 'panel.png')}")
    return summary


def _test(tests: Config, run_name: str, statistics: str) -> dict:
    """Scores of a run's last checkpoint under one kind of BatchNorm statistics; kept from an earlier call."""
    cfg = copy.deepcopy(tests)
    cfg.checkpoint, cfg.batchnorm.statistics = run_name, statistics
    cfg.name = f"test/{run_name}_{statistics}"
    before = cfg.run_dir / "metrics.json"
    if before.is_file():
        scores = json.loads(before.read_text())
        if scores["checkpoint_hash"] == checkpoint.file_hash(checkpoint.find_checkpoint(cfg, run_name)):
            return scores
    return test.main(cfg)


def _row(scores: dict, classes: ClassSet) -> dict:
    present = sorted((n for n in classes.names if scores["pixels"][n]), key=scores["pixels"].get)
    kept = {key: scores[key] for key in ("miou", *classes.subsets, "iou")}
    return kept | {"rarest": present[:RAREST], "miou_rarest": mean_over(scores["iou"], present[:RAREST])}


def format_summary(rows: dict[str, dict]) -> str:
    """The table of mIoU by stage."""
    subsets = [k for k in next(iter(rows.values())) if k.startswith("miou1")]
    columns = {
        "mIoU": "miou",
        **{k: k for k in subsets},
        f"rarest {RAREST}": "miou_rarest",
        "running BN": "miou_running",
        "target BN": "miou_target_bn",
        "best": "best_miou",
    }
    lines = [f"{'mIoU in percent':24}" + "".join(f"{title:>12}" for title in columns)]
    for stage, row in rows.items():
        cells = (f"{row[key]:12.1f}" if row.get(key) is not None else f"{'-':>12}" for key in columns.values())
        lines.append(f"{stage:24}" + "".join(cells))
    lines.append("mIoU: the last checkpoint, as its stage validates it; best: the highest on the validation labels")
    return "\n".join(lines)


def _panel(cfg: Config, runs: dict[str, str], path: Path) -> None:
    """image | each stage | truth; rows from the image that gained most pixels over all stages to the one that lost most."""
    cfg, device = copy.deepcopy(cfg), choose_device(cfg)
    cfg.batchnorm.statistics = "saved"
    models = [load_network(cfg, checkpoint.find_checkpoint(cfg, run_name), device)[0] for run_name in runs.values()]
    val = build_dataset(cfg.data.val, cfg.classes)
    gains = np.zeros(len(val))
    for model, sign in ((models[0], -1), (models[-1], 1)):

        def see(index: int, image: Tensor, prediction: Tensor, label: Tensor, sign: int = sign) -> None:
            gains[index] += sign * ((prediction == label).sum() / (label != IGNORE).sum().clamp(min=1)).item()

        evaluate(model, val, cfg.classes, cfg, device, see)
    ranked = np.argsort(-gains, kind="stable")
    chosen = ranked[np.linspace(0, len(val) - 1, min(5, len(val))).round().astype(int)]
    val.samples = [val.samples[i] for i in chosen]

    columns: list[list[np.ndarray]] = []
    for model in models:
        gallery = Gallery(range(len(val)), cfg.classes)
        evaluate(model, val, cfg.classes, cfg, device, gallery)
        shown = [gallery.shown[i] for i in range(len(val))]
        columns.append([prediction for _, prediction, _ in shown])
    images, truths = [s[0] for s in shown], [s[2] for s in shown]
    rows = [list(row) for row in zip(images, *columns, truths)]
    save_panel(path, rows, ["image", *(name.replace("_", " ") for name in runs), "truth"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of the user's mistakes too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see `python train_bpl.py --help`")
    args = parser.parse_args()
    guarded(lambda: run(args.overrides), args.debug)


if __name__ == "__main__":
    main()
