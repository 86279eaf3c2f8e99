"""Command lines: from words to a configuration, and from errors to one line and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from models import WeightError
from utils.config import (
    ROOT,
    Config,
    ConfigError,
    UserError,
    all_keys,
    find_path,
    key_help,
    out_of_memory,
    to_dict,
    to_yaml,
)
from utils.config.keys import TRAINING_STAGES
from utils.engine import distributed
from utils.engine.log import git_sha
from utils.engine.setup import checked_config


def run_cli(
    main: Callable[[Config], Any], default_config: str, usage: str, stages: tuple[str, ...], reads: tuple[str, ...] = ()
) -> None:
    """Parse `[--config FILE] [key=value …]`, run `main(config)`, and end with the exit status users expect.

    0 done · 1 the user's mistake beyond the config (one line) · 2 a config that cannot be meant (one line).
    `--help` and `--print-config` show the configuration in place of a run. `--debug` shows the traceback of errors.
    `reads`: prefixes of the keys that this command reads, if not all of the stage's.
    """
    parser = _parser(usage, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show the keys that are read, with their values")
    parser.add_argument("--print-config", action="store_true", help="show the whole configuration as YAML")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=lambda path: Path(find_path(path)).absolute(),
        default=str(ROOT / "configs" / default_config),
        help=f"stage YAML (default: configs/{default_config})",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, e.g. train.iterations=200")
    args = parser.parse_intermixed_args()

    def call() -> None:
        config = checked_config(args.config, args.overrides)
        if config.stage not in stages:
            raise ConfigError(
                f"{args.config} is of stage {config.stage!r}; {Path(sys.argv[0]).name} is for {' and '.join(stages)}"
            )
        if args.help:
            print(f"{parser.format_help()}\n{key_help(config, reads)}")
        elif args.print_config:
            print(to_yaml({"git": git_sha(), **to_dict(config)}), end="")  # as a run's config.yml
        else:
            if not reads:
                warn_of_idle_gpus(config)
            warn_of_unread_keys(config, args.overrides, reads)
            main(config)

    guarded(call, args.debug)


def run_words(
    call: Callable[[list[str]], Any], usage: str, words: str = "key=value", script: str = "train_bpl.py"
) -> None:
    """Parse the command line of a module without a stage file and run `call(words)`; errors end as in `run_cli`.

    `script` is the one whose `--help` lists the module's keys.
    """
    parser = _parser(usage)
    keys = f"`python {script} --help` lists the keys" if "key=value" in words else None
    parser.add_argument("words", nargs="*", metavar=words, help=keys)
    args = parser.parse_args()
    guarded(lambda: call(args.words), args.debug)


def split_words(words: list[str], own: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The values of a command's `own` keys among `key=value` words, and all other words."""
    mine = [word for word in words if "=" in word and word.partition("=")[0] in own]
    return dict(word.split("=", 1) for word in mine), [word for word in words if word not in mine]


def _parser(usage: str, **options: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of the user's mistakes too")
    return parser


def warn_of_idle_gpus(config: Config) -> None:
    """One line where a training process sees several GPUs, of which it uses one."""
    alone = config.stage in TRAINING_STAGES and config.device == "auto" and distributed.world_size() == 1
    if alone and (gpus := torch.cuda.device_count()) > 1:
        print(
            f"warning: training on one of {gpus} GPUs; `torchrun --standalone --nproc_per_node={gpus}` in place of "
            "`python` uses all, device=cuda:0 hides this line",
            file=sys.stderr,
        )


def warn_of_unread_keys(config: Config, overrides: list[str], reads: tuple[str, ...] = ()) -> None:
    """A line for each key of the command line that is not read; `reads` as in `run_cli`."""
    keys = all_keys()
    for key in dict.fromkeys(word.partition("=")[0] for word in overrides) if distributed.is_main() else ():
        if reads and not key.startswith(reads):
            print(f"warning: {key}= is not read by this command", file=sys.stderr)
        elif (stages := keys[key].stages) is not None and config.stage not in stages:
            print(f"warning: {key}= is not read by stage {config.stage}, but by {', '.join(stages)}", file=sys.stderr)


def guarded(call: Callable[[], Any], debug: bool = False) -> None:
    """Run `call`; a user's mistake, or what the system refuses, becomes one line on stderr and an exit status.

    Processes that torchrun has started together meet here, and leave here when all are done. The first that fails
    prints why; torchrun ends the others.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = terminals = _Terminal(sys.stdout, 1), _Terminal(sys.stderr, 2)
    try:
        try:
            distributed.start()
            call()
        except SystemExit:  # on a signal: every process leaves after the same step
            distributed.end()
            raise
        distributed.end()
    except (UserError, WeightError, OSError, UnicodeEncodeError) as error:
        if debug:
            traceback.print_exc()
        _print_and_leave(f"error: {_one_line(error)}", getattr(error, "status", 1))
    except KeyboardInterrupt:
        _print_and_leave("interrupted", 130)
    except Exception as error:
        if full := not debug and out_of_memory(error):
            _print_and_leave(
                f"error: {full}: see train.checkpointing, train.accumulate, data.crop, test.batch and "
                "train.batch_target; `python -m utils.benchmark plan` says what fits",
                1,
            )
        if distributed.world_size() == 1:
            raise
        gone = distributed.others_are_gone(error) and not debug
        _print_and_leave(f"error: {distributed.GONE}" if gone else traceback.format_exc(), 1)
    finally:
        for terminal in terminals:
            terminal.flush()
        sys.stdout, sys.stderr = before


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError):  # no space left, a read-only folder, …
        return f"{error.filename or 'the system says'}: {error.strerror or error}"
    if isinstance(error, UnicodeEncodeError):  # of a file's name
        name = f"{error.object[:200]!r}"
        return f"{name} cannot be written in this locale's {error.encoding}: set PYTHONUTF8=1, or rename it"
    return str(error)


def _print_and_leave(line: str, status: int) -> None:
    if distributed.first_to_print():
        print(line, file=sys.stderr)
    distributed.leave(status)


class _Terminal:
    """Stands in for sys.stdout or sys.stderr, so that a run survives a closed terminal or pipe.

    log.txt has the lines that are no longer seen. Characters that the terminal's encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO | None, number: int):
        try:
            os.fstat(number)
        except OSError:  # started with it closed: the next file that is opened would take its place
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text; it is dropped if the terminal is gone."""
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered; it is dropped if the terminal is gone."""
        self._try(self.stream.flush)

    def _try(self, call: Callable[..., Any], *args: str) -> None:
        try:
            call(*args)
        except ValueError:  # it is closed
            pass
        except OSError:
            with contextlib.suppress(OSError, ValueError):  # what is still buffered must not fail at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
