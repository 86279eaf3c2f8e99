"""The benchmark: its memory estimate, its forms, and what it prints."""

import gc

import pytest
import torch

import train_bpl
from data.transforms import class_mix
from utils import benchmark
from utils.benchmark import CPU, Timing, compare, memory_of_step, peak_memory_of, step_of
from utils.config import ConfigError
from utils.engine.command_line import run_words
from utils.engine.setup import resolve_auto


@pytest.fixture
def recipe(configure, tmp_path):
    """Call for a resolved recipe whose activations outweigh its weights."""

    def make(*overrides):
        sizes = ("data.crop=[192,96]", "train.batch_source=2", "train.batch_target=2")
        return resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", tmp_path, *sizes, *overrides))

    return make


@pytest.mark.parametrize(("precision", "checkpointing"), [("float32", True), ("bfloat16", False)])
def test_estimated_memory_is_the_measured(recipe, precision, checkpointing):
    cfg = recipe(f"train.precision={precision}", f"train.checkpointing={checkpointing}", "model.output_stride=8")
    memory = memory_of_step(cfg)
    stage = train_bpl.BPL(cfg, CPU)
    weights = sum(4 * p.numel() for n in stage.networks.values() for p in n.parameters())
    step = step_of(cfg, CPU, "eager")
    step()
    # Gradients are made anew in each step; weights and the optimisers' numbers stay.
    assert memory.batch + weights == pytest.approx(peak_memory_of(step, CPU), rel=0.2)
    assert 3 * weights < memory.fixed < 4 * weights


def test_what_others_left_is_not_counted():
    class Cycle:
        def __init__(self):
            self.me, self.memory = self, torch.empty(3_000_000, dtype=torch.uint8)

    def call():
        first = torch.empty(5_000_000, dtype=torch.uint8)
        gc.collect()
        return first, torch.empty(10_000_000, dtype=torch.uint8)

    gc.disable()
    try:
        peak_memory_of(Cycle, CPU)
        assert peak_memory_of(call, CPU) == 15_000_000
    finally:
        gc.enable()


def test_what_an_earlier_call_left_is_not_counted():
    left = []
    peak_memory_of(lambda: left.append(torch.empty(3_000_000, dtype=torch.uint8)), CPU)

    def call():
        left.clear()
        return torch.empty(10_000_000, dtype=torch.uint8)

    assert peak_memory_of(call, CPU) == 10_000_000


def test_plan_suggests_what_fits(recipe, capsys, monkeypatch):
    def memory(cfg):  # in proportion to the pixels, less by each saving
        half, again = cfg.train.precision != "float32", cfg.train.checkpointing
        return benchmark.Memory(2 * benchmark.GIB, (4 if half else 8) * benchmark.GIB * (1 if again else 4))

    monkeypatch.setattr(benchmark, "memory_of_step", memory)
    monkeypatch.setattr(benchmark, "device_memory", lambda device: 5.5)
    benchmark.run_plan(recipe("train.precision=auto", "model.output_stride=8"), CPU)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "24 GiB: train.precision=bfloat16" in lines  # 1.1 * 18 + 0.8
    assert "16 GiB: train.precision=bfloat16 train.checkpointing=true" in lines  # 1.1 * 6 + 0.8
    assert "cpu 5.5 GiB: train.precision=bfloat16 train.checkpointing=true train.accumulate=2" in lines  # 1.1 * 4 + 0.8
    row = next(line.split() for line in lines if line.startswith("float32") and line.split()[2:4] == ["no", "1"])
    assert row[4:] == ["34.0", "38.2"]


def test_forms_are_one_step(recipe):
    """In float32, the released form's gradients are those of training."""
    cfg, gradients = recipe("train.precision=float32", "data.crop=[64,32]", "model.dropout=0", "data.jitter=false"), []
    for form in ("released", "eager"):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            take = lambda self, seen=seen: seen.extend(p.grad for p in self.param_groups[0]["params"])  # noqa: E731
            patch.setattr(torch.optim.SGD, "step", take)
            step_of(cfg, CPU, form)()
        gradients.append(seen)
    assert gradients[0]
    for released, here in zip(*gradients):
        assert (released - here).norm() <= 1e-3 * released.norm()  # float32 through 18 layers of BatchNorm


def test_step_leaves_out_a_form_that_does_not_fit(recipe, capsys, monkeypatch):
    def small_card(cfg, device, form):
        if form == "released":
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return step_of(cfg, device, form)

    monkeypatch.setattr(benchmark, "step_of", small_card)
    benchmark.run_step(recipe("data.crop=[64,32]"), CPU, repeats=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "as released, float32 is left out: CUDA out of memory."
    assert (
        lines[1].startswith("step of bpl: resnet18, 64x32, 2+2")
        and lines[2].startswith("here, float32")
        and len(lines) == 3
    )


@pytest.mark.parametrize("stage", ["warmup", "pst", "distill"])
def test_a_step_of_every_stage(configure, tmp_path, stage, capsys):
    file = benchmark.STAGES[stage][0]
    sizes = ("data.crop=[64,32]", "train.batch_source=1", "train.batch_target=1")
    cfg = resolve_auto(configure("gta5_to_city", file, tmp_path, *sizes))
    benchmark.run_step(cfg, CPU, repeats=1)
    text = capsys.readouterr().out
    assert text.startswith(f"step of {stage}: resnet18, 64x32, 1+1") and "released" in text and "here, " in text
    source, target = benchmark.batches(cfg, CPU)
    assert "label" in source and ("label" in target) == (stage != "warmup")


def test_data_and_eval_print_their_tables(recipe, capsys):
    cfg = recipe("train.batch_source=1", "train.batch_target=1")
    cfg.data.source.split = "train"  # of the benchmark's own data, not of the image drawn here
    benchmark.run_data(cfg, CPU, repeats=1)
    benchmark.run_eval(cfg, CPU, repeats=1)
    text = capsys.readouterr().out
    assert text.count("as released") == 3 and "a GPU's assumed step of 94 ms takes 21 samples a second" in text
    assert "evaluation: resnet18" in text and "pseudo labels: resnet18" in text and "network alone" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["losses"], "unknown section 'losses'"),
        (["step", "stage=source"], "stage='source' is not one of"),
        (["stage=pst"], "goes with `step` alone"),
    ],
)
def test_words_are_checked(words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", *words])
    with pytest.raises(SystemExit) as error:
        run_words(benchmark.main, benchmark.__doc__, "section or key=value")
    assert error.value.code == ConfigError("").status and message in capsys.readouterr().err


def test_what_is_timed_on_a_cpu_has_whole_parts(recipe):
    sizes = ("data.crop=[896,512]", "train.batch_source=4", "train.batch_target=4", "train.accumulate=4")
    cfg = benchmark.fitting(recipe(*sizes), CPU)
    assert (cfg.train.batch_source, cfg.train.batch_target, cfg.train.accumulate) == (2, 2, 1)


def test_forms_run_in_turn():
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


@pytest.mark.parametrize("labels", ["offline", "online"])
def test_the_step_of_pst_is_that_of_its_labels(configure, tmp_path, monkeypatch, labels):
    mixed = []
    monkeypatch.setattr("train_pst.class_mix", lambda *given: mixed.append(1) or class_mix(*given))
    given = ("train.batch_source=2", "train.batch_target=2", f"pseudo.labels={labels}")
    cfg = resolve_auto(configure("gta5_to_city", "stage2_PST.yml", tmp_path, *given))
    step_of(cfg, CPU, "eager")()
    assert bool(mixed) == (labels == "online")
