"""Checkpoints: written whole or not at all, and found by the name of the run that made them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from data.taxonomy import class_set
from models import WeightError, WeightFile, load_weights, read_checkpoint
from models.weights import find_imagenet_weights, find_simclr_weights
from utils.config import ROOT, Config, UserError
from utils.config.keys import WEIGHT_ENDINGS
from utils.engine import distributed
from utils.engine.run_folder import PARTIAL

PRETRAINED = ROOT / "pretrain_model"


def atomic_write(path: Path, write: Any, previous: Path | None = None) -> None:
    """Call `write(temporary path)`, then put the result in place of `path`: readers see the old file or the new.

    The new file is on the disk before the old one goes; `previous` is where the old one is then kept. Of several
    processes, the first alone writes.

    Raises:
        UserError: it cannot be written (disk full, read-only folder); the old file is as it was.
    """
    if not distributed.is_main():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous and path.is_file():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was there before is kept") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def plain(value: object) -> object:
    """A value with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict) -> None:
    """Save as indented JSON; NaN and infinity become null."""
    atomic_write(path, lambda p: p.write_text(json.dumps(plain(content), indent=2) + "\n"))


def read_mapping(path: Path, parse: Callable[[str], Any] = json.loads) -> dict:
    """The mapping that a text file holds, {} if it cannot be read."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def save_checkpoint(path: Path, content: dict, previous: Path | None = None) -> None:
    """Save a dict of tensors and plain values; see `atomic_write`."""

    def write(temporary: Path) -> None:
        buffer = io.BytesIO()  # torch.save into a file hides why it could not be written
        torch.save(content, buffer)
        temporary.write_bytes(buffer.getbuffer())

    atomic_write(path, write, previous)


def recipe(cfg: Config, model: nn.Module) -> dict:
    """What is needed to use the weights again: architecture, classes, input statistics; `cfg` is resolved."""
    settings = {key: getattr(cfg.model, key) for key in ("arch", "backbone", "output_stride", "dilations", "bn_clr")}
    names = list(class_set(cfg.data).names)
    return settings | {"class_names": names, "mean": list(model.mean), "std": list(model.std)}


def seed_generators(seed: int) -> None:
    """Start Python's, NumPy's and torch's generators, of every device; each process of a run has streams of its own."""
    if distributed.rank():
        seed = int(np.random.SeedSequence([seed, distributed.rank()]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """States of Python's, NumPy's and torch's generators, of the current GPU if there is any, as tensors and plain
    values."""
    version, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (version, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: dict) -> None:
    """Undo `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    version, keys, *rest = state["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_initialized() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])


def rng_states() -> list[dict]:
    """`rng_state` of every process, by rank."""
    return distributed.gathered(rng_state())


def set_rng_states(states: list[dict]) -> None:
    """Undo `rng_states`; processes without a saved state keep their current streams."""
    if distributed.rank() < len(states):
        set_rng_state(states[distributed.rank()])


def file_hash(path: Path) -> str:
    """First 16 hex digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class RunFiles:
    """The checkpoints of a run: `last` is resumed, `previous` was the last before it, `best` scored highest."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.last, self.previous, self.best, self.not_finite = map(self.of, ("last", "previous", "best", "not_finite"))

    def of(self, name: str) -> Path:
        """The checkpoint of that name, e.g. of a teacher."""
        return self.folder / "checkpoints" / f"{name}.pth"

    def can_resume(self) -> bool:
        """Whether there is a state to resume."""
        return self.last.is_file() or self.previous.is_file()

    def clear(self) -> None:
        """Delete them and what was drawn and scored, so that a run that begins anew is not taken for the old one."""
        if not distributed.is_main():
            return
        for path in (self.last, self.previous, self.best, self.not_finite, self.of("teacher")):
            path.unlink(missing_ok=True)
        for name in ("metrics.json", "report.html"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "panels", ignore_errors=True)

    def refuse_unwritable(self) -> None:
        """UserError if the folder of checkpoints takes no file: before the first step, not at the first save."""
        if distributed.is_main():
            atomic_write(self.last.with_name("probe"), Path.touch)
            self.last.with_name("probe").unlink()
        distributed.wait()

    def read(self) -> tuple[dict, str]:
        """The newest undamaged state, and a line that names its file and those passed over.

        Raises:
            UserError: none can be read.
        """
        problems = []
        for path in (self.last, self.previous):
            try:
                state = read_checkpoint(path)
                if {"model", "iteration", "config", "optimizers", "rng", "upstream", "images"} <= state.keys():
                    passed_over = "".join(f" from {path}: {problem}" for problem in problems)
                    return state, f"resumed after step {state['iteration']}{passed_over}"
                problems.append(f"{path} is not the state of a training run")
            except WeightError as error:
                problems.append(str(error) if path.is_file() else f"{path} is missing")
        raise UserError(f"{'; '.join(problems)}; train.restart=true begins anew")


def begins(cfg: Config) -> bool:
    """Whether training begins with the network that `model.init` names, and does not go on from a saved state."""
    return cfg.train.restart or not RunFiles(cfg.run_dir).can_resume()


def refuse_changed_upstream(upstream: dict[str, str], run: Path) -> None:
    """UserError if a file that a run was started from, {path: hash}, has been made anew since.

    A relative path is from the run's own folder.
    """
    for name, digest in upstream.items():
        path = Path(os.path.normpath(run.absolute() / name))  # the run's folder may be a link
        if path.is_file() and file_hash(path) != digest:
            raise UserError(
                f"{run} was started from {path}, which has been made anew since: they no longer belong together; "
                "begin anew with train.restart=true, or give this run a name="
            )


# The commands that train what other runs start from.
_MADE_BY = {
    "source_only": "python train_bpl.py --config configs/stage0_warmup.yml name=source_only loss.adversarial=0",
    "warmup": "python train_bpl.py --config configs/stage0_warmup.yml",
    "bpl": "python train_bpl.py",
    "pst": "python train_pst.py",
    "distill": "python distill.py",
}


def find_checkpoint(cfg: Config, name: str, published: Sequence[str] = ()) -> Path:
    """The weights that `name` stands for: a file, a run of this benchmark, a run's folder, or, for a stage's own name,
    the first published file that exists.

    Raises:
        UserError: says where was looked and how to get the weights.
    """
    if not name:
        raise UserError("no weights are named: give a run's name or a file")
    file = Path(os.path.expanduser(name)).absolute()
    if file.is_file():
        return file
    if name.endswith(WEIGHT_ENDINGS):
        raise UserError(f"no weights at {file}")
    command = _MADE_BY.get(name.split("/")[0])
    runs = [cfg.sibling_run(name), *([file] if file.is_dir() else [])]
    # A run of the user's own, or a mistyped one, is never replaced by a published file.
    ready = [PRETRAINED / file for file in published if command]
    paths = [*(RunFiles(run).of(cfg.which) for run in runs), *ready]
    for path in paths:
        if path.is_file():
            return path
    ways = f"train it (`{command} {cfg.words}`)" if command else "train that run"
    if ready:
        ways += f" or put a published file at {' or '.join(map(str, ready))}"
    looked = [str(path) for path in paths]
    raise UserError(f"no weights of '{name}': looked for {', '.join(looked)}; {ways}, or name a file")


def find_init(cfg: Config) -> Path | None:
    """The file that training starts from, None for scratch; raises UserError or WeightError if it is not there."""
    init = cfg.model.init
    if init == "scratch":
        return None
    find = {"imagenet": find_imagenet_weights, "simclr": find_simclr_weights}.get(init)
    if not find:
        return find_checkpoint(cfg, init, cfg.model.published)
    with distributed.main_first():  # it may have to be downloaded
        return find(cfg.model.backbone_name, PRETRAINED)


def load_networks(networks: dict[str, nn.Module], file: WeightFile, cfg: Config) -> str:
    """Load a file into networks["model"], and into the others what the file has for them; returns a line for the log.

    A discriminator of another form than ours, as in ProDA's files, is left out; `model.init_discriminator=new` leaves
    out every one.

    Raises:
        UserError: the file is of other classes, or of the same in another order.
        WeightError: it does not fit.
    """
    names, wanted = file.class_names, class_set(cfg.data).names
    if names and len(names) == len(wanted) and list(names) != list(wanted):
        raise UserError(f"{file.path} was trained on other classes: {', '.join(names)}")
    message = f"{file.path}: {load_weights(networks['model'], file)}"
    if not names and not file.backbone_alone and cfg.data.class_set == "custom":
        message += "; it does not name its classes: they are taken for data.class_names, in this order"
    for name in networks.keys() & file.networks.keys():
        theirs, own = file.networks[name], networks[name].state_dict()
        differ = [k for k in own if k not in theirs or theirs[k].shape != own[k].shape]
        if name == "discriminator" and cfg.model.init_discriminator == "new":
            message += "; a new discriminator begins (model.init_discriminator=new)"
        elif differ or theirs.keys() - own.keys():
            message += f"; a new {name} begins: the file's has another form"
            if differ and differ[0] in theirs:
                shapes = [tuple(state[differ[0]].shape) for state in (theirs, own)]
                message += f" ({differ[0]} {shapes[0]}, here {shapes[1]})"
        else:
            networks[name].load_state_dict(theirs)
            message += f"; {name} too"
    return message
