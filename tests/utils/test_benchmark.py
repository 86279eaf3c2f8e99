"""The benchmark room: what it prints is about what is there."""

import statistics

import pytest
import torch

import train_bpl
from utils.benchmark import losses, plan, scaling, step
from utils.benchmark.timing import Timing, compare, peak_memory_of
from utils.config import ConfigError
from utils.engine.setup import resolve_auto

CPU = torch.device("cpu")


@pytest.fixture
def recipe(configure, tmp_path):
    """Call for a settled recipe whose activations outweigh its weights."""

    def make(*given):
        sizes = ("data.crop=[192,96]", "train.batch_source=2", "train.batch_target=2")
        return resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", tmp_path, *sizes, *given))

    return make


@pytest.mark.parametrize(("precision", "checkpointing"), [("float32", True), ("bfloat16", False)])
def test_estimated_memory_is_the_measured(recipe, tmp_path, precision, checkpointing):
    cfg = recipe(f"train.precision={precision}", f"train.checkpointing={checkpointing}", "model.output_stride=8")
    memory = plan.memory_of_step(cfg)
    form = step.Form(precision, checkpointing=checkpointing)
    measured = peak_memory_of(step.stepper(cfg, form, CPU, tmp_path), CPU)
    assert memory.total() - memory.static == pytest.approx(measured, rel=0.2)
    stage = train_bpl.BPL(cfg, CPU)
    weights = sum(4 * p.numel() for p in stage.model.parameters())
    assert 2 * weights < memory.static < 4 * weights  # with momentum, the discriminator and its two numbers


def test_plan_suggests_what_fits(recipe, capsys, monkeypatch):
    monkeypatch.setattr(plan, "memory_of_step", lambda cfg: {  # GiB in proportion to the pixels, halved by each saving
        (p, c): plan.Memory(plan.GIB, plan.GIB, (8 if p == "float32" else 4) * plan.GIB * (1 if c else 4))
        for p in ("float32", "bfloat16") for c in (False, True)
    }[cfg.train.precision, cfg.train.checkpointing])  # fmt: skip
    monkeypatch.setattr(plan, "device_memory", lambda device: 5.5 * plan.GIB)
    plan.run(recipe("train.precision=auto", "model.output_stride=8"), CPU)
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "24 GiB: train.precision=bfloat16" in said  # 1.1 * 18 + 0.8
    assert "16 GiB: train.precision=bfloat16 train.checkpointing=true" in said  # 6
    assert "cpu 5.5 GiB: train.precision=bfloat16 train.checkpointing=true train.accumulate=2" in said  # 4
    row = next(line.split() for line in said if line.startswith("float32") and line.split()[2:4] == ["no", "1"])
    assert row[4:] == ["34.0", "-", "-", "-", "x", "x", "-"]


def test_tables_of_losses_and_step(recipe, capsys, monkeypatch):
    monkeypatch.setattr(losses, "FEATURES", (8, 14))
    losses.run(recipe(), CPU, repeats=1)
    said = capsys.readouterr().out
    assert said.count("plain") == said.count("here ") + 4 == 8  # heads say "of plain"
    monkeypatch.setattr(step, "FORMS", {name: step.FORMS[name] for name in ("plain: float32", "here")})
    step.run(recipe("data.crop=[64,32]"), CPU, repeats=1)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert rows[0].startswith("resnet18, 64x32, 2+2") and "of peak" in rows[0]
    assert [row.split("  ")[0] for row in rows[1:3]] == ["plain: float32", "here"] and len(rows) == 1 + len(step.FORMS)
    assert all(0 < float(row.split()[-1].rstrip("%")) < 100 for row in rows[1:])


def test_no_share_of_peak_where_operations_cannot_be_counted(recipe, capsys, monkeypatch):
    def share(backbone):
        step.run(recipe(f"model.backbone={backbone}", "data.crop=[64,32]"), CPU, repeats=1)
        return "of peak" in capsys.readouterr().out

    monkeypatch.setattr(step, "FORMS", {"here": step.FORMS["here"]})
    assert share("resnet18") and not share("timm/mobilenetv3_small_050")


def test_form_that_does_not_fit_is_left_out(recipe, capsys, monkeypatch):
    stepper = step.stepper

    def small_card(cfg, form, device, folder):
        if form is step.PLAIN:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return stepper(cfg, form, device, folder)

    monkeypatch.setattr(step, "stepper", small_card)
    monkeypatch.setattr(step, "FORMS", {name: step.FORMS[name] for name in ("plain: float32", "here")})
    step.run(recipe("data.crop=[64,32]"), CPU, repeats=1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert said[0] == "plain: float32 is left out: CUDA out of memory."
    assert [line.split("  ")[0] for line in said[2:]] == ["here"]
    with pytest.raises(ConfigError, match="tf32"):
        step.run(recipe("train.precision=tf32"), CPU)


def test_forms_are_one_step(recipe, tmp_path):
    """In float32, what the plain form learns from is what training learns from."""
    cfg, gradients = recipe("train.precision=float32", "data.crop=[64,32]", "model.dropout=0", "data.jitter=false"), []
    for form in (step.PLAIN, step.Form("float32")):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.optim.SGD,
                "step",
                lambda self, seen=seen: seen.extend(p.grad for p in self.param_groups[0]["params"]),
            )
            step.stepper(cfg, form, CPU, tmp_path)
        gradients.append(seen)
    for plain, here in zip(*gradients):
        assert (plain - here).norm() <= 1e-3 * plain.norm()  # float32 through 18 layers of BatchNorm


def test_variants_run_in_turn():
    order = []
    timings = compare({name: lambda name=name: order.append(name) for name in "AB"}, CPU, repeats=3)
    assert "".join(order) == "AB" * 4 and all(len(t.seconds) == 3 for t in timings.values())
    assert Timing([3, 1, 2], 0).median == 2


def test_peak_counts_what_is_alive_at_once():
    def call():
        for _ in range(3):
            torch.empty(2**20, dtype=torch.uint8).fill_(1)
        a = torch.empty(2**20, dtype=torch.uint8)
        return a, torch.empty(2**19, dtype=torch.uint8)

    assert peak_memory_of(call, CPU) == pytest.approx(1.5 * 2**20, rel=0.01)


def test_scaling_table(recipe, capsys, monkeypatch):
    seconds = {1: 2.0, 2: 1.25}
    monkeypatch.setattr(scaling.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(scaling, "_together", lambda cfg, n, *_: [(seconds[n] * slow, 0.004) for slow in (1, 9, 0.9)])
    scaling.run(recipe(), CPU)
    one, two = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert one == ["1", "process", "4", "0.50", "2.00", "4.0", "ms", "100%"]  # the median of each
    assert two == ["2", "processes", "4", "0.80", "3.20", "4.0", "ms", "160%"]  # one batch, shared out


def test_scaling_times_processes(recipe):
    cfg = recipe("data.crop=[64,32]", "device=cpu")
    timings = scaling._together(cfg, 2, False, 2)
    assert len(timings) == scaling.STEPS
    a_step, exchange = (statistics.median(kind) for kind in zip(*timings))
    assert 0 < exchange < a_step  # which has one in it
