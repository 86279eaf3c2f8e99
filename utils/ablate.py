"""What each part of the method is worth: variants of a stage, each from the same start, over several seeds.

    python -m utils.ablate benchmark=camvid_day_to_dusk seeds=0,1,2
    python -m utils.ablate benchmark=path/to/mine.yml seeds=0,1 variants=my_variants.yml train.lr=1e-3

`variants` is a YAML of {stage: {variant: [key=value, …]}} for the stages warmup, bpl and pst; by default,
configs/ablations/default.yml. A variant changes some keys of a stage and starts as it does, unless it sets model.init.
The runs that it starts from are the pipeline's, in runs/seed<k>/<benchmark>/: those that are there are used, the others
are trained, once for each seed. Runs of variants go into ablation/<stage>/<variant> beside them (`python -m
utils.report` of that folder shows them).

Writes runs/<benchmark>/ablation.json after each seed. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from utils.config import ROOT, Config, ConfigError, all_keys, find_path, read_yaml
from utils.config.keys import require
from utils.engine import checkpoint
from utils.engine.command_line import run_words, split_words
from utils.engine.log import show_path
from utils.engine.loop import refuse_other_experiment
from utils.engine.setup import check_inputs
from utils.pipeline import (
    STEPS,
    first_weights,
    format_summary,
    load_stage,
    load_stages,
    load_tests,
    over_seeds,
    own_keys,
    stage_rows,
)
from utils.report.page import ABLATION

VARIANTS = ROOT / "configs" / "ablations" / "default.yml"
STAGES = ("warmup", "bpl", "pst")  # that may have variants
SHARED = ("benchmark", "stage", "name", "runs", "seed", "checkpoint", "which", "pseudo_labels", "device")
# Of the keys pseudo.*, those that training reads; the others make labels.
ONLINE = {name for name, key in all_keys().items() if name.startswith("pseudo.") and key.stages == ("pst",)}
SEEDS = [0, 1, 2]


def read_variants(path: Path) -> dict[str, list[str]]:
    """The table's rows and their overrides: {"bpl": [], "bpl/s2t_alone": [...], …}, each stage before its variants.

    Raises ConfigError naming file and entry.
    """
    rows = {}
    for stage, variants in read_yaml(path).items():
        require(stage in STAGES, f"{path}: {stage!r} is no stage with variants; they are {', '.join(STAGES)}")
        example = "`{no_adversary: [loss.adversarial=0]}`"
        require(isinstance(variants, dict) and variants, f"{path}: {stage} must hold variants, as in {example}")
        rows[stage] = []
        for name, own in variants.items():
            where = f"{path}: {stage}/{name}"
            named = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)
            require(named, f"{where}: a variant is named by letters, digits, '_', '-' and '.'")
            words = isinstance(own, list) and all(isinstance(o, str) for o in own)
            require(words, f"{where} must hold a list of key=value, not {own!r}")
            for word in own:
                key = all_keys().get(word.partition("=")[0])  # an unknown one is refused later
                readers = {stage, "pseudo_labels"} if stage == "pst" else {stage}
                read = not key or key.stages is None or readers & {*key.stages}
                require(read, f"{where}: {word} is not read by {stage}, but by {', '.join(key.stages if key else ())}")
                differs = word.partition("=")[0] not in SHARED
                require(differs, f"{where}: {word} cannot differ between variants; give it on the command line")
            rows[f"{stage}/{name}"] = own
    require(rows, f"{path} holds no variants")
    return rows


def _made_from(cfg: Config, stages: dict[str, Config]) -> list[Config]:
    """The stages that must be run before `cfg`, in order; a stage may occur twice."""
    offline = cfg.stage == "pst" and cfg.pseudo.labels == "offline"
    starts = {cfg.model.init, cfg.checkpoint} | ({"pseudo_labels"} if offline else set())
    names, steps = list(stages), []
    for i, name in enumerate(names):
        if name in starts:
            steps += [*_made_from(stages[name], {n: stages[n] for n in names[:i]}), stages[name]]
    return steps


def planned(stages: dict[str, Config], overrides: list[str], row: str, own: list[str]) -> list[Config]:
    """The runs that a row of the table needs, in order, its own last.

    Where the variant's keys change nothing, that is the benchmark's own run of the stage.

    Args:
        stages: `load_stages(overrides)`.
        row: "bpl" or "bpl/<variant>", likewise the other stages.
        own: the variant's keys.
    """
    stage, _, name = row.partition("/")
    of_labels = [o for o in own if o.startswith("pseudo.") and o.partition("=")[0] not in ONLINE]
    cfg = load_stage(stage, [*overrides, *(o for o in own if o not in of_labels)])
    labels = load_stage("pseudo_labels", [*overrides, *of_labels])
    other_labels = labels != stages["pseudo_labels"]
    if other_labels or cfg != stages[stage]:
        cfg.name = f"{ABLATION}/{row}"
    if other_labels:
        labels.name = cfg.pseudo_labels = f"{ABLATION}/pseudo_labels/{name}"
    steps = [*_made_from(cfg, stages | {"pseudo_labels": labels}), cfg]
    return list({step.run_dir: step for step in steps}.values())


def _plan(overrides: list[str], variants: Path) -> dict[str, list[Config]]:
    """The runs of every row for one seed."""
    stages, plan = load_stages(overrides), {}
    for row, own in read_variants(variants).items():
        try:
            plan[row] = planned(stages, overrides, row, own)
        except ConfigError as error:
            raise ConfigError(f"{variants}: {row}: {error}") from None
    return plan


def _check(cfg: Config) -> None:
    """UserError if a run cannot start, or its folder holds another experiment."""
    first_weights(cfg)
    saved = checkpoint.read_mapping(cfg.run_dir / "config.yml", yaml.safe_load)
    if saved and not cfg.train.restart:
        refuse_other_experiment(saved, cfg)


def run(overrides: list[str], seeds: list[int], variants: Path = VARIANTS) -> dict:
    """Train what is not there yet for every variant and seed; returns what is written to ablation.json."""
    rows, base = read_variants(variants), load_stage("bpl", overrides)
    by_seed = [[*overrides, f"seed={seed}", f"runs={base.runs}/seed{seed}"] for seed in seeds]
    plans = [_plan(seeded, variants) for seeded in by_seed]  # every config is checked before the first run starts
    every = {cfg.run_dir: cfg for plan in plans for steps in plan.values() for cfg in steps}.values()
    check_inputs(*(lambda cfg=cfg: _check(cfg) for cfg in every))

    path, summaries, result = base.sibling_run("ablation.json"), [], {}
    for plan, seeded in zip(plans, by_seed):
        summaries.append(_run_seed(plan, load_tests(seeded, base)))
        done = {"benchmark": base.benchmark, "seeds": seeds[: len(summaries)], "overrides": rows}
        result = done | {"rows": over_seeds(summaries)}
        checkpoint.write_json(path, result)
    print(format_summary(result["rows"]))
    print(
        "bpl: the benchmark's own stage; bpl/…: its variants, scored as that stage leaves them, likewise the others; "
        "over own: points over the benchmark's own stage, seed by seed"
    )
    print(f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}; written to {show_path(path)}")
    return result


def _run_seed(plan: dict[str, list[Config]], tests: Config) -> dict[str, dict]:
    """The rows of one seed; a run is made once, however many rows need it."""
    finished, rows = {}, {}  # metrics by run folder
    for row, steps in plan.items():
        for cfg in steps:
            if cfg.run_dir not in finished:
                print(f"== seed {cfg.seed}, {cfg.name or cfg.stage}", flush=True)
                finished[cfg.run_dir] = STEPS[cfg.stage][0].main(cfg)
        stage, run_name = row.partition("/")[0], cfg.name or cfg.stage
        rows |= stage_rows(row, run_name, cfg, finished[cfg.run_dir], tests)
        over_own = rows[row]["miou"] - rows[stage]["miou"] if row != stage else None
        rows[row] |= {"scored_at": stage, "run": run_name, "over_own": over_own}
    return rows


def main(words: list[str]) -> None:
    """Run what the command line asks for."""
    own, words = split_words(words, ("variants",))
    overrides, controls, seeds = own_keys(words)
    require(not any(o.startswith("seed=") for o in overrides), "seed= is given; seeds=0,1,2 says which to run")
    require(controls is None, "controls= is for utils.pipeline, which trains them")
    run(overrides, seeds or SEEDS, Path(find_path(own.get("variants", str(VARIANTS)))).absolute())


if __name__ == "__main__":
    run_words(main, __doc__)
