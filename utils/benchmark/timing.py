"""Fair timing: variants in turn within one process, median and spread, peak memory, share of the machine's peak."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from utils.evaluation.prediction import default_precision


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant's runs, and the most memory that tensors took up during one, in bytes."""

    seconds: list[float]
    memory: int

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)


def half_precision(device: torch.device) -> str:
    """`train.precision` of what is measured in half: what `auto` takes on this GPU; on a CPU, where that is float32, bfloat16."""
    return default_precision(device) if device.type == "cuda" else "bfloat16"


def compare(variants: dict[str, Callable[[], object]], device: torch.device, repeats: int = 7) -> dict[str, Timing]:
    """Time calls in turn (A B C, A B C, …), so that a machine that slows down slows all of them.

    Args:
        variants: by name; the first is the plain form that the others are held against.
        repeats: rounds that count, after one that does not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    memory = {name: peak_memory_of(call, device) for name, call in variants.items()}  # the warm-up round
    for _ in range(repeats):
        for name, call in variants.items():
            seconds[name].append(seconds_of(call, device))
    return {name: Timing(seconds[name], memory[name]) for name in variants}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, its work on the device included."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def peak_memory_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that one call has alive at once, over what was there before."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured here and now.

    One that takes a twentieth of a second is large enough: bfloat16 on a CPU without instructions for it would take
    minutes at the size that float32 needs.
    """
    size, most, best = 128, 8192 if device.type == "cuda" else 2048, 0.0
    while size < most and best < 0.05:
        size *= 2
        product = functools.partial(torch.mm, *torch.randn(2, size, size, device=device).to(dtype))
        best = min(seconds_of(product, device) for _ in range(5))
    return 2 * size**3 / best


def report(
    title: str, timings: dict[str, Timing], images: int = 0, flops: float = 0, peaks: dict[str, float] | None = None
) -> None:
    """Print a row for each variant, the first being what the others are held against.

    Args:
        images: that one call works on, for images per second.
        flops: of one call, and in `peaks` FLOP/s of the machine by variant, for the share that is reached.
    """
    plain = next(iter(timings.values()))
    width = max(len(title), *map(len, timings))
    head = f"{title:{width}}  {'median':>10} {'min':>10} {'max':>10} {'faster':>7} {'memory':>9} {'of plain':>8}"
    print(head + (f" {'images/s':>9}" if images else "") + (f" {'of peak':>8}" if peaks else ""))
    for name, t in timings.items():
        ms = [1000 * s for s in (t.median, min(t.seconds), max(t.seconds))]
        row = f"{name:{width}}  " + " ".join(f"{v:7.1f} ms" for v in ms)
        row += f" {plain.median / t.median:6.2f}x {t.memory / 2**20:5.0f} MiB {t.memory / max(plain.memory, 1):8.0%}"
        row += f" {images / t.median:9.2f}" if images else ""
        print(row + (f" {flops / t.median / peaks[name]:8.1%}" if peaks else ""))
    print(flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
