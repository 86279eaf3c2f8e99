"""What a run leaves behind besides its weights: config.yml, log.txt, metrics.jsonl, TensorBoard events."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.config import ROOT, Config, UserError, to_dict, to_yaml
from utils.engine import distributed
from utils.engine.checkpoint import atomic_write, plain

# What TensorBoard calls the entries of metrics.jsonl; None: it has no curve of them.
PLAIN_NAMES = {
    "loss": "loss",
    "iou": "IoU",
    "accuracy": "accuracy",
    "miou": "validation/mIoU",
    "images_per_second": "speed/images per second",
    "lr": None,  # with the other learning rates
    "pixels": None,  # the same at every validation
    "iteration": None,
}


def git_sha() -> str:
    """Commit of the code, with "-dirty" where files differ from it; "unknown" outside a checkout."""
    if not (ROOT / ".git").exists():  # git would take the commit of a repository that this one's files lie in
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class RunLog:
    """Opens a run folder and writes to it.

    Args:
        cfg: resolved configuration, saved with git SHA and seed.
        first_step: TensorBoard hides events beyond it, left by an interrupted run.
        lengths: of log.txt and metrics.jsonl at that step, from `sync`: they are cut back to it; without, emptied.
    """

    def __init__(self, cfg: Config, first_step: int = 0, lengths: dict[str, int] | None = None):
        self.folder = cfg.run_dir
        text = to_yaml({"git": git_sha(), **to_dict(cfg)})
        atomic_write(self.folder / "config.yml", lambda p: p.write_text(text, encoding="utf-8"))
        self.text_file, self.metrics_file = self.folder / "log.txt", self.folder / "metrics.jsonl"
        for file in (self.text_file, self.metrics_file):
            if file.exists():
                os.truncate(file, min((lengths or {}).get(file.name, 0), file.stat().st_size))
        self.first_step = first_step

    @functools.cached_property
    def board(self) -> SummaryWriter:
        """TensorBoard's file, begun when something is first written to it."""
        return SummaryWriter(self.folder, purge_step=self.first_step + 1)

    def info(self, message: str, terminal: bool = True) -> None:
        """A line with the time in log.txt, and on the terminal, above any progress bar."""
        _append(self.text_file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")
        if terminal:
            tqdm.write(message)

    def record(self, step: int, group: str, values: dict) -> None:
        """Numbers of one step, into metrics.jsonl and, by their plain names, TensorBoard."""
        _append(self.metrics_file, json.dumps({"step": step, "group": group, **plain(values)}))
        folder = {"val": "validation"}.get(group, group)
        self.scalars(step, {PLAIN_NAMES.get(k, f"{folder}/{k.replace('_', ' ')}"): v for k, v in values.items()})

    def scalars(self, step: int, values: dict) -> None:
        """Numbers for TensorBoard alone: {name: number, or {name: number}}; anything else is left out."""
        for name, value in values.items():
            for sub, number in value.items() if isinstance(value, dict) else [("", value)]:
                if name and isinstance(number, float | int):
                    self.board.add_scalar("/".join(filter(None, (name, sub))), number, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """uint8 (H, W, 3) into TensorBoard."""
        self.board.add_image(name, picture, step, dataformats="HWC")

    def sync(self) -> dict[str, int]:
        """Write everything to the disk; returns the lengths of log.txt and metrics.jsonl in bytes."""
        lengths = {}
        with _writing(self.folder):
            if "board" in self.__dict__:
                self.board.flush()
            for path in (self.text_file, self.metrics_file):
                with open(path, "ab") as file:
                    os.fsync(file.fileno())
                    lengths[path.name] = file.tell()
        return lengths

    def close(self) -> None:
        """Flush TensorBoard."""
        if "board" in self.__dict__:
            self.board.close()


class NoLog:
    """Stands in for a `RunLog` in processes that do not write: every call does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def open_log(cfg: Config, first_step: int = 0, lengths: dict[str, int] | None = None) -> RunLog | NoLog:
    """The log of a run; of several processes, the first alone writes it. See `RunLog`."""
    return RunLog(cfg, first_step, lengths) if distributed.is_main() else NoLog()


def progress(steps: Iterable | None = None, **options: Any) -> tqdm:
    """A progress bar, shown on a terminal and by the first process alone."""
    return tqdm(steps, dynamic_ncols=True, disable=None if distributed.is_main() else True, **options)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Most memory in use so far, in GiB: of the GPU by this process, else of the process itself."""
    if device.type == "cuda":
        return {"peak GiB on the GPU": torch.cuda.max_memory_allocated(device) / 2**30}
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return {"peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; the last checkpoint is kept") from None


def _append(path: Path, line: str) -> None:
    # A file's name may hold bytes that are no text.
    with _writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{line}\n")


def show_path(path: Path) -> str:
    """A path for the log: relative to the working folder if it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
