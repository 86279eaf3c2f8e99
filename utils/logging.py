"""What a run leaves behind besides its weights: config.yml, log.txt, metrics.jsonl, TensorBoard events."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.checkpoint import atomic_write, plain
from utils.config import ROOT, Config, UserError, to_dict


def git_sha() -> str:
    """Commit of the code, with "-dirty" where files differ from it; "unknown" outside a checkout."""
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
        lengths: what `sync` gave then; log.txt and metrics.jsonl are cut back to it, and begun anew without.
    """

    def __init__(self, cfg: Config, first_step: int = 0, lengths: dict[str, int] | None = None):
        self.folder = cfg.run_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        header = {"git": git_sha(), **to_dict(cfg)}
        text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
        atomic_write(self.folder / "config.yml", lambda p: p.write_text(text))
        self.text_file, self.metrics_file = self.folder / "log.txt", self.folder / "metrics.jsonl"
        for file in (self.text_file, self.metrics_file):
            if file.exists():
                length = (lengths or {}).get(file.name, 0)
                os.truncate(file, min(length, file.stat().st_size))
        self.board = SummaryWriter(self.folder, purge_step=first_step + 1)

    def say(self, message: str, terminal: bool = True) -> None:
        """A line with the time in log.txt, and on the terminal, above any progress bar."""
        if terminal:
            tqdm.write(message)
        _append(self.text_file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def record(self, step: int, group: str, values: dict) -> None:
        """Numbers of one step, into metrics.jsonl and TensorBoard (nested dicts become a/b)."""
        _append(self.metrics_file, json.dumps({"step": step, "group": group, **plain(values)}))
        for key, value in values.items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            for sub, number in items:
                if isinstance(number, float | int):
                    self.board.add_scalar("/".join(filter(None, (group, key, sub))), number, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """uint8 (H, W, 3) into TensorBoard."""
        self.board.add_image(name, picture, step, dataformats="HWC")

    def sync(self) -> dict[str, int]:
        """Bring everything to the disk; gives the lengths of log.txt and metrics.jsonl in bytes."""
        self.board.flush()
        lengths = {}
        for path in (self.text_file, self.metrics_file):
            with open(path, "ab") as file:
                os.fsync(file.fileno())
                lengths[path.name] = file.tell()
        return lengths

    def close(self) -> None:
        """Flush TensorBoard."""
        self.board.close()


def _append(path: Path, line: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; the last checkpoint is kept") from None


def show_path(path: Path) -> str:
    """Relative to the working folder where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
