"""Runs in processes of their own, that may be killed; and what two runs must have in common."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from models import read_checkpoint as read
from utils.engine.command_line import guarded
from utils.engine.step import GuardedStep


class TinyNetwork(nn.Module):
    """As DeepLabV2 from outside, with everything a run has to carry over: BatchNorm, dropout, two parameter groups."""

    arch = "deeplabv2"

    def __init__(self, num_classes, output_stride, dilations):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 7, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head, self.dropout = nn.Conv2d(8, 8, 1), nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(8, num_classes, 1, bias=False)
        self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.output_stride, self.dilations = output_stride, dilations

    def forward(self, x):
        feat = self.dropout(self.head(self.backbone(x)))
        return {"feat": feat, "logits": self.classifier(feat)}


def tiny_discriminator(num_classes):
    return nn.Conv2d(num_classes, 1, 4, 4)


def use_tiny_networks(monkeypatch):
    """Steps in milliseconds and checkpoints in kilobytes."""

    def build(arch, num_classes, output_stride, dilations, **others):
        return TinyNetwork(num_classes, output_stride, dilations)

    monkeypatch.setattr("utils.engine.setup.build_model", build)
    monkeypatch.setattr("train_bpl.PatchDiscriminator", tiny_discriminator)


FORK = multiprocessing.get_context("fork")  # torch is imported already


def in_process(call, errors=None, seconds=120):
    """Run `call` in a process as a script would, killed after some seconds; its exit code, negative for a signal."""

    def child():
        if errors:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # pytest's own leads elsewhere
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
        guarded(call)

    process = FORK.Process(target=child)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


def slow_steps(seconds, call):
    """`call`, with steps that take so much longer."""

    def slowed():
        step = GuardedStep.__call__

        def slow(self, *args):
            time.sleep(seconds)
            return step(self, *args)

        GuardedStep.__call__ = slow
        call()

    return slowed


def watch_batches(file, at=None, numbers=(signal.SIGKILL,)):
    """From now on, write a digest of each step's batch into `file`; before step `at`, send this process signals."""
    step = GuardedStep.__call__

    def watched(self, losses, source, target, iteration):
        if iteration == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        parts = (t.numpy().tobytes() for batch in (source, target) for t in batch.values())
        digest = hashlib.sha256(b"".join(parts)).hexdigest()
        with open(file, "a") as out:
            out.write(f"{iteration} {digest}\n")
        return step(self, losses, source, target, iteration)

    GuardedStep.__call__ = watched


def batches_of(file):
    """{step: digest}; a step made twice must have had the same batch."""
    seen = {}
    for line in file.read_text().splitlines():
        step, digest = line.split()
        assert seen.setdefault(int(step), digest) == digest
    return seen


def metrics_of(folder):
    """metrics.jsonl without what depends on the clock."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in entries]


def log_of(folder):
    """log.txt without times, speeds, and what it says of starts, stops and the folder."""
    lines = [line[20:] for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    own = ("validation images;", "the same command resumes", "is complete")
    return [re.sub(r"  img/s .*", "", line) for line in lines if not any(text in line for text in own)]


def curves_of(folder):
    """TensorBoard's scalars, {tag: [(step, value)]}."""
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    timed = ("images_per_second", "images per second", "memory", "peak")
    tags = [tag for tag in events.Tags()["scalars"] if not any(word in tag for word in timed)]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def same(a, b):
    """Bit-equal nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one, other):
    """Two run folders tell the same: states, metrics, log, curves."""
    states = [read(folder / "checkpoints" / "last.pth") for folder in (one, other)]
    for key in ("model", "running_statistics", "networks", "optimizers", "rng", "best", "last", "iteration", "step"):
        assert same(states[0][key], states[1][key]), key
    assert metrics_of(one) == metrics_of(other)
    assert log_of(one) == log_of(other)
    assert curves_of(one) == curves_of(other)
    with contextlib.suppress(FileNotFoundError):
        assert (one / "metrics.json").read_text() == (other / "metrics.json").read_text()
