"""A run that is killed, interrupted, or out of disk goes on as if nothing had been, or says why it cannot."""

import contextlib
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from survival import (
    FORK,
    assert_same_run,
    batches_of,
    in_process,
    metrics_of,
    same,
    slow_steps,
    use_tiny_networks,
    watch_batches,
)

import distill
import gen_pseudo_labels
import train_bpl
import train_pst
from models import read_checkpoint as read
from utils.config import UserError
from utils.engine.run_folder import LOCK, run_lock
from utils.engine.step import GuardedStep

TOTAL, KILLED, SAVE = 8, 6, 4  # steps in all, the step killed in, steps between saves
STAGES = {
    "warmup": (train_bpl, "stage0_warmup.yml", "warmup", []),
    "bpl": (train_bpl, "stage1_BPL.yml", "bpl", ["model.init=warmup"]),
    "pst": (train_pst, "stage2_PST.yml", "pst", []),
    "online": (train_pst, "stage2_PST_online.yml", "online", ["name=online", "pseudo.mix=0.5"]),
    "distill": (distill, "stage3_distill.yml", "distill/round1", ["distill.rounds=[1]", "checkpoint=bpl"]),
}


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny_networks(monkeypatch)
        yield


@pytest.fixture(scope="module")
def upstream(configure, tmp_path_factory):
    """A folder of runs in which every stage finds the one before."""
    runs = tmp_path_factory.mktemp("upstream")
    for script, file in (
        (train_bpl, "stage0_warmup.yml"),
        (train_bpl, "stage1_BPL.yml"),
        (gen_pseudo_labels, "pseudo_labels.yml"),
    ):
        script.main(configure("gta5_to_city", file, runs))
    yield runs
    shutil.rmtree(runs)


@pytest.fixture
def folders(tmp_path):
    yield lambda name: tmp_path / name
    shutil.rmtree(tmp_path, ignore_errors=True)  # checkpoints are large


def long_run(configure, upstream, folder, stage, *overrides):
    """The main function and config of a stage, with its upstream in `folder`; and its run folder."""
    script, file, name, own = STAGES[stage]
    if not folder.exists():
        skip = shutil.ignore_patterns(stage) if stage in ("warmup", "bpl") and stage != "bpl" else None
        shutil.copytree(upstream, folder, ignore=skip)
        shutil.rmtree(folder / "gta5_to_city" / name, ignore_errors=True)
    steps = (f"train.iterations={TOTAL}", f"train.horizon={2 * TOTAL}", f"train.save_every={SAVE}")
    every = ("train.val_every=4", "train.log_every=3", "batchnorm.statistics=target", "train.panels=0")
    cfg = configure("gta5_to_city", file, folder, *own, *steps, *every, *overrides)
    return (lambda: script.main(cfg)), folder / "gta5_to_city" / name


def at_once_and_killed(configure, upstream, folders, stage, *overrides):
    results = []
    for kind, at in (("at_once", None), ("killed", KILLED)):
        main, folder = long_run(configure, upstream, folders(kind), stage, *overrides)
        digests = folders(kind) / "batches.txt"

        def call(main=main, digests=digests, at=at):
            watch_batches(digests, at)
            main()

        if at:
            assert in_process(call) == -signal.SIGKILL
            assert 0 < read(folder / "checkpoints" / "last.pth")["iteration"] < KILLED
        assert in_process(lambda call=call, m=main, d=digests: (watch_batches(d), m())) == 0
        more, _ = long_run(configure, upstream, folders(kind), stage, *overrides, f"train.iterations={TOTAL + 1}")
        results.append((folder, digests, more))
    return results


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", list(STAGES))
def test_killed_run_is_the_run_that_was_not(configure, upstream, folders, stage, workers):
    fewer_loaders = ("train.val_every=8", "batchnorm.statistics=running") if workers else ()
    results = at_once_and_killed(configure, upstream, folders, stage, f"data.workers={workers}", *fewer_loaders)
    (one, digests_one, more_one), (other, digests_other, more_other) = results
    assert_same_run(one, other)
    for digests, more in ((digests_one, more_one), (digests_other, more_other)):
        assert in_process(lambda d=digests, m=more: (watch_batches(d), m())) == 0
    assert batches_of(digests_one) == batches_of(digests_other)
    assert list(batches_of(digests_one)) == list(range(1, TOTAL + 2))  # the next batch too


@pytest.mark.parametrize("moment", ["half written", "between the renames"])
def test_killed_while_a_checkpoint_is_written(configure, upstream, folders, moment):
    def call():
        saves = []
        if moment == "half written":
            write = type(one).write_bytes

            def half(path, content):
                if path.name.startswith(".last.pth"):
                    saves.append(path)
                if len(saves) == 2:
                    write(path, bytes(content)[: len(content) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                write(path, content)

            type(one).write_bytes = half
        else:
            replace = os.replace

            def gap(source, to):
                if str(to).endswith("last.pth") and os.path.exists(str(to).replace("last", "previous")):
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, to)

            os.replace = gap
        main()

    main, one = long_run(configure, upstream, folders("at_once"), "warmup")
    assert in_process(main) == 0
    main, other = long_run(configure, upstream, folders("killed"), "warmup")
    assert in_process(call) == -signal.SIGKILL
    assert list((other / "checkpoints").glob(".*.partial"))
    assert in_process(main) == 0
    assert_same_run(one, other)
    assert not list(other.rglob(".*.partial"))
    if moment == "between the renames":
        assert "resumed after step 4 from" in (other / "log.txt").read_text()


def test_killed_at_random_moments(configure, upstream, folders, request):
    """`pytest --kills 100` for more of them; they fall on starts, steps, validations and saves."""
    wanted, rng = request.config.getoption("--kills"), np.random.default_rng()
    total = 15 * wanted  # of which a life of at most 1.2 s makes 12 at most, slowed down
    steps = (f"train.iterations={total}", f"train.horizon={2 * total}", "train.save_every=1", "train.val_every=10")
    main, one = long_run(configure, upstream, folders("at_once"), "bpl", *steps)
    assert in_process(main) == 0
    main, other = long_run(configure, upstream, folders("killed"), "bpl", *steps)
    saves = other / "checkpoints"

    def in_saving():
        write = type(saves).write_bytes

        def half(path, content):
            write(path, bytes(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        type(saves).write_bytes = half
        main()

    for kill in range(wanted):
        saving = kill == wanted // 2  # this one kills itself
        call, seconds = (in_saving, 120) if saving else (main, rng.uniform(0, 1.2))
        assert in_process(slow_steps(0.1, call), seconds=seconds) == -signal.SIGKILL
        assert not saving or list(saves.glob(".*.partial"))
    assert in_process(main) == 0
    assert_same_run(one, other)
    assert not list(other.rglob(".*.partial"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_ends_the_run_after_the_step_and_a_save(configure, upstream, folders, number, status):
    main, one = long_run(configure, upstream, folders("at_once"), "bpl", "data.workers=1")
    assert in_process(main) == 0
    main, other = long_run(configure, upstream, folders("stopped"), "bpl", "data.workers=1")
    errors = folders("errors.txt")
    digests = folders("batches.txt")
    left = in_process(lambda: (watch_batches(digests, 6, (number,)), main()), errors)
    assert left == status, errors.read_text()
    assert "Ctrl-C again stops at once" in errors.read_text() and "Traceback" not in errors.read_text()
    assert read(other / "checkpoints" / "last.pth")["iteration"] == 6
    assert f"{signal.Signals(number).name} after step 6: saved" in (other / "log.txt").read_text()
    assert in_process(main) == 0
    assert_same_run(one, other)


def test_second_signal_ends_the_run_at_once(configure, upstream, folders):
    main, folder = long_run(configure, upstream, folders("stopped"), "warmup")
    twice = (signal.SIGTERM, signal.SIGTERM)
    assert in_process(lambda: (watch_batches(folders("batches.txt"), 6, twice), main())) == 143
    assert read(folder / "checkpoints" / "last.pth")["iteration"] == 4


@pytest.mark.parametrize("numbers", [(signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM, signal.SIGHUP)])
def test_a_hangup_may_come_twice(configure, upstream, folders, numbers):
    """As a terminal goes away, the kernel and the shell send it both; systemd sends it after SIGTERM."""
    main, folder = long_run(configure, upstream, folders("stopped"), "warmup")
    status = in_process(lambda: (watch_batches(folders("batches.txt"), 6, numbers), main()))
    assert status == 128 + numbers[0] and read(folder / "checkpoints" / "last.pth")["iteration"] == 6


def test_lock_keeps_a_second_run_out_and_ends_with_the_first(tmp_path):
    def hold():
        with run_lock(tmp_path / "run"):
            (tmp_path / "held").touch()
            time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"run is in use by process {process.pid} on .*give this run another name="):
        run_lock(tmp_path / "run").__enter__()
    process.kill()
    process.join()
    (tmp_path / "run" / ".last.pth.1.partial").touch()
    nested = tmp_path / "run" / "nested" / "checkpoints"
    nested.mkdir(parents=True)
    (nested.parent / LOCK).touch()
    (nested / ".last.pth.2.partial").touch()  # being written by another run
    with run_lock(tmp_path / "run"):
        assert {p.name for p in (tmp_path / "run").iterdir()} == {LOCK, "nested"}  # not what the dead run had begun
        assert list(nested.iterdir())
    with contextlib.suppress(KeyError), run_lock(tmp_path / "new" / "run"):
        raise KeyError
    assert not (tmp_path / "new").exists()  # nothing was begun


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(configure, upstream, folders, damage):
    main, one = long_run(configure, upstream, folders("at_once"), "warmup")
    main()
    main, other = long_run(configure, upstream, folders("damaged"), "warmup")
    main()
    path = other / "checkpoints" / "last.pth"
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, content))
    if damage == "other":
        torch.save({"model": {}}, path)
    main()
    assert f"resumed after step 4 from {other}/checkpoints/previous.pth: {path}" in (other / "log.txt").read_text()
    assert_same_run(one, other)
    for name in ("last", "previous"):
        (other / "checkpoints" / f"{name}.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"last\.pth .*previous\.pth .*train\.restart=true begins anew"):
        main()


def test_full_disk_stops_the_run_and_keeps_the_checkpoint(configure, upstream, folders):
    main, folder = long_run(configure, upstream, folders("full"), "warmup")
    main_short, _ = long_run(configure, upstream, folders("full"), "warmup", "train.iterations=4")
    main_short()
    before = read(folder / "checkpoints" / "last.pth")
    errors = folders("errors.txt")

    def call():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, resource.RLIM_INFINITY))
        main()

    assert in_process(call, errors) == 1, errors.read_text()
    lines = [line for line in errors.read_text().splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "checkpoints/" in lines[0] and "cannot write" in lines[0], errors.read_text()
    assert "Traceback" not in errors.read_text()
    assert same(before, read(folder / "checkpoints" / "last.pth"))
    assert not [p for p in (folder / "checkpoints").iterdir() if "partial" in p.name]
    main()  # with room again
    assert read(folder / "checkpoints" / "last.pth")["iteration"] == TOTAL


def poison(monkeypatch, at, spoil):
    """`spoil(source)` the batch of some steps."""
    step = GuardedStep.__call__

    def poisoned(self, losses, source, target, iteration):
        def spoiled(source, target, backward):
            return losses(
                source, target, lambda total, **t: backward(spoil(total), **{k: spoil(v) for k, v in t.items()})
            )

        return step(self, spoiled if iteration in at else losses, source, target, iteration)

    monkeypatch.setattr(GuardedStep, "__call__", poisoned)


def test_not_finite_loss_stops_before_weights_are_touched(configure, upstream, folders, monkeypatch):
    main, folder = long_run(configure, upstream, folders("stop"), "warmup", "train.save_every=1")
    poison(monkeypatch, (6,), lambda value: value * float("nan"))
    with pytest.raises(UserError, match=r"^loss ce_source is nan in step 6; .*not_finite\.pth; nothing was updated"):
        main()
    kept, last = (read(folder / "checkpoints" / f"{name}.pth") for name in ("not_finite", "last"))
    assert kept["step"] == 6 and last["iteration"] == 5
    assert kept["source"]["image"].shape == (2, 3, 32, 64) and kept["config"]["seed"] == 0
    weights = {k for k in last["model"] if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert all(torch.equal(last["model"][k], kept["networks"]["model"][k]) for k in weights)
    monkeypatch.undo()
    main()
    assert read(folder / "checkpoints" / "last.pth")["iteration"] == TOTAL


def test_not_finite_gradient_is_named(configure, upstream, folders, monkeypatch):
    main, _ = long_run(configure, upstream, folders("stop"), "warmup")

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    poison(monkeypatch, (3,), Spoil.apply)
    with pytest.raises(UserError, match=r"^gradient of model is (nan|inf) in step 3"):
        main()


def test_not_finite_steps_are_left_out_up_to_a_limit(configure, upstream, folders, monkeypatch):
    options = ("train.on_nonfinite=skip",)
    main, folder = long_run(configure, upstream, folders("skip"), "warmup", *options)
    poison(monkeypatch, (2, 5), lambda value: value * float("inf"))
    main()
    state = read(folder / "checkpoints" / "last.pth")
    assert all(v.isfinite().all() for v in state["model"].values()) and state["step"]["skipped"] == 2
    assert metrics_of(folder)[-2]["skipped_steps"] == 2
    monkeypatch.undo()
    monkeypatch.setattr("utils.engine.step.MAX_SKIPPED", 2)
    poison(monkeypatch, (2, 3, 5), lambda value: value * float("inf"))
    main, folder = long_run(configure, upstream, folders("too many"), "warmup", *options)
    with pytest.raises(UserError, match=r"in step 5; .*2 steps were left out before"):
        main()


def test_gradient_norm_is_logged(upstream):
    entry = metrics_of(upstream / "gta5_to_city" / "bpl")[0]
    assert set(entry["grad_norm"]) == {"model", "discriminator"} and all(v > 0 for v in entry["grad_norm"].values())


def test_deterministic_runs_are_bit_equal(configure, upstream, folders):
    for name in ("one", "other"):
        main, _ = long_run(configure, upstream, folders(name), "pst", "train.deterministic=true", "data.workers=1")
        assert in_process(main) == 0
    assert_same_run(*(folders(name) / "gta5_to_city" / "pst" for name in ("one", "other")))


@pytest.mark.parametrize(("stage", "changed"), [("bpl", "warmup"), ("pst", "bpl"), ("pst", "pseudo_labels")])
def test_stage_notices_that_what_it_was_made_from_has_changed(configure, upstream, folders, stage, changed):
    main, _ = long_run(configure, upstream, folders("runs"), stage, "train.iterations=2")
    main()
    base = folders("runs") / "gta5_to_city" / changed
    if changed == "pseudo_labels":
        (base / "manifest.json").write_text((base / "manifest.json").read_text() + " ")
    else:
        state = read(base / "checkpoints" / "last.pth")
        torch.save(state | {"iteration": 7}, base / "checkpoints" / "last.pth")
    main, _ = long_run(configure, upstream, folders("runs"), stage)
    with pytest.raises(UserError, match=rf"{stage} was started from .*/runs/.*/{changed}/.* made anew since"):
        main()
    folders("runs").rename(folders("moved"))
    main, _ = long_run(configure, upstream, folders("moved"), stage)
    with pytest.raises(UserError, match=rf"{stage} was started from .*/moved/.*/{changed}/.* made anew since"):
        main()
    folders("moved").rename(folders("runs"))
    with contextlib.suppress(UserError):  # pseudo labels of a model that changed are refused as stale
        restarted, _ = long_run(configure, upstream, folders("runs"), stage, "train.restart=true")
        restarted()
