"""Every stage of a benchmark in order, then a table and a picture.

    python -m utils.pipeline benchmark=toy
    python -m utils.pipeline benchmark=path/to/mine.yml train.iterations=2000 seed=1 runs=runs/seed1
    python -m utils.pipeline benchmark=toy controls=true seeds=0,1,2

Runs source-only, warm-up, BPL, pseudo labels, PST, distillation and the tests. Started again, it goes on where it
stopped. Writes runs/<benchmark>/summary.json and panel.png (image | each stage | truth). A key=value reaches every
stage; what differs between stages belongs into the benchmark's `stages:` section. Two keys are the pipeline's own:

  controls=true  also trains, from where the warm-up starts and for as many steps as all stages together,
                 source_only_long (the source alone) and, where target training labels exist, labelled_bound (labels of
                 both domains), and says which share of the gap between them each stage closes
  seeds=0,1,2    runs once for each seed, in runs/seed0/<benchmark> and so on, and writes mean and standard deviation
                 into runs/<benchmark>/seeds.json
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from torch import Tensor

import distill
import gen_pseudo_labels
import test
import train_bpl
import train_pst
from data.datasets import build_dataset
from data.taxonomy import IGNORE, ClassSet, class_set
from utils.config import ROOT, Config, ConfigError
from utils.config.keys import TRAINING_STAGES
from utils.controls import control_runs, gap_closed
from utils.engine import checkpoint, distributed
from utils.engine.command_line import run_words
from utils.engine.log import show_path
from utils.engine.loop import fit
from utils.engine.setup import check_inputs, choose_device, load_config, load_network, refuse_unusable_backbone
from utils.evaluation.metrics import mean_over
from utils.evaluation.pictures import Gallery, save_panel
from utils.evaluation.prediction import evaluate
from utils.report.page import write_report

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


def run(overrides: list[str], controls: bool = False) -> dict:
    """Run or resume the pipeline; returns what is written to summary.json."""
    # Every config is checked before the first stage starts.
    configs = {stage: load_config(ROOT / "configs" / file, [*overrides, *own]) for stage, _, file, own in STEPS}
    benchmark = f"benchmark={configs['bpl'].benchmark}"  # named in any case: the tests' file has one of its own
    check_inputs(*(lambda cfg=cfg: first_weights(cfg) for cfg in configs.values()))
    tests = load_config(ROOT / "configs" / "test_from_gta_to_city.yml", [*overrides, benchmark])
    tests.data.class_set = configs["bpl"].data.class_set  # of a stages.test that follows the file
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
        rows |= stage_rows(stage, final_run[stage], cfg, metrics, tests)
    if controls:
        for name, cfg, stage_type in control_runs(configs):
            print(f"== {name}", flush=True)
            rows |= stage_rows(name, name, cfg, fit(cfg, stage_type), tests)
        for base in ("source_only_target_bn", "source_only_long"):
            for stage, row in rows.items():
                row[f"gap_closed_from_{base}"] = gap_closed(rows, stage, base)
    folder = tests.sibling_run("")
    summary = {"benchmark": tests.benchmark, "seed": tests.seed, "stages": rows}
    checkpoint.write_json(folder / "summary.json", summary)
    _panel(tests, final_run, folder / "panel.png")
    print(format_summary(rows))
    print(f"written to {show_path(folder / 'summary.json')}, panel.png and {write_report(folder).name} beside it")
    return summary


def stage_rows(stage: str, run_name: str, cfg: Config, metrics: dict, tests: Config) -> dict[str, dict]:
    """The summary's row of a trained stage, under both kinds of BatchNorm statistics; source-only has a second one."""
    own = cfg.batchnorm.statistics
    other = "target" if own == "running" else "running"
    scores = {own: metrics["last"], other: _test(tests, run_name, other)}
    both = {"miou_running": scores["running"]["miou"], "miou_target_bn": scores["target"]["miou"]}
    best = {"best_miou": metrics["best"]["miou"]}
    rows = {stage: _row(scores[own], class_set(tests.data)) | {"statistics": own} | both | best}
    if stage == "source_only":
        target = _row(scores["target"], class_set(tests.data)) | {"statistics": "target"}
        rows["source_only_target_bn"] = target | {"miou_target_bn": target["miou"]}
    return rows


def first_weights(cfg: Config) -> None:
    """Raise UserError now if a stage to come cannot start for want of a network or a file of pretrained weights."""
    refuse_unusable_backbone(cfg)
    if cfg.stage == "distill":
        cfg = distill.round_config(cfg, cfg.distill.rounds[0])
    done = (cfg.run_dir / "checkpoints" / "last.pth").is_file()
    if cfg.stage in TRAINING_STAGES and cfg.model.init in ("imagenet", "simclr") and not done:
        checkpoint.find_init(cfg)


def _test(tests: Config, run_name: str, statistics: str) -> dict:
    """Scores of a run's last checkpoint under one kind of BatchNorm statistics; kept from an earlier call."""
    cfg = copy.deepcopy(tests)
    cfg.checkpoint, cfg.which, cfg.batchnorm.statistics = run_name, "last", statistics
    cfg.name, cfg.test.dataset, cfg.test.images = f"test/{run_name}_{statistics}", "val", ""
    before = cfg.run_dir / "metrics.json"
    if before.is_file():
        scores = json.loads(before.read_text())
        same = scores["checkpoint_hash"] == checkpoint.file_hash(checkpoint.find_checkpoint(cfg, run_name))
        if same and scores.get("mode") == test.mode(cfg):
            return scores
    return test.main(cfg)


def _row(scores: dict, classes: ClassSet) -> dict:
    present = sorted((n for n in classes.names if scores["pixels"][n]), key=scores["pixels"].get)
    kept = {key: scores[key] for key in ("miou", *classes.subsets, "iou")}
    return kept | {"rarest": present[:RAREST], "miou_rarest": mean_over(scores["iou"], present[:RAREST])}


def _cell(value: float | dict | None) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.1f} ± {value['std']:.1f}"
    return "-" if value is None else f"{value:.1f}"


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
    where_there = {
        "gap from BN": "gap_closed_from_source_only_target_bn",
        "from long": "gap_closed_from_source_only_long",
        "over own": "over_own",
    }
    known = {key for row in rows.values() for key, value in row.items() if value is not None}
    columns |= {title: key for title, key in where_there.items() if key in known}
    width = max(24, *map(len, rows))
    lines = [f"{'mIoU in percent':{width}}" + "".join(f"{title:>14}" for title in columns)]
    for stage, row in rows.items():
        lines.append(f"{stage:{width}}" + "".join(f"{_cell(row.get(key)):>14}" for key in columns.values()))
    lines.append("mIoU: the last checkpoint, as its stage validates it; best: the highest on the validation labels")
    if "from long" in columns:
        lines.append(
            "gap: share in percent of the way to labelled_bound that is closed, all with target BN; counted from "
            "source_only_target_bn and from source_only_long"
        )
    return "\n".join(lines)


def _panel(cfg: Config, runs: dict[str, str], path: Path) -> None:
    """image | each stage | truth; rows from the image that gained most pixels over all stages to the one that lost most."""
    cfg, device = copy.deepcopy(cfg), choose_device(cfg)
    cfg.which, cfg.batchnorm.statistics = "last", "saved"
    models = [load_network(cfg, checkpoint.find_checkpoint(cfg, run_name), device)[0] for run_name in runs.values()]
    val = build_dataset(cfg.data.val, class_set(cfg.data))
    gains = np.zeros(len(val))
    for model, sign in ((models[0], -1), (models[-1], 1)):

        def see(index: int, image: Tensor, prediction: Tensor, label: Tensor, sign: int = sign) -> None:
            gains[index] += sign * ((prediction == label).sum() / (label != IGNORE).sum().clamp(min=1)).item()

        evaluate(model, val, class_set(cfg.data), cfg, device, see)
    gains = sum(distributed.gathered(gains))
    ranked = np.argsort(-gains, kind="stable")
    chosen = ranked[np.linspace(0, len(val) - 1, min(5, len(val))).round().astype(int)]
    val.samples = [val.samples[i] for i in chosen]

    columns: list[list[np.ndarray]] = []
    for model in models:
        gallery = Gallery(range(len(val)), class_set(cfg.data))
        evaluate(model, val, class_set(cfg.data), cfg, device, gallery)
        shown = [gallery.shown[i] for i in range(len(val))]
        columns.append([prediction for _, prediction, _ in shown])
    images, truths = [s[0] for s in shown], [s[2] for s in shown]
    rows = [list(row) for row in zip(images, *columns, truths)]
    save_panel(path, rows, ["image", *(name.replace("_", " ") for name in runs), "truth"])


def run_seeds(overrides: list[str], seeds: list[int], controls: bool = False) -> dict:
    """The pipeline once for each seed; returns what is written to seeds.json: mean and deviation by stage and class."""
    base = load_config(ROOT / "configs" / "stage1_BPL.yml", overrides)
    summaries, folders = [], {}
    for seed in seeds:
        print(f"==== seed {seed}", flush=True)
        summaries.append(run([*overrides, f"seed={seed}", f"runs={base.runs}/seed{seed}"], controls)["stages"])
        folders[str(seed)] = f"../seed{seed}/{base.benchmark_name}"  # from seeds.json's own
    result = {"benchmark": base.benchmark, "seeds": seeds, "folders": folders, "stages": over_seeds(summaries)}
    path = base.sibling_run("seeds.json")
    checkpoint.write_json(path, result)
    write_report(path.parent)
    print(format_summary(result["stages"]))
    print(f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}; written to {show_path(path)}")
    return result


def over_seeds(summaries: list[dict]) -> dict:
    """The same nested numbers from several seeds -> {"mean": …, "std": …} in place of each; std is the sample's."""
    first = summaries[0]
    if isinstance(first, dict):
        return {key: over_seeds([s[key] for s in summaries]) for key in first if all(key in s for s in summaries)}
    if not all(isinstance(value, int | float) for value in summaries):
        return first if all(value == first for value in summaries) else None
    return {"mean": mean(summaries), "std": stdev(summaries) if len(summaries) > 1 else 0.0}


def own_keys(overrides: list[str]) -> tuple[list[str], bool, list[int]]:
    """The overrides without the pipeline's own keys, and the values of these."""
    controls, seeds, others = False, [], []
    for assignment in overrides:
        key, _, text = assignment.partition("=")
        if key == "controls":
            if text not in ("true", "false"):
                raise ConfigError(f"controls={text!r} has the wrong type: true or false is needed")
            controls = text == "true"
        elif key == "seeds":
            try:
                seeds = [int(seed) for seed in text.strip("[]").split(",")]
            except ValueError:
                raise ConfigError(f"seeds={text!r} has the wrong type: seeds=0,1,2 is needed") from None
            if len(set(seeds)) < len(seeds):
                raise ConfigError(f"seeds={text!r} names a seed twice")
        elif key == "name":
            raise ConfigError("name= would be the one folder of all stages; runs= keeps pipelines apart")
        else:
            others.append(assignment)
    if seeds and any(assignment.startswith("seed=") for assignment in others):
        raise ConfigError("seed= and seeds= are given; seeds= says all")
    return others, controls, seeds


def main() -> None:
    """Command line."""

    def call(words: list[str]) -> None:
        overrides, controls, seeds = own_keys(words)
        run_seeds(overrides, seeds, controls) if seeds else run(overrides, controls)

    run_words(call, __doc__)


if __name__ == "__main__":
    main()
