"""One training step: the batch in parts, gradients, the check that they are finite, the update."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from data.taxonomy import IGNORE
from models import statistics_kept
from utils.config import Config, UserError, to_dict
from utils.config.keys import MAX_SKIPPED
from utils.engine import checkpoint, distributed
from utils.evaluation.prediction import autocast


class GuardedStep:
    """Steps whose update is made only if every loss and gradient is finite.

    Each of several processes has its part of the batch. Gradients, losses and running statistics are averaged over the
    processes, so all make the same update or none.

    In float16, losses are scaled up so that small gradients do not vanish. A step whose gradients overflow is left out
    and counted in `overflows`, and the scale goes down.

    Args:
        cfg: resolved; `train.on_nonfinite` says what happens to a step that is not finite, `train.accumulate` into how
            many parts a batch is split.
        networks, optimizers: by name; all of them are stepped together.
        file: where the batch, the networks and the config of a bad step are kept.
    """

    def __init__(
        self,
        cfg: Config,
        networks: dict[str, nn.Module],
        optimizers: dict[str, Optimizer],
        device: torch.device,
        file: Path,
    ):
        self.cfg, self.networks, self.optimizers, self.device, self.file = cfg, networks, optimizers, device, file
        self.skipped = self.overflows = 0
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.train.precision == "float16")
        self._sums: dict[str, dict[str, float]] = {"loss": {}, "grad_norm": {}}  # since the last line of the log
        self._count = 0

    def __call__(self, losses: Callable[..., None], source: dict, target: dict, iteration: int) -> str:
        """Make one step.

        Args:
            losses: `Stage.step`, called for each part of the batch; parts with labels have an entry `normalizer`, see
                `segmentation_loss`.
            iteration: the step's number.

        Returns:
            A line about the step if it was left out, else "".

        Raises:
            UserError: a loss or gradient is not finite and may not be left out, or float16 cannot hold the gradients at
                any scale; no weight has been changed.
        """
        t = self.cfg.train
        for network in self.networks.values():
            if not network.training:  # a walk through hundreds of layers, while a GPU would wait
                network.train()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if t.compile:  # the call alone imports torch's compiler, which takes seconds
            torch.compiler.cudagraph_mark_step_begin()  # graphs may now write over what the last step's returned
        # A forward pass that is not finite spoils running statistics too; on_nonfinite=skip puts them back.
        before = [b.clone() for b in self._buffers()] if t.on_nonfinite == "skip" else []
        terms: dict[str, Tensor] = {}

        def backward(total: Tensor, **named: Tensor) -> None:
            recomputes = statistics_kept(*self.networks.values()) if t.checkpointing else contextlib.nullcontext()
            # Gradients take the types of the forward pass.
            with torch.autocast(self.device.type, enabled=False), recomputes:
                self.scaler.scale(total / t.accumulate).backward()
            for name, value in named.items():
                terms[name] = terms.get(name, 0) + value.detach() / t.accumulate

        with autocast(self.device, t.precision):
            for parts in zip(_split(source, t.accumulate), _split(target, t.accumulate)):
                losses(*parts, backward)
        gradients = {k: [p.grad for p in n.parameters() if p.grad is not None] for k, n in self.networks.items()}
        # One exchange after all backward passes. DistributedDataParallel exchanges in each of them, in buckets that it
        # lays out anew after a start, so a resumed run would round otherwise than one that was never stopped.
        terms = {name: value.float() for name, value in terms.items()}
        statistics = [b for b in self._buffers() if b.is_floating_point()]
        distributed.average([*itertools.chain(*gradients.values()), *terms.values(), *statistics])
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norms = {k: get_total_norm(g) for k, g in gradients.items() if g}
        # The one wait for the device: the host must know all numbers before weights are touched.
        values = torch.stack([*terms.values(), *norms.values()]).tolist()
        numbers = {"loss": dict(zip(terms, values)), "grad_norm": dict(zip(norms, values[len(terms) :]))}
        finite = {kind: all(map(math.isfinite, entries.values())) for kind, entries in numbers.items()}
        if self.scaler.is_enabled() and finite["loss"] and not finite["grad_norm"]:
            self.scaler.update()  # lowers the scale
            return self._overflow(iteration)
        if not all(finite.values()):
            parts = {"source": distributed.joined(source), "target": distributed.joined(target)}
            message = self._keep(numbers, parts, iteration)
            for buffer, value in zip(self._buffers(), before):
                buffer.copy_(value)
            self.scaler.update()
            return message
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        self._count += 1
        for kind, entries in numbers.items():
            for name, value in entries.items():
                self._sums[kind][name] = self._sums[kind].get(name, 0) + value
        return ""

    def _buffers(self) -> list[Tensor]:
        return [b for n in self.networks.values() for b in n.buffers()]

    def _overflow(self, iteration: int) -> str:
        self.overflows += 1
        scale = self.scaler.get_scale()
        if scale < 1:
            raise UserError(
                f"gradients of step {iteration} overflow float16 even at a loss scale of {2 * scale:g}; nothing was "
                "updated; train.precision=bfloat16, tf32 or float32 has the range"
            )
        return (
            f"step {iteration} left out: gradients overflow float16; loss scale now {scale:g}, {self.overflows} so far"
        )

    def _keep(self, numbers: dict, batch: dict, iteration: int) -> str:
        """Save a step that is not finite; returns the line about it, or raises it where training shall stop."""
        named = {f"loss {name}": value for name, value in numbers["loss"].items()}
        named |= {f"gradient of {name}": value for name, value in numbers["grad_norm"].items()}
        name, value = next((name, value) for name, value in named.items() if not math.isfinite(value))
        networks = {k: v.state_dict() for k, v in self.networks.items()}
        content = numbers | batch | {"step": iteration, "networks": networks, "config": to_dict(self.cfg)}
        checkpoint.save_checkpoint(self.file, content)
        self.skipped += 1
        message = f"{name} is {value} in step {iteration}; batch, networks and config are in {self.file}"
        if self.cfg.train.on_nonfinite == "stop":
            raise UserError(f"{message}; nothing was updated; a lower train.lr, or train.on_nonfinite=skip, may help")
        if self.skipped > MAX_SKIPPED:
            raise UserError(f"{message}; {MAX_SKIPPED} steps were left out before")
        return f"{message}; step left out, {self.skipped} so far"

    def take_means(self) -> dict[str, dict[str, float]]:
        """{"loss": {term: mean}, "grad_norm": {network: mean}} since the last call, empty where no step counted."""
        means = {kind: {k: v / self._count for k, v in sums.items()} for kind, sums in self._sums.items()}
        self._sums, self._count = {"loss": {}, "grad_norm": {}}, 0
        return means

    def state_dict(self) -> dict:
        """What a resumed run needs to log the same numbers."""
        return {
            "sums": self._sums,
            "count": self._count,
            "skipped": self.skipped,
            "overflows": self.overflows,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`."""
        self._sums, self._count = state["sums"], state["count"]
        self.skipped, self.overflows = state["skipped"], state["overflows"]
        self.scaler.load_state_dict(state["scaler"])


def _split(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """The batch in equal parts. All parts of all processes have one `normalizer`: their mean of labelled pixels."""
    split = [{key: value.chunk(parts)[i] for key, value in batch.items()} for i in range(parts)]
    if "label" in batch:
        labelled = (batch["label"] != IGNORE).sum().float() / parts
        distributed.average([labelled])
        split = [part | {"normalizer": labelled} for part in split]
    return split
