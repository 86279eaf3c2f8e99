"""The one training loop. A stage brings its networks and its step; everything else of a run is here."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from data import pseudo_labels
from data.datasets import SegmentationDataset, build_dataset
from data.first_look import look_at
from data.loaders import UNREADABLE, training_batches
from data.transforms import RandomScaleCropFlip, Views
from models import parameter_groups
from models.formats import own_checkpoint
from utils import checkpoint, distributed
from utils.config import Config, UserError, default_config, flatten, to_dict
from utils.inference import (
    batchnorm_statistics,
    evaluate,
    recompute_batchnorm,
    set_batchnorm_statistics,
)
from utils.logging import open_log, peak_memory, progress, show_path
from utils.metrics import table
from utils.process import Interruption, alone_in
from utils.report import write_report
from utils.schema import TRAINING_STAGES, DatasetConfig, TestConfig
from utils.selection import target_free_scores
from utils.setup import (
    build_network,
    check_inputs,
    choose_device,
    compile_networks,
    prepare_data,
    refuse_unusable_backbone,
    settle,
)
from utils.step import GuardedStep
from utils.visual import Gallery, spread

Backward = Callable[..., None]

# Keys that may differ between the two parts of a resumed run: they change where and how fast, not what is learnt.
HARMLESS = {"benchmark", "runs", "device", "data.workers", "data.check", "data.on_error", "data.max_skipped"}
HARMLESS |= {f"test.{f.name}" for f in dataclasses.fields(TestConfig)}
HARMLESS |= {
    f"train.{key}"
    for key in (
        *("iterations", "log_every", "save_every", "val_every", "panels", "restart", "deterministic"),
        *("checkpointing", "compile", "on_nonfinite", "max_skipped"),
    )
}


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
        self.model = distributed.synchronized(build_network(cfg, device), device)
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
        Contents of the run's metrics.json: {"last": scores, "best": scores, "best_chosen_by": text}.

    Raises:
        ConfigError: the network that model.backbone names cannot be built.
        UserError: data or weights are missing, the run folder is in use or holds another experiment, a loss is not
            finite, the disk is full.
        SystemExit: Ctrl-C (130) or SIGTERM (143), after the step in hand and a save.
    """
    refuse_unusable_backbone(cfg)
    with alone_in(cfg.run_dir):
        run = _Run(cfg, stage_type)
        with Interruption() as stop, contextlib.closing(run.batches()) as batches:  # closed: loader processes end
            return run.train(batches, stop)


def seeds(cfg: Config) -> list[int]:
    """Of source draws, target draws, and of dropout and colours, for this link of the chain: stages that drew alike
    would show a network the few hundred crops again that it has learnt just before."""
    number = 0
    if cfg.stage == "distill":
        number = cfg.distill.rounds[0]
    elif cfg.stage == "warmup" and not cfg.loss.adversarial:  # source alone, from its beginning or going on from it
        number = 1 if cfg.model.init in ("scratch", "imagenet", "simclr") else 2
    link = (TRAINING_STAGES.index(cfg.stage), number)
    return np.random.SeedSequence([cfg.seed, *link]).generate_state(3).tolist()


class _Run:
    def __init__(self, cfg: Config, stage_type: type[Stage]):
        self.cfg, self.folder, self.files = cfg, cfg.run_dir, checkpoint.RunFiles(cfg.run_dir)
        saved, loaded = self.files.read() if self.files.there() and not cfg.train.restart else (None, "random weights")
        if saved:
            refuse_other_experiment(saved["config"], cfg)
            checkpoint.refuse_changed_upstream(saved.get("upstream", {}), show_path(self.folder))
            if cfg.train.precision == "auto":  # as it was, on another device too
                cfg = copy.deepcopy(cfg)
                cfg.train.precision = saved["config"]["train"]["precision"]
        self.device = choose_device(cfg)
        prepare_data(cfg)
        d, labels = cfg.data, cfg.sibling_run(cfg.pseudo_labels) if stage_type.uses_pseudo_labels else None
        source_seed, target_seed, own_seed = seeds(cfg)
        self.source, self.target, self.val, init, _ = check_inputs(
            lambda: look_at(self._training_set(d.source, True, source_seed), "source", cfg),
            lambda: look_at(
                self._training_set(d.target, stage_type.uses_target_labels, target_seed, labels), "target", cfg
            ),
            lambda: look_at(build_dataset(d.val, cfg.classes, True), "val", cfg),
            lambda: None if saved else checkpoint.find_init(cfg),
            lambda: pseudo_labels.read_manifest(labels) if labels else None,
        )
        if saved:
            self.upstream = saved.get("upstream", {})
        else:
            made_from = [path for path in (init, labels and labels / pseudo_labels.MANIFEST) if path]
            self.upstream = {str(path.resolve()): checkpoint.file_hash(path) for path in made_from}
        file = own_checkpoint(self.files.last, saved) if saved else checkpoint.open_file(init) if init else None
        self.cfg = cfg = settle(cfg, file)
        self.stage = stage_type(cfg, self.device)
        self.model = self.stage.model
        if init:
            loaded = checkpoint.load(self.stage.networks, file, cfg)
        self.iteration, self.last_scores, self.best = 0, None, None
        stage, file = self.stage, self.files.not_finite
        self.step, self.unreadable = GuardedStep(cfg, stage.networks, stage.optimizers, self.device, file), set()
        checkpoint.seed_generators(own_seed)
        if saved:
            self._restore(saved)
        distributed.same_weights(stage.networks)
        if cfg.train.compile:
            compile_networks(stage.networks, self.device)
        if not saved:
            self.files.clear()  # last of all: what is refused above leaves a run that was to be replaced as it is
        self.saved_at = self.iteration
        self.log = open_log(cfg, self.iteration, saved and saved.get("lengths"))
        place = f"{self.device}" if distributed.world_size() == 1 else f"{distributed.world_size()} {self.device.type}s"
        self.log.say(
            f"{show_path(self.folder)} on {place}: {len(self.source)} source, {len(self.target)} target "
            f"and {len(self.val)} validation images; {loaded}"
        )

    def _training_set(
        self, section: DatasetConfig, labelled: bool, seed: int, labels: Path | None = None
    ) -> SegmentationDataset:
        cfg = self.cfg
        dataset = build_dataset(section, cfg.classes, labelled, RandomScaleCropFlip(cfg.data), seed)
        dataset.skips = cfg.data.on_error == "skip"
        if labels:
            pseudo_labels.attach(dataset, labels, cfg.classes)
        return dataset

    def train(self, batches: Iterator[tuple[dict, dict]], stop: Interruption) -> dict:
        cfg, t = self.cfg, self.cfg.train
        scores = None
        bar = progress(total=t.iterations, initial=self.iteration, desc=cfg.name or cfg.stage)
        timed, started = 0, time.monotonic()
        images_per_step = t.batch_source + (t.batch_target if self.stage.uses_target else 0)
        while self.iteration < t.iterations:
            batch = self._next(batches, stop)
            if stop.came():
                self._leave(stop)
            self.iteration += 1
            factor = (1 - self.iteration / t.horizon) ** t.power  # the first step is step 1, as released
            rates = self._set_learning_rates(factor)
            if left_out := self.step(self.stage.step, *batch, self.iteration):
                self.log.say(left_out)
            timed += 1
            bar.update()
            validates = self.iteration % t.val_every == 0 or self.iteration == t.iterations
            saves = validates or self.iteration % t.save_every == 0
            if saves or self.iteration % t.log_every == 0:
                for found in distributed.gathered(sorted(self.unreadable)):
                    self._count_unreadable(found)
                means, lr = self.step.take_means(), next(iter(rates.values()))
                rate = timed * images_per_step / (time.monotonic() - started)
                faults = {"skipped_steps": self.step.skipped, "float16_overflows": self.step.overflows}
                faults["unreadable_files"] = len(self.unreadable)
                entry = means | {"lr": lr, "images_per_second": rate} | {k: v for k, v in faults.items() if v}
                self.log.record(self.iteration, "train", entry)
                self.log.watch(self.iteration, {"learning rate": rates, "memory": peak_memory(self.device)})
                shown = {n: f"{v:.3f}" for n, v in means["loss"].items()} | {"lr": f"{lr:.1e}", "img/s": f"{rate:.1f}"}
                bar.set_postfix(shown)
                line = f"step {self.iteration}/{t.iterations}  " + "  ".join(f"{k} {v}" for k, v in shown.items())
                self.log.say(line, terminal=bar.disable)
                timed, started = 0, time.monotonic()
            if saves:
                pause = time.monotonic()
                scores = self._validate_and_save(validates) or scores
                started += time.monotonic() - pause
        bar.close()
        if stop.came():  # while the last step was saved: what is left takes no time, but no stage follows
            self._leave(stop)
        result_file = self.folder / "metrics.json"
        trained = scores is not None
        if not trained:
            scores = self.last_scores
            if scores is None or scores["iteration"] != self.iteration:  # train.iterations has been lowered since
                scores = self._validate_and_save(True)
            self.log.say(f"{show_path(self.folder)} is complete; train.restart=true begins anew")
        result = {"last": scores, "best": self.best, "best_chosen_by": f"mIoU on data.val, {len(self.val)} images"}
        checkpoint.write_json(result_file, result)
        if trained:
            self.log.hparams(cfg, result)
        self.log.close()
        write_report(self.folder)
        return result

    def batches(self) -> Iterator[tuple[dict, dict]]:
        """Source and target batches from here on, or this process's parts of them, on the device."""
        t, workers, pin = self.cfg.train, self.cfg.data.workers, self.device.type == "cuda"
        source = training_batches(self.source, t.batch_source, workers, self.iteration, pin)
        target = itertools.repeat({})
        if self.stage.uses_target:
            target = training_batches(self.target, t.batch_target, workers, self.iteration, pin)
        for pair in zip(source, target):
            for batch in pair:
                self._count_unreadable(batch.pop(UNREADABLE, []))
            yield tuple({k: v.to(self.device, non_blocking=pin) for k, v in batch.items()} for batch in pair)

    def _next(self, batches: Iterator, stop: Interruption) -> tuple[dict, dict]:
        try:
            return next(batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            if stop.signal:  # the signal reached them too; no batch is needed any more
                return {}, {}
            raise UserError(
                f"a loader process was ended by the system ({error}): out of memory? Try a smaller data.workers"
            ) from None

    def _count_unreadable(self, messages: list[str]) -> None:
        for message in messages:
            if message not in self.unreadable:
                self.unreadable.add(message)
                self.log.say(f"left out ({len(self.unreadable)} so far): {message}")
        if len(self.unreadable) > self.cfg.data.max_skipped:
            raise UserError(
                f"more than data.max_skipped={self.cfg.data.max_skipped} files cannot be used, the last: "
                f"{(messages or sorted(self.unreadable))[-1]}"
            )

    def _leave(self, stop: Interruption) -> None:
        """Save and end as a signal asks."""
        if self.saved_at != self.iteration:
            self.log.say(f"{stop.name} after step {self.iteration}: saved; started again, the run goes on there")
            self._validate_and_save(False)
        self.log.close()
        stop.obey()

    def _set_learning_rates(self, factor: float) -> dict[str, float]:
        """Poly schedule for every group of every optimiser; returns the rates by name, the backbone's first."""
        rates = {}
        for name, optimizer in self.stage.optimizers.items():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                rates[group.get("name", name)] = group["lr"] = group["initial_lr"] * factor
        return rates

    @torch.compiler.set_stance("force_eager")  # what is compiled are the shapes of training
    def _validate_and_save(self, validates: bool) -> dict | None:
        cfg, running = self.cfg, batchnorm_statistics(self.model)
        rng = checkpoint.rng_states()  # put back below: training must not depend on when it is looked at
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
            scores["target_free"] = target_free_scores(self.model, self.target, cfg, self.device)
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
                self.log.say(table({"last": scores, "best on val": self.best}, cfg.classes))
                self.log.say("best on val: chosen by the labels of data.val that it is measured on; last: by none")
            if better:
                checkpoint.save_checkpoint(self.files.best, weights)
        state = weights | {
            "networks": {k: v.state_dict() for k, v in self.stage.networks.items() if v is not self.model},
            "optimizers": {k: v.state_dict() for k, v in self.stage.optimizers.items()},
            "best": self.best,
            "last": self.last_scores,
            **rng,
            "step": self.step.state_dict(),
            "unreadable": sorted(self.unreadable),
            "upstream": self.upstream,
            "lengths": self.log.sync(),
        }
        self.files.save(state)
        self.saved_at = self.iteration
        set_batchnorm_statistics(self.model, running)
        checkpoint.set_rng_states(rng)
        return scores

    def _restore(self, saved: dict) -> None:
        try:
            self.model.load_state_dict(saved["model"])
            set_batchnorm_statistics(self.model, saved["running_statistics"])
            for name, state in saved["networks"].items():
                self.stage.networks[name].load_state_dict(state)
            for name, state in saved["optimizers"].items():
                self.stage.optimizers[name].load_state_dict(state)
            checkpoint.set_rng_states(saved)
            self.step.load_state_dict(saved["step"])
            self.unreadable = set(saved["unreadable"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{self.files.last} cannot be resumed ({reason}); train.restart=true begins anew") from None
        self.iteration, self.best, self.last_scores = saved["iteration"], saved["best"], saved["last"]


def refuse_other_experiment(saved: dict, cfg: Config) -> None:
    """UserError if a run's saved configuration, nested as in its config.yml, differs from `cfg` in what is learnt."""
    defaults = flatten(to_dict(default_config()))  # of keys that are newer than the run
    old, new = defaults | flatten(saved), flatten(to_dict(cfg))
    changed = [k for k in new if k not in HARMLESS and new[k] not in (old.get(k), "auto")]  # auto: as it was
    if changed:
        listed = ", ".join(f"{k}: {old.get(k)} -> {new[k]}" for k in changed[:4])
        raise UserError(
            f"{show_path(cfg.run_dir)} holds another experiment ({listed}{', …' if len(changed) > 4 else ''}); "
            "give this one a name=, or begin anew with train.restart=true"
        )
