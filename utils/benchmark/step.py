"""A whole training step of BPL, discriminator included, beside its plain form."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import train_bpl
from data.taxonomy import class_set
from utils.benchmark.losses import plain_bidirectional
from utils.benchmark.timing import compare, half_precision, matmul_peak, report
from utils.config import Config, ConfigError, UserError
from utils.engine.setup import build_network, compile_networks, resolve_auto
from utils.engine.step import GuardedStep

CPU_MOST = 512 * 256  # pixels of a crop that two cores do in seconds; of larger ones, as recipes have them,
CPU_CROP, CPU_BATCH = [256, 128], 2  # these take the place
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Form:
    """The switches of a variant; the defaults are what training does."""

    precision: str = ""  # "" = half where the device has it
    channels_last: bool = True
    source_first: bool = True  # the source's graph is freed before the target's is built
    fast_losses: bool = True
    checkpointing: bool = False
    compiled: bool = False


PLAIN = Form("float32", channels_last=False, source_first=False, fast_losses=False)
FORMS = {
    "plain: float32": PLAIN,
    "here": Form(),
    "  in float32": Form("float32"),
    "  contiguous layout": Form(channels_last=False),
    "  both graphs at once": Form(source_first=False),
    "  plain losses": Form(fast_losses=False),
    "  checkpointing": Form(checkpointing=True),
}


def fitting(cfg: Config, device: torch.device) -> Config:
    """A copy with crops and batches that the device gets through."""
    cfg = copy.deepcopy(cfg)
    d, t = cfg.data, cfg.train
    if device.type == "cpu" and d.crop[0] * d.crop[1] > CPU_MOST:
        d.crop, t.batch_source, t.batch_target = CPU_CROP, CPU_BATCH, CPU_BATCH
    return cfg


def batches(cfg: Config, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random source and target batches of the recipe's size."""
    draw, (width, height), t = torch.Generator().manual_seed(0), cfg.data.crop, cfg.train

    def images(count: int, channels: int, end: int) -> Tensor:
        return torch.randint(0, end, (count, channels, height, width), generator=draw, dtype=torch.uint8).to(device)

    labels = images(t.batch_source, 1, len(class_set(cfg.data)))[:, 0]
    return {"image": images(t.batch_source, 3, 256), "label": labels}, {"image": images(t.batch_target, 3, 256)}


def stepper(cfg: Config, form: Form, device: torch.device, folder: Path) -> Callable[[], None]:
    """A call that makes one step in a form, with networks and optimisers of its own."""
    cfg = copy.deepcopy(cfg)
    cfg.train.precision, cfg.train.checkpointing = form.precision or half_precision(device), form.checkpointing
    cfg = resolve_auto(cfg)
    stage = train_bpl.BPL(cfg, device)
    if not form.channels_last:
        stage.model.to(memory_format=torch.contiguous_format)
    if form.compiled:
        compile_networks(stage.networks, device)
    losses = stage.step if form.source_first else _at_once(stage.step)
    step, batch = GuardedStep(cfg, stage.networks, stage.optimizers, device, folder / "bad.pth"), batches(cfg, device)

    def call() -> None:
        plain = mock.patch.object(train_bpl, "bidirectional_prototype_loss", plain_bidirectional)
        with contextlib.nullcontext() if form.fast_losses else plain:
            step(losses, *batch, 1)
        for optimizer in stage.optimizers.values():
            optimizer.zero_grad()  # the next call does not begin by freeing what this one has allocated

    call()  # optimisers have their state from now on
    return call


def _at_once(step: Callable[..., None]) -> Callable[..., None]:
    """The step with one backward pass, of the sum of all losses."""

    def losses(source: dict, target: dict, backward: Callable[..., None]) -> None:
        totals, terms = [], {}

        def collect(total: Tensor, **named: Tensor) -> None:
            totals.append(total)
            terms.update(named)

        step(source, target, collect)
        backward(sum(totals), **terms)

    return losses


def run(cfg: Config, device: torch.device, repeats: int = 0) -> None:
    """Print the table; a form that the device cannot hold or compile is left out, with a line that says so.

    Raises:
        ConfigError: tf32, which torch has for a whole process and not for one form of the step.
    """
    if cfg.train.precision == "tf32":
        raise ConfigError("train.precision=tf32 would change every row of the step's table; leave it out")
    cfg = resolve_auto(fitting(cfg, device))
    forms = FORMS | ({"  torch.compile": Form(compiled=True)} if device.type == "cuda" else {})
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for name, form in forms.items():
            try:
                calls[name] = stepper(cfg, form, device, Path(folder))
            except (UserError, torch.OutOfMemoryError) as error:
                print(f"{name.strip()} is left out: {str(error).splitlines()[0]}")
        if not calls:
            return
        timings = compare(calls, device, repeats or (7 if device.type == "cuda" else 3))
        t, (width, height) = cfg.train, cfg.data.crop
        title = f"{cfg.model.backbone}, {width}x{height}, {t.batch_source}+{t.batch_target}"
        images = t.batch_source + t.batch_target
        if any(getattr(module, "groups", 1) > 1 for module in build_network(cfg, device).modules()):
            report(title, timings, images)  # torch counts the backward pass of grouped convolutions as if of one group
            return
        with FlopCounterMode(display=False) as counter:
            calls.get("here", next(iter(calls.values())))()
    half = half_precision(device)
    peaks = {p: matmul_peak(device, DTYPES.get(p, torch.float32)) for p in ("float32", half)}
    peaks[half] = max(peaks.values())  # a CPU without instructions for it may multiply slower than its convolutions
    shares = {name: peaks[form.precision or half] for name, form in forms.items()}
    report(title, timings, images, counter.get_total_flops(), shares)
