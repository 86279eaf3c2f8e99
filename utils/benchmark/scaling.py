"""Training by several processes: on one, two, … GPUs, or on the same CPU cores shared by two."""

from __future__ import annotations

import copy
import gc
import os
import statistics

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train_bpl
from data.taxonomy import class_set
from utils.benchmark.timing import seconds_of
from utils.config import Config, UserError
from utils.engine import distributed
from utils.engine.command_line import guarded
from utils.engine.setup import choose_device, resolve_auto
from utils.engine.step import GuardedStep

CPU_NETWORK, CPU_STRIDE, CPU_CROP = "resnet18", 16, [128, 64]  # what a few cores get through
WARM_UP, STEPS = 2, 5


def run(cfg: Config, device: torch.device) -> None:
    """Print steps and images per second of BPL by the number of processes, and what an exchange takes.

    Efficiency is images per second over those of one process, for each unit of hardware that is worked on: every GPU has
    the recipe's whole batch, while processes on a CPU share its cores, and one batch.
    """
    on_gpus, units = device.type == "cuda", torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    counts = sorted({*(n for n in (1, 2, 4, 8, 16) if n <= units), units}) if on_gpus else [1, 2]
    if units == 1:
        print(f"one {'GPU' if on_gpus else 'core'}: nothing to share among processes\n")
        return
    cfg = copy.deepcopy(cfg)
    cfg.device = device.type
    if on_gpus:  # what sections before this one have left belongs to this process, and the first GPU is a child's
        gc.collect()
        torch.cuda.empty_cache()
    else:
        cfg.model.backbone, cfg.model.output_stride, cfg.data.crop = CPU_NETWORK, CPU_STRIDE, CPU_CROP
    cfg = resolve_auto(cfg)
    found: dict[int, list[tuple[float, float]]] = {n: [] for n in counts}
    for n in [*counts, *counts]:  # in turn, as a machine may slow down
        found[n] += _together(cfg, n, on_gpus, units)
    width, height = cfg.data.crop
    print(f"{cfg.model.backbone}, {width}x{height}   images/step   steps/s  images/s  exchange  efficiency")
    alone = 0.0
    for n, timings in found.items():
        images = (cfg.train.batch_source + cfg.train.batch_target) * (n if on_gpus else 1)
        step, exchange = (statistics.median(kind) for kind in zip(*timings))
        alone = alone or images / step
        efficiency = images / step / alone / (n if on_gpus else 1)
        name = f"{n} {'GPU' if on_gpus else 'process'}{('s' if on_gpus else 'es') if n > 1 else ''}"
        row = f"{name:24}{images:8}{1 / step:10.2f}{images / step:10.2f}{1000 * exchange:7.1f} ms{efficiency:12.0%}"
        print(row, flush=True)
    print()


def _together(cfg: Config, processes: int, on_gpus: bool, units: int) -> list[tuple[float, float]]:
    """`_steps` by so many processes, as the first of them sees it."""
    cfg, t = copy.deepcopy(cfg), cfg.train
    if on_gpus:
        cfg.train.batch_source, cfg.train.batch_target = processes * t.batch_source, processes * t.batch_target
    launch = LaunchConfig(
        1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1, run_id="scaling"
    )
    try:
        return elastic_launch(launch, _steps)(cfg, units if on_gpus else max(1, units // processes))[0]
    except ChildFailedError:  # it has said why
        raise UserError(f"{processes} processes cannot train together here") from None


def _steps(cfg: Config, threads: int) -> list[tuple[float, float]]:
    """Seconds of each step, and of one exchange of gradients, on random batches."""
    timings = []

    def call() -> None:
        torch.set_num_threads(threads)
        device = choose_device(cfg)
        stage = train_bpl.BPL(cfg, device)
        step = GuardedStep(cfg, stage.networks, stage.optimizers, device, cfg.run_dir / "not_finite.pth")
        width, height = cfg.data.crop
        source, target = (len(distributed.local_batch(n)) for n in (cfg.train.batch_source, cfg.train.batch_target))
        images = torch.randint(0, 256, (source + target, 3, height, width), dtype=torch.uint8, device=device)
        labels = torch.randint(0, len(class_set(cfg.data)), (source, height, width), dtype=torch.uint8, device=device)
        batch = ({"image": images[:source], "label": labels}, {"image": images[source:]})
        gradients = [torch.zeros_like(p) for n in stage.networks.values() for p in n.parameters()]
        for i in range(WARM_UP + STEPS):
            seconds = seconds_of(lambda: step(stage.step, *batch, 1), device)
            exchange = seconds_of(lambda: distributed.average(gradients), device)
            if i >= WARM_UP:
                timings.append((seconds, exchange))

    guarded(call)
    return timings
