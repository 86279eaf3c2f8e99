"""Image and label files of every format as one dataset class.

A format is a way to list files and an id map; all else is shared. Samples leave here as uint8 tensors.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from string import Formatter

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.taxonomy import ID_TO_NAME, KNOWN_IDS, UNKNOWN, ClassSet, resolve_id_map
from data.transforms import Crop
from utils.config import UserError
from utils.config.keys import DatasetConfig

HOW_TO_GET = {
    "gta5": "https://download.visinf.tu-darmstadt.de/data/from_games/",
    "synthia": "https://synthia-dataset.net/downloads/ (SYNTHIA-RAND-CITYSCAPES)",
    "cityscapes": "https://www.cityscapes-dataset.com/downloads/ (leftImg8bit_trainvaltest, gtFine_trainvaltest)",
    "folder": "point root, images and labels at your files",
}

IMAGE_ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # of a folder's or a glob's files

UNREADABLE = "unreadable"  # the entry of a sample that cannot be used, or stands for one such: why
ATTEMPTS = 10  # samples in a row that a draw may skip
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# Formats that are decoded in this process; of others, Pillow hands some to programs (EPS to Ghostscript).
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True)
class Sample:
    """One image on disk, its label if there is one, and its name: the path below root without ending."""

    image: Path
    label: Path | None
    name: str


def list_samples(cfg: DatasetConfig, with_labels: bool = True) -> list[Sample]:
    """The files of a dataset, sorted by name.

    Args:
        cfg: format, root, split and, for folders, globs.
        with_labels: False lists images alone, for domains whose labels must not be read.

    Raises:
        UserError: root is missing, no image is found, labels are wanted but not described or a file is missing.
    """
    samples, _ = pair_files(cfg, with_labels)
    missing = [s.label for s in samples if with_labels and not s.label.is_file()]
    if missing:
        root = Path(cfg.root)
        raise UserError(f"{len(missing)} of {len(samples)} labels below {root} are missing, the first is {missing[0]}")
    return samples


def pair_files(cfg: DatasetConfig, with_labels: bool = True) -> tuple[list[Sample], list[Path]]:
    """As `list_samples`, with labels that may be missing; and the label files that belong to no image."""
    root = Path(cfg.root)
    if not root.is_dir():
        raise UserError(f"no {cfg.format} dataset: {root} does not exist (get it: {HOW_TO_GET[cfg.format]})")
    globs, label_of = _LAYOUTS[cfg.format](cfg)
    if any(".." in Path(pattern).parts for pattern in globs):  # names of samples become paths below a run's folder
        raise UserError(f"images: {globs} must be globs below {root}, without '..'")
    try:
        images = sorted({path for pattern in globs for path in root.glob(pattern)})
    except (NotImplementedError, ValueError) as error:  # an absolute or empty pattern
        raise UserError(f"images: {globs} must be globs relative to {root} ({_first_line(error)})") from None
    if not images:
        raise UserError(f"no {cfg.format} image matches {' or '.join(globs[:3])} below {root}")
    if with_labels and label_of is None:
        raise UserError(f"labels are needed for {root}, but the dataset's `labels` key is empty")
    samples = []
    for image in images:
        relative = image.relative_to(root)
        label = root / label_of(relative) if with_labels else None
        samples.append(Sample(image, label, relative.with_suffix("").as_posix()))
    if not with_labels or cfg.format == "folder":  # a folder may hold more labels than its globs name images
        return samples, []
    # The label of a glob is the glob of the labels.
    labels = {path for pattern in globs for path in root.glob(label_of(Path(pattern)).as_posix())}
    return samples, sorted(labels - {s.label for s in samples})


def find_images(pattern: str) -> list[Sample]:
    """Images without labels: one file, all below a folder, or what a glob matches; names are below its fixed part.

    Raises UserError if there is none, or two would have one name.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        root, found = path.parent, [path]
    else:
        fixed = itertools.takewhile(lambda part: not has_magic(part), path.parts)
        root, inside = (path, "**/*") if path.is_dir() else (Path(*fixed), None)
        inside = inside or path.relative_to(root).as_posix()
        matched = (root / name for name in sorted(glob(inside, root_dir=root, recursive=True)))
        found = [p for p in matched if p.suffix.lower() in IMAGE_ENDINGS and p.is_file()]
    if not found:
        raise UserError(f"no image at {pattern}: a file, a folder or a glob of {', '.join(sorted(IMAGE_ENDINGS))}")
    samples, first = [], {}
    for image in found:
        name = image.relative_to(root).with_suffix("").as_posix()
        if name in first:
            raise UserError(f"{first[name]} and {image} would have one name; take them in two calls")
        first[name] = image
        samples.append(Sample(image, None, name))
    return samples


def _gta5(cfg: DatasetConfig) -> tuple[list[str], Callable[[Path], Path]]:
    images = ["images/*.png"]
    if cfg.split != "all":
        split = Path(cfg.root) / "split.mat"
        try:
            ids = loadmat(split)[f"{cfg.split}Ids"].ravel()
        except (OSError, KeyError, ValueError, MatReadError) as error:
            raise UserError(f"cannot read split={cfg.split} from {split}: {_first_line(error)}") from None
        images = [f"images/{i:05d}.png" for i in ids]
        missing = [name for name in images if not (Path(cfg.root) / name).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(images)} images that {split} lists for split={cfg.split} are not below "
                f"{cfg.root}, the first is {missing[0]}"
            )
    return images, lambda image: Path("labels") / image.name


def _synthia(cfg: DatasetConfig) -> tuple[list[str], Callable[[Path], Path]]:
    return ["RGB/*.png"], lambda image: Path("GT/LABELS") / image.name


def _cityscapes(cfg: DatasetConfig) -> tuple[list[str], Callable[[Path], Path]]:
    def label_of(image: Path) -> Path:
        stem = image.stem.removesuffix("_leftImg8bit")
        return Path("gtFine", cfg.split, image.parent.name, f"{stem}_gtFine_labelIds.png")

    return [f"leftImg8bit/{cfg.split}/*/*_leftImg8bit.png"], label_of


def _folder(cfg: DatasetConfig) -> tuple[list[str], Callable[[Path], Path] | None]:
    try:
        fields = {name for _, name, *_ in Formatter().parse(cfg.labels) if name is not None}
    except ValueError:
        fields = {"?"}
    if not fields <= {"dir", "parent", "stem"}:
        raise UserError(f"labels: {cfg.labels!r} may hold {{dir}}, {{parent}} and {{stem}} alone")

    def label_of(image: Path) -> Path:
        stem = image.stem.removesuffix(cfg.strip)
        return Path(cfg.labels.format(dir=image.parent.as_posix(), parent=image.parent.name, stem=stem))

    return cfg.images, label_of if cfg.labels else None


_LAYOUTS = {"gta5": _gta5, "synthia": _synthia, "cityscapes": _cityscapes, "folder": _folder}


def read_picture(path: Path, depth: Callable[[tuple[int, int]], float] | None = None) -> Image.Image:
    """8-bit RGB picture, decoded, turned as its EXIF entry says, without alpha; raises UserError naming a file that
    cannot be decoded.

    It stays Pillow's, whose decoder is as fast as torchvision's: an array of all pixels costs a third of the decoding.

    Args:
        depth: gives, for a size (width, height), the share of the height, from the top, that will be looked at. Rows
            further down may be left undecoded, and are black then.
    """
    try:
        with _opened(path) as picture:
            early = depth is not None and _stop_early(picture, depth(picture.size))
            if early and picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                return read_picture(path)  # its top is elsewhere
            ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode == "F":
                raise ValueError("floating-point pixels")
            if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            return picture if picture.mode == "RGB" else picture.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in every way there is
        raise UserError(f"cannot read image {path}: {_first_line(error)}") from None


def _stop_early(picture: Image.Image, depth: float) -> bool:
    """Tell the decoder, not started yet, to stop below a share of the rows; gives whether it will.

    A PNG is one stream from the top down. One that does not end as it should is decoded whole: it is cut off, which is
    to be said at once, not when a crop happens to need what is missing.
    """
    if picture.format != "PNG" or picture.info.get("interlace") or picture.is_animated or len(picture.tile) != 1:
        return False
    place = picture.fp.tell()
    picture.fp.seek(-len(_PNG_END), os.SEEK_END)
    complete = picture.fp.read() == _PNG_END
    picture.fp.seek(place)
    if complete:
        codec, _, offset, options = picture.tile[0]
        rows = min(picture.height, math.ceil(picture.height * depth) + 1)  # one more, where a filter magnifies
        picture.tile = [(codec, (0, 0, picture.width, rows), offset, options)]
    return complete


def read_image(path: Path) -> Tensor:
    """`read_picture` as uint8 (3, H, W)."""
    return _pixels(read_picture(path))


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture, not decoded yet; ValueError for a size that no image has, so that a few bytes cannot fill memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        picture = Image.open(path, formats=_FORMATS)
    with picture:
        if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{picture.width}x{picture.height} pixels are too many")
        yield picture


def read_label_ids(path: Path) -> np.ndarray:
    """Integer label ids (H, W) as stored: 8-bit grey or palette index, or the first channel of 16-bit SYNTHIA.

    Raises UserError naming the file if it cannot be decoded or is a colour picture.
    """
    try:
        with _opened(path) as picture:
            mode = picture.mode
            if mode in ("L", "P", "I;16"):
                return np.asarray(picture)
            if mode in ("1", "I"):
                return np.asarray(picture).astype(np.uint8 if mode == "1" else np.uint16)
        # Pillow cuts 16-bit colour down to 8 bits, which turns every SYNTHIA class into 0.
        ids = decode_image(str(path), mode=ImageReadMode.UNCHANGED)
    except Exception as error:
        raise UserError(f"cannot read label {path}: {_first_line(error)}") from None
    if ids.dtype != torch.uint16:
        raise UserError(
            f"label {path} is an 8-bit picture of mode {mode}; a grey, palette or 16-bit PNG of label ids is needed"
        )
    return ids[0].numpy()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


class SegmentationDataset(Dataset):
    """Images with, where listed, labels.

    Args:
        samples: files, from `list_samples`; replace their labels to train on another label source.
        lookup_table: uint8 (65536,), label id on disk -> train id; not needed without labels.
        size: [width, height] that image and label are brought to, or [] to keep them.
        transform: called as `transform((width, height), rng)`, gives the crop to take of an image of that size.
        seed: with the draw's number, decides every random choice: which worker draws it plays no part.

    Attributes:
        skips: a sample that cannot be used is {UNREADABLE: why} instead of a UserError; of a draw, the next one that
            can be used with this entry.

    An item is asked for as `index`, or as `(index, draw)` by the endless sampler, and is a dict:
        image: uint8 (3, H, W); label: uint8 (H, W) of train ids, all `IGNORE` where there is none; index: int.
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

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        if not isinstance(key, tuple):
            return self._sample_or_problem(key, 0)
        (index, draw), problem = key, None
        for step in range(ATTEMPTS):
            item = self._sample_or_problem((index + step) % len(self), draw)
            problem = problem or item.get(UNREADABLE)
            if UNREADABLE not in item:
                return item | {UNREADABLE: problem} if problem else item
        raise UserError(f"{ATTEMPTS} samples in a row cannot be used; {problem}")

    def _sample_or_problem(self, index: int, draw: int) -> dict:
        try:
            return self._sample(index, draw)
        except UserError as error:
            if not self.skips:
                raise
            return {UNREADABLE: str(error)}

    def _sample(self, index: int, draw: int) -> dict:
        sample, label = self.samples[index], None

        def crop_of(size: tuple[int, int]) -> Crop:  # the same at every call
            return self.transform(self.size or size, np.random.default_rng([self.seed, draw, 1]))

        picture = read_picture(sample.image, (lambda size: crop_of(size).depth) if self.transform else None)
        ids = None if sample.label is None else read_label_ids(sample.label)
        if ids is not None and not self.size and ids.shape != picture.size[::-1]:
            raise UserError(
                f"{sample.image} is {picture.width}x{picture.height}, but its label {sample.label} is "
                f"{ids.shape[1]}x{ids.shape[0]}; set the dataset's size to bring both to one"
            )
        train_ids = functools.partial(self._train_ids, sample.label)
        # Some GTA5 labels differ in size from their image: each is brought to the common size, or cropped, by itself.
        if self.transform:
            crop = crop_of(picture.size)
            image, label = crop.of_image(picture), None if ids is None else crop.of_label(ids, train_ids)
        else:
            image, label = _pixels(picture), None if ids is None else torch.from_numpy(train_ids(ids))
            if self.size:
                hw = self.size[::-1]
                image, label = F.resize(image, hw, antialias=True), label if ids is None else resize_label(label, hw)
        item = {"image": image, "index": index}
        return item if label is None else item | {"label": label}

    def _train_ids(self, path: Path, ids: np.ndarray) -> np.ndarray:
        """uint8 train ids of label ids, which file `path` holds."""
        label = self.lookup_table[ids]
        if (unknown := label == UNKNOWN).any():
            raise UserError(f"label {path} holds id {ids[unknown][0]}, which is none of this dataset's")
        return label


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


def build_dataset(
    cfg: DatasetConfig, classes: ClassSet, with_labels: bool = True, transform: Callable | None = None, seed: int = 0
) -> SegmentationDataset:
    """The dataset that a config section describes; see `SegmentationDataset`."""
    # A folder's ids that its id_map leaves out are ignored: void has many numbers. `data.verify` names them.
    table = mark_unknown(classes.lookup_table(label_ids(cfg, classes)), KNOWN_IDS.get(cfg.format))
    return SegmentationDataset(list_samples(cfg, with_labels), table, cfg.size, transform, seed)
