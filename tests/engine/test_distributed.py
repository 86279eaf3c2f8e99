"""Two processes do what one does; what ends one of them ends both in order, with one line."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from survival import FORK, TinyNetwork, assert_same_run, metrics_of, same, tiny_discriminator
from torch import nn

import distill
import gen_pseudo_labels
import test
import train_bpl
import train_pst
from data.taxonomy import IGNORE
from data.transforms import Views
from models import read_checkpoint as read
from utils.config import ROOT, UserError
from utils.engine import distributed
from utils.engine.command_line import guarded
from utils.engine.distributed import GONE
from utils.engine.step import GuardedStep

LAYOUT = "gta5_to_city"
STAGES = {
    "warmup": (train_bpl, "stage0_warmup.yml", ()),
    "bpl": (train_bpl, "stage1_BPL.yml", ("model.init=warmup",)),
    "pst": (train_pst, "stage2_PST.yml", ()),
    "distill/round1": (
        distill,
        "stage3_distill.yml",
        ("checkpoint=warmup", "distill.init_round1=teacher", "distill.rounds=[1]"),
    ),
}


class Plain(TinyNetwork):
    """Without BatchNorm and dropout: a batch in two parts has the gradients of the whole."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.backbone[1], self.dropout = nn.Identity(), nn.Identity()


@contextlib.contextmanager
def networks(kind):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            "utils.engine.setup.build_model",
            lambda arch, num_classes, output_stride, dilations, **others: kind(num_classes, output_stride, dilations),
        )
        monkeypatch.setattr("train_bpl.PatchDiscriminator", tiny_discriminator)
        yield


class Together:
    """Processes that run `call`, as torchrun would start them on one machine, with its store."""

    def __init__(self, call, errors, count=2):
        self.store, self.errors, self.processes = dist.TCPStore("127.0.0.1", 0, is_master=True), errors, []

        def child(rank):
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            torch.set_num_threads(1)
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            os.environ.update({k: str(v) for k, v in (numbers | where).items()})
            guarded(call)

        for rank in range(count):
            self.processes.append(FORK.Process(target=child, args=(rank,)))
            self.processes[-1].start()

    def statuses(self, seconds=60):
        """Exit status of each, None for one that is still there after so long."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, until - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return statuses

    def said(self):
        """The lines about errors."""
        text = self.errors.read_text()
        assert "Traceback" not in text, text
        return [line for line in text.splitlines() if line.startswith("error")]


@pytest.fixture
def two(tmp_path):
    return lambda call: Together(call, tmp_path / f"errors{time.monotonic_ns()}.txt")


@pytest.fixture(scope="module")
def upstream(configure, tmp_path_factory):
    """Runs of networks without BatchNorm, by one process."""
    runs = tmp_path_factory.mktemp("upstream")
    with networks(Plain):
        for script, file, own in (*list(STAGES.values())[:2], (gen_pseudo_labels, "pseudo_labels.yml", ())):
            script.main(configure(LAYOUT, file, runs, *own))
    return runs


def prepared(configure, upstream, folder, stage, *overrides):
    """A stage's main function and its run folder, with its upstream in `folder`."""
    script, file, own = STAGES[stage]
    shutil.copytree(upstream, folder, ignore=shutil.ignore_patterns(stage), dirs_exist_ok=True)
    cfg = configure(LAYOUT, file, folder, *own, "train.panels=1", *overrides)
    return (lambda: script.main(cfg)), folder / LAYOUT / stage


def weights_of(folder):
    state = read(folder / "checkpoints" / "last.pth")
    every = {"model": state["model"], **state["networks"]}
    return {f"{name}.{key}": value for name, network in every.items() for key, value in network.items()}


def assert_alike(one, other):
    """Two runs have the same weights and losses, but for rounding."""
    weights, others = weights_of(one), weights_of(other)
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=0, atol=1e-5, msg=key)
    for entry, same_entry in zip(metrics_of(one), metrics_of(other), strict=True):
        if entry["group"] == "train":
            for kind in ("loss", "grad_norm"):
                assert same_entry[kind] == pytest.approx(entry[kind], abs=1e-5), entry["step"]


def hides_half_of_some(views, images, labels):
    """In place of what each process draws for itself: a hole in some images, not in others."""
    some = images[:, 0, 0, 0] % 2 == 0
    labels = labels.clone()
    labels[some, :, : labels.shape[2] // 2] = IGNORE
    return views.weak(images), labels


@pytest.mark.parametrize("stage", list(STAGES))
def test_two_processes_make_the_steps_of_one(configure, upstream, tmp_path, two, stage, monkeypatch):
    monkeypatch.setattr(Views, "distill", hides_half_of_some)
    steps = ("train.iterations=5", "train.horizon=10", "train.val_every=5", "train.save_every=3")
    steps += ("data.jitter=false", "train.lr=0.01")
    with networks(Plain):
        main, one = prepared(configure, upstream, tmp_path / "one", stage, *steps)
        main()
        main, other = prepared(configure, upstream, tmp_path / "two", stage, *steps)
        assert two(main).statuses() == [0, 0]
        assert_alike(one, other)
        before = weights_of(upstream / LAYOUT / "warmup")["model.head.weight"]
        assert (weights_of(one)["model.head.weight"] - before).abs().max() > 5e-3  # than rounding by far
        if stage == "bpl":  # begun by two, finished by one
            main, mixed = prepared(configure, upstream, tmp_path / "mixed", stage, *steps, "train.iterations=3")
            assert two(main).statuses() == [0, 0]
            main, _ = prepared(configure, upstream, tmp_path / "mixed", stage, *steps)
            main()
            assert read(mixed / "checkpoints" / "last.pth")["iteration"] == 5
            torch.testing.assert_close(weights_of(mixed), weights_of(one), rtol=0, atol=1e-5)


def test_two_processes_score_and_label_as_one(configure, upstream, tmp_path, two):
    def work(runs):
        labels = configure(LAYOUT, "pseudo_labels.yml", runs, "name=labels", "checkpoint=warmup")
        scores = configure(LAYOUT, "test_from_gta_to_city.yml", runs, "checkpoint=warmup", "test.export=true")
        return lambda: (gen_pseudo_labels.main(labels), test.main(scores))

    with networks(Plain):
        for name in ("one", "two"):
            shutil.copytree(upstream, tmp_path / name)
        work(tmp_path / "one")()
        assert two(work(tmp_path / "two")).statuses() == [0, 0]
    one, other = (tmp_path / name / LAYOUT for name in ("one", "two"))
    for folder, count in (
        ("labels", 10),
        ("test", 22),
    ):  # labels and confidences; four kinds of predictions, two panels
        pictures = {p.relative_to(one) for kind in ("*.png", "*.jpg") for p in (one / folder).rglob(kind)}
        assert len(pictures) == count and all((one / p).read_bytes() == (other / p).read_bytes() for p in pictures)
    for file, own in (("labels/manifest.json", {"config", "weights"}), ("test/metrics.json", {"checkpoint"})):
        a, b = (json.loads((folder / file).read_text()) for folder in (one, other))
        assert a.keys() == b.keys() and all(a[key] == b[key] for key in a.keys() - own)


EVERY = ("train.iterations=8", "train.horizon=16", "train.save_every=4", "train.val_every=4", "train.log_every=3")


@pytest.fixture(scope="module")
def at_once(configure, upstream, tmp_path_factory):
    """BPL by two processes, with BatchNorm, dropout and jitter, never stopped."""
    folder = tmp_path_factory.mktemp("at_once")
    with networks(TinyNetwork):
        main, run = prepared(configure, upstream, folder / "runs", "bpl", "model.init=scratch", *EVERY)
        together = Together(main, folder / "errors.txt")
        assert together.statuses() == [0, 0], together.errors.read_text()
    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_killed_and_the_run_goes_on_bit_for_bit(configure, upstream, tmp_path, two, at_once, rank):
    with networks(TinyNetwork):
        main, run = prepared(configure, upstream, tmp_path / "runs", "bpl", "model.init=scratch", *EVERY)
        together = two(lambda: (watch_at(6, rank, signal.SIGKILL), main()))
        assert sorted(together.statuses()) == [-signal.SIGKILL, 1]
        assert together.said() == [f"error: {GONE}"] and GONE.endswith("resumes the run")
        assert read(run / "checkpoints" / "last.pth")["iteration"] == 4
        assert two(main).statuses() == [0, 0]
    assert_same_run(at_once, run)
    states = [read(folder / "checkpoints" / "last.pth")["rng"] for folder in (at_once, run)]
    assert len(states[0]) == 2 and same(*states)


def watch_at(at, rank, number):
    """Before step `at`, the process of that rank gets a signal."""
    step = GuardedStep.__call__

    def watched(self, losses, source, target, iteration):
        if iteration == at and distributed.rank() == rank:
            os.kill(os.getpid(), number)
        return step(self, losses, source, target, iteration)

    GuardedStep.__call__ = watched


def test_a_signal_to_one_is_a_signal_to_all(configure, upstream, tmp_path, two, at_once):
    with networks(TinyNetwork):
        main, run = prepared(configure, upstream, tmp_path / "runs", "bpl", "model.init=scratch", *EVERY)
        together = two(lambda: (watch_at(5, 1, signal.SIGTERM), main()))
        assert together.statuses() == [143, 143] and not together.said()
        assert read(run / "checkpoints" / "last.pth")["iteration"] == 5
        assert "SIGTERM after step 5: saved" in (run / "log.txt").read_text()
        assert two(main).statuses() == [0, 0]
    assert_same_run(at_once, run)


def test_a_loss_that_is_not_finite_in_one_stops_all(configure, upstream, tmp_path, two):
    def spoiled():
        step = GuardedStep.__call__

        def spoil(self, losses, source, target, iteration):
            if iteration == 3 and distributed.rank() == 1:
                self.networks["model"].classifier.weight.data[0, 0] = float("nan")
            return step(self, losses, source, target, iteration)

        GuardedStep.__call__ = spoil
        main()

    with networks(Plain):
        main, run = prepared(configure, upstream, tmp_path / "runs", "warmup", *EVERY)
        together = two(spoiled)
        assert together.statuses() == [1, 1]
    (said,) = together.said()
    assert said.startswith("error: loss ce_source is nan in step 3; batch, networks and config are in")
    kept = read(run / "checkpoints" / "not_finite.pth")
    assert len(kept["source"]["image"]) == 2  # of both
    assert all(value.isfinite().all() for value in kept["networks"]["model"].values())  # the first one's


@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_an_error_is_said_once_and_ends_all(two, ranks):
    def call():
        if distributed.rank() in ranks:
            raise UserError("cannot read image 1.png")
        distributed.wait()

    together = two(call)
    assert together.statuses(30) == [1, 1]
    assert together.said() == ["error: cannot read image 1.png"]


def test_output_goes_where_the_caller_had_sent_it_when_a_run_has_ended(two, tmp_path):
    second = dist.TCPStore("127.0.0.1", 0, is_master=True)  # the first holds old addresses

    def call():
        distributed.end()  # leaves the other process, so that a second start meets it anew
        os.environ["MASTER_PORT"] = str(second.port)
        with open(tmp_path / f"{os.environ['RANK']}.txt", "w") as file, contextlib.redirect_stdout(file):
            distributed.start()
            print("during")
            distributed.end()
            print("after")

    assert two(call).statuses(60) == [0, 0]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["during\nafter\n", "after\n"]


def test_torchrun_refuses_a_batch_that_does_not_divide(benchmarks, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_bpl.py"]
    command += [f"benchmark={benchmarks[LAYOUT]}", f"runs={tmp_path}", "device=cpu", "train.batch_target=3"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert said == ["error: train.batch_target=3 must be a multiple of 2 (processes x train.accumulate)"]
    assert ended.returncode != 0 and not list(tmp_path.iterdir())


def test_parts(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    parts, dealt = [], []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        parts += distributed.local_batch(6)
        dealt.append(distributed.shard_indices(9, 2))
    assert parts == list(range(6)) and dealt == [[0, 1, 6, 7], [2, 3, 8], [4, 5]]
