"""Are the files of a benchmark there, paired, readable and labelled as they should be?

    python -m data.verify benchmark=gta5_to_cityscapes
    python -m data.verify benchmark=path/to/mine.yml data.workers=16

Decodes every file that training reads, but not the target's labels. Prints a table, and names whatever training would
stumble over or silently learn wrong; then the exit status is 1. All of that, and samples as contact sheets, go to
runs/<benchmark>/verify/.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data.check import Labels, odd_images, sample_facts, squeezed
from data.datasets import (
    TOLERANCE,
    UNREADABLE,
    Sample,
    SegmentationDataset,
    pair_files,
    size_text,
    sizes_conflict,
)
from data.images import show_name
from data.loaders import mapped, spread
from data.taxonomy import ClassSet, class_set, label_ids
from utils.config import Config, UserError
from utils.config.keys import DatasetConfig
from utils.engine.checkpoint import atomic_write
from utils.engine.command_line import run_cli
from utils.engine.log import progress, show_path
from utils.engine.setup import prepare_data
from utils.evaluation.metrics import text_table
from utils.evaluation.pictures import colorize, save_panel, to_picture

_OF_DATA = ("class_", "palette", "source", "target", "val", "workers", "toy_root")
READS = ("benchmark", "runs", *(f"data.{key}" for key in _OF_DATA))  # prefixes of the keys that are read
SHOWN = 8  # faults of a kind that are printed, samples on a contact sheet


@dataclass
class Report:
    """What was found in one dataset."""

    samples: list[Sample] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)  # (width, height) of images
    labels: int = 0
    pixels: Counter = field(default_factory=Counter)  # by class, and "ignored"
    faults: dict[str, list[str]] = field(default_factory=dict)  # kind -> files
    warnings: list[str] = field(default_factory=list)  # what may be intended
    hashes: dict[str, str] = field(default_factory=dict)  # of an image's pixels -> its path

    @property
    def images(self) -> int:
        """How many could be read."""
        return self.sizes.total()

    def fault(self, kind: str, name: object) -> None:
        self.faults.setdefault(kind, []).append(show_name(name))


def check_dataset(cfg: DatasetConfig, classes: ClassSet, workers: int, name: str) -> Report:
    """Decode every file of a dataset; `name` is source, target or val."""
    report, labels, with_labels = Report(), Labels(cfg, classes), name != "target"
    try:
        report.samples = listing = pair_files(cfg, with_labels)
    except UserError as error:
        report.fault("no files", error)
        return report
    if listing.note:
        report.warnings.append(listing.note)
    for path in listing.orphans:
        report.fault("label without image", path)
    size_of, dark, turned, looks = {}, [], [], mapped(sample_facts, listing, workers)
    for sample, found in zip(listing, progress(looks, desc=name, total=len(listing), unit="img")):
        if with_labels and not sample.label.exists():
            report.fault("image without label", f"{sample.image}: {sample.label} is missing")
        for kind, text in found["problems"]:
            report.fault(kind, text)
        dark += [sample.image] * found.get("dark", False)
        turned += [sample.image] * found.get("turned", False)
        if found.get("label_map"):
            report.fault("image looks like a label map", sample.image)
        size, label_size = found.get("size"), found.get("label_size")
        if size and label_size and sizes_conflict(size, label_size, cfg.size):
            report.fault(
                "image and label differ in size", f"{sample.image}: {size_text(size)}, label {size_text(label_size)}"
            )
        if size:
            size_of[sample.image] = size
            if (twin := report.hashes.setdefault(found["hash"], str(sample.image))) != str(sample.image):
                report.fault("image twice in the dataset", f"{sample.image} = {twin}")
        if label_size:
            report.labels += 1
            labels.add(sample, found)
            if unknown := labels.unknown(found["ids"]):
                listed = ", ".join(map(str, unknown[:5]))
                report.fault(f"label ids that {cfg.format} does not have", f"{sample.label}: {listed}")
            if cfg.format == "synthia" and found["stored"] in ("L", "P"):
                report.fault("SYNTHIA label of 8 bits, not 16: cut down or renumbered", sample.label)
    report.sizes, report.pixels = Counter(size_of.values()), labels.pixels()
    usual, any_size = _usual(report), cfg.format == "folder"
    for path, size in size_of.items():
        if not any_size and any(abs(a - b) > TOLERANCE * b for a, b in zip(size, usual)):
            report.fault("image of another size than the rest", f"{path}: {size_text(size)}, not {size_text(usual)}")
    for kind, text in labels.faults():
        report.fault(kind, f"{report.labels} labels below {cfg.root}: {text}")
    report.warnings += (
        squeezed(size_of.values(), cfg.size) + odd_images(dark, turned) + labels.warnings(every_class=name == "source")
    )
    return report


def _usual(report: Report) -> tuple[int, int] | None:
    return report.sizes.most_common(1)[0][0] if report.sizes else None


def summary(reports: dict[str, Report], classes: ClassSet) -> str:
    """Files, sizes and class shares of each dataset, side by side."""
    every = list(reports.values())
    rows = [
        ["images", *(str(r.images) for r in every)],
        ["labels", *(str(r.labels) for r in every)],
        ["usual size", *(size_text(_usual(r)) if r.sizes else "-" for r in every)],
        ["sizes", *(str(len(r.sizes)) for r in every)],
    ]
    for name in (*classes.names, "ignored"):
        rows.append([name, *(f"{r.pixels[name] / r.pixels.total():.3%}" if r.pixels[name] else "-" for r in every)])
    rows.append(["faults", *(str(sum(map(len, r.faults.values()))) for r in every)])
    return text_table(["", *reports], rows)


def contact_sheet(path: Path, samples: list[Sample], cfg: DatasetConfig, classes: ClassSet) -> None:
    """Draw samples of a dataset: image | label | both, images alone where there are no labels."""
    table, rows = classes.lookup_table(label_ids(cfg, classes)), []
    dataset = SegmentationDataset(samples, table, cfg.size, skips=True)
    for item in (dataset[index] for index in spread(len(samples), SHOWN)):
        if UNREADABLE in item:  # it is among the faults
            continue
        picture = to_picture(item["image"])
        label = colorize(item["label"], classes) if "label" in item else None
        rows.append([picture] if label is None else [picture, label, picture // 2 + label // 2])
    if rows:
        save_panel(path, rows, ["image", "label", "both"][: len(rows[0])])


def main(cfg: Config) -> dict[str, Report]:
    """Check source, target and validation images; raises UserError if anything is wrong with them."""
    prepare_data(cfg)
    classes, reports, folder = class_set(cfg.data), {}, cfg.sibling_run("verify")
    for name in ("source", "target", "val"):
        section = getattr(cfg.data, name)
        reports[name] = check_dataset(section, classes, cfg.data.workers, name)
        contact_sheet(folder / f"{name}.png", reports[name].samples, section, classes)
    for name in ("source", "target"):
        for twin in reports[name].hashes.keys() & reports["val"].hashes.keys():
            pair = f"{reports[name].hashes[twin]} = {reports['val'].hashes[twin]}"
            reports["val"].fault(f"validation image that is in {name} too", pair)
    print(summary(reports, classes))
    faults, warnings = [], []
    for name, report in reports.items():
        for kind, texts in report.faults.items():
            lines = [f"{name}: {kind}: {text}" for text in sorted(texts)]
            faults += lines
            print(*lines[:SHOWN], sep="\n")
            if len(lines) > SHOWN:
                print(f"{name}: {kind}: and {len(lines) - SHOWN} more")
        warnings += [f"{name}: warning: {text}" for text in report.warnings]
    for line in warnings:
        print(line)
    for name, lines in (("faults.txt", faults), ("warnings.txt", warnings)):
        text = "".join(f"{line}\n" for line in lines)
        atomic_write(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    if faults:
        raise UserError(f"{len(faults)} faults, listed in {folder / 'faults.txt'}")
    listed = f", {len(warnings)} warnings" if warnings else ""
    print(f"no fault{listed}; samples are in {show_path(folder)}")
    return reports


if __name__ == "__main__":
    run_cli(main, "stage1_BPL.yml", __doc__, ("bpl",), reads=READS)
