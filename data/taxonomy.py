"""Names, ids, colours and class sets.

A *label id* is what a dataset stores on disk (Cityscapes and GTA5 share one numbering, SYNTHIA has its own). A *train
id* is the index of a class in the network's output. A *class name* connects the two: every dataset says which name a
label id stands for, a class set says which names are learnt and in which order. Whatever has no train id is `IGNORE`.
"""

from __future__ import annotations

import colorsys
import unicodedata
from dataclasses import dataclass, field

import numpy as np

from utils.config.errors import ConfigError
from utils.config.keys import DataConfig, DatasetConfig, nearest

IGNORE = 255
UNKNOWN = 254  # stands for label ids that a dataset cannot hold; samples with it are refused

# (name, Cityscapes label id, SYNTHIA label id, official colour), in train-id order.
_CITYSCAPES = (
    ("road", 7, 3, (128, 64, 128)),
    ("sidewalk", 8, 4, (244, 35, 232)),
    ("building", 11, 2, (70, 70, 70)),
    ("wall", 12, 21, (102, 102, 156)),
    ("fence", 13, 5, (190, 153, 153)),
    ("pole", 17, 7, (153, 153, 153)),
    ("traffic light", 19, 15, (250, 170, 30)),
    ("traffic sign", 20, 9, (220, 220, 0)),
    ("vegetation", 21, 6, (107, 142, 35)),
    ("terrain", 22, 16, (152, 251, 152)),
    ("sky", 23, 1, (70, 130, 180)),
    ("person", 24, 10, (220, 20, 60)),
    ("rider", 25, 17, (255, 0, 0)),
    ("car", 26, 8, (0, 0, 142)),
    ("truck", 27, 18, (0, 0, 70)),
    ("bus", 28, 19, (0, 60, 100)),
    ("train", 31, 20, (0, 80, 100)),
    ("motorcycle", 32, 12, (0, 0, 230)),
    ("bicycle", 33, 11, (119, 11, 32)),
)
CITYSCAPES_NAMES, CITYSCAPES_LABEL_IDS, SYNTHIA_LABEL_IDS, CITYSCAPES_PALETTE = zip(*_CITYSCAPES)

# What a label id on disk stands for, by dataset format.
ID_TO_NAME = {
    "cityscapes": dict(zip(CITYSCAPES_LABEL_IDS, CITYSCAPES_NAMES)),
    "gta5": dict(zip(CITYSCAPES_LABEL_IDS, CITYSCAPES_NAMES)),
    "synthia": dict(zip(SYNTHIA_LABEL_IDS, CITYSCAPES_NAMES)),
}

# Every label id that may occur, void ones included; 255 is Cityscapes' -1.
KNOWN_IDS = {
    "cityscapes": {*range(34), 255},
    "gta5": {*range(35), 255},
    "synthia": set(range(23)),
}


@dataclass(frozen=True)
class ClassSet:
    """The classes a network learns, in train-id order.

    `subsets` names further averages over some of the classes, reported beside mIoU
    (e.g. `miou13` over thirteen of SYNTHIA's sixteen).
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    subsets: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def lookup_table(self, id_to_name: dict[int, str], known: set[int] | None = None) -> np.ndarray:
        """uint8 array of 65,536 entries: label id -> train id, `IGNORE` where the set has no such class.

        Args:
            known: every id that may occur; others get `UNKNOWN`. None: any may.
        """
        table = np.full(2**16, IGNORE, np.uint8)
        if known is not None:
            table[:] = UNKNOWN
            table[list(known)] = IGNORE
        for label_id, name in id_to_name.items():
            if name in self.names:
                table[label_id] = self.names.index(name)
        return table

    def inverse_table(self, id_to_name: dict[int, str]) -> np.ndarray:
        """Array of 256 entries: train id -> the first label id of its class.

        Where there is none, 255, or the largest id below it that stands for no class. uint8, or uint16 where a label id
        needs it.
        """
        taken = {label_id for label_id, name in id_to_name.items() if name in self.names}
        table = np.full(256, next((i for i in range(IGNORE, -1, -1) if i not in taken), IGNORE), np.uint16)
        for label_id, name in reversed(id_to_name.items()):
            if name in self.names:
                table[self.names.index(name)] = label_id
        return table if table.max() > 255 else table.astype(np.uint8)


# SYNTHIA is scored on 16 classes, and older work on 13 of them ("mIoU*").
_SIXTEEN = tuple(name for name in CITYSCAPES_NAMES if name not in ("terrain", "truck", "train"))
_THIRTEEN = tuple(name for name in _SIXTEEN if name not in ("wall", "fence", "pole"))
_COLOUR = dict(zip(CITYSCAPES_NAMES, CITYSCAPES_PALETTE))
CLASS_SETS = {
    "cityscapes19": ClassSet(CITYSCAPES_NAMES, CITYSCAPES_PALETTE),
    "cityscapes16": ClassSet(
        _SIXTEEN, tuple(_COLOUR[name] for name in _SIXTEEN), {"miou16": _SIXTEEN, "miou13": _THIRTEEN}
    ),
}


def custom_class_set(names: list[str], palette: list[list[int]]) -> ClassSet:
    """A class set of the user's own; without a palette, colours are spread over the hue circle.

    Raises ValueError if a name is empty, occurs twice or is "ignore" or "ignored", the palette's length differs, or a
    colour is not three bytes.
    """
    alike = [unicodedata.normalize("NFC", name).strip() for name in names]
    doubles = sorted({name for name in alike if alike.count(name) > 1})
    if doubles:
        raise ValueError(f"data.class_names holds {doubles[0]!r} twice")
    if "" in alike:
        raise ValueError("data.class_names holds an empty name")
    for word in {"ignore", "ignored"} & {*alike}:
        raise ValueError(f"data.class_names holds {word!r}, the word of id_map for what is not learnt")
    if not 2 <= len(names) <= UNKNOWN:
        raise ValueError(f"data.class_names must hold 2 to {UNKNOWN} names for class_set 'custom', not {len(names)}")
    if not palette:
        hues = [(i * 0.618) % 1 for i in range(len(names))]  # golden ratio: neighbours in id differ in hue
        palette = [[int(255 * c) for c in colorsys.hsv_to_rgb(h, 0.75, 0.9)] for h in hues]
    if len(palette) != len(names):
        raise ValueError(f"data.palette holds {len(palette)} colours for {len(names)} class names")
    for name, colour in zip(names, palette):
        if len(colour) != 3 or not all(0 <= c <= 255 for c in colour):
            raise ValueError(f"data.palette: the colour of {name!r} is {colour}, not three numbers of 0..255")
    return ClassSet(tuple(names), tuple(tuple(c) for c in palette))


def resolve_id_map(id_map: dict, classes: ClassSet) -> dict[int, str]:
    """The `id_map` of a folder dataset, checked: {label id: class name}; empty means label id = train id.

    Raises ValueError for an id outside 0..65535 or a name that is not in the class set ("ignore" is allowed).
    """
    if not id_map:
        return dict(enumerate(classes.names))
    for label_id, name in id_map.items():
        if isinstance(label_id, bool) or not isinstance(label_id, int) or not 0 <= label_id < 2**16:
            raise ValueError(f"id_map: {label_id!r} is not a label id (0..65535)")
        if name not in classes.names and name != "ignore":
            near = nearest(name, [*classes.names, "ignore"])
            raise ValueError(f"id_map: label id {label_id} -> {name!r} is not a class; nearest is {near!r}")
    return dict(id_map)


def label_ids(cfg: DatasetConfig, classes: ClassSet) -> dict[int, str]:
    """What each label id of a dataset stands for."""
    return ID_TO_NAME.get(cfg.format) or resolve_id_map(cfg.id_map, classes)


def known_ids(cfg: DatasetConfig, classes: ClassSet) -> set[int] | None:
    """Every label id that a dataset may hold; None with an id_map, which need not list void ids."""
    return None if cfg.id_map else KNOWN_IDS.get(cfg.format, {*range(len(classes)), IGNORE})


def class_set(data: DataConfig) -> ClassSet:
    """The class set that a configuration names; `auto` stands for cityscapes19 until a checkpoint says otherwise."""
    if data.class_set == "custom":
        return custom_class_set(data.class_names, data.palette)
    return CLASS_SETS["cityscapes19" if data.class_set == "auto" else data.class_set]


def check_classes(data: DataConfig) -> None:
    """ConfigError for classes, palettes and id maps that cannot be meant, or a class that no source label can hold."""
    key = ""
    try:
        classes = class_set(data)
        for name in ("source", "target", "val"):
            section, key = getattr(data, name), f"data.{name}."
            taught = label_ids(section, classes).values()
            untaught = [n for n in classes.names if n not in taught]
            if untaught and name == "source":
                raise ValueError(f"format and id_map have no label id for class {untaught[0]!r} of the class set")
    except ValueError as error:
        raise ConfigError(f"{key}{error}") from None
