"""A run as one page: report.html, complete in itself, without a script and without the network.

Built from what a run folder holds: metrics.jsonl, metrics.json, manifest.json, config.yml, panels/, and of a
benchmark summary.json, seeds.json, panel.png, features.json and features.png. What is missing is left out.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from html import escape
from pathlib import Path

import numpy as np

from utils.config import flatten
from utils.engine.checkpoint import atomic_write
from utils.engine.distributed import is_main
from utils.report.charts import Bar, Line, bars, chips, heat_map, line_chart, picture, table, tiles
from utils.report.runs import ABLATION, STAGES, class_set_of, find_runs, read_mapping, title_of

CONTROLS = (
    "source_only_long",
    "source_only_target_bn",
    "source_only",
)  # what a result is held against, the first that is there
RESULTS = ("distill/round2", "distill/round1", "distill", "pst", "bpl", "warmup")  # what a page is about, likewise
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
OWN_ROWS = {"last": "last checkpoint", "best": "best checkpoint", "test": "test"}  # of the page of one run
CONFUSIONS = 10  # largest ones that are listed


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
        folder = folder.resolve()
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
        columns = {title: key for title, key in COLUMNS.items() if any(key in row for row in rows.values())}
        scores = table(
            ["", *columns],
            [[self.title(n), *(_percent(row.get(k)) for k in columns.values())] for n, row in rows.items()],
        )
        rarest = next((row["rarest"] for row in rows.values() if row.get("rarest")), [])
        lead = "In percent, on the validation images. The last checkpoint of a run was chosen by no target label, "
        lead += "the best one by the labels that it is scored on."
        lead += f" Rarest classes: {escape(', '.join(rarest))}." if rarest else ""
        if "gap closed from long" in columns:
            lead += " Gap closed: share of the way from that control to the network with target labels."
        title = "mIoU" if self.alone else "mIoU by stage"
        return _section(title, f'<div class="pair">{chart}{scores}</div>', lead)

    def seeds(self) -> str:
        rows = {k: v for k, v in self.over_seeds.get("stages", {}).items() if isinstance(v, dict) and "miou" in v}
        if not rows:
            return ""
        columns = {title: key for title, key in COLUMNS.items() if any(row.get(key) for row in rows.values())}
        cells = ([_spread(row.get(key)) for key in columns.values()] for row in rows.values())
        scores = table(["", *columns], [[self.title(name), *row] for name, row in zip(rows, cells)])
        classes = list(next(iter(rows.values())).get("iou") or {})
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
        lead = f"{escape(title_of(final))}: rows are true classes. Beside it, the largest confusions."
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
        lead = "Share of the pixels predicted as a class that is kept, in percent; then the class's share of all "
        lead += "predictions and the least confidence that is kept."
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
        drawn = picture(self.folder / "features.png", "features and prototypes in two dimensions, by run")
        lead = (
            "Compactness: mean cosine between a pixel's feature and the centre of its true class. Separation: mean of "
        )
        lead += "1 − cosine between the centres of two classes. More is better for both, and neither says much alone."
        return _section("Features", table(["", "compactness", "separation"], rows) + drawn, lead)

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
        atomic_write(path, lambda p: p.write_text(page, encoding="utf-8"))
    return path
