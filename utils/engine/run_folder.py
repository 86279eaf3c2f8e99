"""What keeps a run alone in its folder, and lets it end in order."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from utils.config import UserError
from utils.engine import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOCK = ".lock"
PARTIAL = ".partial"  # ending of files that are being written


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder.

    The folder is made if it is not there, and removed again if nothing was written into it. The lock belongs to this
    process alone, not to its loader processes, and ends with it: a kill leaves nothing to clean up. Leftovers of
    half-written files are deleted. Of several processes of a run, the first holds the lock for all; they enter and
    leave together.

    Raises:
        UserError: another run holds it.
    """
    with _locked(folder) if distributed.is_main() else contextlib.nullcontext():
        distributed.wait()
        yield
    distributed.wait()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        _lock(file, folder)
        try:
            for leftover in folder.rglob(f".*{PARTIAL}"):
                within = leftover.relative_to(folder).parents
                if not any((folder / part / LOCK).is_file() for part in within if part.parts):  # another run's
                    leftover.unlink(missing_ok=True)
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                with contextlib.suppress(OSError):  # another run's folder stands beside it
                    for path in made:
                        path.rmdir()


def _lock(file, folder: Path) -> None:
    try:
        # A POSIX record lock: unlike flock, forked loader processes that outlive a kill by seconds do not keep it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"{folder} is in use by {holder}: wait for it, or give this run another name=") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()


class Interruption:
    """Ctrl-C, SIGTERM and SIGHUP inside a `with` block: the first is noted in `signal`, which is 0 before.

    A second Ctrl-C or SIGTERM ends the process at once. A second SIGHUP does not, since a closing terminal sends
    several. With several processes nothing ends at once, or the others would wait; torchrun ends those that take over
    half a minute.
    """

    def __init__(self):
        self.signal = 0
        self._before: dict = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and background jobs have it
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if distributed.world_size() > 1 or (self.signal and signal.SIGHUP in (number, self.signal)):
            self.signal = self.signal or number
            return
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        with contextlib.suppress(OSError):  # the terminal is gone
            # Not print: the handler may have interrupted one.
            os.write(2, b"\nfinishing this step and saving; Ctrl-C again stops at once\n")

    def came(self) -> bool:
        """Whether a signal has come by now, to any process of the run: all of them leave after the same step."""
        if number := distributed.largest(self.signal):
            self.signal = number
        return number > 0
