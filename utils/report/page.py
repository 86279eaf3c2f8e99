"""A run, or all stages of a benchmark, as one page: report.html, complete in itself, without scripts or network.

It shows what a run folder holds: metrics.json, config.yml and panels/; of a benchmark also summary.json, seeds.json
and panel.png. Missing or damaged files leave a gap. TensorBoard has the curves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
import yaml

from data.taxonomy import CLASS_SETS, custom_class_set
from utils.config import UserError
from utils.config.keys import TRAINING_STAGES
from utils.engine.checkpoint import atomic_write, read_mapping
from utils.engine.distributed import is_main
from utils.evaluation.metrics import cell, left_out_note
from utils.report.markup import heat_map, legend, picture, table

STAGES = {  # rows of summary.json and first folders of runs, in order: title on the page
    "source_only": "source only",
    "source_only_target_bn": "source only, target BN",
    "warmup": "warm-up",
    "bpl": "BPL",
    "pst": "PST",
    "distill": "distilled",
    "source_only_long": "source only, long",
    "labelled_bound": "with target labels",
}
ABLATION = "ablation"  # folder of the runs that `utils.ablate` makes, beside a benchmark's own
COLUMNS = {  # of a table of stages, where any row has them: title and key of the row
    "steps": "steps",
    "target BN": "miou_target_bn",
    "control": "control_miou_target_bn",
    "gain": "gain_over_control",
    "of the gap": "gap_closed_from_source_only_long",
    "mIoU": "miou",
    "16 classes": "miou16",
    "13 classes": "miou13",
    "rarest": "miou_rarest",
    "pixel accuracy": "pixel_accuracy",
    "best": "best_miou",
    "over own": "over_own",
}
NOTES = {  # on columns
    "control": "Control: the source alone for as many steps; gain: over it, both under target BN.",
    "of the gap": "Of the gap: share in percent of the way from source_only_long to labelled_bound, under target BN.",
    "best": "mIoU and the columns after it: last checkpoints, with the BatchNorm statistics that the stage validates "
    "with; best: the highest of all validations.",
}


@dataclass(frozen=True)
class Run:
    """What a run folder holds, as far as it can be read; `name` is its path below the benchmark's folder."""

    name: str
    folder: Path
    config: dict
    scores: dict[str, dict]  # "last" and "best" of training, or "test"


def _stages(summary: dict) -> dict[str, dict]:
    """The rows of a summary, as far as they are rows."""
    stages = summary.get("stages")
    return {name: row for name, row in stages.items() if isinstance(row, dict)} if isinstance(stages, dict) else {}


def _read_run(folder: Path, name: str = "") -> Run:
    config, metrics = read_mapping(folder / "config.yml", yaml.safe_load), read_mapping(folder / "metrics.json")
    name = name or str(config.get("name") or config.get("stage") or folder.name)
    scores = {"test": metrics} if "miou" in metrics else {k: v for k, v in metrics.items() if isinstance(v, dict)}
    return Run(name, folder, config, scores)


def _place(name: str) -> tuple[int, str]:
    """Sort key that brings runs into the order of the stages, unknown ones last."""
    first = name.split("/")[0]
    return (list(STAGES).index(first) if first in STAGES else len(STAGES)), name


def find_runs(folder: Path) -> list[Run]:
    """The run in a folder, or the training runs below it, without those of an ablation, in the order of the stages.

    Raises UserError if there is none.
    """
    if (folder / "config.yml").is_file():
        return [_read_run(folder)]
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in map(os.path.realpath, Path(place).parents):  # a link to a folder above
            folders.clear()
        elif "metrics.jsonl" in files:
            found.append(Path(place).relative_to(folder))
    names = sorted((f.as_posix() for f in found if ABLATION not in f.parts), key=_place)
    if not names:
        raise UserError(f"{folder} holds no run")
    return [_read_run(folder / name, name) for name in names]


def title_of(name: str) -> str:
    """'distill/round2' -> 'distilled, round 2'."""
    first, *rest = name.split("/")
    rest = [r.replace("round", "round ").replace("_", " ") for r in rest]
    return ", ".join([STAGES.get(first, first.replace("_", " ")), *rest])


def _section(title: str, body: str, lead: str = "") -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>" if body else ""


def _details(title: str, body: str, is_open: bool = False) -> str:
    return f"<details{' open' * is_open}><summary>{escape(title)}</summary>{body}</details>"


def score_table(rows: dict[str, dict]) -> tuple[list[str], list[list[str]], list[str]]:
    """Head and cells of a table of scores, a row for each of `rows`, and the notes on its columns."""
    columns = {title: key for title, key in COLUMNS.items() if any(row.get(key) is not None for row in rows.values())}
    cells = [[name, *(cell(row.get(key)) for key in columns.values())] for name, row in rows.items()]
    notes = [note for title, note in NOTES.items() if title in columns]
    rows_of: dict[str, list[str]] = {}
    for name, row in rows.items():
        rows_of.setdefault(left_out_note(row) if row.get("iou") else "", []).append(name)
    for note, names in rows_of.items():
        if note:  # of several, each names its rows: their means are of different classes
            notes.append(f"{note} ({', '.join(names)})." if len(rows_of) > 1 else f"{note}.")
    return list(columns), cells, notes


def _scores(title: str, rows: dict[str, dict], lead: str = "In percent.", more: str = "") -> str:
    """Tables of scores, the averages and IoU by class, then `more`; `rows` by their titles."""
    rows = {name: row for name, row in rows.items() if row.get("miou") is not None}
    if not rows:
        return ""
    columns, averages, notes = score_table(rows)
    by_row = {name: row["iou"] for name, row in rows.items() if row.get("iou")}
    classes = dict.fromkeys(name for iou in by_row.values() for name in iou)
    cells = [[name, *(cell(iou.get(name)) for iou in by_row.values())] for name in classes]
    by_class = f"<h3>IoU by class</h3>{table(['', *by_row], cells)}" if cells else ""
    rarest = next((row["rarest"] for row in rows.values() if row.get("rarest")), None)
    notes += [f"Rarest classes: {', '.join(rarest)}."] if rarest else []
    return _section(title, table(["", *columns], averages) + by_class + more, escape(" ".join([lead, *notes])))


class _Page:
    """The sections of a page; each is '' where the folder has nothing for it."""

    def __init__(self, folder: Path):
        self.folder, self.over_seeds = folder, read_mapping(folder / "seeds.json")
        self.runs = [] if self.over_seeds and not (folder / "summary.json").is_file() else find_runs(folder)
        self.alone = bool(self.runs) and self.runs[0].folder == folder
        self.config = next((run.config for run in reversed(self.runs) if run.config), {})

    def head(self) -> str:
        benchmark = Path(str(self.config.get("benchmark", self.folder.name))).stem
        name = f"{title_of(self.runs[0].name)}, {benchmark}" if self.alone else benchmark
        facts = {"seed": self.config.get("seed"), "code": self.config.get("git")}
        text = " · ".join(f"{key} {str(value)[:10]}" for key, value in facts.items() if value is not None)
        return f"<header><h1>{escape(name)}</h1><p>{escape(text)}</p></header>"

    def scores(self) -> str:
        if self.alone:
            names = {"last": "last checkpoint", "best": "best checkpoint", "test": "test"}
            return _scores("mIoU", {names.get(k, k): v for k, v in self.runs[0].scores.items()})
        stages = _stages(read_mapping(self.folder / "summary.json"))
        rows = {title_of(name): row for name, row in stages.items()}
        for run in self.runs:  # runs that the summary lacks; its distillation row stands for the last round
            if run.name.split("/")[0] not in stages and run.scores.get("last"):
                rows[title_of(run.name)] = run.scores["last"]
        return _scores("mIoU by stage", rows, "In percent, on the validation images, of last checkpoints.")

    def seeds(self) -> str:
        rows = {title_of(name): row for name, row in _stages(self.over_seeds).items()}
        count = len(self.over_seeds.get("seeds", []))
        pages = self.over_seeds.get("folders", {}).items()
        links = ", ".join(f'<a href="{quote(place)}/report.html">seed {escape(seed)}</a>' for seed, place in pages)
        lead = f"In percent, last checkpoints: mean ± standard deviation over {count} seeds."
        return _scores("Over seeds", rows, lead, f"<p>{links}</p>")

    def panels(self) -> str:
        body = "" if self.alone else picture(self.folder / "panel.png", "image, prediction of each stage, truth")
        for run in self.runs if not body else ():
            files = sorted((run.folder / "panels").glob("*.png"))
            for file in files if "test" in run.scores else files[-1:]:  # of training, the last step's
                title = f"{title_of(run.name)}, {file.stem.lstrip('0')}"
                drawn = picture(file, f"{title}: image, prediction, truth")
                body += f"<h3>{escape(title)}</h3>{drawn}" if drawn else ""
        return _section("Predictions", body + self._class_legend() if body else "")

    def _class_legend(self) -> str:
        try:
            data = self.config["data"]
            classes = CLASS_SETS.get(data["class_set"]) or custom_class_set(data["class_names"], data["palette"])
        except (KeyError, TypeError, ValueError):  # a damaged config.yml
            return ""
        return legend([(n, "rgb({}, {}, {})".format(*colour)) for n, colour in zip(classes.names, classes.palette)])

    def confusion(self) -> str:
        maps = {}
        for run in self.runs:
            scores = next(iter(run.scores.values()), {})
            if scores.get("confusion") and scores.get("iou"):
                counts = np.array(scores["confusion"], float)
                maps[run.name] = heat_map(counts, list(scores["iou"]))
        stages = [name for name in maps if name.split("/")[0] in TRAINING_STAGES] or list(maps)
        lead = "Rows are true classes, columns predictions, in % of the true class's pixels."
        return _section("Confusion", "".join(_details(title_of(n), m, n == stages[-1]) for n, m in maps.items()), lead)

    def configs(self) -> str:
        body = ""
        for run in self.runs:
            if run.config:
                text = (run.folder / "config.yml").read_text(encoding="utf-8")
                body += _details(title_of(run.name), f"<pre>{escape(text)}</pre>")
        return _section("Configuration", body)

    def html(self) -> str:
        style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
        parts = (self.head, self.seeds, self.scores, self.panels, self.confusion, self.configs)

        def text_of(part: Callable[[], str]) -> str:
            try:
                return part()
            except (AttributeError, KeyError, TypeError, ValueError):  # a file of another form leaves a gap
                return ""

        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>PBAL: {escape(self.folder.name)}'
            '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>\n{style}</style></head>\n<body><main>{''.join(map(text_of, parts))}</main></body></html>\n"
        )


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html and return its path; raises UserError if the folder holds no run."""
    path = folder.absolute() / "report.html"
    if is_main():
        page = _Page(path.parent).html()
        # A path in it may hold bytes that are not UTF-8.
        atomic_write(path, lambda p: p.write_text(page, encoding="utf-8", errors="backslashreplace"))
    return path
