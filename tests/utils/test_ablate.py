"""Ablations: every variant has its row, what variants share is trained once, and a bad list is refused at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from survival import use_tiny_networks

import train_bpl
import train_pst
from data import pseudo_labels
from utils import ablate, pipeline
from utils.ablate import VARIANTS, planned, read_variants
from utils.config import ConfigError, UserError
from utils.engine.command_line import run_words
from utils.pipeline import load_stages
from utils.report.page import find_runs, write_report

LIST = {
    "bpl": {
        "both": ["loss.directions=both"],
        "s2t_alone": ["loss.directions=s2t"],
        "no_adversary": ["loss.adversarial=0"],
    },
    "pst": {"no_contrast": ["loss.contrast=0"], "constant": ["pseudo.selection=constant", "pseudo.threshold=0.2"]},
}
ROWS = ["bpl", "bpl/both", "bpl/s2t_alone", "bpl/no_adversary", "pst", "pst/no_contrast", "pst/constant"]


@pytest.fixture
def variants(tmp_path):
    path = tmp_path / "variants.yml"
    path.write_text(yaml.safe_dump(LIST, sort_keys=False))
    return path


@pytest.fixture
def given(benchmarks, tmp_path):
    return [f"benchmark={benchmarks['day_to_dusk']}", f"runs={tmp_path / 'runs'}", "device=cpu"]


@pytest.fixture
def work(monkeypatch):
    """With tiny networks: the steps of each run and the labels that are made, in order, as run folders' names."""
    use_tiny_networks(monkeypatch)
    seen = []

    def watch(owner, name):
        call = getattr(owner, name)

        def watched(first, *args):
            folder = first if isinstance(first, Path) else first.cfg.run_dir
            seen.append(folder.as_posix().partition("/day_to_dusk/")[2])
            return call(first, *args)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((train_bpl.BPL, "step"), (train_pst.PST, "step"), (pseudo_labels, "begin")):
        watch(owner, name)
    return seen


def trained(*names):
    """Two steps of each, and labels once."""
    return [name for name in names for _ in range(1 if "pseudo_labels" in name else 2)]


def test_every_variant_has_its_row_and_shared_runs_are_made_once(given, variants, work, capsys, tmp_path):
    result = ablate.run(given, [0, 3], variants)
    chain = ("warmup", "bpl", "ablation/bpl/s2t_alone", "ablation/bpl/no_adversary")
    chain += (
        "pseudo_labels",
        "pst",
        "ablation/pst/no_contrast",
        "ablation/pseudo_labels/constant",
        "ablation/pst/constant",
    )
    assert work == trained(*chain) * 2

    folder = tmp_path / "runs"
    assert result == json.loads((folder / "day_to_dusk" / "ablation.json").read_text())
    assert list(result["rows"]) == ROWS and result["seeds"] == [0, 3]
    table = capsys.readouterr().out
    for name, row in result["rows"].items():
        assert f"\n{name} " in table and row["scored_at"] == name.split("/")[0]
        scores = [
            json.loads((folder / f"seed{s}/day_to_dusk" / row["run"] / "metrics.json").read_text()) for s in (0, 3)
        ]
        scores = [s["last"] for s in scores]
        assert row["miou"] == pipeline.over_seeds([s["miou"] for s in scores])
        assert row["iou"] == pipeline.over_seeds([s["iou"] for s in scores])
        assert row["miou_target_bn"]["mean"] > 0 and "miou_rarest" not in row  # of four classes
    same, other = (result["rows"][row] for row in ("bpl/both", "bpl/s2t_alone"))
    assert same["run"] == "bpl" and same["over_own"] == {"mean": 0, "std": 0}
    gains = [other["miou"]["mean"] - result["rows"]["bpl"]["miou"]["mean"]]
    assert other["over_own"]["mean"] == pytest.approx(gains[0])

    work.clear()  # again: nothing is trained, in whatever order
    assert ablate.run(given, [0, 3], variants) == result and not work


def test_runs_of_the_pipeline_are_taken_and_not_mixed_with_variants(given, variants, work, tmp_path):
    folder = tmp_path / "runs" / "seed1" / "day_to_dusk"
    given.append("distill.rounds=[1]")
    summary = pipeline.run([*given, "seed=1", f"runs={tmp_path / 'runs/seed1'}"], control=False)
    stages = [run.name for run in find_runs(folder)]
    work.clear()
    rows = ablate.run(given, [1], variants)["rows"]
    assert {name.split("/")[0] for name in work} == {"ablation"}
    assert rows["pst"]["miou"]["mean"] == summary["stages"]["pst"]["miou"]
    assert [run.name for run in find_runs(folder)] == stages
    page, own = (write_report(place).read_text(encoding="utf-8") for place in (folder, folder / "ablation"))
    for name in ("s2t alone", "no contrast"):
        assert name in own and name not in page
    assert {run.name for run in find_runs(folder / "ablation")} == {r for r in ROWS if "/" in r} - {"bpl/both"}


def test_other_experiments_are_refused_before_anything_is_trained(given, variants, work, tmp_path):
    train_bpl.main(load_stages([*given, "seed=7", "train.lr=2e-3", f"runs={tmp_path / 'runs/seed7'}"])["warmup"])
    work.clear()
    other = r"seed7/day_to_dusk/warmup holds another experiment \(train\.lr: 0\.002 -> 0\.001\)"
    with pytest.raises(UserError, match=other):
        ablate.run(given, [0, 7], variants)
    assert not work


def test_goes_on_where_it_was_stopped(given, variants, work, monkeypatch):
    step, calls = train_pst.PST.step, []

    def stopped(*args):
        calls.append(None)
        if len(calls) == 4:  # in the second PST run
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(train_pst.PST, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablate.run(given, [0], variants)
    before = list(work)
    ablate.run(given, [0], variants)
    again = work[len(before) :]
    assert before[-1] == "ablation/pst/no_contrast"
    assert again == trained("ablation/pst/no_contrast", "ablation/pseudo_labels/constant", "ablation/pst/constant")


def test_plans(given):
    def plan(row, *own):
        overrides = [*given, own[0]]
        return [cfg.name or cfg.stage for cfg in planned(load_stages(overrides), overrides, row, list(own[1:]))]

    assert plan("bpl", "seed=0") == ["warmup", "bpl"]
    assert plan("bpl", "model.init=scratch") == ["bpl"]
    given.append("loss.contrast=0.1")
    assert plan("pst/x", "seed=0", "loss.contrast=0.1") == ["warmup", "bpl", "pseudo_labels", "pst"]
    assert plan("pst/x", "seed=0", "pseudo.selection=class_balanced") == ["warmup", "bpl", "pseudo_labels", "pst"]
    assert plan("pst/x", "seed=0", "model.init=scratch")[-2:] == ["pseudo_labels", "ablation/pst/x"]
    assert plan("pst/x", "seed=0", "model.init=pst")[-2:] == ["pst", "ablation/pst/x"]  # a second round
    assert plan("bpl/x", "seed=0", "model.init=source_only") == ["source_only", "ablation/bpl/x"]
    assert plan("pst/x", "seed=0", "pseudo.labels=online", "model.init=bpl") == ["warmup", "bpl", "ablation/pst/x"]
    labels, run = planned(load_stages(given), given, "pst/x", ["pseudo.keep=0.1"])[-2:]
    assert run.pseudo_labels == labels.name and labels.pseudo.keep == 0.1


@pytest.mark.parametrize("name", ["toy", "camvid_day_to_dusk", "gta5_to_cityscapes"])
def test_own_list_fits_the_benchmarks(name):
    rows, overrides = read_variants(VARIANTS), [f"benchmark={name}"]
    stages = load_stages(overrides)
    plans = {row: planned(stages, overrides, row, own) for row, own in rows.items()}
    known = {row for row, plan in plans.items() if not plan[-1].name}
    own = {"pst/prototypes_stopped", "pst/threshold_balanced" if name == "toy" else "pst/threshold_constant"}
    own |= {"pst/contrast_1"} if name == "gta5_to_cityscapes" else set()
    assert known == {"bpl", "pst", "bpl/both_directions"} | own
    others = len(rows) - len(known) + 2  # all of the known are one of two runs
    names = {cfg.run_dir for plan in plans.values() for cfg in plan}
    assert len({plan[-1].run_dir for plan in plans.values()}) == others < len(names)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no variants"),
        ("[bpl]", "holds list"),
        ("distill: {x: []}", "'distill' is no stage with variants; they are warmup, bpl, pst"),
        ("bpl: []", "bpl must hold variants"),
        ("bpl: {x: loss.adversarial=0}", "bpl/x must hold a list of key=value"),
        ("bpl: {x: [{loss: 0}]}", "bpl/x must hold a list of key=value"),
        ("bpl: {../x: []}", "bpl/../x: a variant is named by"),
        ("bpl: {no: []}", "bpl/False: a variant is named by"),
        ("bpl: {x: [pseudo.keep=0.1]}", "bpl/x: pseudo.keep=0.1 is not read by bpl, but by pseudo_labels, distill"),
        ("bpl: {x: [seed=3]}", "bpl/x: seed=3 cannot differ"),
        ("bpl: {x: [loss.adversarial]}", "bpl/x: 'loss.adversarial' is not of the form key=value"),
        ("bpl: {x: [loss.adversary=0]}", "bpl/x: unknown key 'loss.adversary'"),
        ("pst: {x: [loss.contrast=much]}", "pst/x: loss.contrast='much' has the wrong type"),
        ("pst: {x: [], y: [loss.contrast=-1]}", "pst/y: loss.contrast=-1.0 must be 0 or more"),
        ("bpl: {x: [loss.directions=up]}", "bpl/x: loss.directions='up' is not one of both | s2t | t2s"),
    ],
)
def test_bad_lists_are_refused_before_anything_is_trained(given, work, tmp_path, content, said):
    path = tmp_path / "variants.yml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        ablate.run(given, [0], path)
    assert said in str(error.value) and "variants.yml" in str(error.value) and "\n" not in str(error.value)
    assert not work and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("variants=absent.yml", "absent.yml: No such file"),
        ("seeds=0,a", "seeds='0,a'"),
        ("controls=true", "controls= is for utils.pipeline"),
        ("train.learning_rate=1", "unknown key 'train.learning_rate' in the command line"),
    ],
)
def test_command_line(tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ablate", "benchmark=toy", given])
    with pytest.raises(SystemExit) as left:
        run_words(ablate.main, ablate.__doc__)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
