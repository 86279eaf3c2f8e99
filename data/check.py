"""One check of samples: `data.verify` runs it on all, training on a few before its work starts."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.datasets import Sample, SegmentationDataset, same_aspect, size_text
from data.images import is_turned, read_label_ids, read_picture, show_name, stored_as
from data.loaders import spread
from data.taxonomy import CITYSCAPES_NAMES, ID_TO_NAME, IGNORE, KNOWN_IDS, ClassSet, class_set, known_ids, label_ids
from utils.config import Config, UserError
from utils.config.keys import DatasetConfig

CHECKED = 8  # samples of each dataset that are looked at before training
FEW_COLOURS = 40  # a picture with at most so many is a label map, not a photograph
DARK = 20  # of 255: an image that is nowhere brighter has lost bits
FEW_BITS = {"1": 1, "L;2": 3, "L;4": 15}  # how such labels are stored: the largest id
MOST_IGNORED = 2 / 3  # of the pixels; more cause a warning


def sample_facts(sample: Sample) -> dict:
    """Facts about one image and its label.

    Returns:
        size: (width, height); hash: of the pixels; label_map: whether the image looks like one; dark: whether it is
        black to the eye; turned: whether it is labelled, and EXIF turns it; label_size; ids: {label id: pixels};
        stored: how the label stores them; palette: {index: colour}; problems: UserErrors of files that cannot be read.
        An entry that could not be found out is absent.
    """
    found = {"problems": []}
    try:
        picture = read_picture(sample.image)
        found["size"] = picture.size
        found["hash"] = hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()
        found["label_map"] = len(picture.getcolors(FEW_COLOURS) or ()) > 1
        found["dark"] = max(high for _, high in picture.getextrema()) < DARK
        found["turned"] = sample.label is not None and is_turned(sample.image)
    except UserError as error:
        found["problems"].append(("image cannot be read", str(error)))
    if sample.label and sample.label.exists():
        try:
            ids = read_label_ids(sample.label)
            found["label_size"] = ids.shape[::-1]
            counts = np.bincount(ids.ravel())
            found["ids"] = {int(i): int(counts[i]) for i in np.flatnonzero(counts)}
            found["stored"], found["palette"] = stored_as(sample.label)
        except UserError as error:
            found["problems"].append(("label cannot be read", str(error)))
    return found


def odd_images(dark: list[Path], turned: list[Path]) -> list[str]:
    """Lines about images that are read, but perhaps not as they were meant."""
    lines = []
    if dark:
        lines.append(f"{len(dark)} images are nearly black, the first is {show_name(dark[0])}: 12 bits stored as 16?")
    if turned:
        first = f"the first is {show_name(turned[0])}"
        lines.append(f"{len(turned)} labelled images are turned upright by EXIF, {first}: are their labels upright?")
    return lines


class Labels:
    """Which ids the labels of a dataset hold, how they are stored, and what is wrong with them."""

    def __init__(self, cfg: DatasetConfig, classes: ClassSet):
        self.cfg, self.classes, self.names = cfg, classes, label_ids(cfg, classes)
        self.learnt = {i: name for i, name in self.names.items() if name in classes.names}
        self.ids, self.stored, self.colours = Counter(), {}, {}
        self.other_palette = ""

    def add(self, sample: Sample, found: dict) -> None:
        """Take in what `sample_facts` found."""
        self.ids.update(found.get("ids", {}))
        stored = found.get("stored", "")
        largest = next((most for kind, most in FEW_BITS.items() if stored.startswith(kind)), None)
        if stored and (largest is None or largest in found["ids"]):  # without the largest id, none can have been 255
            self.stored.setdefault(stored, sample.label)
        for index, colour in found.get("palette", {}).items():
            first, path = self.colours.setdefault(index, (colour, sample.label))
            if first != colour and not self.other_palette:
                self.other_palette = f"index {index} is {first} in {path} and {colour} in {sample.label}"

    def pixels(self) -> Counter:
        """Pixels by class, and of those "ignored"."""
        found = Counter()
        for label_id, number in self.ids.items():
            found[self.learnt.get(label_id, "ignored")] += number
        return found

    def unknown(self, ids: dict[int, int]) -> list[int]:
        """The ids that the dataset cannot hold."""
        known = known_ids(self.cfg, self.classes)
        return [] if known is None else sorted(ids.keys() - known)

    def faults(self) -> list[tuple[str, str]]:
        """(kind, text) of what is surely wrong: ids of another numbering, ids that were lost."""
        if not self.ids:
            return []
        looks, found = self.looks_like(), []
        if not self._pixels(self.learnt):
            found.append(("no label holds any class", f"no pixel of any class; {self._held()}{looks and ': ' + looks}"))
        elif looks and not self._all_named():
            remedy = " (if they are meant as they are, name every id, as in {0: ignore})" if self.cfg.id_map else ""
            found.append(("label ids of another numbering", f"{self._ignored()}: {looks}{remedy}"))
        if self.other_palette:
            found.append(("palettes differ, so that their indices are no ids", self.other_palette))
        few = [s for s in self.stored if s.startswith(tuple(FEW_BITS))]
        others = [s for s in self.stored if s not in few]
        if few and others:
            text = f"{self.stored[few[0]]} beside {self.stored[others[0]]}: 255 may have become 1, 3 or 15"
            found.append(("grey of few bits beside other labels, as an optimiser makes them", text))
        return found

    def mostly_ignored(self) -> list[str]:
        """A warning if most pixels are of no class."""
        total, learnt = self.ids.total(), self._pixels(self.learnt)
        looks = self.looks_like() if learnt and self._all_named() else ""
        mostly = learnt and total - learnt > MOST_IGNORED * total
        return [f"{self._ignored()}{looks and f'; {looks}, but every id of id_map occurs'}"] if mostly or looks else []

    def eight_bits(self) -> Path | None:
        """A label of 8 bits in SYNTHIA, which has 16: ids may have been cut down or renumbered."""
        return self.stored.get("L", self.stored.get("P")) if self.cfg.format == "synthia" else None

    def warnings(self, every_class: bool) -> list[str]:
        """What looks odd but may be intended; classes without a pixel are named if `every_class`."""
        if not self._pixels(self.learnt):
            return []
        found = self.mostly_ignored()
        seen = {self.names.get(i) for i in self.ids}
        absent = [name for name in self.classes.names if name not in seen]
        if every_class and absent:
            listed = ", ".join(f"{n} ({' '.join(str(i) for i, m in self.names.items() if m == n)})" for n in absent)
            found.append(f"no pixel of class {listed}; {self._held()}")
        stray = [i for i in sorted(self.ids) if i not in self.names and i != IGNORE] if self.cfg.id_map else []
        if stray:
            listed = ", ".join(f"{i} ({self.ids[i] / self.ids.total():.1%})" for i in stray[:8])
            found.append(f"ids that id_map does not name are ignored: {listed}{', …' if len(stray) > 8 else ''}")
        return found + self.untaught()

    def untaught(self) -> list[str]:
        """A line about classes that no label can hold: wherever one is predicted, it counts as wrong."""
        without = [name for name in self.classes.names if name not in self.names.values()]
        return [f"no label id stands for class {', '.join(without)}: the IoU is 0 if predicted"] if without else []

    def _all_named(self) -> bool:
        """Whether the user names ids, and every one occurs: then it is hardly a mistake that others are ignored."""
        return bool(self.cfg.id_map) and self.names.keys() <= set(self.ids)

    def looks_like(self) -> str:
        """Which numbering the ids more likely have, or what has happened to them; "" if they are as expected."""
        present, half = set(self.ids), (self.ids.total() - self.ids[IGNORE]) / 2
        learnt, unknown = self._pixels(self.learnt), self.unknown(self.ids)
        if self.cfg.id_map and present <= self.names.keys():  # every id is meant as the user says
            return ""
        if present == {0} and not learnt:
            return "16-bit labels that were cut to 8 bits hold 0 alone"
        if not self.cfg.id_map and self.cfg.format == "folder" and unknown == [len(self.classes)]:
            return "they look like ids that begin at 1: name them in id_map"
        if set(self.classes.names) <= set(CITYSCAPES_NAMES):
            for name, names, known in _NUMBERINGS:
                other, better = self.learnt.items() - names.items(), self._pixels(names)
                if other and present <= known and better > max(half, learnt) and (unknown or learnt < half):
                    return f"they look like {name}"
        if present == {0, IGNORE} and not self.cfg.id_map and len(self.classes) == 2:
            return "they look like a mask of 0 and 255: name 255 in id_map"
        body = present - {IGNORE}
        step = math.gcd(*body)
        if step > 1 and len(body) > 2 and (unknown or not learnt):
            return f"they are multiples of {step}, as in labels that were stretched for the eye"
        return ""

    def _pixels(self, ids: dict[int, str]) -> int:
        return sum(self.ids[i] for i in ids)

    def _ignored(self) -> str:
        share = 1 - self._pixels(self.learnt) / self.ids.total()
        return f"{share:.0%} of the pixels are ignored; {self._held()}"

    def _held(self) -> str:
        most = ", ".join(f"{i} ({n / self.ids.total():.0%})" for i, n in self.ids.most_common(5))
        return f"the labels hold ids {most}{', …' if len(self.ids) > 5 else ''}"


# (words, {label id: class}, ids that may occur)
_TRAIN_IDS = dict(enumerate(CITYSCAPES_NAMES))
_NUMBERINGS = (
    ("train ids (0 to 18, 255)", _TRAIN_IDS, {*_TRAIN_IDS, IGNORE}),
    ("Cityscapes' label ids (0 to 33)", ID_TO_NAME["cityscapes"], KNOWN_IDS["gta5"]),
    ("SYNTHIA's ids (0 to 22)", ID_TO_NAME["synthia"], KNOWN_IDS["synthia"]),
)


def check_samples(dataset: SegmentationDataset, name: str, cfg: Config) -> SegmentationDataset:
    """Look at `CHECKED` samples, spread evenly, and give the dataset back, with notes of what looks odd.

    Args:
        dataset: where it has a transform, it is trained on.
        name: source, target or val.

    Raises:
        UserError: the batch is larger than the dataset, a file is empty, a sample cannot be used, labels are of another
            numbering or hold no pixel of any class, every image is smaller than the crop at every scale.
    """
    key, trained = f"data.{name}", dataset.transform is not None
    batch = getattr(cfg.train, f"batch_{name}") if trained else 0
    if batch > len(dataset):
        raise UserError(f"train.batch_{name}={batch} is larger than {key}: {len(dataset)} images")
    paths = [path for s in dataset.samples for path in (s.image, s.label) if path]
    empty = [path for path in paths if _is_empty(path)]
    if empty and not dataset.skips:
        raise UserError(f"{len(empty)} files of {key} are empty, the first is {show_name(empty[0])}")
    labels, sizes, dark, turned = Labels(getattr(cfg.data, name), class_set(cfg.data)), [], [], []
    looked_at = [dataset.samples[index] for index in spread(len(dataset), CHECKED)]
    for sample in looked_at:
        found = sample_facts(sample)
        try:
            _refuse_unusable(dataset, sample, found, labels)
            sizes.append(found["size"])
            labels.add(sample, found)
            dark += [sample.image] * found["dark"]
            turned += [sample.image] * found["turned"]
            if found["label_map"]:
                dataset.notes.append(f"{key}: {show_name(sample.image)} looks like a label map, not like an image")
        except UserError:
            if not dataset.skips:
                raise
    if not dataset.has_pseudo_labels:  # an unsure network may have labelled nothing in some
        if faults := labels.faults():
            first = next(s.label for s in looked_at if s.label)
            kind, text = faults[0]
            raise UserError(f"{kind}: {text} ({len(sizes)} labels of {key} were looked at, such as {show_name(first)})")
        unlearnable = labels.untaught() if labels.ids else []
        dataset.notes += [f"{key}: {text}" for text in labels.mostly_ignored() + unlearnable]
        if path := labels.eight_bits():
            dataset.notes.append(
                f"{key}: SYNTHIA's labels have 16 bits, {show_name(path)} has 8: are its ids SYNTHIA's?"
            )
    dataset.notes += [f"{key}: {text}" for text in odd_images(dark, turned)]
    dataset.notes += [f"{key}: {text}" for text in squeezed(sizes, dataset.size)]
    if trained and sizes:
        _refuse_small([tuple(dataset.size)] if dataset.size else sizes, key, cfg)
    return dataset


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:  # a broken link is named where it is opened
        return False


def squeezed(sizes: Iterable[tuple[int, int]], size: Sequence[int]) -> list[str]:
    """A line about images of (width, height) whose shape the dataset's `size` changes, if there are any."""
    changed = [given for given in sizes if size and not same_aspect(given, size)]
    if not changed:
        return []
    first = size_text(changed[0])
    return [f"{len(changed)} images, the first of {first}, are squeezed to size={[*size]} (width, height)"]


def _refuse_unusable(dataset: SegmentationDataset, sample: Sample, found: dict, labels: Labels) -> None:
    """The UserError that the sample would cause in training."""
    for _, problem in found["problems"]:
        raise UserError(problem)
    if sample.label:
        dataset.refuse_unlike_sizes(sample, found["size"], found["label_size"])
        try:
            dataset.train_ids(sample.label, np.array([*found["ids"]]))
        except UserError as error:
            labels.add(sample, found)
            looks = labels.looks_like()
            raise UserError(f"{error}{looks and ': ' + looks}") from None


def _refuse_small(sizes: list[tuple[int, int]], key: str, cfg: Config) -> None:
    """UserError if no image fills the crop even at the largest scale: every crop would have a dead rim."""
    d = cfg.data
    factors = {(width, height): d.scale[1] * (d.base_width or width) / width for width, height in sizes}
    scaled = {size: [round(side * factor) for side in size] for size, factor in factors.items()}
    if any(width >= d.crop[0] and height >= d.crop[1] for width, height in scaled.values()):
        return
    (width, height), (w, h) = max(scaled.items(), key=lambda item: min(item[1]))
    raise UserError(
        f"data.crop={d.crop} is larger than the images of {key}: {width}x{height} at data.scale's {d.scale[1]:g} "
        f"and data.base_width={d.base_width} is {w}x{h}"
    )
