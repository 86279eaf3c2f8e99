"""Every stage of a benchmark in order, then a table and a picture.

    python -m utils.pipeline benchmark=toy
    python -m utils.pipeline benchmark=path/to/mine.yml train.iterations=2000 seed=1 runs=runs/seed1
    python -m utils.pipeline benchmark=toy controls=true seeds=0,1,2

Runs source-only, warm-up, BPL, pseudo labels, PST, distillation, their control and the tests. Started again, it goes on
where it stopped. Writes runs/<benchmark>/summary.json and panel.png (image | each stage | truth). A key=value reaches
every stage; what differs between stages belongs in the benchmark's `stages:` section.

Every stage also goes on learning from the source, and that alone raises mIoU. So each is held against a control that
learns from source images alone, for as many steps as the chain had taken by then, at the same learning rates. Where a
stage's row is not above its control, nothing was gained from the target.

Two keys are the pipeline's own:

  controls=true   also trains labelled_bound, with the labels of both domains where target training labels exist, and
                  says which share of the gap from the control to that bound each stage closes
  controls=false  trains neither; without controls=, the control alone is trained
  seeds=0,1,2     runs once for each seed, in runs/seed0/<benchmark> and so on, and writes mean and standard deviation
                  into runs/<benchmark>/seeds.json
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev

from torch import Tensor

import distill
import gen_pseudo_labels
import test
import train_bpl
import train_pst
from data.datasets import build_dataset, fingerprint, list_samples
from data.loaders import spread
from data.taxonomy import ClassSet, class_set
from loss import segmentation_loss
from models import upsample
from utils.config import ROOT, Config, ConfigError, UserError
from utils.config.keys import TRAINING_STAGES, WEIGHT_ENDINGS, require
from utils.engine import checkpoint
from utils.engine.command_line import run_words, split_words, warn_of_idle_gpus
from utils.engine.log import show_path
from utils.engine.loop import Backward, Stage, fit, training_set
from utils.engine.setup import (
    check_inputs,
    checked_config,
    choose_device,
    load_network,
    prepare_data,
    refuse_unusable_backbone,
)
from utils.evaluation.metrics import mean_over, text_table
from utils.evaluation.pictures import Gallery, save_panel
from utils.evaluation.prediction import evaluate
from utils.report.page import score_table, write_report

STEPS = {  # stage: its script, its config, what sets it apart; in order
    "source_only": (train_bpl, "stage0_warmup.yml", ["name=source_only", "loss.adversarial=0"]),
    "warmup": (train_bpl, "stage0_warmup.yml", []),
    "bpl": (train_bpl, "stage1_BPL.yml", []),
    "pseudo_labels": (gen_pseudo_labels, "pseudo_labels.yml", []),
    "pst": (train_pst, "stage2_PST.yml", []),
    "distill": (distill, "stage3_distill.yml", []),
}
TESTS = ROOT / "configs" / "test_from_gta_to_city.yml"
CONTROL, BOUND = "source_only_long", "labelled_bound"
RAREST = 6  # classes that the tail score averages over
PICTURES = 5  # rows of the panel


def load_stage(stage: str, overrides: list[str]) -> Config:
    _, file, own = STEPS[stage]
    return checked_config(ROOT / "configs" / file, [*overrides, *own])


def load_stages(overrides: list[str]) -> dict[str, Config]:
    """The configuration of every stage, in order."""
    stages = {stage: load_stage(stage, overrides) for stage in STEPS}
    named = {cfg.name for stage, cfg in stages.items() if stage != "source_only"} - {""}
    require(not named, f"name: {' '.join(named)} would be the one folder of all stages; take it out of the YAML")
    scored = {str((cfg.data.val, test.mode(cfg))) for cfg in stages.values() if cfg.stage in TRAINING_STAGES}
    different = "data.val, or how it is predicted (test.flip, scales, window, overlap), differs between the stages"
    require(len(scored) == 1, f"{different} of the benchmark: one table would compare them")
    return stages


def load_tests(overrides: list[str], cfg: Config) -> Config:
    """The configuration that the runs of `cfg`'s benchmark are scored by: as the stages validate, whatever the
    benchmark's stages.test has."""
    tests = checked_config(TESTS, [*overrides, f"benchmark={cfg.benchmark}"])  # the tests' file names one of its own
    tests.data, tests.test, tests.batchnorm.images = cfg.data, cfg.test, cfg.batchnorm.images
    return tests


def run(overrides: list[str], control: bool = True, bound: bool = False) -> dict:
    """Run or resume the pipeline; returns what is written to summary.json."""
    configs = load_stages(overrides)  # every one is checked before the first stage starts
    check_inputs(*(lambda cfg=cfg: first_weights(cfg) for cfg in configs.values()))
    tests = load_tests(overrides, configs["bpl"])
    warn_of_idle_gpus(configs["bpl"])
    bound_cfg = bound_config(configs) if control and bound else None
    final_run, rows = {}, {}
    for stage, cfg in configs.items():
        if stage == "pseudo_labels" and configs["pst"].pseudo.labels == "online":
            continue
        print(f"== {stage}", flush=True)
        metrics = STEPS[stage][0].main(cfg)
        if stage != "pseudo_labels":
            name = cfg.name or cfg.stage
            final_run[stage] = f"{name}/round{cfg.distill.rounds[-1]}" if stage == "distill" else name
            rows |= stage_rows(stage, final_run[stage], cfg, metrics, tests)
    if control:
        add_controls(rows, configs, tests, bound_cfg)
    folder = tests.sibling_run("")
    summary = {"benchmark": tests.benchmark, "seed": tests.seed, "stages": rows}
    checkpoint.write_json(folder / "summary.json", summary)
    _panel(tests, final_run, configs["bpl"].batchnorm.statistics, folder / "panel.png")
    print(format_summary(rows))
    print(f"written to {show_path(folder / 'summary.json')}, panel.png and {write_report(folder).name} beside it")
    return summary


def first_weights(cfg: Config) -> None:
    """Raise UserError now if a later stage would lack its network or pretrained weights."""
    refuse_unusable_backbone(cfg)
    if cfg.stage == "distill":
        require(
            cfg.distill.rounds[0] == 1, f"distill.rounds={cfg.distill.rounds}: here, distillation begins with round 1"
        )
        cfg = distill.round_config(cfg, 1)
    init = cfg.model.init
    from_file = init in ("imagenet", "simclr") or init.endswith(WEIGHT_ENDINGS)  # others are runs, still to be trained
    if cfg.stage in TRAINING_STAGES and from_file and checkpoint.begins(cfg):
        checkpoint.find_init(cfg)


# -------------------------------------------------------------------------------------------------------- controls


class LabelledBound(Stage):
    """L = CE(z_s, y_s) + CE(z_t, y_t), with the true labels of target training images."""

    uses_target_labels = True

    def step(self, source: dict[str, Tensor], target: dict[str, Tensor], backward: Backward) -> None:
        for domain, batch in (("source", source), ("target", target)):
            logits = self.model(self.views.strong(batch["image"]))["logits"]
            logits = upsample(logits.float(), batch["label"].shape[1:])
            ce = segmentation_loss(logits, batch["label"], batch.get("normalizer"))
            del logits
            backward(ce, **{f"ce_{domain}": ce})


def add_controls(rows: dict[str, dict], configs: dict[str, Config], tests: Config, bound: Config | None) -> None:
    """Train the controls and add to `rows` what they reach and how each stage compares, under target statistics.

    Only the control's last leg gets a row.
    """
    steps = steps_by_stage(configs)
    for stage, cfg in control_legs(configs):
        print(f"== control of {stage}", flush=True)
        metrics = fit(cfg, train_bpl.BPL)
        control = _scores_of_target_bn(cfg.name, cfg, metrics, tests)["miou"]
        compared = {"control_miou_target_bn": control, "gain_over_control": rows[stage]["miou_target_bn"] - control}
        rows[stage] |= compared | {"steps": steps[stage]}
    rows |= stage_rows(CONTROL, cfg.name, cfg, metrics, tests)
    rows[CONTROL]["steps"] = steps[stage]
    if bound:
        print(f"== {BOUND}", flush=True)
        rows |= stage_rows(BOUND, BOUND, bound, fit(bound, LabelledBound), tests)
        rows[BOUND]["steps"] = steps[stage]
        for name, row in rows.items():
            row[f"gap_closed_from_{CONTROL}"] = gap_closed(rows, name)


def rounds_of(cfg: Config) -> list[Config]:
    """The runs that a stage consists of: distillation has one for each round."""
    return [distill.round_config(cfg, n) for n in cfg.distill.rounds] if cfg.stage == "distill" else [cfg]


def steps_by_stage(configs: dict[str, Config]) -> dict[str, int]:
    """Training steps from the start of the warm-up to the end of each stage."""
    own = (sum(cfg.train.iterations for cfg in rounds_of(configs[stage])) for stage in TRAINING_STAGES)
    return dict(zip(TRAINING_STAGES, accumulate(own)))


def control_legs(configs: dict[str, Config]) -> Iterator[tuple[str, Config]]:
    """(stage, configuration) of the runs that one after another make up the control `source_only_long`.

    Each has the sections data, train and batchnorm of the stage that it is the control of, and learns from source
    images alone, in that stage's view; all but the first also take them in its order. The first starts where the
    warm-up starts, each other one from the one before. Where the first would repeat `source_only`, it is `source_only`.
    """
    init = configs["warmup"].model.init
    legs = (own for stage in TRAINING_STAGES for own in rounds_of(configs[stage]))
    for number, own in enumerate(legs, 1):
        cfg = copy.deepcopy(configs["warmup"])
        cfg.stage, cfg.data, cfg.distill = own.stage, copy.deepcopy(own.data), own.distill
        cfg.data.jitter &= own.stage != "distill"  # which learns from the source as it is
        cfg.train, cfg.batchnorm = own.train, own.batchnorm
        part = (own.name or own.stage).replace("/", "_")  # distillation's rounds have names
        cfg.name, cfg.model.init, cfg.loss.adversarial = f"{CONTROL}/{number}_{part}", init, 0.0
        if replace(cfg, name="source_only") == configs["source_only"]:
            cfg = copy.deepcopy(configs["source_only"])
            cfg.train.restart = False  # it has just been trained
        init = cfg.name
        yield own.stage, cfg


def bound_config(configs: dict[str, Config]) -> Config | None:
    """Of `labelled_bound`: the warm-up stretched to the steps of all stages. None where the target has no labels.

    Raises UserError where it has, but a label cannot be used, before any stage takes its hours.
    """
    cfg = copy.deepcopy(configs["warmup"])
    prepare_data(cfg)
    try:
        list_samples(cfg.data.target)
    except UserError as error:
        print(f"no {BOUND}: {error}")
        return None
    training_set(cfg, "target", cfg.seed)
    steps, t = steps_by_stage(configs)["distill"], cfg.train
    cfg.name, cfg.loss.adversarial = BOUND, 0.0
    t.horizon, t.iterations = round(steps * t.horizon / t.iterations), steps
    return cfg


def gap_closed(rows: dict[str, dict], stage: str) -> float | None:
    """Share in percent of the way from the control to the bound that a stage has gone, all with target BatchNorm.

    None where the bound is not above the control.
    """
    start, end, here = (rows[name]["miou_target_bn"] for name in (CONTROL, BOUND, stage))
    return 100 * (here - start) / (end - start) if end > start and stage != CONTROL else None


# ---------------------------------------------------------------------------------------------------------- scores


def stage_rows(stage: str, run_name: str, cfg: Config, metrics: dict, tests: Config) -> dict[str, dict]:
    """The summary's row of a trained stage; source-only has a second one, under target BatchNorm statistics."""
    classes, target = class_set(tests.data), _scores_of_target_bn(run_name, cfg, metrics, tests)
    more = {"miou_target_bn": target["miou"], "best_miou": metrics["best"]["miou"]}
    rows = {stage: _row(metrics["last"], classes) | {"statistics": cfg.batchnorm.statistics} | more}
    if stage == "source_only":
        more = {"statistics": "target", "miou_target_bn": target["miou"]}
        rows["source_only_target_bn"] = _row(target, classes) | more
    return rows


def _scores_of_target_bn(run_name: str, cfg: Config, metrics: dict, tests: Config) -> dict:
    """Scores of a run's last checkpoint under target BatchNorm statistics; tested if the run has others."""
    return metrics["last"] if cfg.batchnorm.statistics == "target" else _test(tests, run_name)


def _row(scores: dict, classes: ClassSet) -> dict:
    present = sorted((n for n in classes.names if scores["pixels"][n]), key=scores["pixels"].get)
    kept = {key: scores[key] for key in ("miou", *classes.subsets, "iou")}
    if len(present) <= RAREST:  # their mean is the mIoU
        return kept
    return kept | {"rarest": present[:RAREST], "miou_rarest": mean_over(scores["iou"], present[:RAREST])}


def _test(tests: Config, run_name: str) -> dict:
    """Test a run's last checkpoint under target BatchNorm statistics; scores are kept from an earlier call."""
    cfg = copy.deepcopy(tests)
    cfg.checkpoint, cfg.which, cfg.batchnorm.statistics = run_name, "last", "target"
    cfg.name, cfg.test.dataset, cfg.test.images = f"test/{run_name}_target", "val", ""
    scores = checkpoint.read_mapping(cfg.run_dir / "metrics.json")
    same = {
        "checkpoint_hash": checkpoint.file_hash(checkpoint.find_checkpoint(cfg, run_name)),
        "files": fingerprint(val := list_samples(cfg.data.val)),
        "labels": fingerprint(val, labels=True),
        "mode": test.mode(cfg),
    }
    return scores if scores | same == scores else test.main(cfg)


def format_summary(rows: dict[str, dict]) -> str:
    """The table of mIoU by stage."""
    columns, cells, notes = score_table(rows)
    return "\n".join([text_table(["mIoU in percent", *columns], cells), *notes])


def _panel(cfg: Config, runs: dict[str, str], statistics: str, path: Path) -> None:
    """image | each stage | truth, of images spread over the validation split.

    Source only is drawn with the later stages' BatchNorm statistics, so that pictures differ by what was learnt alone.
    """
    cfg, device, classes = copy.deepcopy(cfg), choose_device(cfg), class_set(cfg.data)
    cfg.which, shown = "last", []
    val = build_dataset(cfg.data.val, classes)
    val.samples = [val.samples[i] for i in spread(len(val), PICTURES)]
    for stage, run_name in runs.items():
        cfg.batchnorm.statistics = statistics if stage == "source_only" else "saved"
        model, _ = load_network(cfg, checkpoint.find_checkpoint(cfg, run_name), device)
        gallery = Gallery(range(len(val)), classes)
        evaluate(model, val, cfg, device, gallery)
        shown.append(gallery.shown)
    rows = [[image, *(pictures[i][1] for pictures in shown), truth] for i, (image, _, truth) in shown[0].items()]
    save_panel(path, rows, ["image", *(name.replace("_", " ") for name in runs), "truth"])


# ----------------------------------------------------------------------------------------------------------- seeds


def run_seeds(overrides: list[str], seeds: list[int], control: bool = True, bound: bool = False) -> dict:
    """The pipeline once for each seed; returns what is written to seeds.json: mean and deviation by stage and class."""
    base = load_stage("bpl", overrides)
    for seed in seeds:  # a wrong one is refused before the first is trained
        load_stage("bpl", [*overrides, f"seed={seed}"])
    summaries, folders = [], {}
    for seed in seeds:
        print(f"==== seed {seed}", flush=True)
        own = [*overrides, f"seed={seed}", f"runs={base.runs}/seed{seed}"]
        summaries.append(run(own, control, bound)["stages"])
        folders[str(seed)] = f"../seed{seed}/{base.benchmark_name}"  # from seeds.json's own
    result = {"benchmark": base.benchmark, "seeds": seeds, "folders": folders, "stages": over_seeds(summaries)}
    path = base.sibling_run("seeds.json")
    checkpoint.write_json(path, result)
    write_report(path.parent)
    print(format_summary(result["stages"]))
    print(f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}; written to {show_path(path)}")
    return result


def over_seeds(summaries: list[dict]) -> dict:
    """The same nested rows from several seeds, {"mean": …, "std": …} in place of each float; std is the sample's."""
    first = summaries[0]
    if isinstance(first, dict):
        return {key: over_seeds([s[key] for s in summaries]) for key in first if all(key in s for s in summaries)}
    if not all(isinstance(value, float) for value in summaries):
        return first if all(value == first for value in summaries) else None
    return {"mean": mean(summaries), "std": stdev(summaries) if len(summaries) > 1 else 0.0}


def own_keys(overrides: list[str]) -> tuple[list[str], bool | None, list[int]]:
    """The overrides without the pipeline's own keys, and the values of these: controls (None if not given), seeds."""
    own, others = split_words(overrides, ("controls", "seeds"))
    controls, numbers = own.get("controls"), own.get("seeds")
    require(controls in ("true", "false", None), f"controls={controls!r} has the wrong type: true or false is needed")
    try:
        seeds = [] if numbers is None else [int(seed) for seed in numbers.strip("[]").split(",")]
    except ValueError:
        raise ConfigError(f"seeds={numbers!r} has the wrong type: seeds=0,1,2 is needed") from None
    require(len(set(seeds)) == len(seeds), f"seeds={numbers!r} names a seed twice")
    given = {o.partition("=")[0] for o in others}
    require("name" not in given, "name= would be the one folder of all stages; runs= keeps pipelines apart")
    for key in ("checkpoint", "pseudo_labels"):
        require(key not in given, f"{key}= is not read here: each stage takes up what the one before it has made")
    require(not seeds or "seed" not in given, "seed= and seeds= are given; seeds= says all")
    return others, controls and controls == "true", seeds


def main(words: list[str]) -> None:
    """Run what the command line asks for."""
    overrides, controls, seeds = own_keys(words)
    which = {"control": controls is not False, "bound": controls is True}
    run_seeds(overrides, seeds, **which) if seeds else run(overrides, **which)


if __name__ == "__main__":
    run_words(main, __doc__)
