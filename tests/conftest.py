"""Small datasets in the layouts of the real ones, and benchmarks that train on them in seconds."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.toy import png16
from utils.config import ROOT, Config
from utils.engine.setup import checked_config

# Tests compute on the CPU, and some of them fork: where torch sees a GPU, a forked child cannot train.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Name, label id of Cityscapes and GTA5, label id of SYNTHIA, as the datasets' own documentation has them: what
# readers give is checked against these.
_IDS = (
    ("road", 7, 3),
    ("sidewalk", 8, 4),
    ("building", 11, 2),
    ("wall", 12, 21),
    ("fence", 13, 5),
    ("pole", 17, 7),
    ("traffic light", 19, 15),
    ("traffic sign", 20, 9),
    ("vegetation", 21, 6),
    ("terrain", 22, 16),
    ("sky", 23, 1),
    ("person", 24, 10),
    ("rider", 25, 17),
    ("car", 26, 8),
    ("truck", 27, 18),
    ("bus", 28, 19),
    ("train", 31, 20),
    ("motorcycle", 32, 12),
    ("bicycle", 33, 11),
)
NAMES = [name for name, _, _ in _IDS]
CITYSCAPES_IDS = {name: label_id for name, label_id, _ in _IDS}
SYNTHIA_IDS = {name: label_id for name, _, label_id in _IDS}
FOLDER_NAMES = ["sky", "building", "street", "car"]
FOLDER_IDS = {"sky": 0, "building": 1, "street": 3, "car": 8}
WIDTH, HEIGHT, BLOCK = 96, 64, 8


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=8, help="how often test_killed_at_random_moments kills its run")


@dataclass(frozen=True)
class Tree:
    """A dataset on disk: the config section that reads it, and the label ids written, by sample name."""

    section: dict
    ids: dict[str, np.ndarray]
    id_of: dict[str, int]

    @property
    def root(self) -> Path:
        return Path(self.section["root"])

    def pixels_of(self, names: tuple[str, ...]) -> dict[str, list[int]]:
        """By sample name: how many pixels of each class were written."""
        return {key: [int((ids == self.id_of[n]).sum()) for n in names] for key, ids in self.ids.items()}


def _blocks(rng: np.random.Generator, ids: list[int]) -> np.ndarray:
    """Label ids (H, W) in square blocks."""
    coarse = rng.choice(np.array(ids, np.uint16), (HEIGHT // BLOCK, WIDTH // BLOCK))
    return np.kron(coarse, np.ones((BLOCK, BLOCK), np.uint16))


def _save_photo(path: Path, rng: np.random.Generator, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)


def _save_label(path: Path, ids: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(ids.astype(np.uint8))
    if palette:
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    picture.save(path)


def _write_gta5(root: Path) -> Tree:
    """Palette labels; the size of the last image is not that of its label."""
    rng, written = np.random.default_rng(1), {}
    for i in range(1, 6):
        ids = _blocks(rng, [*range(35), 255])
        _save_photo(root / f"images/{i:05d}.png", rng, (WIDTH + 4, HEIGHT - 2) if i == 5 else (WIDTH, HEIGHT))
        _save_label(root / f"labels/{i:05d}.png", ids, palette=True)
        written[f"images/{i:05d}"] = ids
    return Tree({"format": "gta5", "root": str(root), "size": [WIDTH, HEIGHT]}, written, CITYSCAPES_IDS)


def _write_synthia(root: Path) -> Tree:
    """16-bit labels: class, instance (beyond 8 bits), nothing."""
    rng, written = np.random.default_rng(2), {}
    for i in range(5):
        ids = _blocks(rng, list(range(23)))
        _save_photo(root / f"RGB/{i:07d}.png", rng)
        label = root / f"GT/LABELS/{i:07d}.png"
        label.parent.mkdir(parents=True, exist_ok=True)
        instances = rng.integers(0, 2**16, ids.shape).astype(np.uint16)
        label.write_bytes(png16(np.stack([ids, instances, 0 * ids], 2)))
        written[f"RGB/{i:07d}"] = ids
    return Tree({"format": "synthia", "root": str(root)}, written, SYNTHIA_IDS)


def _write_cityscapes(root: Path, split: str) -> Tree:
    """Two cities; -1, the id of number plates, is read as 255."""
    rng, written = np.random.default_rng([3, len(split)]), {}
    for i in range(5):
        city = ("aachen", "zurich")[i % 2]
        ids, stem = _blocks(rng, [*range(34), 255]), f"{city}_{i:06d}_000019"
        _save_photo(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", rng)
        _save_label(root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", ids)
        written[f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit"] = ids
    return Tree({"format": "cityscapes", "root": str(root), "split": split}, written, CITYSCAPES_IDS)


def _write_folder(root: Path, part: str) -> Tree:
    """JPEGs by sequence; id 4 is mapped to 'ignore', 11 is not mapped at all."""
    rng, written = np.random.default_rng([4, len(part)]), {}
    for i in range(5):
        ids, sequence = _blocks(rng, [*FOLDER_IDS.values(), 4, 11]), f"seq{i % 2}"
        _save_photo(root / f"{part}/photos/{sequence}/{i:04d}_rgb.jpg", rng)
        _save_label(root / f"truth/{part}/{sequence}/{i:04d}_L.png", ids)
        written[f"{part}/photos/{sequence}/{i:04d}_rgb"] = ids
    section = {
        "format": "folder",
        "root": str(root),
        "images": [f"{part}/photos/*/*.jpg"],
        "labels": f"truth/{part}/{{parent}}/{{stem}}_L.png",
        "strip": "_rgb",
        "id_map": {i: name for name, i in FOLDER_IDS.items()} | {4: "ignore"},
    }
    return Tree(section, written, FOLDER_IDS)


@pytest.fixture(scope="session")
def trees(tmp_path_factory) -> dict[str, Tree]:
    """Every dataset, five images each; a test that changes files works on a copy of its own."""
    root = tmp_path_factory.mktemp("datasets")
    return {
        "gta5": _write_gta5(root / "GTA5"),
        "synthia": _write_synthia(root / "SYNTHIA"),
        "cityscapes": _write_cityscapes(root / "Cityscapes", "train"),
        "cityscapes_val": _write_cityscapes(root / "Cityscapes", "val"),
        "day": _write_folder(root / "own", "day"),
        "dusk": _write_folder(root / "own", "dusk"),
        "dusk_val": _write_folder(root / "own", "dusk_val"),
    }


@pytest.fixture
def copied(trees, tmp_path):
    """Call with a dataset's name for a copy that may be damaged."""

    def copy(name: str) -> Tree:
        shutil.copytree(trees[name].root, tmp_path / name)
        return Tree(trees[name].section | {"root": str(tmp_path / name)}, trees[name].ids, trees[name].id_of)

    return copy


CUSTOM = {
    "class_set": "custom",
    "class_names": FOLDER_NAMES,
    "palette": [[70, 130, 180], [70, 70, 70], [128, 64, 128], [0, 0, 142]],
}
LAYOUTS = {  # name: classes, source, target, validation
    "gta5_to_city": ({"class_set": "cityscapes19"}, "gta5", "cityscapes", "cityscapes_val"),
    "synthia_to_city": ({"class_set": "cityscapes16"}, "synthia", "cityscapes", "cityscapes_val"),
    "day_to_dusk": (CUSTOM, "day", "dusk", "dusk_val"),
}


@pytest.fixture(scope="session")
def benchmarks(trees, tmp_path_factory) -> dict[str, Path]:
    """A benchmark YAML per layout: a small network, two steps of two crops."""
    folder, files = tmp_path_factory.mktemp("benchmarks"), {}
    for name, (classes, source, target, val) in LAYOUTS.items():
        unlabelled = {key: value for key, value in trees[target].section.items() if key != "labels"}
        sections = {"source": trees[source].section, "target": unlabelled, "val": trees[val].section}
        views = {"base_width": WIDTH, "scale": [0.75, 1.5], "crop": [64, 32], "workers": 0}
        balanced = {"pseudo": {"selection": "class_balanced", "keep": 0.5}}  # two steps make no network sure
        content = {
            "data": {**classes, **sections, **views},
            "model": {"backbone": "resnet18", "output_stride": 16},
            "train": {"precision": "float32"}
            | {"iterations": 2, "horizon": 4, "lr": 1e-3, "batch_source": 2, "batch_target": 2}
            | {"val_every": 2, "save_every": 2, "log_every": 1, "panels": 2},
            "test": {"batch": 2, "panels": 2},
            "stages": {
                "warmup": {"model": {"init": "scratch"}},
                "pseudo_labels": balanced,
                "pst": {"model": {"init": "bpl"}},
                "distill": {"distill": {"init_round1": "teacher"}, **balanced},
            },
        }
        files[name] = folder / f"{name}.yml"
        files[name].write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def configure(benchmarks):
    """Call with a layout, a stage file's name, the folder of runs and overrides for the configuration."""

    def make(layout: str, stage_file: str, runs: Path, *overrides: str) -> Config:
        given = [f"benchmark={benchmarks[layout]}", f"runs={runs}", "device=cpu", *overrides]
        return checked_config(ROOT / "configs" / stage_file, given)

    return make


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # the networks here are too small to gain from more
