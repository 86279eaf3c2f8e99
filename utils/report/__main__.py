"""Write the page of a run, or of all stages of a benchmark, anew.

python -m utils.report runs/toy
python -m utils.report runs/toy/bpl
"""

from __future__ import annotations

from pathlib import Path

from utils.config import UserError
from utils.engine.command_line import run_words
from utils.engine.log import show_path
from utils.report.page import write_report


def write_reports(folders: list[str]) -> None:
    """Write a page into each folder."""
    if not folders:
        raise UserError("name runs/<benchmark>, or a run's folder in it")
    for folder in folders:
        print(f"written to {show_path(write_report(Path(folder)))}")


if __name__ == "__main__":
    run_words(write_reports, __doc__, "folder")
