"""Controls: as many steps as the chain, labels of the target for the bound alone, shares of the gap."""

from __future__ import annotations

import json

import pytest

from data import datasets
from utils import pipeline
from utils.config import ROOT, ConfigError
from utils.controls import chain_steps, control_runs, gap_closed
from utils.engine.setup import load_config
from utils.pipeline import STEPS


@pytest.fixture
def configs(benchmarks):
    """The pipeline's configurations on the Cityscapes tree, whose training images have labels."""

    def load(*overrides):
        given = [f"benchmark={benchmarks['gta5_to_city']}", *overrides]
        return {stage: load_config(ROOT / "configs" / file, [*given, *own]) for stage, _, file, own in STEPS}

    return load


def test_controls_start_where_the_warmup_does_and_run_as_long_as_the_stages(configs):
    every = configs("train.iterations=5", "train.horizon=10", "distill.rounds=[1, 2]")
    every["warmup"].model.init, every["warmup"].train.lr = "source_only", 0.02
    every["pst"].train.iterations = 4
    assert chain_steps(every) == 24  # warm-up, BPL, PST, two rounds
    (name, long, _), (_, bound, stage) = control_runs(every)
    assert name == long.name == "source_only_long" and bound.name == "labelled_bound"
    for cfg in (long, bound):
        assert cfg.train.iterations == 24 and cfg.train.horizon == 48  # the same share of the poly schedule is run
        assert cfg.model.init == "source_only" and cfg.train.lr == 0.02
    assert long.batchnorm == every["bpl"].batchnorm
    assert long.loss.adversarial == 0 and long.loss.bidirectional == 0 and stage.uses_target_labels
    assert every["warmup"].loss.adversarial > 0 and every["warmup"].train.iterations == 5


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


def test_controls_by_the_pipeline(benchmarks, tmp_path, monkeypatch):
    """A seed of the whole chain with controls; only the bound opens target training labels."""
    opened, fitted = [], []
    read, fit = datasets.read_label_ids, pipeline.fit
    monkeypatch.setattr(datasets, "read_label_ids", lambda path: opened.append(str(path)) or read(path))
    monkeypatch.setattr(pipeline, "fit", lambda cfg, stage: fitted.append(len(opened)) or fit(cfg, stage))
    given = [f"benchmark={benchmarks['gta5_to_city']}", f"runs={tmp_path}", "device=cpu", "distill.rounds=[1]"]
    result = pipeline.run_seeds(given, [3], controls=True)
    assert result == json.loads((tmp_path / "gta5_to_city" / "seeds.json").read_text())
    rows = json.loads((tmp_path / "seed3" / "gta5_to_city" / "summary.json").read_text())["stages"]
    assert list(rows)[-2:] == ["source_only_long", "labelled_bound"]
    assert result["stages"]["pst"]["miou"] == {"mean": rows["pst"]["miou"], "std": 0}
    _, bound = fitted
    of_target = [i for i, path in enumerate(opened) if "/gtFine/train/" in path]
    assert of_target and min(of_target) >= bound


def test_mean_and_deviation_over_seeds():
    a, b = ({"pst": {"miou": m, "rarest": ["car"], "best_miou": None, "iou": {"car": m}}} for m in (40.0, 43.0))
    row = pipeline.over_seeds([a, b])["pst"]
    assert row["miou"] == row["iou"]["car"] == {"mean": 41.5, "std": pytest.approx(3 / 2**0.5)}
    assert row["rarest"] == ["car"] and row["best_miou"] is None
    assert "41.5 ± 2.1" in pipeline.format_summary({"pst": row})


@pytest.mark.parametrize("given", ["controls=yes", "seeds=0,x", "seeds=1,1", "seeds=", "name=x", "seed=1 seeds=0,1"])
def test_own_keys_are_checked(given):
    with pytest.raises(ConfigError, match=given.split("=")[0]):
        pipeline.own_keys(given.split())
    assert pipeline.own_keys(["train.lr=1", "controls=true", "seeds=0,1"]) == (["train.lr=1"], True, [0, 1])
