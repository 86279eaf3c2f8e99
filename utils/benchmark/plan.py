"""The memory that a BPL step takes, by settings, before any data, weights or GPU are there.

The step runs once per network on the meta device, where tensors have sizes but no content, and every tensor is counted
from its making to its end.
"""

from __future__ import annotations

import copy
import itertools
import os
import weakref
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import loss.cosine
import train_bpl
from data.taxonomy import IGNORE
from models import OUTPUT_STRIDE, statistics_kept
from utils.benchmark.timing import half_precision
from utils.config import Config
from utils.engine.setup import resolve_auto

META = torch.device("meta")
GIB = 2**30
CARDS = (12, 16, 24, 40, 80)  # GiB
# What tensors do not show: the CUDA context and workspaces of convolutions in GiB, gaps between tensors as a share.
OVERHEAD, GAPS = 0.8, 0.1


@dataclass(frozen=True)
class Memory:
    """Bytes of one recipe.

    Attributes:
        static: weights, running statistics and optimiser state, there all the time.
        fixed: at the step's peak whatever the batch: gradients, and weights cast to half precision.
        batch: at the step's peak, in proportion to the batch: activations, their gradients, maps of the losses.
    """

    static: int
    fixed: int
    batch: int

    def total(self, parts: int = 1) -> float:
        """Peak in bytes with train.accumulate=parts."""
        return self.static + self.fixed + self.batch / parts


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most there ever were, but for those in `uncounted`."""

    def __init__(self, uncounted: list[Tensor]):
        super().__init__()
        self._known: dict[int, weakref.ref | None] = {t.untyped_storage()._cdata: None for t in uncounted}
        self.alive = self.peak = 0

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._end(key, size))
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def _end(self, key: int, size: int) -> None:
        del self._known[key]
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._see(value)
        return result


class _NoViews:
    """Images as they come, as floats."""

    def weak(self, images: Tensor) -> Tensor:
        return images.float()

    strong = weak


def memory_of_step(cfg: Config) -> Memory:
    """Of one BPL step as the configuration has it, with train.accumulate=1."""
    cfg = resolve_auto(cfg)
    with META:
        stage = train_bpl.BPL(cfg, META)
    stage.views = _NoViews()
    weights = {name: sum(p.numel() for p in n.parameters()) for name, n in stage.networks.items()}
    adam = weights.get("discriminator", 0)  # keeps two numbers for each weight, SGD its momentum
    statistics = sum(b.nbytes for n in stage.networks.values() for b in n.buffers())
    static = statistics + 4 * (2 * weights["model"] + 3 * adam)

    half = cfg.train.precision in ("bfloat16", "float16")
    if half:  # as autocast does: convolutions take and give half precision; the weights stand for their cast copies
        for network in stage.networks.values():
            network.bfloat16()
            for module in network.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.register_forward_pre_hook(_cast)
    for network in stage.networks.values():  # gradients of weights are counted apart: here they may be halves
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(_drop)
    copies = sum(2 * count for count in weights.values()) if half else 0
    gradients = sum(4 * count for count in weights.values())
    t, (width, height) = cfg.train, cfg.data.crop
    source, target = (
        {
            "image": torch.empty(size, 3, height, width, dtype=torch.uint8, device=META),
            "label": torch.full((size, height, width), IGNORE, dtype=torch.uint8, device=META),
        }
        for size in (t.batch_source, t.batch_target)
    )
    weights_and_statistics = [t for n in stage.networks.values() for t in (*n.parameters(), *n.buffers())]
    with _Alive(weights_and_statistics) as counter:

        def backward(total: Tensor, **terms: Tensor) -> None:
            with statistics_kept(*stage.networks.values()):
                total.backward()

        with mock.patch.object(loss.cosine.torch, "autocast", mock.MagicMock()):  # there is none for this device
            for network in stage.networks.values():
                network.train()
            stage.step(source, target, backward)
        images = sum(v.nbytes for batch in (source, target) for v in batch.values())
    return Memory(static, gradients + copies, counter.peak + images)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _cast(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(x.to(module.weight.dtype) for x in inputs)


def settings(cfg: Config, half: str) -> dict[tuple[str, int, bool, int], float]:
    """Peak in bytes by (precision, output stride, checkpointing, accumulate)."""
    peaks, t = {}, cfg.train
    least = 2 if cfg.model.arch == "deeplab_pbal" else 1  # images in a part, see `resolve_auto`
    parts = [n for n in (1, 2, 4, 8) if not (t.batch_source % n or t.batch_target % n)]
    parts = [n for n in parts if min(t.batch_source, t.batch_target) // n >= least]
    for precision, stride, again in itertools.product((half, "float32"), (8, 16), (False, True)):
        one = copy.deepcopy(cfg)
        one.train.precision, one.model.output_stride, one.train.checkpointing = precision, stride, again
        one.train.accumulate = 1
        memory = memory_of_step(one)
        peaks |= {(precision, stride, again, n): memory.total(n) for n in parts}
    return peaks


def device_memory(device: torch.device) -> int:
    """Bytes that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run(cfg: Config, device: torch.device) -> None:
    """Print the table, and for each size of memory the settings that come closest to the recipe."""
    cfg = copy.deepcopy(cfg)
    half = cfg.train.precision
    if half in ("auto", "float32", "tf32"):
        half = half_precision(device)
    cfg.model.arch = "deeplabv2" if cfg.model.arch == "auto" else cfg.model.arch
    own_stride = OUTPUT_STRIDE[cfg.model.arch] if cfg.model.output_stride == "auto" else cfg.model.output_stride
    peaks = settings(cfg, half)
    t, (width, height) = cfg.train, cfg.data.crop
    print(f"BPL of {cfg.benchmark_name}: {width}x{height}, {t.batch_source}+{t.batch_target} images, GiB of tensors")
    sizes = [*CARDS, round(device_memory(device) / GIB, 1)]
    heads = [f"{size:g}" for size in CARDS] + [f"{device.type} {sizes[-1]:g}"]
    print(
        f"{'precision':9} {'stride':>6} {'checkpointing':>13} {'accumulate':>10} {'GiB':>6}  fits into "
        + " ".join(heads)
    )
    needs = {key: (1 + GAPS) * peak / GIB + OVERHEAD for key, peak in peaks.items()}
    for (precision, stride, again, parts), peak in peaks.items():
        fits = ["x" if needs[precision, stride, again, parts] <= size else "-" for size in sizes]
        marks = " ".join(f"{mark:>{len(head)}}" for mark, head in zip(fits, heads))
        row = f"{precision:9} {stride:6} {'yes' if again else 'no':>13} {parts:10} {peak / GIB:6.1f}  {'':9} {marks}"
        print(row.rstrip())
    print(f"\nfits: with {GAPS:.0%} for gaps between tensors and {OVERHEAD:g} GiB for CUDA and its convolutions")
    for size, head in zip(sizes, heads):
        # What changes the result least: first checkpointing, then smaller parts for BatchNorm, the stride last.
        order = sorted(needs, key=lambda key: (key[1] != own_stride, key[3], key[2], key[0] != half))
        best = next((key for key in order if needs[key] <= size), None)
        print(
            f"{head:>9} GiB: " + (_overrides(best, own_stride) if best else "none of these; take a smaller data.crop")
        )
    print(flush=True)


def _overrides(key: tuple[str, int, bool, int], own_stride: int) -> str:
    precision, stride, again, parts = key
    words = [f"train.precision={precision}"]
    words += ["train.checkpointing=true"] if again else []
    words += [f"train.accumulate={parts}"] if parts > 1 else []
    words += [f"model.output_stride={stride}"] if stride != own_stride else []
    return " ".join(words)
