"""Are the files of a benchmark there, paired, readable and labelled as they should be?

    python -m data.verify benchmark=gta5_to_cityscapes
    python -m data.verify benchmark=path/to/mine.yml data.workers=16

Decodes every file. Prints a table, and names whatever training would stumble over or silently learn wrong; then the
exit status is 1. All of that, and samples as contact sheets, go to runs/<benchmark>/verify/.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.check import Labels, look_at
from data.datasets import Sample, pair_files
from data.images import read_image, read_label_ids, show_name
from data.loaders import mapped, spread
from data.taxonomy import IGNORE, ClassSet, class_set
from utils.config import Config, UserError
from utils.config.keys import DatasetConfig
from utils.engine.checkpoint import atomic_write
from utils.engine.command_line import run_cli
from utils.engine.log import show_path
from utils.engine.setup import prepare_data
from utils.evaluation.metrics import text_table
from utils.evaluation.pictures import colorize, save_panel, to_picture

TOLERANCE = 0.1  # sizes may differ by less where `size` brings them to one, as some of GTA5's do
SHOWN = 8  # faults of a kind that are printed, samples on a contact sheet


@dataclass
class Report:
    """What was found in one dataset."""

    images: int = 0
    labels: int = 0
    sizes: Counter = field(default_factory=Counter)  # (width, height) of images
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # by train id
    faults: dict[str, list[str]] = field(default_factory=dict)  # kind -> files
    warnings: list[str] = field(default_factory=list)  # what may be intended
    hashes: dict[str, str] = field(default_factory=dict)  # of an image's pixels -> its path

    def fault(self, kind: str, name: object) -> None:
        self.faults.setdefault(kind, []).append(show_name(name))


def check_dataset(
    cfg: DatasetConfig, classes: ClassSet, with_labels: bool, workers: int, name: str
) -> tuple[Report, list[Sample]]:
    """Decode every file of a dataset; `name` is source, target or val."""
    report, labels = Report(), Labels(cfg, classes)
    try:
        samples = pair_files(cfg, with_labels)
    except UserError as error:
        report.fault("no files", error)
        return report, []
    if samples.note:
        report.warnings.append(samples.note)
    fixed = cfg.format != "folder"  # images of a folder may have any size
    for path in samples.orphans:
        report.fault("label without image", path)
    per_image, looks = [], mapped(look_at, samples, workers)
    for sample, found in zip(samples, tqdm(looks, name, len(samples), unit="img", dynamic_ncols=True, disable=None)):
        if with_labels and not sample.label.exists():
            report.fault("image without label", f"{sample.image}: {sample.label} is missing")
        for kind, text in found["problems"]:
            report.fault(kind, text)
        if found.get("label_map"):
            report.fault("image looks like a label map", sample.image)
        size, label_size = found.get("size"), found.get("label_size")
        if size and label_size and size != label_size and not (cfg.size and _alike(size, label_size)):
            report.fault("image and label differ in size", f"{sample.image}: {_by(size)}, label {_by(label_size)}")
        if size:
            per_image.append((sample, size))
            report.sizes[size] += 1
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
    report.images = len(per_image)
    usual = report.sizes.most_common(1)[0][0] if report.sizes else None
    for sample, size in per_image if fixed else []:
        if not _alike(size, usual):
            report.fault("image of another size than the rest", f"{sample.image}: {_by(size)}, not {_by(usual)}")
    report.pixels = labels.pixels()
    for kind, text in labels.faults():
        report.fault(kind, f"{report.labels} labels below {cfg.root}: {text}")
    report.warnings += labels.warnings(every_class=name == "source")
    return report, samples


def _alike(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return all(abs(x - y) <= TOLERANCE * max(x, y) for x, y in zip(a, b))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def summary(reports: dict[str, Report], classes: ClassSet) -> str:
    """Files, sizes and class shares of each dataset, side by side."""
    every = list(reports.values())
    rows = [
        ["images", *(str(r.images) for r in every)],
        ["labels", *(str(r.labels) for r in every)],
        ["usual size", *(_by(r.sizes.most_common(1)[0][0]) if r.sizes else "-" for r in every)],
        ["sizes", *(str(len(r.sizes)) for r in every)],
    ]
    for k, name in [*enumerate(classes.names), (IGNORE, "ignored")]:
        rows.append([name, *(f"{r.pixels[k] / r.pixels.sum():.3%}" if r.pixels[k] else "-" for r in every)])
    rows.append(["faults", *(str(sum(map(len, r.faults.values()))) for r in every)])
    return text_table(["", *reports], rows)


def contact_sheet(samples: list[Sample], labels: Labels, cfg: Config, name: str) -> None:
    """Draw samples of a dataset: image | label | both, images alone where there are no labels."""
    rows = []
    for index in spread(len(samples), SHOWN):
        sample = samples[index]
        try:
            picture = to_picture(read_image(sample.image))
            if sample.label:
                label = colorize(labels.table[read_label_ids(sample.label)], classes=class_set(cfg.data))
                label = np.asarray(Image.fromarray(label).resize(picture.shape[1::-1], Image.Resampling.NEAREST))
                rows.append([picture, label, (picture // 2 + label // 2)])
            else:
                rows.append([picture])
        except UserError:  # it is among the faults
            continue
    if rows:
        save_panel(cfg.sibling_run("verify") / f"{name}.png", rows, ["image", "label", "both"][: len(rows[0])])


def main(cfg: Config) -> dict[str, Report]:
    """Check source, target and validation images; raises UserError if anything is wrong with them."""
    prepare_data(cfg)
    classes, reports = class_set(cfg.data), {}
    for name in ("source", "target", "val"):
        section = getattr(cfg.data, name)
        reports[name], samples = check_dataset(section, classes, name != "target", cfg.data.workers, name)
        contact_sheet(samples, Labels(section, classes), cfg, name)
    for name in ("source", "target"):
        for twin in reports[name].hashes.keys() & reports["val"].hashes.keys():
            pair = f"{reports[name].hashes[twin]} = {reports['val'].hashes[twin]}"
            reports["val"].fault(f"validation image that is in {name} too", pair)
    print(summary(reports, classes))
    every = []
    for name, report in reports.items():
        for kind, texts in report.faults.items():
            lines = [f"{name}: {kind}: {text}" for text in sorted(texts)]
            every += lines
            more = [f"{name}: {kind}: and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            print("\n".join(lines[:SHOWN] + more))
    warnings = [f"{name}: warning: {text}" for name, report in reports.items() for text in report.warnings]
    print("".join(f"{line}\n" for line in warnings), end="")
    folder = cfg.sibling_run("verify")
    for name, lines in (("faults.txt", every), ("warnings.txt", warnings)):
        text = "".join(f"{line}\n" for line in lines)
        atomic_write(folder / name, lambda p, text=text: p.write_text(text, "utf-8"))
    if every:
        raise UserError(f"{len(every)} faults, listed in {folder / 'faults.txt'}")
    listed = f", {len(warnings)} warnings" if warnings else ""
    print(f"no fault{listed}; samples are in {show_path(folder)}")
    return reports


if __name__ == "__main__":
    run_cli(main, "stage1_BPL.yml", __doc__, ("bpl",))
