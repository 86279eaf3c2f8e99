"""The one training loop. A stage brings its networks and its step; everything else of a run is here.

`fit` is the loop. `Run` holds what a run knows and saves; `_set_up` makes it, from a start or from a saved state.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from data import pseudo_labels
from data.check import check_samples
from data.datasets import SegmentationDataset, build_dataset, fingerprint
from data.loaders import UNREADABLE, spread, training_batches
from data.taxonomy import class_set
from data.transforms import RandomScaleCropFlip, Views
from models import parameter_groups, read_weights
from models.weights import identify
from utils.config import Config, UserError, all_keys, flatten, reason, to_dict
from utils.config.keys import MAX_SKIPPED, TRAINING_STAGES, TrainConfig
from utils.engine import checkpoint, distributed
from utils.engine.log import open_log, peak_memory, progress, show_path
from utils.engine.run_folder import Interruption, run_lock
from utils.engine.setup import (
    build_network,
    check_inputs,
    choose_device,
    prepare_data,
    refuse_missing_compiler,
    refuse_unusable_backbone,
    resolve_auto,
)
from utils.engine.step import GuardedStep
from utils.evaluation.batchnorm import batchnorm_statistics, recompute_batchnorm, set_batchnorm_statistics
from utils.evaluation.metrics import class_table, left_out_note
from utils.evaluation.pictures import Gallery
from utils.evaluation.prediction import evaluate

Backward = Callable[..., None]

MOMENTUM = 0.9  # of SGD (as released)
POWER = 0.9  # of the poly schedule (as released)

# Keys that may differ between the two parts of a resumed run: they change where, how fast and how long it learns.
HARMLESS = {
    *("benchmark", "runs", "device", "model.published", "data.workers", "data.on_error", "data.toy_root"),
    "data.palette",
    *("data.source.root", "data.target.root", "data.val.root", "train.iterations", "train.log_every"),
    *("train.save_every", "train.val_every", "train.panels", "train.restart", "train.deterministic"),
    *("train.checkpointing", "train.compile", "train.on_nonfinite", "test.batch"),
}


@contextlib.contextmanager
def _without_search() -> Iterator[None]:
    """Inside, cuDNN does not time its algorithms: it would do so anew for every size of image."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Stage:
    """What a stage script fills in.

    Attributes:
        model: the network that is adapted, evaluated and saved.
        networks: every network that is saved to be resumed, by name; `model` is one of them.
        optimizers: by name; their learning rates follow the poly schedule.
        teachers: those of `networks` that no optimizer updates, but that are validated and saved like the model.
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
        adamw = t.optimizer == "adamw"
        groups = parameter_groups(self.model, t.lr, t.head_lr_factor, spare_vectors=adamw)
        self.networks: dict[str, nn.Module] = {"model": self.model}
        self.teachers: dict[str, nn.Module] = {}
        kind, own = (AdamW, {}) if adamw else (SGD, {"momentum": MOMENTUM})
        optimizer = kind(groups, weight_decay=t.weight_decay, fused=fuses(device), **own)
        self.optimizers: dict[str, Optimizer] = {"model": optimizer}
        self.views = Views(cfg.data, self.model.mean, self.model.std)

    def compile(self) -> None:
        """torch.compile of every network and of the strong view, in place; on a GPU, networks become CUDA graphs.

        Names and state dicts stay as they are. Compilation itself happens in the first step. Raises UserError if this
        machine has no compiler for the device.
        """
        refuse_missing_compiler(self.device)
        # cuDNN may time its algorithms, once for each input size: training has one size per domain.
        torch.backends.cudnn.benchmark = not self.cfg.train.deterministic
        for network in vars(self).values():
            if isinstance(network, nn.Module):
                network.compile(mode="reduce-overhead")  # as CUDA graphs; on a CPU the mode makes no difference
        self.views.compile()

    def before_step(self, iteration: int) -> None:
        """Called once before each step, the first of which is 1; its batch may come in parts."""

    def step(self, source: dict[str, Tensor], target: dict[str, Tensor], backward: Backward) -> None:
        """Compute one step's losses and call `backward` for them.

        Args:
            source: image uint8 (N, 3, H, W), label uint8 (N, H, W), on the device; with it normalizer, see
                `segmentation_loss`.
            target: image; label and normalizer where the stage uses labels of the target.
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
        SystemExit: Ctrl-C (130), SIGTERM (143) or SIGHUP (129), after the current step and a save.
    """
    with run_lock(cfg.run_dir):
        run = _set_up(cfg, stage_type)
        t = run.cfg.train
        if run.iteration >= t.iterations:
            run.log.info(f"{show_path(run.folder)} is complete; train.restart=true begins anew")
        with (
            Interruption() as stop,
            contextlib.closing(run.batches()) as batches,  # which ends the loader processes
            progress(total=t.iterations, initial=run.iteration, desc=run.cfg.name or run.cfg.stage) as bar,
        ):
            while run.iteration < t.iterations:
                source, target = _next(batches, stop)
                if stop.came():
                    run.leave(stop)
                run.iteration += 1
                rates = _set_learning_rates(run.stage, poly_schedule(run.iteration, t))
                run.stage.before_step(run.iteration)
                if message := run.step(run.stage.step, source, target, run.iteration):
                    run.log.info(message)
                bar.update()
                validates = run.iteration % t.val_every == 0 or run.iteration == t.iterations
                saves = validates or run.iteration % t.save_every == 0
                if saves or run.iteration % t.log_every == 0:
                    run.log_step(rates, bar)
                if saves:
                    run.save(validates)
            if stop.came():  # during the last save
                run.leave(stop)
        return run.finish()


def _next(batches: Iterator, stop: Interruption) -> tuple[dict, dict]:
    """The next pair of batches; empty ones where a signal has ended the loader processes too."""
    try:
        return next(batches)
    except UserError:
        if stop.signal:
            return {}, {}
        raise


def fuses(device: torch.device) -> bool:
    """Whether optimizers update all weights in one kernel (torch's `fused`): on a GPU alone.

    On a CPU it saves no time. There, torch 2.14's fused optimizers compute wrong updates, without an error, if a
    gradient or a momentum has another memory layout than its weight.
    """
    return device.type == "cuda"


def _fit_to_device(optimizer: Optimizer, device: torch.device) -> None:
    """Undo what a loaded state has from the device it was made on: the kind of kernels, the place of Adam's counters,
    and the memory layout of the momenta, which fused kernels need to be that of the weights."""
    fused = fuses(device)
    for group in optimizer.param_groups:
        group["fused"] = fused
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if name == "step":
                state[name] = value.to(weight.device if fused else "cpu")
            elif value.shape == weight.shape:
                state[name] = torch.empty_like(weight).copy_(value)


def poly_schedule(iteration: int, train: TrainConfig) -> float:
    """Share of the initial learning rates in a step, the first of which is 1: (1 - iteration / horizon)^0.9, as
    released, after a linear rise over `warmup_steps` steps."""
    rise = min(1, iteration / max(1, train.warmup_steps))
    return rise * (1 - iteration / train.horizon) ** POWER


def _set_learning_rates(stage: Stage, factor: float) -> dict[str, float]:
    """Set every group of every optimizer to `factor` times its initial rate; returns the rates by name, the backbone's
    first."""
    rates = {}
    for name, optimizer in stage.optimizers.items():
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            rates[group.get("name", name)] = group["lr"] = group["initial_lr"] * factor
    return rates


class Data(NamedTuple):
    """The datasets of a run."""

    source: SegmentationDataset
    target: SegmentationDataset
    val: SegmentationDataset


def _set_up(cfg: Config, stage_type: type[Stage]) -> Run:
    """Check every input, build the networks, and fill them from the run's saved state or from `model.init`."""
    refuse_unusable_backbone(cfg)
    if (cfg.run_dir / pseudo_labels.MANIFEST).exists():
        raise UserError(f"{cfg.run_dir} is a folder of pseudo labels: choose another name=")
    if checkpoint.read_mapping(cfg.run_dir / "config.yml", yaml.safe_load).get("stage") == "test":
        raise UserError(f"{cfg.run_dir} is a test's: choose another name=")
    files, saved, start = checkpoint.RunFiles(cfg.run_dir), None, "random weights"
    if files.can_resume() and not cfg.train.restart:
        saved, start = files.read()
        upstream = saved["upstream"]
        refuse_other_experiment(saved["config"], cfg, upstream.values())
        checkpoint.refuse_changed_upstream(upstream, cfg.run_dir)
        if (taken := saved["iteration"]) > cfg.train.iterations:
            raise UserError(
                f"{cfg.run_dir} has taken {taken} steps, more than train.iterations={cfg.train.iterations}: give the "
                "shorter run a name= (a pipeline: runs=), or begin anew with train.restart=true"
            )
        if cfg.train.precision == "auto":  # a resumed run keeps its precision, on another device too
            cfg = copy.deepcopy(cfg)
            cfg.train.precision = saved["config"]["train"]["precision"]
    device = choose_device(cfg)
    prepare_data(cfg)
    source_seed, target_seed, own_seed = seeds(cfg)
    labels = cfg.sibling_run(cfg.pseudo_labels) if stage_type.uses_pseudo_labels else None
    *datasets, init, _ = check_inputs(
        lambda: training_set(cfg, "source", source_seed),
        lambda: training_set(cfg, "target", target_seed, stage_type.uses_target_labels, labels),
        lambda: check_samples(build_dataset(cfg.data.val, class_set(cfg.data)), "val", cfg),
        lambda: None if saved else checkpoint.find_init(cfg),
        lambda: _refuse_stale(labels) if labels else None,
    )
    if init and init.resolve().parent == files.last.parent.resolve():
        raise UserError(f"{init} belongs to this run, whose first save would replace it: give the new run a name=")
    data = Data(*datasets)
    images = {name: fingerprint(dataset.samples) for name, dataset in data._asdict().items()}
    for name, dataset in data._asdict().items():  # labels that it learns from, or is scored by
        if all(sample.label for sample in dataset.samples):
            images[f"{name}.labels"] = fingerprint(dataset.samples, labels=True)
    if saved:
        refuse_other_images(saved["images"], images, cfg.run_dir)
        file = identify(files.last, saved)
    else:
        file = read_weights(init) if init else None
        made_from = [path for path in (init, labels and labels / pseudo_labels.MANIFEST) if path]
        upstream = {_beside(path, cfg): checkpoint.file_hash(path) for path in made_from}
    cfg = resolve_auto(cfg, file)
    stage = stage_type(cfg, device)
    if init:
        trained = {name: network for name, network in stage.networks.items() if name not in stage.teachers}
        start = checkpoint.load_networks(trained, file, cfg)  # a teacher begins as the model's copy
    run = Run(cfg, stage, data, upstream, images)
    checkpoint.seed_generators(own_seed)
    if saved:
        run.load_state_dict(saved)
    distributed.same_weights(stage.networks)
    if cfg.train.compile:
        stage.compile()
        if run.iteration < cfg.train.iterations:
            start += "; the first step compiles the networks, which takes minutes"
    files.refuse_unwritable()
    if not saved:
        files.clear()  # only now: a refusal above leaves the run that was to be replaced as it is
    run.open_log(start, saved and saved["lengths"])
    return run


def _beside(path: Path, cfg: Config) -> str:
    """A file as a run remembers it: from its own folder, where all runs may move together, or the whole path."""
    path = path.absolute()
    return os.path.relpath(path, cfg.run_dir) if path.is_relative_to(cfg.sibling_run("")) else str(path)


def training_set(
    cfg: Config, name: str, seed: int, labelled: bool = True, labels: Path | None = None
) -> SegmentationDataset:
    """The source or target dataset with random crops, checked; `labels` is a folder of pseudo labels."""
    classes, skips = class_set(cfg.data), cfg.data.on_error == "skip"
    dataset = build_dataset(getattr(cfg.data, name), classes, labelled, RandomScaleCropFlip(cfg.data), seed, skips)
    if labels:
        pseudo_labels.attach(dataset, labels, classes)
    return check_samples(dataset, name, cfg)


def _refuse_stale(labels: Path) -> None:
    """UserError if pseudo labels are unfinished, or made by a checkpoint that has changed since."""
    manifest = pseudo_labels.read_manifest(labels)
    weights = Path(os.path.normpath(labels.absolute() / manifest.get("weights", "")))  # the folder may be a link
    if weights.is_file() and checkpoint.file_hash(weights) != manifest.get("checkpoint"):
        raise UserError(
            f"the pseudo labels in {labels} are stale: {weights} has been trained on since; delete this folder and "
            "make them again, by the command that made them"
        )


def seeds(cfg: Config) -> list[int]:
    """Seeds of source draws, of target draws, and of dropout and colours.

    Each stage has its own random stream, so that stages do not repeat crops.
    """
    number = 0
    if cfg.stage == "distill":
        number = cfg.distill.rounds[0]
    elif cfg.stage == "warmup" and not cfg.loss.adversarial:  # source alone, from its beginning or going on from it
        number = 1 if cfg.model.init in ("scratch", "imagenet", "simclr") else 2
    sequence = np.random.SeedSequence([cfg.seed, TRAINING_STAGES.index(cfg.stage), number])
    return sequence.generate_state(3).tolist()


def refuse_other_experiment(saved: dict, cfg: Config, started_from: Collection[str] = ()) -> None:
    """UserError if a run's saved configuration, nested as in its config.yml, differs from `cfg` in what is learnt.

    `started_from` are the hashes of the files that the run was started from: these may have got another path.
    """
    defaults = flatten(to_dict(Config()))  # of keys that are newer than the run
    old, new = defaults | flatten(saved), flatten(to_dict(cfg))
    unread = {k for k, key in all_keys().items() if key.stages is not None and cfg.stage not in key.stages}
    unread.discard("stage")  # which no stage reads, but which says what was learnt
    changed = [k for k in new if k not in HARMLESS | unread and new[k] not in (old.get(k), "auto")]  # auto: as it was
    files = {k for k in ("model.init", "distill.init_round1") if os.path.isfile(new[k])}
    changed = [k for k in changed if k not in files or checkpoint.file_hash(Path(new[k])) not in started_from]
    if changed:
        listed = ", ".join(f"{k}: {old.get(k)} -> {new[k]}" for k in changed[:4])
        raise UserError(
            f"{cfg.run_dir} holds another experiment ({listed}{', …' if len(changed) > 4 else ''}); "
            "give this one a name= (a pipeline: runs=), or begin anew with train.restart=true"
        )


def refuse_other_images(saved: dict[str, str], found: dict[str, str], run: Path) -> None:
    """UserError if source, target or val no longer consist of the images or labels that a run has begun with."""
    for name, images in saved.items():
        here = found.get(name, "no labels")
        if here != images:
            raise UserError(
                f"data.{name} has {here}, but {run} has begun with {images}; put them back, begin anew with "
                "train.restart=true, or give this run a name="
            )


class Run:
    """A run between its steps: what it has, where it stands, what it writes.

    Args:
        cfg: resolved.
        upstream: {path: hash} of the files that the run was started from.
        images: `fingerprint` of source, target and val, and of their labels where there are any.
    """

    def __init__(self, cfg: Config, stage: Stage, data: Data, upstream: dict[str, str], images: dict[str, str]):
        self.cfg, self.stage, self.model, self.data = cfg, stage, stage.model, data
        self.folder, self.files = cfg.run_dir, checkpoint.RunFiles(cfg.run_dir)
        self.upstream, self.images = upstream, images
        self.step = GuardedStep(cfg, stage.networks, stage.optimizers, stage.device, self.files.not_finite)
        self.iteration = self.saved_at = 0
        self.last_scores: dict | None = None
        self.best: dict | None = None
        self.unreadable: set[str] = set()  # files that were left out, with the reason

    def state_dict(self) -> dict:
        """The state to resume from; `save` adds the model's weights and the random streams."""
        return {
            "networks": {k: v.state_dict() for k, v in self.stage.networks.items() if v is not self.model},
            "optimizers": {k: v.state_dict() for k, v in self.stage.optimizers.items()},
            "step": self.step.state_dict(),
            "best": self.best,
            "last": self.last_scores,
            "unreadable": sorted(self.unreadable),
            "upstream": self.upstream,
            "images": self.images,
            "lengths": self.log.sync(),
        }

    def load_state_dict(self, saved: dict) -> None:
        """Go on from what `save` wrote; raises UserError if it does not fit."""
        try:
            self.model.load_state_dict(saved["model"])
            set_batchnorm_statistics(self.model, saved["running_statistics"])
            for name, state in saved["networks"].items():
                self.stage.networks[name].load_state_dict(state)
            for name, state in saved["optimizers"].items():
                self.stage.optimizers[name].load_state_dict(state)
                _fit_to_device(self.stage.optimizers[name], self.stage.device)
            checkpoint.set_rng_states(saved["rng"])
            self.step.load_state_dict(saved["step"])
            self.unreadable = set(saved["unreadable"])
        except (KeyError, RuntimeError, ValueError) as error:
            why = reason(error)
            raise UserError(f"{self.files.last} cannot be resumed ({why}); train.restart=true begins anew") from None
        self.iteration = self.saved_at = saved["iteration"]
        self.best, self.last_scores = saved["best"], saved["last"]

    def open_log(self, start: str, lengths: dict[str, int] | None) -> None:
        """Open log and metrics and write what the run consists of; see `RunLog` for `lengths`."""
        device, number = self.stage.device, distributed.world_size()
        place = f"{device}" if number == 1 else f"{number} {device.type}s"
        self.log = open_log(self.cfg, self.iteration, lengths)
        self.log.info(
            f"{show_path(self.folder)} on {place}: {len(self.data.source)} source, {len(self.data.target)} target "
            f"and {len(self.data.val)} validation images; {start}"
        )
        for note in itertools.chain.from_iterable(dataset.notes for dataset in self.data):
            self.log.info(note)
        self._start_clock()

    def _start_clock(self) -> None:
        """Measure the speed from here on."""
        self._clock = self.iteration, time.monotonic()

    def batches(self) -> Iterator[tuple[dict, dict]]:
        """Source and target batches from here on, or this process's parts of them, on the device."""
        t, workers, device = self.cfg.train, self.cfg.data.workers, self.stage.device
        pin = device.type == "cuda"

        def stream(dataset: SegmentationDataset, size: int) -> Iterator[dict]:
            part = distributed.local_batch(size)
            return training_batches(dataset, size, workers, self.iteration, pin, part)

        source = stream(self.data.source, t.batch_source)
        target = stream(self.data.target, t.batch_target) if self.stage.uses_target else itertools.repeat({})
        for pair in zip(source, target):
            for batch in pair:
                self.count_unreadable(batch.pop(UNREADABLE, []))
            yield tuple({k: v.to(device, non_blocking=pin) for k, v in batch.items()} for batch in pair)

    def count_unreadable(self, messages: list[str]) -> None:
        """Note files that were left out; raises UserError if they are too many."""
        for message in messages:
            if message not in self.unreadable:
                self.unreadable.add(message)
                self.log.info(f"left out ({len(self.unreadable)} so far): {message}")
        if len(self.unreadable) > MAX_SKIPPED:
            last = (messages or sorted(self.unreadable))[-1]
            raise UserError(f"more than {MAX_SKIPPED} files cannot be used, the last: {last}")

    def log_step(self, rates: dict[str, float], bar) -> None:
        """Write the mean losses since the last time, rates, speed and time left."""
        for found in distributed.gathered(sorted(self.unreadable)):
            self.count_unreadable(found)
        means, lr, t = self.step.take_means(), next(iter(rates.values())), self.cfg.train
        step, started = self._clock
        pace = (time.monotonic() - started) / (self.iteration - step)  # seconds a step
        left = datetime.timedelta(seconds=round((t.iterations - self.iteration) * pace))
        speed = (t.batch_source + (t.batch_target if self.stage.uses_target else 0)) / pace  # images a second
        faults = {"skipped_steps": self.step.skipped, "float16_overflows": self.step.overflows}
        faults["unreadable_files"] = len(self.unreadable)
        entry = means | {"lr": lr, "images_per_second": speed} | {k: v for k, v in faults.items() if v}
        self.log.record(self.iteration, "train", entry)
        self.log.scalars(self.iteration, {"learning rate": rates, "memory": peak_memory(self.stage.device)})
        shown = {n: f"{v:.3f}" for n, v in means["loss"].items()} | {"lr": f"{lr:.1e}", "img/s": f"{speed:.1f}"}
        bar.set_postfix(shown)
        values = "  ".join(f"{k} {v}" for k, v in shown.items())
        self.log.info(f"step {self.iteration}/{t.iterations}  {values}  left {left}", terminal=bar.disable)
        self._start_clock()

    @torch.compiler.set_stance("force_eager")  # what is compiled are the shapes of training
    @_without_search()
    def save(self, validates: bool) -> None:
        """Write checkpoints/last.pth, after a validation if asked. Training goes on as if neither had happened."""
        rng, teachers = checkpoint.rng_states(), {}
        for name, teacher in self.stage.teachers.items():
            with self._inference_statistics(teacher) as running:
                if validates:
                    scores = evaluate(teacher, self.data.val, self.cfg, self.stage.device)
                    teachers[name] = {key: scores[key] for key in ("miou", "iou")}
                    self.log.info(f"step {self.iteration}: mIoU {scores['miou']:.2f} of the {name}")
                checkpoint.save_checkpoint(self.files.of(name), self._weights(teacher, running))
        with self._inference_statistics(self.model) as running:
            weights = self._weights(self.model, running)
            if validates and self._validate({"teachers": teachers} if teachers else {}):
                checkpoint.save_checkpoint(self.files.best, weights)
            checkpoint.save_checkpoint(self.files.last, weights | self.state_dict() | {"rng": rng}, self.files.previous)
        self.saved_at = self.iteration
        checkpoint.set_rng_states(rng)
        self._start_clock()

    @contextlib.contextmanager
    def _inference_statistics(self, network: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Inside, the network has the BatchNorm statistics that `batchnorm.statistics` names. Gives the running ones,
        which it has again afterwards."""
        running = batchnorm_statistics(network)
        if self.cfg.batchnorm.statistics == "target":
            recompute_batchnorm(network, self.data.target, self.cfg, self.stage.device)
        yield running
        set_batchnorm_statistics(network, running)

    def _weights(self, network: nn.Module, running: dict[str, Tensor]) -> dict:
        """What is needed to use a network again."""
        return {
            "recipe": checkpoint.recipe(self.cfg, network),
            "model": network.state_dict(),
            "running_statistics": running,
            "iteration": self.iteration,
            "config": to_dict(self.cfg),
        }

    def _validate(self, more: dict) -> bool:
        """Score the model and log the scores with `more`; returns whether it is the best so far."""
        cfg, classes, step = self.cfg, class_set(self.cfg.data), self.iteration
        gallery = Gallery(spread(len(self.data.val), cfg.train.panels), classes)
        scores = evaluate(self.model, self.data.val, cfg, self.stage.device, gallery)
        self.last_scores = scores | more | {"iteration": step}
        better = self.best is None or scores["miou"] > self.best["miou"]
        self.best = self.last_scores if better else self.best
        self.log.record(step, "val", self.last_scores)
        if gallery.shown:
            self.log.picture(step, "val/panel", gallery.save(self.folder / "panels" / f"{step:06d}.png"))
        notes = [f"best {self.best['miou']:.2f} at step {self.best['iteration']}", left_out_note(scores)]
        self.log.info(f"step {step}: mIoU {scores['miou']:.2f} ({'; '.join(filter(None, notes))})")
        if step == cfg.train.iterations:
            self.log.info(class_table(scores, classes))
        return better

    def leave(self, stop: Interruption) -> NoReturn:
        """Save, and end as a signal asks."""
        if self.saved_at != self.iteration:
            name = signal.Signals(stop.signal).name
            same = "the same command" + (" without train.restart=true" if self.cfg.train.restart else "")
            self.log.info(f"{name} after step {self.iteration}: saved; {same} resumes there")
            self.save(validates=False)
        self.log.close()
        raise SystemExit(128 + stop.signal)  # the conventional status

    def finish(self) -> dict:
        """Write metrics.json and return what it holds."""
        if self.last_scores is None or self.last_scores["iteration"] != self.iteration:
            self.save(validates=True)  # train.iterations has been lowered since
        chosen_by = f"mIoU on data.val, {len(self.data.val)} images"
        result = {"last": self.last_scores, "best": self.best, "best_chosen_by": chosen_by}
        checkpoint.write_json(self.folder / "metrics.json", result)
        self.log.close()
        return result
