"""The pipeline's controls: as many steps as the chain, source images alone; target labels for the bound alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from survival import use_tiny_networks

from data import datasets
from data.taxonomy import ClassSet, class_set
from utils import pipeline
from utils.config import ConfigError, UserError
from utils.pipeline import BOUND, CONTROL, bound_config, control_legs, gap_closed, load_stages, steps_by_stage


def stages_of(benchmarks, layout, *overrides):
    return load_stages([f"benchmark={benchmarks[layout]}", *overrides])


def test_the_control_takes_the_steps_and_rates_of_the_stages_one_after_another(benchmarks):
    every = stages_of(benchmarks, "gta5_to_city", "train.iterations=5", "train.horizon=10", "distill.rounds=[1, 2]")
    every["warmup"].model.init, every["pst"].train.iterations, every["pst"].train.lr = "source_only", 4, 0.02
    every["pst"].batchnorm.statistics, every["pst"].data.jitter_factor = "target", [0.9, 1.1]
    assert steps_by_stage(every) == {"warmup": 5, "bpl": 10, "pst": 14, "distill": 24}
    legs = list(control_legs(every))
    assert [stage for stage, _ in legs] == ["warmup", "bpl", "pst", "distill", "distill"]
    for stage, cfg in legs:
        assert (cfg.train, cfg.batchnorm) == (every[stage].train, every[stage].batchnorm)
        assert cfg.data == replace(every[stage].data, jitter=stage != "distill") and every[stage].data.jitter
        assert cfg.loss.adversarial == cfg.loss.bidirectional == 0
    starts, names = [cfg.model.init for _, cfg in legs], [cfg.name for _, cfg in legs]
    assert starts == ["source_only", *names[:-1]] and len(set(names)) == 5
    assert [cfg.distill.rounds for _, cfg in legs[-2:]] == [[1], [2]]  # crops of their own
    assert every["warmup"].loss.adversarial > 0 and every["warmup"].train.iterations == 5

    bound = bound_config(every)
    assert (bound.train.iterations, bound.train.horizon, bound.model.init) == (24, 48, "source_only")

    every["warmup"].model.init, every["source_only"].batchnorm = "scratch", every["warmup"].batchnorm
    every["source_only"].model.init = "scratch"  # from where the warm-up starts, as in the published pairs
    for cfg in every.values():
        cfg.train.restart = True
    (_, first), (_, second), *_ = control_legs(every)
    assert (first.name, second.model.init) == ("source_only", "source_only")
    assert second.train.restart and not first.train.restart  # it has just been trained


@pytest.mark.parametrize("statistics", ["target", "running"])
def test_stages_are_held_against_controls_under_target_statistics(benchmarks, monkeypatch, statistics):
    every, tested = stages_of(benchmarks, "gta5_to_city", "distill.rounds=[1]"), []
    tests = pipeline.load_tests([f"benchmark={benchmarks['gta5_to_city']}"], every["bpl"])
    names = class_set(tests.data).names
    scores = {"miou": 50.0, "iou": dict.fromkeys(names, 50.0), "pixels": dict.fromkeys(names, 1)}
    scores |= dict.fromkeys(class_set(tests.data).subsets, 50.0)
    monkeypatch.setattr(pipeline, "fit", lambda cfg, stage: {"last": scores, "best": scores})
    monkeypatch.setattr(pipeline, "_test", lambda tests, run: tested.append(run) or scores | {"miou": 55.0})
    for cfg in every.values():
        cfg.batchnorm.statistics = statistics
    rows = {stage: {"miou_target_bn": 60.0} for stage in ("warmup", "bpl", "pst", "distill")}
    pipeline.add_controls(rows, every, tests, bound=None)
    legs = [cfg.name for _, cfg in control_legs(every)]
    assert tested == ([] if statistics == "target" else [*legs, legs[-1]])  # what a run was not validated with
    gains = [row["gain_over_control"] for name, row in rows.items() if name != CONTROL]
    assert gains == [10 if statistics == "target" else 5] * 4
    assert (rows[CONTROL]["miou"], rows[CONTROL]["miou_target_bn"]) == (50, 60 - gains[0])


def test_the_scores_of_a_table_are_of_the_same_images(benchmarks, tmp_path):
    content = yaml.safe_load(Path(benchmarks["gta5_to_city"]).read_text())
    content.setdefault("stages", {})["test"] = {"test": {"flip": True}, "data": {"val": {"split": "test"}}}
    (tmp_path / "own.yml").write_text(yaml.safe_dump(content))
    cfg = pipeline.load_stages([f"benchmark={tmp_path / 'own.yml'}"])["bpl"]
    tests = pipeline.load_tests([f"benchmark={tmp_path / 'own.yml'}"], cfg)
    assert (tests.data.val, tests.test) == (cfg.data.val, cfg.test) and not cfg.test.flip
    content["stages"]["pst"] = {"test": {"flip": True}} | content["stages"].get("pst", {})
    (tmp_path / "own.yml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"data\.val, or how .*test\.flip.* differs between the stages"):
        pipeline.load_stages([f"benchmark={tmp_path / 'own.yml'}"])


@pytest.mark.parametrize("change", ["none", "checkpoint_hash", "files", "labels", "mode", "damaged"])
def test_scores_of_an_earlier_call_are_taken_if_they_are_of_the_same(benchmarks, tmp_path, monkeypatch, change):
    tests = pipeline.load_tests([f"runs={tmp_path}"], stages_of(benchmarks, "gta5_to_city")["bpl"])
    weights = tests.sibling_run("bpl") / "checkpoints" / "last.pth"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    kept = {"checkpoint_hash": pipeline.checkpoint.file_hash(weights), "mode": pipeline.test.mode(tests), "miou": 1.0}
    val = datasets.list_samples(tests.data.val)
    kept |= {"files": datasets.fingerprint(val), "labels": datasets.fingerprint(val, labels=True)}
    file = tests.sibling_run("test/bpl_target") / "metrics.json"
    file.parent.mkdir(parents=True)
    file.write_text("{" if change == "damaged" else json.dumps(kept | ({change: "other"} if change in kept else {})))
    monkeypatch.setattr(pipeline.test, "main", lambda cfg: "tested anew")
    assert pipeline._test(tests, "bpl") == (kept if change == "none" else "tested anew")


def test_a_yaml_may_not_name_the_one_folder_of_all_stages(benchmarks, tmp_path):
    content = yaml.safe_load(Path(benchmarks["gta5_to_city"]).read_text(encoding="utf-8"))
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(content | {"name": "x"}))
    with pytest.raises(ConfigError, match="name: x would be the one folder of all stages; take it out of the YAML"):
        load_stages([f"benchmark={tmp_path / 'mine.yml'}"])


def test_distillation_begins_with_round_1(benchmarks):
    cfg = stages_of(benchmarks, "gta5_to_city", "distill.rounds=[2]")["distill"]
    with pytest.raises(ConfigError, match=r"distill\.rounds=\[2\]: here, distillation begins with round 1"):
        pipeline.first_weights(cfg)


def test_a_file_that_a_later_stage_starts_from_is_looked_for_at_once(benchmarks, tmp_path):
    cfg = stages_of(benchmarks, "gta5_to_city", f"runs={tmp_path}")["pst"]
    cfg.model.init = str(tmp_path / "typo.pth")
    with pytest.raises(UserError, match=r"no weights at .*typo\.pth"):
        pipeline.first_weights(cfg)
    last = pipeline.checkpoint.RunFiles(cfg.run_dir).last
    last.parent.mkdir(parents=True)
    last.touch()
    pipeline.first_weights(cfg)  # it goes on from there
    cfg.train.restart = True
    with pytest.raises(UserError, match=r"no weights at .*typo\.pth"):
        pipeline.first_weights(cfg)
    cfg.model.init = "bpl"  # still to be trained
    pipeline.first_weights(cfg)


@pytest.mark.parametrize("key", ["checkpoint", "pseudo_labels", "name"])
def test_what_links_the_stages_is_no_key_of_the_pipeline(key):
    with pytest.raises(ConfigError, match=f"{key}= "):
        pipeline.own_keys([f"{key}=bpl"])


def test_no_bound_without_target_labels(benchmarks, capsys):
    assert bound_config(stages_of(benchmarks, "day_to_dusk")) is None
    assert f"no {BOUND}" in capsys.readouterr().out


def test_a_label_that_the_bound_cannot_use_is_told_before_the_first_stage(benchmarks, tmp_path, monkeypatch):
    every = stages_of(benchmarks, "gta5_to_city")
    broken = datasets.list_samples(every["warmup"].data.target)[0].label
    monkeypatch.setattr(pipeline.train_bpl, "main", lambda cfg: pytest.fail("a stage has begun"))
    monkeypatch.setattr(pipeline, "first_weights", lambda cfg: None)
    content = broken.read_bytes()
    try:
        broken.write_bytes(b"")
        with pytest.raises(UserError, match=f"empty, the first is .*{broken.name}"):
            pipeline.run([f"benchmark={benchmarks['gta5_to_city']}", f"runs={tmp_path}"], bound=True)
    finally:
        broken.write_bytes(content)


def test_share_of_the_gap():
    rows = {CONTROL: {"miou_target_bn": 40.0}, "pst": {"miou_target_bn": 46.0}, "bpl": {"miou_target_bn": 38.0}}
    rows[BOUND] = {"miou_target_bn": 50.0}
    assert gap_closed(rows, "pst") == 60
    assert gap_closed(rows, "bpl") == -20
    assert gap_closed(rows, BOUND) == 100
    assert gap_closed(rows, CONTROL) is None
    rows[BOUND]["miou_target_bn"] = 40.0
    assert gap_closed(rows, "pst") is None


def test_controls_by_the_pipeline(benchmarks, tmp_path, monkeypatch, capsys):
    """A seed of the whole chain with controls; only the bound opens target training labels."""
    use_tiny_networks(monkeypatch)
    opened, fitted, read, fit = [], {}, datasets.read_label_ids, pipeline.fit
    monkeypatch.setattr(datasets, "read_label_ids", lambda path: opened.append(str(path)) or read(path))

    def watched(cfg, stage):
        before = len(opened)
        result = fit(cfg, stage)
        fitted[cfg.name] = {
            part for path in opened[before:] for part in ("labels", "train", "val") if f"/{part}/" in path
        }
        return result

    monkeypatch.setattr(pipeline, "fit", watched)
    given = [f"benchmark={benchmarks['gta5_to_city']}", f"runs={tmp_path}", "device=cpu", "distill.rounds=[1]"]
    result = pipeline.run_seeds(given, [3], bound=True)
    assert result == json.loads((tmp_path / "gta5_to_city" / "seeds.json").read_text())
    rows = json.loads((tmp_path / "seed3" / "gta5_to_city" / "summary.json").read_text())["stages"]
    assert list(rows)[-2:] == [CONTROL, BOUND]
    assert result["stages"]["pst"]["miou"] == {"mean": rows["pst"]["miou"], "std": 0}
    assert opened and {name: "train" in parts for name, parts in fitted.items()} == dict.fromkeys(
        ["source_only", f"{CONTROL}/2_bpl", f"{CONTROL}/3_pst", f"{CONTROL}/4_distill_round1"], False
    ) | {BOUND: True}
    for name, steps in (("warmup", 2), ("bpl", 4), ("pst", 6), ("distill", 8)):
        row = rows[name]
        assert row["gain_over_control"] == pytest.approx(row["miou_target_bn"] - row["control_miou_target_bn"])
        assert row["steps"] == steps
    assert rows[CONTROL]["miou_target_bn"] == rows["distill"]["control_miou_target_bn"]
    assert rows[CONTROL]["steps"] == rows[BOUND]["steps"] == 8 and "steps" not in rows["source_only"]
    table = capsys.readouterr().out
    assert all(title in table for title in ("control", "gain", "of the gap"))

    monkeypatch.setattr(pipeline, "fit", fit)
    monkeypatch.setattr("train_bpl.BPL.step", pytest.fail)  # again: nothing is trained, nor for less
    again = pipeline.run([*given, "seed=3", f"runs={tmp_path}/seed3"], control=False)["stages"]
    assert set(again) == set(rows) - {CONTROL, BOUND} and "control_miou_target_bn" not in again["bpl"]


def test_mean_and_deviation_over_seeds():
    a, b = ({"pst": {"miou": m, "rarest": ["car"], "best_miou": None, "iou": {"car": m}}} for m in (40.0, 43.0))
    row = pipeline.over_seeds([a, b])["pst"]
    assert row["miou"] == row["iou"]["car"] == {"mean": 41.5, "std": pytest.approx(3 / 2**0.5)}
    assert row["rarest"] == ["car"] and row["best_miou"] is None
    assert "41.5 ± 2.1" in pipeline.format_summary({"pst": row})
    table = pipeline.format_summary(pipeline.over_seeds([a]))
    assert "40.0" in table and "±" not in table  # one seed has no deviation
    assert "nan" not in pipeline.format_summary({"pst": {"miou": {"mean": None, "std": None}}})


def test_rarest_classes_have_a_column_where_they_are_not_all():
    for number, there in ((6, False), (7, True)):
        names = tuple(f"class {k}" for k in range(number))
        scores = {"miou": 50.0, "iou": dict.fromkeys(names, 50.0), "pixels": dict.fromkeys(names, 1)}
        row = pipeline._row(scores, ClassSet(names, ((0, 0, 0),) * number))
        assert ("rarest" in pipeline.format_summary({"pst": row})) == ("miou_rarest" in row) == there


@pytest.mark.parametrize("given", ["controls=yes", "seeds=0,x", "seeds=1,1", "seeds=", "name=x", "seed=1 seeds=0,1"])
def test_own_keys_are_checked(given):
    with pytest.raises(ConfigError, match=given.split("=")[0]):
        pipeline.own_keys(given.split())
    assert pipeline.own_keys(["train.lr=1", "controls=true", "seeds=0,1"]) == (["train.lr=1"], True, [0, 1])
    assert pipeline.own_keys(["controls=false"]) == ([], False, [])
    assert pipeline.own_keys([]) == ([], None, [])


def test_a_wrong_seed_is_refused_before_the_first_is_trained(benchmarks, monkeypatch):
    monkeypatch.setattr(pipeline, "run", lambda *args: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="seed=-1"):
        pipeline.run_seeds([f"benchmark={benchmarks['gta5_to_city']}"], [0, -1])
