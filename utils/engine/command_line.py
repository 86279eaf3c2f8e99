"""Command lines: from words to a configuration, and from errors to one line and an exit status."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models import WeightError
from utils.config import ROOT, Config, ConfigError, UserError, key_help
from utils.engine import distributed
from utils.engine.setup import load_config


def run_cli(main: Callable[[Config], Any], default_config: str, usage: str, stages: tuple[str, ...]) -> None:
    """Parse `[--config FILE] [key=value …]`, run `main(config)`, and end with the exit status users expect.

    0 done · 1 the user's mistake beyond the config (one line) · 2 a config that cannot be meant (one line).
    `--debug` shows the traceback of such errors.
    """
    parser = argparse.ArgumentParser(
        description=usage, epilog=key_help(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=str(ROOT / "configs" / default_config),
        help=f"stage YAML (default: configs/{default_config})",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of the user's mistakes too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, e.g. train.iterations=200")
    args = parser.parse_intermixed_args()

    def call() -> None:
        config = load_config(args.config, args.overrides)
        if config.stage not in stages:
            raise ConfigError(
                f"{args.config} is of stage {config.stage!r}; {Path(sys.argv[0]).name} is for {' and '.join(stages)}"
            )
        main(config)

    guarded(call, args.debug)


def run_words(call: Callable[[list[str]], Any], usage: str, words: str = "key=value") -> None:
    """Parse the command line of a module without a stage file and run `call(words)`; errors end as in `run_cli`."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of the user's mistakes too")
    parser.add_argument("words", nargs="*", metavar=words, help="see `python train_bpl.py --help`")
    args = parser.parse_args()
    guarded(lambda: call(args.words), args.debug)


def guarded(call: Callable[[], Any], debug: bool = False) -> None:
    """Run `call`; a user's mistake becomes its message on stderr and its exit status, as does what the system refuses.

    Where torchrun has started several processes, they meet here, and part here when all are done. The first that fails
    prints why; torchrun ends the others.
    """
    try:
        try:
            distributed.start()
            call()
        except SystemExit:  # on a signal: every process leaves after the same step
            distributed.end()
            raise
        distributed.end()
    except (UserError, WeightError, OSError) as error:  # the last: no space left, a read-only folder, …
        if debug:
            traceback.print_exc()
        if isinstance(error, OSError):
            error = UserError(f"{error.filename or 'the system says'}: {error.strerror or error}")
        _print_and_leave(f"error: {error}", getattr(error, "status", 1))
    except torch.OutOfMemoryError as error:
        if debug:
            traceback.print_exc()
        _print_and_leave(
            f"error: {str(error).split('. ')[0]}: see train.checkpointing, train.accumulate, data.crop and test.batch; "
            "`python -m utils.benchmark plan` says what fits",
            1,
        )
    except KeyboardInterrupt:
        _print_and_leave("interrupted", 130)
    except Exception as error:
        if distributed.world_size() == 1:
            raise
        gone = distributed.others_are_gone(error) and not debug
        _print_and_leave(f"error: {distributed.GONE}" if gone else traceback.format_exc(), 1)


def _print_and_leave(line: str, status: int) -> None:
    if distributed.first_to_print():
        print(line, file=sys.stderr)
    distributed.leave(status)
