"""Loaders whose stream of samples depends on the seed and the step alone: resuming is starting further on."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from data.datasets import UNREADABLE, SegmentationDataset


class EndlessSampler(Sampler):
    """Endless (index, draw) pairs, a new permutation each epoch.

    Every image comes once an epoch; a batch may join the end of one epoch and the start of the next, so none
    is dropped. `draw` counts the samples from the start of training.

    Args:
        start: the first draw.
        batch, part: of each `batch` draws, those that are given, all by default.
    """

    def __init__(self, length: int, seed: int, start: int = 0, batch: int = 1, part: range = range(1)):
        self.length, self.seed, self.start, self.batch, self.part = length, seed, start, batch, part

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draw = self.start
        while True:
            epoch, offset = divmod(draw, self.length)
            for index in np.random.default_rng([self.seed, epoch]).permutation(self.length)[offset:]:
                if draw % self.batch in self.part:
                    yield int(index), draw
                draw += 1


def training_batches(
    dataset: SegmentationDataset,
    batch_size: int,
    workers: int,
    start_step: int = 0,
    pin: bool = False,
    part: range | None = None,
) -> Iterator[dict]:
    """Endless batches from step `start_step` on: image uint8 (N, 3, H, W), label uint8 (N, H, W) if there are any.

    Args:
        part: which samples of every batch are given, all by default: several processes share a batch.

    Where `dataset.skips`, the batch's entry `UNREADABLE` lists why samples were replaced.
    """
    part = part or range(batch_size)
    sampler = EndlessSampler(len(dataset), dataset.seed, start_step * batch_size, batch_size, part)
    return iter(_loader(dataset, len(part), workers, sampler, pin_memory=pin, collate_fn=_collate))


def _collate(samples: list[dict]) -> dict:
    problems = [s.pop(UNREADABLE) for s in samples if UNREADABLE in s]
    batch = default_collate(samples)
    return batch | {UNREADABLE: problems} if problems else batch


def whole_images(
    dataset: SegmentationDataset, batch_size: int, workers: int, indices: list[int] | None = None
) -> DataLoader:
    """Every image once, in order, as lists of samples: sizes may differ within a batch. Where `dataset.skips`, those
    that cannot be used are left out."""
    return _loader(dataset, batch_size, workers, indices, collate_fn=_usable)


def _usable(samples: list[dict]) -> list[dict]:
    return [s for s in samples if UNREADABLE not in s]


def _loader(dataset: SegmentationDataset, batch_size: int, workers: int, sampler, **options) -> DataLoader:
    # A worker's parent must be the trainer, which it watches over; from Python 3.14 on, Linux has another default.
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
        multiprocessing_context=context,
        generator=torch.Generator(),  # a loader's start leaves the global random stream, and so a resumed run, alone
        **options,
    )


def _start_worker(parent: int, worker: int) -> None:
    torch.set_num_threads(1)  # workers are parallel already
    _leave_signals_to(parent)


def _leave_signals_to(parent: int) -> None:
    """For loader processes: a Ctrl-C or SIGTERM to the whole group must not take the batches away under a last step.

    They watch over their parent themselves, but for one that was killed before they began: it is looked for here.
    """
    if os.getppid() != parent:
        os._exit(1)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's own way to end them


def spread(length: int, count: int) -> list[int]:
    """`count` indices spread evenly over 0..length-1, ends left out, so that repeated draws show the same images."""
    count = min(count, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]
