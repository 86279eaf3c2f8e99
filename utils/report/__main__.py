"""Write the page of a run, or of all stages of a benchmark, anew.

python -m utils.report runs/toy
python -m utils.report runs/toy/bpl
"""

from __future__ import annotations

import argparse
from pathlib import Path

from utils.engine.command_line import guarded
from utils.engine.log import show_path
from utils.report.page import write_report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of the user's mistakes too")
    parser.add_argument("folder", nargs="+", type=Path, help="runs/<benchmark>, or one run in it")
    args = parser.parse_args()
    for folder in args.folder:
        guarded(lambda folder=folder: print(f"written to {show_path(write_report(folder))}"), args.debug)


if __name__ == "__main__":
    main()
