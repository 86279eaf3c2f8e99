"""Loaders whose stream of samples depends on the seed and the step alone: resuming is starting further on."""

from __future__ import annotations

import errno
import functools
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from data.datasets import UNREADABLE, SegmentationDataset
from utils.config import UserError

_EXIT_CODES = {"shared memory": 81, "files": 82, "ended": 83}  # of a loader process that could not hand a batch over
_FEWER = "take fewer or no loader processes (data.workers=0)"
_REMEDIES = {
    "shared memory": "shared memory (/dev/shm) is full: give the container more (docker run --shm-size=8g), "
    f"or {_FEWER}",
    "files": f"too many files are open: raise the limit (ulimit -n 65536), or {_FEWER}",
    "memory": f"there is not enough memory: {_FEWER} or smaller batches",
    "ended": "a loader process has ended, as when memory runs out or too many files are open: "
    f"{_FEWER} or smaller batches, or raise the limit of files (ulimit -n 65536)",
}


def endless_draws(length: int, seed: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Endless (index, draw) pairs from draw `start` on, a new permutation of the indices each epoch.

    Every image comes once an epoch; a batch may join the end of one epoch and the start of the next, so none
    is dropped. `draw` counts the samples from the start of training.
    """
    draw = start
    while True:
        epoch, offset = divmod(draw, length)
        for index in np.random.default_rng([seed, epoch]).permutation(length)[offset:]:
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

    Where `dataset.skips`, the batch's entry `UNREADABLE` lists why samples were replaced. Raises as `iterate`.
    """
    part = part or range(batch_size)
    draws = endless_draws(len(dataset), dataset.seed, start_step * batch_size)
    own = ((index, draw) for index, draw in draws if draw % batch_size in part)
    return iterate(_loader(dataset, len(part), workers, own, pin_memory=pin, collate_fn=_collate))


def _collate(samples: list[dict]) -> dict:
    problems = [s.pop(UNREADABLE) for s in samples if UNREADABLE in s]
    batch = default_collate(samples)
    return batch | {UNREADABLE: problems} if problems else batch


def whole_images(
    dataset: SegmentationDataset, batch_size: int, workers: int, indices: list[int] | None = None
) -> Iterator[list[dict]]:
    """Every image once, in order, as lists of samples: sizes may differ within a batch. Where `dataset.skips`, those
    that cannot be used are left out. Raises as `iterate`."""
    return iterate(_loader(dataset, batch_size, workers, indices, collate_fn=_usable))


def mapped(function: Callable, items: Sequence, workers: int) -> Iterator:
    """`function(item)` of every item, in order, computed by loader processes. Raises as `iterate`."""
    return iterate(_loader(items, None, workers, None, collate_fn=function))


def _usable(samples: list[dict]) -> list[dict]:
    return [s for s in samples if UNREADABLE not in s]


def iterate(loader: DataLoader) -> Iterator:
    """The batches of a loader, whose processes start at once.

    Raises:
        UserError: a sample cannot be used, or the loader's processes fail: shared memory is full, too many files are
            open, one was killed.
    """
    others, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    if loader.num_workers:
        # One temporary folder for all: a worker near its limit of open files could not delete its own, and complains.
        multiprocessing.util.get_temp_dir()
    try:
        batches = iter(loader)
    except OSError as error:
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        error.__traceback__ = None  # frees torch's half-made iterator, which complains of being half made
        sys.unraisablehook = hook
        raise _explained(error) from None
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        # Torch's own handler would raise at any line, also while a checkpoint is written. The next batch tells as well.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return _explained_batches(batches, set(multiprocessing.active_children()) - others)


def _explained_batches(batches: Iterator, processes: set) -> Iterator:
    try:
        yield from batches
    except UserError:
        raise
    except (OSError, EOFError, RuntimeError, MemoryError) as error:
        if isinstance(error, EOFError | OSError):
            time.sleep(1)  # until the process has ended, and has an exit code
        raise _explained(error, [process.exitcode for process in processes]) from None


def _cause(error: BaseException, exit_codes: Sequence[int | None] = ()) -> str:
    """Which of `_REMEDIES` helps against an error, "" if none does: it is none of the system's."""
    number, text = getattr(error, "errno", None), " ".join([str(error), *(f"exit code {code}." for code in exit_codes)])

    def holds(*words: str) -> bool:
        return any(word in text for word in words)

    full, files = (f"exit code {_EXIT_CODES[cause]}." for cause in ("shared memory", "files"))
    killed = f"exit code -{int(signal.SIGBUS)}."  # by a write to shared memory beyond its end
    if number in (errno.EMFILE, errno.ENFILE) or holds("Too many open files", "ancillary data", files):
        return "files"
    if number == errno.ENOSPC or holds("shared memory", "/dev/shm", "No space left", "Bus error", killed, full):
        return "shared memory"
    if number in (errno.ENOMEM, errno.EAGAIN) or isinstance(error, MemoryError) or holds("allocate memory"):
        return "memory"
    return "ended" if holds("DataLoader worker (") or isinstance(error, EOFError | OSError) else ""


def _explained(error: BaseException, exit_codes: Sequence[int | None] = ()) -> BaseException:
    """A UserError that names cause and remedy, or the error itself where it is none of the system's."""
    cause = _cause(error, exit_codes)
    if not cause:
        return error
    return UserError(f"loading images: {_REMEDIES[cause]}")


def _loader(dataset: Dataset | Sequence, batch_size: int | None, workers: int, sampler, **options) -> DataLoader:
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
    # A Ctrl-C or SIGTERM to the whole group is for the trainer: its last step needs a batch, then it ends the workers.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.getppid() != parent:  # torch's worker ends when its parent is gone, unless it was gone before
        os._exit(1)
    # A thread sends the batches. If it fails, Python drops the batch, and the parent would wait for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: _end_worker(error))
    sys.excepthook = lambda kind, error, trace: _end_worker(error)  # of the thread that shares open files


def _end_worker(error: BaseException) -> None:
    os._exit(_EXIT_CODES.get(_cause(error), _EXIT_CODES["ended"]))


def spread(length: int, count: int) -> list[int]:
    """`count` indices, fewer if there are not so many, from the middles of equal parts of 0..length-1."""
    count = min(count, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]
