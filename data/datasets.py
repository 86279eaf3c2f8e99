"""What lies where: image and label files of every format as one dataset class.

A format is a way to list files and an id map; all else is shared. Samples leave here as uint8 tensors.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.images import IMAGE_ENDINGS, read_label_ids, read_upper_rows, show_name
from data.taxonomy import UNKNOWN, ClassSet, known_ids, label_ids
from data.transforms import Crop
from utils.config import UserError, reason
from utils.config.keys import DatasetConfig, fixed_part, leaves_folder

HOW_TO_GET = {
    "gta5": "get it at https://download.visinf.tu-darmstadt.de/data/from_games/",
    "synthia": "get it at https://synthia-dataset.net/downloads/ (SYNTHIA-RAND-CITYSCAPES)",
    "cityscapes": "get leftImg8bit_trainvaltest, gtFine_trainvaltest at https://www.cityscapes-dataset.com/downloads/",
    "folder": "set root, images and labels to your files",
}

UNREADABLE = "unreadable"  # entry of a sample: why its file, or the one that it stands in for, cannot be used
ATTEMPTS = 10  # samples in a row that a draw may skip
UNCOMPRESSED = {".bmp", ".pbm", ".pgm", ".pnm", ".ppm", ".tif", ".tiff"}  # the size says nothing of the content
TOLERANCE = 0.1  # how much the aspect ratios of image and label may differ where `size` rescales both


@dataclass(frozen=True)
class Sample:
    """One image on disk, its label if there is one, and its name: the path below root without ending."""

    image: Path
    label: Path | None
    name: str


def list_samples(cfg: DatasetConfig, with_labels: bool = True) -> Listing:
    """The files of a dataset, sorted by name. `with_labels=False` neither needs nor reads labels.

    Raises:
        UserError: root is missing, no image is found, labels are wanted but not described or a file is missing, a file
            is both image and label, or two images would have one name.
    """
    listing = pair_files(cfg, with_labels)
    missing = [s.label for s in listing if with_labels and not s.label.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(listing)} labels below {cfg.root} are missing, the first is {missing[0]}"
        )
    return listing


def fingerprint(samples: list[Sample], labels: bool = False) -> str:
    """How many images, or labels, there are, and a hash of the images' names and of the files' sizes in bytes; where
    their folder is does not count. Of uncompressed files, 4 KiB from the middle count too."""
    digest = hashlib.sha256()
    for sample in samples:
        path, size, middle = sample.label if labels else sample.image, 0, b""  # of a broken link
        with contextlib.suppress(OSError):
            size = os.stat(path).st_size
            if path.suffix.lower() in UNCOMPRESSED:
                with open(path, "rb") as file:
                    file.seek(size // 2)
                    middle = file.read(4096)
        digest.update(f"{sample.name}\0{size}\n".encode("utf-8", "surrogateescape") + middle)
    return f"{len(samples)} {'labels' if labels else 'images'} of hash {digest.hexdigest()[:12]}"


class Listing(list[Sample]):
    """Samples, sorted by name.

    Attributes:
        orphans: label files that belong to no image.
        note: a line about images that lie there and were not taken, globs that match nothing, labels that images
            share; "" if there are none.
    """

    def __init__(self, samples: list[Sample], orphans: list[Path] = (), note: str = ""):
        super().__init__(samples)
        self.orphans, self.note = orphans, note


def pair_files(cfg: DatasetConfig, with_labels: bool = True) -> Listing:
    """As `list_samples`, with labels that may be missing."""
    if not cfg.root:
        raise UserError("a dataset has no root: data.source, data.target and data.val must say where their images are")
    os.fsencode(cfg.root)  # fails here if the locale cannot encode it
    root = Path(cfg.root).absolute()  # errors name files by their whole paths
    if not root.is_dir():
        raise UserError(f"no {cfg.format} dataset: the folder {root} does not exist; {HOW_TO_GET[cfg.format]}")
    cfg = _as_folder(cfg)
    # Names of samples become paths below a run's folder.
    if any(not pattern or leaves_folder(pattern) for pattern in cfg.images):
        raise UserError(f"images: {cfg.images} must be globs relative to {root}, without '..'")
    for pattern in cfg.images:
        if not has_magic(pattern) and (root / pattern).is_dir():
            raise UserError(
                f"images: {pattern!r} is a folder below {root}; {os.path.join(pattern, '*')!r} is its images"
            )
    found = {pattern: find_files(root, [pattern]) for pattern in cfg.images}
    images = sorted({image for taken, _ in found.values() for image in taken})
    left = sorted({file for _, rest in found.values() for file in rest}.difference(images))
    without = [pattern for pattern, (taken, _) in found.items() if not taken]
    if missing := [pattern for pattern in without if images and not has_magic(pattern)]:
        raise UserError(f"images: {root / missing[0]} is missing")
    if not images:
        globs = " or ".join(cfg.images[:3])
        raise UserError(f"no {cfg.format} image matches {globs} below {root}{_note(root, left, '; ')}")
    if with_labels and not cfg.labels:
        raise UserError(f"labels are needed for {root}, but the dataset's `labels` key is empty")
    samples, labels, shared = [], {}, []
    for image in images:
        relative = image.relative_to(root)
        label = _in_any_case(root / _label_of(relative, cfg)) if cfg.labels else None
        place = label and Path(os.path.normpath(label))  # a template may hold ..
        if place and labels.setdefault(place, image) != image:
            shared.append(f"{relative} and {labels[place].relative_to(root)} have {place}")
        samples.append(Sample(image, label if with_labels else None, relative.with_suffix("").as_posix()))
    refuse_double_names(samples)
    if both := sorted(labels.keys() & {*images}):
        raise UserError(
            f"{len(both)} files are both image and label, the first is {both[0]}: narrow the globs of images"
        )
    orphans = []
    if with_labels and cfg.format != "folder":  # a folder may hold more labels than its globs name images
        # The label template, applied to the images' glob, is the labels' glob.
        there, _ = find_files(root, [_label_of(Path(pattern), cfg).as_posix() for pattern in cfg.images])
        orphans = [path for path in there if path not in labels]
    notes = [_note(root, [path for path in left if path not in labels])]
    notes += [f"no image below {root} matches {pattern}" for pattern in without]
    if with_labels and shared:
        notes.append(f"{len(shared)} images below {root} share the label of another: {show_name(shared[0])}")
    return Listing(samples, orphans, "; ".join(filter(None, notes)))


def find_images(pattern: str, runs: str = "") -> Listing:
    """Images without labels: one file, all below a folder, or what a glob matches; names are below its fixed part.

    What lies below the folder `runs` is not taken, if that is below the pattern's fixed part.

    Raises UserError if there is none, or two would have one name.
    """
    path, left = Path(os.path.expanduser(pattern)).absolute(), []
    if path.is_file():
        root, found = path.parent, [path]
    else:
        root = fixed_part(path)
        found, left = find_files(root, ["**/*" if path.is_dir() else path.relative_to(root).as_posix()])
        odd = {file for file in found if not file.is_file() or file.suffix.lower() not in IMAGE_ENDINGS}
        own = Path(os.path.expanduser(runs)).resolve() if runs else None
        if own and root.resolve() in own.parents:
            odd |= {file for file in found if own in (folder := file.parent.resolve(), *folder.parents)}
        found, left = [file for file in found if file not in odd], left + sorted(odd)
    if not found:
        endings = ", ".join(sorted(IMAGE_ENDINGS))
        raise UserError(f"no image at {path}: a file, a folder or a glob of {endings}{_note(root, left, '; ')}")
    samples = [Sample(image, None, image.relative_to(root).with_suffix("").as_posix()) for image in found]
    refuse_double_names(samples)
    return Listing(samples, note=_note(root, left))


def refuse_double_names(samples: list[Sample]) -> None:
    """UserError if two images differ in their endings alone: what is written for them would be one file."""
    first: dict[str, Path] = {}
    for sample in samples:
        if (other := first.setdefault(sample.name, sample.image)) != sample.image:
            raise UserError(f"{other} and {sample.image} would have one name: rename one of them")


def find_files(root: Path, globs: list[str]) -> tuple[list[Path], list[Path]]:
    """(images below `root` that globs match, what lies beside them and is not taken), both sorted.

    Linked folders are entered. A glob's ending, such as .jpg, matches in upper and lower case; a glob without one takes
    `IMAGE_ENDINGS`. Folders and broken links named like images are listed: reading them later fails with their name.
    Not taken are
        - hidden images,
        - images that the glob would match if they had its ending,
        - all other files, if the glob has no ending.
    """
    taken, left = set(), set()
    for pattern in globs:
        *folders, name = Path(pattern).parts or ("",)
        if name == "**":
            folders, name = [*folders, name], "*"
        ending = "" if has_magic(Path(name).suffix) else Path(name).suffix
        stem = name.removesuffix(ending)
        for folder in _folders(root, folders):
            if os.path.lexists(folder / name):  # brackets may belong to its name
                taken.add(folder / name)
            if not has_magic(name):
                continue
            before, magic = os.path.splitext(stem)  # without an ending: the name may have one with magic
            for entry in _entries(folder):
                entry_stem, suffix = os.path.splitext(entry.name)
                named = fnmatchcase(entry_stem if ending else entry.name, stem)
                if not (named or (not ending and fnmatchcase(entry_stem + suffix.lower(), before + magic.lower()))):
                    continue
                image, is_folder = suffix.lower() in IMAGE_ENDINGS, _is_folder(entry)
                hidden = entry.name.startswith(".") and not name.startswith(".")
                fits = suffix.lower() == ending.lower() if ending else image
                if fits and not hidden and (image or not is_folder):
                    taken.add(folder / entry.name)
                elif not is_folder and (image or not (ending or hidden)):
                    left.add(folder / entry.name)
    return sorted(taken), sorted(left - taken)


def _folders(folder: Path, parts: list[str], above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Folders below `folder` that the parts of a glob match; a link back to a folder `above` is not followed."""
    if not folder.is_dir():
        return
    if not parts:
        yield folder
        return
    part, *rest = parts
    if not has_magic(part) or os.path.lexists(folder / part):
        yield from _folders(folder / part, rest, above)
        return
    if part == "**":
        yield from _folders(folder, rest, above)
    above = (*above, os.path.realpath(folder))
    for entry in _entries(folder):
        hidden = entry.name.startswith(".") and not part.startswith(".")
        fits = (part == "**" or fnmatchcase(entry.name, part)) and not hidden and _is_folder(entry)
        if fits and os.path.realpath(entry.path) not in above:
            yield from _folders(folder / entry.name, parts if part == "**" else rest, above)


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"cannot list {show_name(folder)}: {reason(error)}") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _in_any_case(path: Path) -> Path:
    """A file whose ending may be written in upper or lower case."""
    for ending in (path.suffix, path.suffix.upper(), path.suffix.lower()):
        if path.with_suffix(ending).is_file():
            return path.with_suffix(ending)
    return path


def _note(root: Path, left: list[Path], before: str = "") -> str:
    """A line that counts the files that were not taken, with `before` in front of it; "" if there are none."""
    if not left:
        return ""
    endings = Counter(path.suffix or "no ending" for path in left)
    listed = ", ".join(f"{number} {ending}" for ending, number in endings.most_common(4))
    first = left[0].relative_to(root)
    return show_name(f"{before}not taken: {len(left)} files below {root} ({listed}), the first is {first}")


def _as_folder(cfg: DatasetConfig) -> DatasetConfig:
    """The section with the `images`, `labels` and `strip` that stand for its format."""
    if cfg.format == "gta5":
        return replace(cfg, images=_gta5_images(cfg), labels="labels/{stem}.png", strip="")
    if cfg.format == "synthia":
        return replace(cfg, images=["RGB/*.png"], labels="GT/LABELS/{stem}.png", strip="")
    if cfg.format == "cityscapes":
        images = [f"leftImg8bit/{cfg.split}/*/*_leftImg8bit.png"]
        labels = f"gtFine/{cfg.split}/{{parent}}/{{stem}}_gtFine_labelIds.png"
        return replace(cfg, images=images, labels=labels, strip="_leftImg8bit")
    # A format behind a name, as in {stem:05d}, is refused too.
    if re.search("[{}]", re.sub("{{|}}|{(dir|parent|stem)}", "", cfg.labels)):
        raise UserError(f"labels: {cfg.labels!r} may hold {{dir}}, {{parent}} and {{stem}} alone")
    return cfg


def _gta5_images(cfg: DatasetConfig) -> list[str]:
    """Globs of the images of a split, which a file lists."""
    if cfg.split == "all":
        return ["images/*.png"]
    split = Path(cfg.root) / "split.mat"
    try:
        ids = loadmat(split)[f"{cfg.split}Ids"].ravel().astype(int)
    except (OSError, KeyError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise UserError(f"cannot read split={cfg.split} from {split}: {reason(error)}") from None
    images = [f"images/{i:05d}.png" for i in ids]
    missing = [name for name in images if not (Path(cfg.root) / name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(images)} images that {split} lists for split={cfg.split} are not below "
            f"{cfg.root}, the first is {missing[0]}"
        )
    return images


def _label_of(image: Path, cfg: DatasetConfig) -> Path:
    """The path of an image's label, as that of the image below the root."""
    stem = image.stem.removesuffix(cfg.strip)
    label = cfg.labels.format(dir=image.parent.as_posix(), parent=image.parent.name, stem=stem)
    return Path(label.lstrip("/"))  # an image directly below the root has no parent's name


@dataclass(eq=False, repr=False)
class SegmentationDataset(Dataset):
    """Images with, where listed, labels.

    An item is asked for as `index`, or as `(index, draw)` by the endless stream of draws, and is a dict:
        image: uint8 (3, H, W); label: uint8 (H, W) of train ids, where there is one; index: int.

    Where `skips`, samples that cannot be used are replaced. An index then gives {UNREADABLE: why} in place of a
    UserError; a draw gives the next sample that can be used, with the entry {UNREADABLE: why}.
    """

    samples: list[Sample]  # from `list_samples`; replace their labels to train on another label source
    lookup_table: np.ndarray | None = None  # uint8 (65536,), label id on disk -> train id; not needed without labels
    size: Sequence[int] = ()  # (width, height) that image and label are brought to; empty keeps them
    transform: Callable | None = None  # called with (width, height) and a random generator, gives the `Crop` to take
    seed: int = 0  # decides every random choice, together with the draw's number; which worker draws plays no part
    skips: bool = False
    has_pseudo_labels: bool = False  # made of these very images, at the size that the dataset had then
    notes: list[str] = field(init=False)  # for the log: files that were not taken, what looks odd in the labels

    def __post_init__(self):
        note = getattr(self.samples, "note", "")
        self.notes = [note] if note else []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        drawn, problem = isinstance(key, tuple), None
        index, draw = key if drawn else (key, 0)
        for step in range(ATTEMPTS if drawn else 1):
            try:
                item = self._sample((index + step) % len(self), draw)
                return item | {UNREADABLE: problem} if problem else item
            except UserError as error:
                if not self.skips:  # in training, hours may lie behind, and a repaired file would be another
                    raise UserError(f"{error}{'; data.on_error=skip goes on without it' * drawn}") from None
                problem = problem or str(error)
        if drawn:
            raise UserError(f"{ATTEMPTS} samples in a row cannot be used; {problem}")
        return {UNREADABLE: problem}

    def _sample(self, index: int, draw: int) -> dict:
        sample = self.samples[index]

        def crop_of(size: tuple[int, int]) -> Crop:  # the same at every call
            return self.transform(self.size or size, np.random.default_rng([self.seed, draw, 1]))

        # Some GTA5 labels differ in size from their image: each is brought to the common size, or cropped, by itself.
        share = (lambda size: crop_of(size).depth) if self.transform else (lambda size: 1)
        picture, size = read_upper_rows(sample.image, share)
        crop, hw = crop_of(size) if self.transform else None, self.size[::-1] or size[::-1]
        image = crop.of_image(picture, size) if crop else F.resize(F.pil_to_tensor(picture), hw, antialias=True)
        item = {"image": image, "index": index}
        if sample.label is None:
            return item
        ids = read_label_ids(sample.label)
        self.refuse_unlike_sizes(sample, size, ids.shape[::-1])
        train_ids = functools.partial(self.train_ids, sample.label)
        label = crop.of_label(ids, train_ids) if crop else resize_label(torch.from_numpy(train_ids(ids)), hw)
        return item | {"label": label}

    def refuse_unlike_sizes(self, sample: Sample, size: tuple[int, int], label_size: tuple[int, int]) -> None:
        """UserError for an image and a label whose (width, height) are `sizes_conflict`.

        Pseudo labels belong to their images, even where `size` has squeezed these.
        """
        if not sizes_conflict(size, label_size, self.size) or (self.size and self.has_pseudo_labels):
            return
        remedy = "do they belong together?"
        if same_aspect(size, label_size):
            remedy = "set the dataset's size to bring both to one"
        image, label = show_name(sample.image), show_name(sample.label)
        raise UserError(f"{image} is {size_text(size)}, but its label {label} is {size_text(label_size)}; {remedy}")

    def train_ids(self, path: Path, ids: np.ndarray) -> np.ndarray:
        """uint8 train ids of label ids, which file `path` holds; UserError for one that the dataset cannot hold."""
        label = self.lookup_table[ids]
        if (unknown := label == UNKNOWN).any():
            raise UserError(f"label {show_name(path)} holds id {ids[unknown][0]}, which is none of this dataset's")
        return label


def sizes_conflict(size: tuple[int, int], label_size: tuple[int, int], common: Sequence[int]) -> bool:
    """Whether the (width, height) of image and label differ, and a dataset's `size` cannot bring them to one."""
    return size != label_size and not (common and same_aspect(size, label_size))


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (width, height) have about one shape, as those of GTA5's images and labels."""
    across = sorted((size[0] * other[1], other[0] * size[1]))
    return across[1] <= (1 + TOLERANCE) * across[0]


def size_text(size: tuple[int, int]) -> str:
    """(width, height) in words."""
    return f"{size[0]}x{size[1]}"


def resize_label(label: Tensor, hw: Sequence[int]) -> Tensor:
    """A label map (H, W) at another size (height, width), by nearest neighbour."""
    return F.resize(label[None], list(hw), interpolation=InterpolationMode.NEAREST_EXACT)[0]


def build_dataset(
    cfg: DatasetConfig,
    classes: ClassSet,
    with_labels: bool = True,
    transform: Callable | None = None,
    seed: int = 0,
    skips: bool = False,
) -> SegmentationDataset:
    """The dataset that a config section describes; see `SegmentationDataset`."""
    # Ids that an id_map leaves out are ignored; `data.verify` names them.
    table = classes.lookup_table(label_ids(cfg, classes), known_ids(cfg, classes))
    return SegmentationDataset(list_samples(cfg, with_labels), table, cfg.size, transform, seed, skips)
