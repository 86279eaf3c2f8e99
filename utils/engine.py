"""The one training loop. A stage brings its networks and its step; everything else of a run is here."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from data import pseudo_labels
from data.datasets import build_dataset
from data.loaders import training_batches
from data.transforms import RandomScaleCropFlip, Views
from models import parameter_groups
from utils import checkpoint
from utils.config import Config, UserError, flatten, to_dict
from utils.inference import (
    autocast,
    batchnorm_statistics,
    evaluate,
    recompute_batchnorm,
    set_batchnorm_statistics,
)
from utils.logging import RunLog, peak_memory, show_path
from utils.metrics import table
from utils.report import write_report
from utils.schema import TestConfig
from utils.setup import build_network, check_inputs, choose_device, prepare_data, settle
from utils.visual import Gallery, spread

Backward = Callable[..., None]

# Keys that may differ between the two parts of a resumed run: they change where and how fast, not what is learnt.
HARMLESS = {"runs", "device", "data.workers"} | {f"test.{f.name}" for f in dataclasses.fields(TestConfig)}
HARMLESS |= {f"train.{key}" for key in ("iterations", "log_every", "save_every", "val_every", "panels", "restart")}


class Stage:
    """What a stage script fills in.

    Attributes:
        model: the network that is adapted, evaluated and saved.
        networks: every network that is trained, by name; `model` is one of them.
        optimizers: by name; their learning rates follow the poly schedule.
        views: inputs from uint8 images.
        uses_pseudo_labels: whether target batches carry the labels of the run that `pseudo_labels=` names.
        uses_target_labels: whether target batches carry true labels; for the upper bound alone.
        uses_target: whether target images are trained on at all; without, target batches are empty.
    """

    uses_pseudo_labels = False
    uses_target_labels = False
    uses_target = True

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg, self.device = cfg, device
        self.model = build_network(cfg, device)
        t = cfg.train
        groups = parameter_groups(self.model, t.lr, t.head_lr_factor)
        self.networks: dict[str, nn.Module] = {"model": self.model}
        self.optimizers: dict[str, Optimizer] = {"model": SGD(groups, momentum=t.momentum, weight_decay=t.weight_decay)}
        self.views = Views(cfg.data, self.model.mean, self.model.std)

    def step(self, source: dict[str, Tensor], target: dict[str, Tensor], backward: Backward) -> None:
        """One step's losses.

        Args:
            source: image uint8 (N, 3, H, W), label uint8 (N, H, W), on the device.
            target: image, and label where the stage uses pseudo labels.
            backward: `backward(total, **terms)` adds the gradient of `total` and logs the terms. Call it as soon as
                a loss is known: its graph is freed at once.
        """
        raise NotImplementedError


def fit(cfg: Config, stage_type: type[Stage]) -> dict:
    """Train a stage from its start, or from where its run folder says that it stopped.

    Returns:
        Contents of the run's metrics.json: {"last": scores, "best": scores}.

    Raises:
        UserError: data or weights are missing, the run folder holds another experiment, a loss is not finite.
    """
    return _Run(cfg, stage_type).train()


class _Run:
    def __init__(self, cfg: Config, stage_type: type[Stage]):
        self.folder = cfg.run_dir
        self.last_file, self.best_file = (self.folder / "checkpoints" / f"{n}.pth" for n in ("last", "best"))
        self.device = choose_device(cfg)
        saved = checkpoint.read(self.last_file) if self.last_file.is_file() and not cfg.train.restart else None
        if saved:
            _refuse_other_experiment(saved["config"], cfg)
        prepare_data(cfg)
        transform, d, labels = RandomScaleCropFlip(cfg.data), cfg.data, cfg.sibling_run(cfg.pseudo_labels)
        self.source, self.target, self.val, init, _ = check_inputs(
            lambda: build_dataset(d.source, cfg.classes, True, transform, seed=2 * cfg.seed),
            lambda: build_dataset(
                d.target, cfg.classes, stage_type.uses_target_labels, transform, seed=2 * cfg.seed + 1
            ),
            lambda: build_dataset(d.val, cfg.classes, True),
            lambda: None if saved else checkpoint.find_init(cfg),
            lambda: pseudo_labels.read_manifest(labels) if stage_type.uses_pseudo_labels else None,
        )
        if stage_type.uses_pseudo_labels:
            pseudo_labels.attach(self.target, labels)
        start = self.last_file if saved else init
        file = checkpoint.open_file(start) if start else None
        self.cfg = cfg = settle(cfg, file)
        self.stage = stage_type(cfg, self.device)
        self.model = self.stage.model
        loaded = checkpoint.load(self.stage.networks, file, cfg) if init else "random weights"
        self.iteration, self.last_scores, self.best = 0, None, None
        torch.manual_seed(cfg.seed)
        if saved:
            self._restore(saved)
            loaded = f"resumed after step {self.iteration}"
        else:
            for file in (self.last_file, self.best_file):  # train.restart: killed early, it must not resume the old run
                file.unlink(missing_ok=True)
        self.log = RunLog(cfg, self.iteration)
        self.log.say(
            f"{show_path(self.folder)} on {self.device}: {len(self.source)} source, {len(self.target)} target "
            f"and {len(self.val)} validation images; {loaded}"
        )

    def train(self) -> dict:
        cfg, t = self.cfg, self.cfg.train
        scores = None
        pin = self.device.type == "cuda"
        batches = self._batches(pin) if self.iteration < t.iterations else None
        bar = tqdm(
            total=t.iterations, initial=self.iteration, desc=cfg.name or cfg.stage, dynamic_ncols=True, disable=None
        )
        sums: dict[str, Tensor] = {}
        since, started = 0, time.monotonic()
        images_per_step = t.batch_source + (t.batch_target if self.stage.uses_target else 0)
        while self.iteration < t.iterations:
            self.iteration += 1
            factor = (1 - self.iteration / t.horizon) ** t.power  # the first step is step 1, as released
            rates = self._set_learning_rates(factor)
            lr = next(iter(rates.values()))
            for name, value in self._step(*next(batches)).items():
                sums[name] = sums.get(name, 0) + value
            since += 1
            bar.update()
            validates = self.iteration % t.val_every == 0 or self.iteration == t.iterations
            saves = validates or self.iteration % t.save_every == 0
            if saves or self.iteration % t.log_every == 0:  # losses are looked at before weights are kept
                losses = {name: (value / since).item() for name, value in sums.items()}
                _refuse_not_finite(losses, self.iteration)
                rate = since * images_per_step / (time.monotonic() - started)
                self.log.record(self.iteration, "train", {"loss": losses, "lr": lr, "images_per_second": rate})
                self.log.watch(self.iteration, {"learning rate": rates, "memory": peak_memory(self.device)})
                shown = {n: f"{v:.3f}" for n, v in losses.items()} | {"lr": f"{lr:.1e}", "img/s": f"{rate:.1f}"}
                bar.set_postfix(shown)
                line = f"step {self.iteration}/{t.iterations}  " + "  ".join(f"{k} {v}" for k, v in shown.items())
                self.log.say(line, terminal=bar.disable)
                sums, since, started = {}, 0, time.monotonic()
            if saves:
                pause = time.monotonic()
                scores = self._validate_and_save(validates) or scores
                started += time.monotonic() - pause
        bar.close()
        result_file = self.folder / "metrics.json"
        if scores is None:  # nothing was left to do
            scores = self.last_scores
            self.log.say(f"{show_path(self.folder)} is complete; train.restart=true begins anew")
        result = {"last": scores, "best": self.best}
        checkpoint.write_json(result_file, result)
        self.log.hparams(cfg, result)
        self.log.close()
        write_report(self.folder)
        return result

    def _batches(self, pin: bool) -> Iterator[tuple[dict, dict]]:
        t, workers = self.cfg.train, self.cfg.data.workers
        source = training_batches(self.source, t.batch_source, workers, self.iteration, pin)
        target = itertools.repeat({})
        if self.stage.uses_target:
            target = training_batches(self.target, t.batch_target, workers, self.iteration, pin)
        for pair in zip(source, target):
            yield tuple({k: v.to(self.device, non_blocking=pin) for k, v in batch.items()} for batch in pair)

    def _set_learning_rates(self, factor: float) -> dict[str, float]:
        """Poly schedule for every group of every optimiser; returns the rates by name, the backbone's first."""
        rates = {}
        for name, optimizer in self.stage.optimizers.items():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                rates[group.get("name", name)] = group["lr"] = group["initial_lr"] * factor
        return rates

    def _step(self, source: dict, target: dict) -> dict[str, Tensor]:
        for network in self.stage.networks.values():
            network.train()
        for optimizer in self.stage.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}

        def backward(total: Tensor, **named: Tensor) -> None:
            with torch.autocast(self.device.type, enabled=False):  # gradients take the types of the forward pass
                total.backward()
            terms.update({name: value.detach() for name, value in named.items()})

        with autocast(self.device, self.cfg.train.precision):
            self.stage.step(source, target, backward)
        for optimizer in self.stage.optimizers.values():
            optimizer.step()
        return terms

    def _validate_and_save(self, validates: bool) -> dict | None:
        cfg, running = self.cfg, batchnorm_statistics(self.model)
        adapted = cfg.batchnorm.statistics == "target"
        if adapted:
            recompute_batchnorm(self.model, self.target, cfg, self.device)
        weights = {
            "recipe": checkpoint.recipe(cfg, self.model),
            "model": self.model.state_dict(),
            "running_statistics": running,
            "iteration": self.iteration,
            "config": to_dict(cfg),
        }
        scores = None
        if validates:
            gallery = Gallery(spread(len(self.val), cfg.train.panels), cfg.classes)
            scores = evaluate(self.model, self.val, cfg.classes, cfg, self.device, gallery)
            scores["iteration"] = self.iteration
            self.last_scores = scores
            self.log.record(self.iteration, "val", scores)
            if gallery.shown:
                sheet = gallery.save(self.folder / "panels" / f"{self.iteration:06d}.png")
                self.log.picture(self.iteration, "val/panel", sheet)
            better = self.best is None or scores["miou"] > self.best["miou"]
            self.best = scores if better else self.best
            self.log.say(
                f"step {self.iteration}: mIoU {scores['miou']:.2f} (best {self.best['miou']:.2f} "
                f"at step {self.best['iteration']})"
            )
            if self.iteration == cfg.train.iterations:
                self.log.say(table({"last": scores, "best": self.best}, cfg.classes))
            if better:
                checkpoint.save_checkpoint(self.best_file, weights)
        state = weights | {
            "networks": {k: v.state_dict() for k, v in self.stage.networks.items() if v is not self.model},
            "optimizers": {k: v.state_dict() for k, v in self.stage.optimizers.items()},
            "best": self.best,
            "last": self.last_scores,
            "rng": checkpoint.rng_state(),
        }
        checkpoint.save_checkpoint(self.last_file, state)
        set_batchnorm_statistics(self.model, running)
        return scores

    def _restore(self, saved: dict) -> None:
        try:
            self.model.load_state_dict(saved["model"])
            set_batchnorm_statistics(self.model, saved["running_statistics"])
            for name, state in saved["networks"].items():
                self.stage.networks[name].load_state_dict(state)
            for name, state in saved["optimizers"].items():
                self.stage.optimizers[name].load_state_dict(state)
            checkpoint.set_rng_state(saved["rng"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{self.last_file} cannot be resumed ({reason}); train.restart=true begins anew") from None
        self.iteration, self.best, self.last_scores = saved["iteration"], saved["best"], saved["last"]


def _refuse_other_experiment(saved: dict, cfg: Config) -> None:
    old, new = flatten(saved), flatten(to_dict(cfg))
    changed = [k for k in new if k not in HARMLESS and new[k] not in (old.get(k), "auto")]  # auto: as it was
    if changed:
        listed = ", ".join(f"{k}: {old.get(k)} -> {new[k]}" for k in changed[:4])
        raise UserError(
            f"{show_path(cfg.run_dir)} holds another experiment ({listed}{', …' if len(changed) > 4 else ''}); "
            "give this one a name=, or begin anew with train.restart=true"
        )


def _refuse_not_finite(losses: dict[str, float], iteration: int) -> None:
    for name, value in losses.items():
        if not abs(value) < float("inf"):
            raise UserError(f"loss {name} is {value} by step {iteration}; the last good state is checkpoints/last.pth")
