"""Run folders as they lie on disk: what each left behind, their order and their names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from data.taxonomy import CLASS_SETS, ClassSet, custom_class_set
from utils.config import UserError

# Rows of summary.json and first folders of runs, in the order of the chain: what a page calls each, and its hue.
STAGES = {
    "source_only": ("source only", "#8a94a3"),
    "source_only_target_bn": ("source only, target BN", "#5b6675"),
    "warmup": ("warm-up", "#d08a00"),
    "bpl": ("BPL", "#0d9a6c"),
    "pst": ("PST", "#1f6fc4"),
    "distill": ("distilled", "#8e4fb8"),
    "source_only_long": ("source only, long", "#a0784f"),
    "labelled_bound": ("with target labels", "#d1495b"),
}
ABLATION = "ablation"  # folder of the runs that `utils.ablate` makes, beside a benchmark's own


@dataclass(frozen=True)
class Run:
    """One run folder as far as it can be read; `name` is its path below the benchmark's folder."""

    name: str
    folder: Path
    config: dict
    train: list[dict]
    val: list[dict]
    scores: dict[str, dict]  # "last" and "best" of training, or "test"


def read_mapping(path: Path, parse=json.loads) -> dict:
    """A file's mapping, or an empty one: a page with a gap is better than none."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # cut short by a kill
            continue
    return [e for e in entries if isinstance(e, dict) and "step" in e]


def _read_run(folder: Path, name: str) -> Run:
    entries, metrics = _lines(folder / "metrics.jsonl"), read_mapping(folder / "metrics.json")
    scores = {"test": metrics} if "miou" in metrics else {k: v for k, v in metrics.items() if isinstance(v, dict)}
    by_group = ([e for e in entries if e.get("group") == group] for group in ("train", "val"))
    return Run(name, folder, read_mapping(folder / "config.yml", yaml.safe_load), *by_group, scores)


def _place(name: str) -> tuple[int, str]:
    """Sorts the names of rows and runs into the order of the stages, unknown ones last."""
    first = name.split("/")[0]
    return (list(STAGES).index(first) if first in STAGES else len(STAGES)), name


def find_runs(folder: Path) -> list[Run]:
    """The run that a folder is, or the training runs below it without an ablation's, in the order of the stages.

    Raises UserError if there is none.
    """
    if (folder / "config.yml").is_file():
        config = read_mapping(folder / "config.yml", yaml.safe_load)
        name = str(config.get("name") or config.get("stage") or folder.name)
        return [_read_run(folder, name)]
    found = [p.parent for p in folder.rglob("metrics.jsonl") if ABLATION not in p.relative_to(folder).parts]
    if not found:
        raise UserError(f"{folder} holds no run: name runs/<benchmark> or a run's folder in it")
    names = sorted((f.relative_to(folder).as_posix() for f in found), key=_place)
    return [_read_run(folder / name, name) for name in names]


def class_set_of(config: dict) -> ClassSet | None:
    """The classes that a run's config.yml names, None if it does not say."""
    data = config.get("data", {})
    if data.get("class_set") in CLASS_SETS:
        return CLASS_SETS[data["class_set"]]
    try:
        return custom_class_set(data["class_names"], data["palette"])
    except (KeyError, ValueError, TypeError):
        return None


def title_of(name: str) -> str:
    """'distill/round2' -> 'distilled, round 2'."""
    first, *rest = name.split("/")
    rest = [r.replace("round", "round ").replace("_", " ") for r in rest]
    return ", ".join([STAGES[first][0] if first in STAGES else first.replace("_", " "), *rest])
