"""What lies where: image and label files of every format as one dataset class.

A format is a way to list files and an id map; all else is shared. Samples leave here as uint8 tensors.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from string import Formatter

import numpy as np
import torch
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.images import IMAGE_ENDINGS, read_label_ids, read_picture, show_name
from data.taxonomy import ID_TO_NAME, IGNORE, KNOWN_IDS, UNKNOWN, ClassSet, resolve_id_map
from data.transforms import Crop
from utils.config import UserError, reason
from utils.config.keys import DatasetConfig

HOW_TO_GET = {
    "gta5": "https://download.visinf.tu-darmstadt.de/data/from_games/",
    "synthia": "https://synthia-dataset.net/downloads/ (SYNTHIA-RAND-CITYSCAPES)",
    "cityscapes": "https://www.cityscapes-dataset.com/downloads/ (leftImg8bit_trainvaltest, gtFine_trainvaltest)",
    "folder": "point root, images and labels at your files",
}

UNREADABLE = "unreadable"  # entry of a sample: why it, or the one that it replaces, cannot be used
ATTEMPTS = 10  # samples in a row that a draw may skip
TOLERANCE = 0.1  # of an image's and a label's ratio of width to height, where `size` brings both to one


@dataclass(frozen=True)
class Sample:
    """One image on disk, its label if there is one, and its name: the path below root without ending."""

    image: Path
    label: Path | None
    name: str


def list_samples(cfg: DatasetConfig, with_labels: bool = True) -> Listing:
    """The files of a dataset, sorted by name.

    Args:
        cfg: format, root, split and, for folders, globs.
        with_labels: False lists images alone, for domains whose labels must not be read.

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


class Listing(list[Sample]):
    """Samples, sorted by name.

    Attributes:
        orphans: label files that belong to no image.
        note: a line that counts and names images that lie there and were not taken; "" if there are none.
    """

    def __init__(self, samples: list[Sample], orphans: list[Path] = (), note: str = ""):
        super().__init__(samples)
        self.orphans, self.note = orphans, note


def pair_files(cfg: DatasetConfig, with_labels: bool = True) -> Listing:
    """As `list_samples`, with labels that may be missing."""
    root = Path(cfg.root).absolute()  # errors name files by their whole paths
    if not root.is_dir():
        raise UserError(f"no {cfg.format} dataset: {root} does not exist (get it: {HOW_TO_GET[cfg.format]})")
    globs, label_of = _LAYOUTS[cfg.format](cfg)
    for pattern in globs:
        # Names of samples become paths below a run's folder.
        if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UserError(f"images: {globs} must be globs relative to {root}, without '..'")
    images, left = find_files(root, globs)
    if not images:
        note = f"; {_note(root, left)}" if left else ""
        raise UserError(f"no {cfg.format} image matches {' or '.join(globs[:3])} below {root}{note}")
    if with_labels and label_of is None:
        raise UserError(f"labels are needed for {root}, but the dataset's `labels` key is empty")
    samples, labels = [], set()
    for image in images:
        relative = image.relative_to(root)
        label = _in_any_case(root / label_of(relative)) if label_of else None
        labels.add(label)
        samples.append(Sample(image, label if with_labels else None, relative.with_suffix("").as_posix()))
    refuse_double_names(samples)
    if both := sorted(labels.intersection(images)):
        raise UserError(
            f"{len(both)} files are both image and label, the first is {both[0]}: narrow the globs of images"
        )
    orphans = []
    if with_labels and cfg.format != "folder":  # a folder may hold more labels than its globs name images
        # The rule that gives an image's label, applied to the images' glob, gives the labels' glob.
        found, _ = find_files(root, [label_of(Path(pattern)).as_posix() for pattern in globs])
        orphans = [path for path in found if path not in labels]
    return Listing(samples, orphans, _note(root, [path for path in left if path not in labels]))


def find_images(pattern: str) -> Listing:
    """Images without labels: one file, all below a folder, or what a glob matches; names are below its fixed part.

    Raises UserError if there is none, or two would have one name.
    """
    path, left = Path(pattern).expanduser().absolute(), []
    if path.is_file():
        root, found = path.parent, [path]
    else:
        fixed = itertools.takewhile(lambda part: not has_magic(part), path.parts)
        root = path if path.is_dir() else Path(*fixed)
        found, left = find_files(root, ["**/*" if path.is_dir() else path.relative_to(root).as_posix()])
        odd = {file for file in found if not file.is_file() or file.suffix.lower() not in IMAGE_ENDINGS}
        found, left = [file for file in found if file not in odd], left + sorted(odd)
    if not found:
        note = f"; {_note(root, left)}" if left else ""
        endings = ", ".join(sorted(IMAGE_ENDINGS))
        raise UserError(f"no image at {path}: a file, a folder or a glob of {endings}{note}")
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
            if not has_magic(name):
                if os.path.lexists(folder / name):
                    taken.add(folder / name)
                continue
            for entry in _entries(folder):
                suffix = os.path.splitext(entry.name)[1]
                if not fnmatchcase(entry.name.removesuffix(suffix) if ending else entry.name, stem):
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
    if not has_magic(part):
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
    if path.is_file():
        return path
    stem, ending = os.path.splitext(path)
    return next((p for p in (Path(stem + ending.upper()), Path(stem + ending.lower())) if p.is_file()), path)


def _note(root: Path, left: list[Path]) -> str:
    """A line that counts the files that were not taken, "" if there are none."""
    if not left:
        return ""
    endings = Counter(path.suffix or "no ending" for path in left)
    listed = ", ".join(f"{number} {ending}" for ending, number in endings.most_common(4))
    return show_name(f"not taken: {len(left)} files below {root} ({listed}), the first is {left[0].relative_to(root)}")


def _gta5(cfg: DatasetConfig) -> tuple[list[str], Callable[[Path], Path]]:
    images = ["images/*.png"]
    if cfg.split != "all":
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
    return images, _label_by("labels/{stem}.png")


def _synthia(cfg: DatasetConfig) -> tuple[list[str], Callable[[Path], Path]]:
    return ["RGB/*.png"], _label_by("GT/LABELS/{stem}.png")


def _cityscapes(cfg: DatasetConfig) -> tuple[list[str], Callable[[Path], Path]]:
    label = _label_by(f"gtFine/{cfg.split}/{{parent}}/{{stem}}_gtFine_labelIds.png", "_leftImg8bit")
    return [f"leftImg8bit/{cfg.split}/*/*_leftImg8bit.png"], label


def _folder(cfg: DatasetConfig) -> tuple[list[str], Callable[[Path], Path] | None]:
    try:
        # A format behind a name, as in {stem:05d}, is refused too.
        fields = {
            f"{name}{spec}{how or ''}" for _, name, spec, how in Formatter().parse(cfg.labels) if name is not None
        }
    except ValueError:
        fields = {"?"}
    if not fields <= {"dir", "parent", "stem"}:
        raise UserError(f"labels: {cfg.labels!r} may hold {{dir}}, {{parent}} and {{stem}} alone")
    return cfg.images, _label_by(cfg.labels, cfg.strip) if cfg.labels else None


def _label_by(template: str, strip: str = "") -> Callable[[Path], Path]:
    """Gives the path of an image's label for that of the image, both below the root."""

    def label_of(image: Path) -> Path:
        stem = image.stem.removesuffix(strip)
        return Path(template.format(dir=image.parent.as_posix(), parent=image.parent.name, stem=stem))

    return label_of


_LAYOUTS = {"gta5": _gta5, "synthia": _synthia, "cityscapes": _cityscapes, "folder": _folder}


class SegmentationDataset(Dataset):
    """Images with, where listed, labels.

    Args:
        samples: files, from `list_samples`; replace their labels to train on another label source.
        lookup_table: uint8 (65536,), label id on disk -> train id; not needed without labels.
        size: [width, height] that image and label are brought to, or [] to keep them.
        transform: called as `transform((width, height), rng)`, gives the crop to take of an image of that size.
        seed: decides every random choice, together with the draw's number. Which worker draws plays no part.

    Attributes:
        skips: whether samples that cannot be used are replaced. An index then gives {UNREADABLE: why} in place of a
            UserError; a draw gives the next sample that can be used, with the entry {UNREADABLE: why}.
        notes: lines for the log: files that were not taken, what looks odd in the labels.

    An item is asked for as `index`, or as `(index, draw)` by the endless stream of draws, and is a dict:
        image: uint8 (3, H, W); label: uint8 (H, W) of train ids, where there is one; index: int.
    """

    def __init__(
        self,
        samples: list[Sample],
        lookup_table: np.ndarray | None = None,
        size: list[int] = (),
        transform: Callable | None = None,
        seed: int = 0,
    ):
        self.samples, self.lookup_table, self.size = samples, lookup_table, list(size)
        self.transform, self.seed, self.skips = transform, seed, False
        self.notes = [samples.note] if isinstance(samples, Listing) and samples.note else []

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
                if not self.skips:
                    raise
                problem = problem or str(error)
        if drawn:
            raise UserError(f"{ATTEMPTS} samples in a row cannot be used; {problem}")
        return {UNREADABLE: problem}

    def _sample(self, index: int, draw: int) -> dict:
        sample = self.samples[index]

        def crop_of(size: tuple[int, int]) -> Crop:  # the same at every call
            return self.transform(self.size or size, np.random.default_rng([self.seed, draw, 1]))

        # Some GTA5 labels differ in size from their image: each is brought to the common size, or cropped, by itself.
        hw = self.size[::-1]
        if self.transform:
            picture = read_picture(sample.image, lambda size: crop_of(size).depth)
            image = crop_of(picture.size).of_image(picture)
        else:
            picture = read_picture(sample.image)
            image = F.pil_to_tensor(picture)
            image = F.resize(image, hw, antialias=True) if hw else image
        item = {"image": image, "index": index}
        if sample.label is None:
            return item
        ids, train_ids = read_label_ids(sample.label), functools.partial(self.train_ids, sample.label)
        self.refuse_unlike_sizes(sample, picture.size, ids.shape[::-1])
        if self.transform:
            label = crop_of(picture.size).of_label(ids, train_ids)
        else:
            label = torch.from_numpy(train_ids(ids))
            label = resize_label(label, hw) if hw else label
        return item | {"label": label}

    def refuse_unlike_sizes(self, sample: Sample, size: tuple[int, int], label_size: tuple[int, int]) -> None:
        """UserError if image and label, of two (width, height), differ in size and `size` cannot bring them to one."""
        if tuple(size) == tuple(label_size) or (self.size and alike(size, label_size)):
            return
        remedy = (
            "set the dataset's size to bring both to one" if alike(size, label_size) else "do they belong together?"
        )
        raise UserError(
            f"{show_name(sample.image)} is {size[0]}x{size[1]}, but its label {show_name(sample.label)} is "
            f"{label_size[0]}x{label_size[1]}; {remedy}"
        )

    def train_ids(self, path: Path, ids: np.ndarray) -> np.ndarray:
        """uint8 train ids of label ids, which file `path` holds; UserError for one that the dataset cannot hold."""
        label = self.lookup_table[ids]
        if (unknown := label == UNKNOWN).any():
            raise UserError(f"label {show_name(path)} holds id {ids[unknown][0]}, which is none of this dataset's")
        return label


def alike(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (width, height) have about one shape, as those of GTA5's images and labels."""
    across = sorted((size[0] * other[1], other[0] * size[1]))
    return across[1] <= (1 + TOLERANCE) * across[0]


def mark_unknown(table: np.ndarray, known: set[int] | None) -> np.ndarray:
    """A lookup table with `UNKNOWN` for every label id that is not among the known ones."""
    return table if known is None else np.where(np.isin(np.arange(len(table)), list(known)), table, np.uint8(UNKNOWN))


def resize_label(label: Tensor, hw: Sequence[int]) -> Tensor:
    """A label map (H, W) at another size (height, width), by nearest neighbour."""
    if list(label.shape) == list(hw):
        return label
    return F.resize(label[None], list(hw), interpolation=InterpolationMode.NEAREST_EXACT)[0]


def label_ids(cfg: DatasetConfig, classes: ClassSet) -> dict[int, str]:
    """What each label id of a dataset stands for."""
    return ID_TO_NAME.get(cfg.format) or resolve_id_map(cfg.id_map, classes)


def known_ids(cfg: DatasetConfig, classes: ClassSet) -> set[int] | None:
    """Every label id that a dataset may hold; None of one with an id_map, which need not name the numbers of void."""
    return None if cfg.id_map else KNOWN_IDS.get(cfg.format, {*range(len(classes)), IGNORE})


def build_dataset(
    cfg: DatasetConfig, classes: ClassSet, with_labels: bool = True, transform: Callable | None = None, seed: int = 0
) -> SegmentationDataset:
    """The dataset that a config section describes; see `SegmentationDataset`."""
    # Ids that an id_map leaves out are ignored; `data.verify` names them.
    table = mark_unknown(classes.lookup_table(label_ids(cfg, classes)), known_ids(cfg, classes))
    return SegmentationDataset(list_samples(cfg, with_labels), table, cfg.size, transform, seed)
