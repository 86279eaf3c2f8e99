"""Controls: as many steps as the chain, labels of the target for the bound alone, shares of the gap."""

from __future__ import annotations

import json

import pytest

from data import datasets
from utils import pipeline
from utils.config import ROOT, ConfigError, load_config
from utils.controls import chain_steps, control_runs, gap_closed
from utils.pipeline import STEPS


@pytest.fixture
def configs(benchmarks):
    """The pipeline's configurations on the Cityscapes tree, whose training images have labels."""

    def load(*overrides):
        given = [f"benchmark={benchmarks['gta5_to_city']}", *overrides]
        return {stage: load_config(ROOT / "configs" / file, [*given, *own]) for stage, _, file, own in STEPS}

    return load


def test_controls_run_as_many_steps_as_the_chain(configs):
    every = configs("train.iterations=5", "train.horizon=10", "distill.rounds=[1, 2]")
    assert chain_steps(every) == 5 * 5  # warm-up, BPL, PST, two rounds
    every["warmup"].model.init = "source_only"
    assert chain_steps(every) == 6 * 5
    every["source_only"].train.iterations = 4
    (name, long, _), (_, bound, stage) = control_runs(every)
    assert name == long.name == "source_only_long" and bound.name == "labelled_bound"
    assert long.train.iterations == bound.train.iterations == 29
    assert long.train.horizon == round(29 * 10 / 4)  # the same share of the poly schedule is run
    assert long.loss.adversarial == 0 and stage.uses_target_labels
    assert long.batchnorm == every["bpl"].batchnorm


def test_no_bound_without_target_labels(benchmarks, capsys):
    given = [f"benchmark={benchmarks['day_to_dusk']}"]
    every = {stage: load_config(ROOT / "configs" / file, [*given, *own]) for stage, _, file, own in STEPS}
    every["source_only"].data.target.labels = ""
    assert [name for name, *_ in control_runs(every)] == ["source_only_long"]
    assert "no labelled_bound" in capsys.readouterr().out


def test_share_of_the_gap():
    rows = {"long": {"miou_target_bn": 40.0}, "pst": {"miou_target_bn": 46.0}, "bpl": {"miou_target_bn": 38.0}}
    assert gap_closed(rows, "pst", "long") is None
    rows["labelled_bound"] = {"miou_target_bn": 50.0}
    assert gap_closed(rows, "pst", "long") == 60
    assert gap_closed(rows, "bpl", "long") == -20
    assert gap_closed(rows, "labelled_bound", "long") == 100
    assert gap_closed(rows, "long", "long") is None
    rows["labelled_bound"]["miou_target_bn"] = 40.0
    assert gap_closed(rows, "pst", "long") is None


def test_seeds_and_controls_by_the_pipeline(benchmarks, tmp_path, monkeypatch):
    """Two seeds of the whole chain with controls; only the bound opens target training labels."""
    opened = []
    read = datasets.read_label_ids
    monkeypatch.setattr(datasets, "read_label_ids", lambda path: opened.append(str(path)) or read(path))
    fitted = []
    fit = pipeline.fit
    monkeypatch.setattr(pipeline, "fit", lambda cfg, stage: fitted.append(len(opened)) or fit(cfg, stage))
    given = [f"benchmark={benchmarks['gta5_to_city']}", f"runs={tmp_path}", "device=cpu", "data.workers=0"]
    result = pipeline.run_seeds(given, [3, 4], controls=True)
    folder = tmp_path / "gta5_to_city"
    assert result == json.loads((folder / "seeds.json").read_text())
    rows = [json.loads((tmp_path / f"seed{seed}/gta5_to_city/summary.json").read_text())["stages"] for seed in (3, 4)]
    assert list(rows[0])[-2:] == ["source_only_long", "labelled_bound"]
    a, b = (row["pst"]["miou"] for row in rows)
    assert result["stages"]["pst"]["miou"]["mean"] == pytest.approx((a + b) / 2)
    assert result["stages"]["pst"]["miou"]["std"] == pytest.approx(abs(a - b) / 2**0.5)
    assert set(result["stages"]["pst"]["iou"]["road"]) == {"mean", "std"}
    train_labels = [i for i, path in enumerate(opened) if "/gtFine/train/" in path]
    long, bound = fitted[:2]
    assert train_labels and not [i for i in train_labels if i < bound]  # of the first seed, all before the bound
    assert long < bound


@pytest.mark.parametrize("given", ["controls=yes", "seeds=0,x", "seeds=1,1", "seeds="])
def test_own_keys_are_checked(given):
    with pytest.raises(ConfigError, match=given.split("=")[0]):
        pipeline._own_keys([given])
    assert pipeline._own_keys(["seed=1", "controls=true", "seeds=0,1"]) == (["seed=1"], True, [0, 1])
