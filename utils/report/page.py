"""A run as one page: report.html, complete in itself, without scripts and without the network.

It shows what a run folder holds: metrics.jsonl, metrics.json, manifest.json, config.yml, panels/, and of a benchmark
summary.json, seeds.json, panel.png and features.json. Missing or damaged files leave a gap.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import yaml

from data.taxonomy import CLASS_SETS, ClassSet, custom_class_set
from utils.config import UserError, flatten
from utils.engine.checkpoint import atomic_write
from utils.engine.distributed import is_main
from utils.evaluation.metrics import left_out_note
from utils.report.charts import Bar, Line, bars, chips, heat_map, line_chart, picture, table, tiles

# Rows of summary.json and first folders of runs, in order: title and colour on the page.
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


# What a result is compared with, and what a page is about; the first that is there.
CONTROLS = ("source_only_long", "source_only_target_bn", "source_only")
RESULTS = ("distill/round2", "distill/round1", "distill", "pst", "bpl", "warmup")
OTHER_HUES = ("#4f8f8b", "#b8527e", "#7a8a2e", "#c0643a")
COLUMNS = {  # of the table of scores
    "mIoU": "miou",
    "16 classes": "miou16",
    "13 classes": "miou13",
    "rarest classes": "miou_rarest",
    "pixel accuracy": "pixel_accuracy",
    "running BN": "miou_running",
    "target BN": "miou_target_bn",
    "best": "best_miou",
    "gap closed from target BN": "gap_closed_from_source_only_target_bn",
    "gap closed from long": "gap_closed_from_source_only_long",
}
OWN_ROWS = {"last": "last checkpoint", "best": "best checkpoint", "test": "test"}  # on the page of one run
RAREST = 6  # classes of the pipeline's score of rare classes; of no more classes it repeats the mIoU
CONFUSIONS = 10  # how many are listed


@dataclass(frozen=True)
class Run:
    """What a run folder holds, as far as it can be read; `name` is its path below the benchmark's folder."""

    name: str
    folder: Path
    config: dict
    train: list[dict]
    val: list[dict]
    scores: dict[str, dict]  # "last" and "best" of training, or "test"


def read_mapping(path: Path, parse=json.loads) -> dict:
    """The mapping that a file holds, {} if it cannot be read."""
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
    """Sort key that brings names of rows and runs into the order of the stages, unknown ones last."""
    first = name.split("/")[0]
    return (list(STAGES).index(first) if first in STAGES else len(STAGES)), name


def find_runs(folder: Path) -> list[Run]:
    """The run in a folder, or the training runs below it but for those of an ablation, in the order of the stages.

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


def _section(title: str, body: str, lead: str = "") -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>" if body else ""


def _first(wanted: Iterable[str], there: Container[str]) -> str | None:
    return next((name for name in wanted if name in there), None)


def _percent(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "–"


def _spread(value: object) -> str:
    return f"{value['mean']:.1f} ± {value['std']:.1f}" if isinstance(value, dict) and "std" in value else "–"


class _Page:
    """The sections of a page; each is '' where the folder has nothing for it."""

    def __init__(self, folder: Path):
        folder = folder.absolute()
        self.folder, self.over_seeds = folder, read_mapping(folder / "seeds.json")
        self.runs = [] if self.over_seeds and not (folder / "summary.json").is_file() else find_runs(folder)
        self.alone = bool(self.runs) and self.runs[0].folder == folder
        self.config = next((run.config for run in reversed(self.runs) if run.config), {})
        summary = {} if self.alone else read_mapping(folder / "summary.json")
        self.rows: dict[str, dict] = {k: v for k, v in summary.get("stages", {}).items() if isinstance(v, dict)}
        if self.alone:
            self.rows = {k: v for k, v in self.runs[0].scores.items() if v}
        for run in self.runs:  # runs that the summary does not know; of a row in rounds it holds the last one
            if not self.alone and run.scores.get("last") and run.name.split("/")[0] not in self.rows:
                self.rows[run.name] = run.scores["last"]
        classes = class_set_of(self.config)
        known = next((list(row["iou"]) for row in self.rows.values() if row.get("iou")), [])
        self.names = list(classes.names) if classes else known
        palette = classes.palette if classes else [(120, 130, 145)] * len(known)
        self.class_hue = {n: "rgb({}, {}, {})".format(*colour) for n, colour in zip(self.names, palette)}
        others = [n for n in dict.fromkeys([*self.rows, *(r.name for r in self.runs)]) if n.split("/")[0] not in STAGES]
        self.other_hue = {n: OTHER_HUES[i % len(OTHER_HUES)] for i, n in enumerate(others)}

    def hue(self, name: str) -> str:
        stage = self.runs[0].name if self.alone else name
        first = stage.split("/")[0]
        hue = STAGES[first][1] if first in STAGES else self.other_hue.get(stage, OTHER_HUES[0])
        return hue + "88" if name == "best" or stage.endswith("/round1") else hue

    def title(self, name: str) -> str:
        return OWN_ROWS.get(name, name) if self.alone else title_of(name)

    def head(self) -> str:
        benchmark = Path(str(self.config.get("benchmark", self.folder.name))).stem
        name = f"{title_of(self.runs[0].name)}, {benchmark}" if self.alone else benchmark
        facts = [f"seed {self.config['seed']}"] if "seed" in self.config else []
        facts += [f"{self.config['model']['backbone']}"] if "backbone" in self.config.get("model", {}) else []
        facts += [f"code {str(self.config['git'])[:10]}"] if "git" in self.config else []
        return f"<header><h1>{escape(name)}</h1><p>{escape(' · '.join(facts))}</p></header>"

    def overview(self) -> str:
        facts, scored = [], {k: v for k, v in self.rows.items() if isinstance(v.get("miou"), float)}
        final = _first((*RESULTS, *scored), scored)
        if final:
            facts.append(("mIoU", f"{scored[final]['miou']:.1f} %", self.title(final)))
            control = _first(CONTROLS, scored)
            if control and control != final:
                gain = scored[final]["miou"] - scored[control]["miou"]
                facts.append(("against the source alone", f"{gain:+.1f}", f"points over {self.title(control)}"))
            elif "best" in scored and scored["best"].get("iteration"):
                facts.append(("best mIoU", f"{scored['best']['miou']:.1f} %", f"at step {scored['best']['iteration']}"))
        for name, manifest in self._manifests()[:1]:
            facts.append(("pseudo labels kept", f"{100 * manifest['kept']:.1f} %", f"of all pixels, {name}"))
        steps = [run.train[-1]["step"] for run in self.runs if run.train]
        if steps:
            facts.append(("steps", f"{sum(steps):,}", f"in {len(steps)} run{'s' * (len(steps) > 1)}"))
        return tiles(facts)

    def scores(self) -> str:
        rows = {name: row for name, row in self.rows.items() if isinstance(row.get("miou"), int | float)}
        if not rows:
            return ""
        chart = bars([Bar(self.title(name), row["miou"], self.hue(name)) for name, row in rows.items()])
        columns = {
            title: key for title, key in COLUMNS.items() if any(row.get(key) is not None for row in rows.values())
        }
        scored = {n for row in rows.values() for n, value in (row.get("iou") or {}).items() if value is not None}
        if len(scored) <= RAREST:
            columns.pop("rarest classes", None)
        scores = table(
            ["", *columns],
            [[self.title(n), *(_percent(row.get(k)) for k in columns.values())] for n, row in rows.items()],
        )
        rarest = next((row["rarest"] for row in rows.values() if row.get("rarest")), [])
        lead = (
            "In percent, on the validation images. The last checkpoint does not depend on target labels; the best one "
        )
        lead += "was chosen by the labels that it is scored on."
        lead += f" Rarest classes: {escape(', '.join(rarest))}." if "rarest classes" in columns else ""
        notes = dict.fromkeys(left_out_note(row) for row in rows.values() if row.get("iou"))
        lead += "".join(f" {escape(note)}." for note in notes if note)
        if "gap closed from long" in columns:
            lead += " Gap closed: share of the way from that control to the network with target labels."
        title = "mIoU" if self.alone else "mIoU by stage"
        return _section(title, f'<div class="pair">{chart}{scores}</div>', lead)

    def seeds(self) -> str:
        rows = {k: v for k, v in self.over_seeds.get("stages", {}).items() if isinstance(v, dict) and "miou" in v}
        if not rows:
            return ""
        columns = {title: key for title, key in COLUMNS.items() if any(row.get(key) for row in rows.values())}
        classes = list(next(iter(rows.values())).get("iou") or {})
        if len(classes) <= RAREST:
            columns.pop("rarest classes", None)
        cells = ([_spread(row.get(key)) for key in columns.values()] for row in rows.values())
        scores = table(["", *columns], [[self.title(name), *row] for name, row in zip(rows, cells)])
        by_class = table(
            ["IoU", *map(title_of, rows)],
            [[name, *(_spread(row["iou"].get(name)) for row in rows.values())] for name in classes],
        )
        pages = {f"seed {k}": v for k, v in self.over_seeds.get("folders", {}).items()}
        links = ", ".join(f'<a href="{escape(v)}/report.html">{escape(k)}</a>' for k, v in pages.items())
        count = len(self.over_seeds.get("seeds", []))
        lead = f"In percent, last checkpoints: mean ± standard deviation over {count} seeds. {links}"
        return _section("Over seeds", f'<div class="scroll">{scores}</div><div class="scroll">{by_class}</div>', lead)

    def curves(self) -> str:
        starts, offset = [], 0
        miou, losses = [], {}
        for run in self.runs:
            steps = [e["step"] for e in (*run.train, *run.val)]
            if not steps:
                continue
            starts.append(offset)
            points = [(offset + e["step"], e["miou"]) for e in run.val if isinstance(e.get("miou"), int | float)]
            miou.append(Line(title_of(run.name), self.hue(run.name), points))
            terms: dict[str, list] = {}
            for entry in run.train:
                for term, value in entry.get("loss", {}).items():
                    if value is not None:
                        terms.setdefault(term, []).append((offset + entry["step"], value))
            for term, points in terms.items():
                losses.setdefault(term, []).append(Line(title_of(run.name), self.hue(run.name), points))
            offset += max(steps)
        if not starts:
            return ""
        label = "step" if self.alone else "step, stages one after another"
        charts = [line_chart("mIoU", miou, label, "percent", False, starts)] if any(m.points for m in miou) else []
        charts += [line_chart(t.replace("_", " "), lines, label, "loss", True, starts) for t, lines in losses.items()]
        legend = "" if self.alone else chips([(m.name, m.colour) for m in miou])
        return _section("Training", f'{legend}<div class="charts">{"".join(charts)}</div>')

    def classes(self) -> str:
        rows = {name: row["iou"] for name, row in self.rows.items() if row.get("iou")}
        if not rows:
            return ""
        pixels = next((s["pixels"] for run in self.runs for s in run.scores.values() if s.get("pixels")), {})
        total, cards = sum(pixels.values()) or 1, []
        for name in self.names:
            share = f"<small>{100 * pixels[name] / total:.1f} % of pixels</small>" if name in pixels else ""
            head = f'<h3><i style="background:{self.class_hue[name]}"></i>{escape(name)} {share}</h3>'
            cards.append(head + bars([Bar(self.title(r), iou.get(name), self.hue(r)) for r, iou in rows.items()]))
        body = "".join(f'<div class="card">{card}</div>' for card in cards)
        return _section("IoU by class", f'<div class="cards">{body}</div>', "In percent; – is a class without pixels.")

    def confusion(self) -> str:
        sources = {run.name: next(iter(run.scores.values()), {}) for run in self.runs}
        matrices = {n: np.array(s["confusion"], float) for n, s in sources.items() if s.get("confusion")}
        matrices = {n: m for n, m in matrices.items() if m.shape == (len(self.names),) * 2}
        final = _first((*RESULTS, *matrices), matrices)
        if not final:
            return ""

        def shown(name: str) -> str:
            counts = matrices[name]
            share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
            off = share * (1 - np.eye(len(share)))
            largest = [divmod(int(i), len(off)) for i in np.argsort(-off, axis=None, kind="stable")[:CONFUSIONS]]
            rows = [[self.names[i], self.names[j], _percent(off[i, j])] for i, j in largest if off[i, j] > 0]
            chart = heat_map(counts, self.names, f"Confusion matrix, {title_of(name)}")
            largest = table(["truth", "taken for", "% of truth"], rows) if rows else ""
            return f'<div class="pair"><div class="scroll" tabindex="0">{chart}</div>{largest}</div>'

        rest = "".join(
            f"<details><summary>{escape(title_of(n))}</summary>{shown(n)}</details>" for n in matrices if n != final
        )
        lead = (
            f"{escape(title_of(final))}: rows are true classes, columns predictions, in % of the true class's pixels."
        )
        return _section("Confusion", shown(final) + rest, lead)

    def _manifests(self) -> list[tuple[str, dict]]:
        """(name, manifest) of the pseudo labels below the folder, or those that a single run has learnt from."""
        if self.alone:
            run = self.runs[0]
            root = run.folder.parents[len(Path(run.name).parts) - 1]
            used = "pseudo_labels" in run.config and run.config.get("stage") in ("pst", "distill")
            paths = [root / str(run.config["pseudo_labels"]) / "manifest.json"] if used else []
        else:
            root = self.folder
            paths = [p for p in root.rglob("manifest.json") if ABLATION not in p.relative_to(root).parts]
        names = sorted((p.parent.relative_to(root).as_posix() for p in paths), key=lambda n: ("/" in n, n))
        found = [(title_of(n), read_mapping(root / n / "manifest.json")) for n in names]
        return [(n, m) for n, m in found if isinstance(m.get("kept"), float) and m.get("classes")]

    def pseudo_labels(self) -> str:
        cards = []
        for name, manifest in self._manifests():
            total = sum(c["predicted"] for c in manifest["classes"].values()) or 1
            rows = []
            for k, c in manifest["classes"].items():
                kept = 100 * c["kept"] / c["predicted"] if c["predicted"] else None
                note = f"{100 * c['predicted'] / total:.1f} % · ≥ {c['threshold']:.2f}"
                rows.append(Bar(k, kept, self.class_hue.get(k, "var(--muted)"), note))
            selection = str(manifest.get("selection", "")).replace("_", " ")
            how = escape(f"{100 * manifest['kept']:.1f} % of all pixels, {selection}")
            cards.append(
                f'<div class="card"><h3>{escape(name)}<br><small>{how}</small></h3>{bars(rows, digits=0)}</div>'
            )
        lead = (
            "Percentage of the pixels predicted as a class that is kept; then the class's share of all predictions and "
        )
        lead += "its confidence threshold."
        return _section("Pseudo labels", f'<div class="cards">{"".join(cards)}</div>' if cards else "", lead)

    def panels(self) -> str:
        legend = chips(list(self.class_hue.items()))
        together = "" if self.alone else picture(self.folder / "panel.png", "image, prediction of each stage, truth")
        if together:
            return _section("The same images across stages", together + legend)
        body = ""
        for run in self.runs:
            files = sorted((run.folder / "panels").glob("*.png"))
            drawn = picture(files[-1], f"{title_of(run.name)}: image, prediction, truth") if files else ""
            if drawn:
                step = escape(files[-1].stem.lstrip("0"))
                body += f"<h3>{escape(title_of(run.name))} <small>{step}</small></h3>{drawn}"
        return _section("Predictions", body + legend if body else "")

    def features(self) -> str:
        numbers = {} if self.alone else read_mapping(self.folder / "features.json")
        rows = [
            [
                title_of(n),
                *(f"{r[k]:.3f}" if isinstance(r.get(k), float) else "–" for k in ("compactness", "separation")),
            ]
            for n, r in numbers.get("runs", {}).items()
        ]
        if not rows:
            return ""
        lead = (
            "Compactness: mean cosine between a pixel's feature and the centre of its true class. Separation: mean of "
        )
        lead += "1 − cosine between the centres of two classes. Higher is better, for both together. "
        lead += "The features themselves: tensorboard --logdir embed."
        return _section("Features", table(["", "compactness", "separation"], rows), lead)

    def configs(self) -> str:
        flat = {run.name: flatten(run.config) for run in self.runs if run.config}
        body = ""
        if len(flat) > 1:
            keys = dict.fromkeys(key for config in flat.values() for key in config)
            rows = [[key, *(str(c.get(key, "")) or "–" for c in flat.values())] for key in keys if key != "name"]
            rows = [row for row in rows if len(set(row[1:])) > 1]
            body = f"<p>Keys that differ between runs:</p>{table(['', *map(title_of, flat)], rows)}" if rows else ""
        for run in self.runs:
            if run.config:
                text = (run.folder / "config.yml").read_text(encoding="utf-8")
                body += f"<details><summary>{escape(title_of(run.name))}</summary><pre>{escape(text)}</pre></details>"
        return _section("Configuration", body)

    def html(self) -> str:
        style = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")
        parts = (self.seeds, self.scores, self.panels, self.classes, self.curves, self.confusion)
        parts += (self.pseudo_labels, self.features, self.configs)
        body = self.head() + self.overview() + "".join(part() for part in parts)
        name = escape(self.folder.name)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>PBAL: ' + name + "</title>"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>\n{style}</style></head>\n<body><main>{body}</main></body></html>\n"
        )


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html and return its path; raises UserError if the folder holds no run."""
    path = folder / "report.html"
    if is_main():
        page = _Page(folder).html()
        # A path in it may hold bytes that are not UTF-8.
        atomic_write(path, lambda p: p.write_text(page, encoding="utf-8", errors="backslashreplace"))
    return path
