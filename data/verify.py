"""Are the files of a benchmark there, paired, readable and labelled as they should be?

    python -m data.verify benchmark=gta5_to_cityscapes
    python -m data.verify benchmark=path/to/mine.yml data.workers=16

Decodes every file. Prints a table, and names whatever training would stumble over or silently learn wrong; then the
exit status is 1. All of that, and samples as contact sheets, go to runs/<benchmark>/verify/.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.datasets import Sample, label_ids, pair_files, read_image, read_label_ids
from data.loaders import spread
from data.taxonomy import IGNORE, KNOWN_IDS, ClassSet, class_set
from utils.config import Config, UserError
from utils.config.keys import DatasetConfig
from utils.engine.checkpoint import atomic_write
from utils.engine.command_line import run_cli
from utils.engine.log import show_path
from utils.engine.setup import prepare_data
from utils.evaluation.pictures import colorize, save_panel, to_picture

TOLERANCE = 0.1  # sizes that differ by less are brought to one by `size`: some of GTA5's do
FEW_COLOURS = 40  # a grey or palette picture of no more is a label map, not a photograph
SHOWN = 8  # faults of a kind that are printed, samples on a contact sheet


@dataclass
class Report:
    """What is known of one dataset."""

    images: int = 0
    labels: int = 0
    sizes: Counter = field(default_factory=Counter)  # (width, height) of images
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # by train id
    faults: dict[str, list[str]] = field(default_factory=dict)  # kind -> files
    hashes: dict[str, str] = field(default_factory=dict)  # of an image's pixels -> its path

    def fault(self, kind: str, name: object) -> None:
        self.faults.setdefault(kind, []).append(str(name))


class Files(Dataset):
    """Decodes and looks at one image and its label; an item is a dict of findings.

    size: (width, height); hash: of the pixels; label_size: (width, height); pixels: int64 (256,) by train id;
    faults: (kind, text) pairs. What could not be found out is absent.
    """

    def __init__(self, samples: list[Sample], cfg: DatasetConfig, classes: ClassSet):
        self.samples, self.format = samples, cfg.format
        self.lookup_table = classes.lookup_table(label_ids(cfg, classes))
        # Of a folder's ids, those that its id_map leaves out are meant to be ignored; without one they are train ids.
        known = KNOWN_IDS.get(cfg.format) or (None if cfg.id_map else {*range(len(classes)), IGNORE})
        self.known = known and np.isin(np.arange(2**16), list(known))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample, found = self.samples[index], {"faults": []}
        try:
            pixels = read_image(sample.image)
            found["size"] = (pixels.shape[2], pixels.shape[1])
            found["hash"] = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).hexdigest()
            with Image.open(sample.image) as picture:
                if picture.mode in ("L", "P") and picture.getcolors(FEW_COLOURS):
                    found["faults"].append(("image looks like a label map", sample.image))
        except UserError as error:
            found["faults"].append(("image cannot be read", str(error)))
        if sample.label and sample.label.exists():
            self._look_at_label(sample, found)
        return found

    def _look_at_label(self, sample: Sample, found: dict) -> None:
        try:
            ids = read_label_ids(sample.label)
        except UserError as error:
            found["faults"].append(("label cannot be read", str(error)))
            return
        found["label_size"] = (ids.shape[1], ids.shape[0])
        counts = np.bincount(ids.ravel(), minlength=2**16)
        found["pixels"] = np.bincount(self.lookup_table, counts, 256).astype(np.int64)
        unknown = np.flatnonzero((counts > 0) & ~self.known) if self.known is not None else []
        if len(unknown):
            listed = ", ".join(map(str, unknown[:5]))
            found["faults"].append((f"label ids that {self.format} does not have", f"{sample.label}: {listed}"))
        if self.format == "synthia":
            with Image.open(sample.label) as picture:
                if picture.mode in ("L", "P"):
                    found["faults"].append(("SYNTHIA label of 8 bits, not 16: cut down or renumbered", sample.label))


def look_at(cfg: DatasetConfig, classes: ClassSet, with_labels: bool, workers: int, name: str) -> tuple[Report, Files]:
    """Decode every file of a dataset; `name` is for the progress bar."""
    report = Report()
    try:
        samples, orphans = pair_files(cfg, with_labels)
    except UserError as error:
        report.fault("no files", error)
        return report, Files([], cfg, classes)
    fixed = cfg.format != "folder"  # whose images may be of any size
    for path in orphans:
        report.fault("label without image", path)
    files, per_image = Files(samples, cfg, classes), []
    loader = DataLoader(files, batch_size=None, num_workers=workers, collate_fn=dict)
    for sample, found in zip(samples, tqdm(loader, desc=name, unit="img", dynamic_ncols=True, disable=None)):
        if with_labels and not sample.label.exists():
            report.fault("image without label", f"{sample.image}: {sample.label} is missing")
        for kind, text in found["faults"]:
            report.fault(kind, text)
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
            report.pixels += found["pixels"]
    report.images = len(per_image)
    usual = report.sizes.most_common(1)[0][0] if report.sizes else None
    for sample, size in per_image if fixed else []:
        if not _alike(size, usual):
            report.fault("image of another size than the rest", f"{sample.image}: {_by(size)}, not {_by(usual)}")
    if report.labels and not report.pixels[: len(classes)].any():
        report.fault("no label holds any class", f"{report.labels} labels below {cfg.root}: ids of another numbering?")
    return report, files


def _alike(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return all(abs(x - y) <= TOLERANCE * max(x, y) for x, y in zip(a, b))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def summary(reports: dict[str, Report], classes: ClassSet) -> str:
    """Files, sizes and class shares of each dataset, side by side."""
    width = max(len(n) for n in (*classes.names, "usual size"))

    def line(title: str, cells) -> str:
        return f"{title:{width}}" + "".join(f"{c:>14}" for c in cells)

    every = list(reports.values())
    rows = [line("", reports), line("images", (r.images for r in every)), line("labels", (r.labels for r in every))]
    rows.append(line("usual size", (_by(r.sizes.most_common(1)[0][0]) if r.sizes else "-" for r in every)))
    rows.append(line("sizes", (len(r.sizes) for r in every)))
    for k, name in [*enumerate(classes.names), (IGNORE, "ignored")]:
        shares = (f"{r.pixels[k] / r.pixels.sum():.3%}" if r.pixels[k] else "-" for r in every)
        rows.append(line(name, shares))
    return "\n".join([*rows, line("faults", (sum(map(len, r.faults.values())) for r in every))])


def contact_sheet(files: Files, cfg: Config, name: str) -> None:
    """Draw samples of a dataset: image | label | both, images alone where there are no labels."""
    rows = []
    for index in spread(len(files), SHOWN):
        sample = files.samples[index]
        try:
            picture = to_picture(read_image(sample.image))
            if sample.label:
                label = colorize(files.lookup_table[read_label_ids(sample.label)], classes=class_set(cfg.data))
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
    reports: dict[str, Report] = {}
    for name in ("source", "target", "val"):
        section = getattr(cfg.data, name)
        reports[name], files = look_at(section, class_set(cfg.data), name != "target", cfg.data.workers, name)
        contact_sheet(files, cfg, name)
    for name in ("source", "target"):
        for twin in reports[name].hashes.keys() & reports["val"].hashes.keys():
            pair = f"{reports[name].hashes[twin]} = {reports['val'].hashes[twin]}"
            reports["val"].fault(f"validation image that is in {name} too", pair)
    print(summary(reports, class_set(cfg.data)))
    every = []
    for name, report in reports.items():
        for kind, texts in report.faults.items():
            lines = [f"{name}: {kind}: {text}" for text in sorted(texts)]
            every += lines
            more = [f"{name}: {kind}: and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            print("\n".join(lines[:SHOWN] + more))
    folder = cfg.sibling_run("verify")
    atomic_write(folder / "faults.txt", lambda p: p.write_text("".join(f"{line}\n" for line in every)))
    if every:
        raise UserError(f"{len(every)} faults, listed in {show_path(folder / 'faults.txt')}")
    print(f"no fault; samples are in {show_path(folder)}")
    return reports


if __name__ == "__main__":
    run_cli(main, "stage1_BPL.yml", __doc__, ("bpl",))
