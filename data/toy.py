"""Toy cities: small drawn street scenes in the on-disk layouts of GTA5, SYNTHIA and Cityscapes.

    python -m data.toy --root data/toy --seed 0

They hold all 19 Cityscapes classes with exact label maps and take seconds to draw, so that the whole pipeline runs
without any download. Runs draw seed 0 into `data.toy_root` themselves. For other drawings, call this with another
folder and seed, name its subfolders in data.source.root, data.target.root and data.val.root, and set data.toy_root=''.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from data.taxonomy import CITYSCAPES_LABEL_IDS, CITYSCAPES_PALETTE, SYNTHIA_LABEL_IDS
from data.toy_scene import BICYCLE, LOOKS, PERSON, STYLES, draw_scene
from utils.config import UserError

VERSION = 2  # raise it whenever a painter changes, so that existing toy folders are drawn again
COUNTS = {"GTA5": 240, "SYNTHIA": 240, "Cityscapes/train": 160, "Cityscapes/val": 48}  # images per split
CITIES = {"train": ("toystadt", "modelburg"), "val": ("sampleheim",)}
MISMATCHED = 1  # index of the one GTA5 image whose size is not that of its label, as some real ones

LABEL_ID_OF = np.zeros(256, np.uint8)  # train id -> Cityscapes label id; void -> 0 ("unlabeled")
LABEL_ID_OF[:19] = CITYSCAPES_LABEL_IDS
SYNTHIA_ID_OF = np.zeros(256, np.uint16)  # train id -> SYNTHIA label id; void -> 0
SYNTHIA_ID_OF[:19] = SYNTHIA_LABEL_IDS


def png16(pixels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG from (H, W, 3) uint16: the format of the SYNTHIA labels, which Pillow cannot write."""
    height, width, _ = pixels.shape
    lines = np.pad(pixels.astype(">u2").view(np.uint8).reshape(height, -1), ((0, 0), (1, 0)))  # filter type 0
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)  # 16 bits per sample, colour type RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def write_pair(root: Path, split: str, index: int, seed: int) -> None:
    """Draw and write one image with its label; its own random stream makes it independent of all others."""
    domain, _, part = split.partition("/")
    style, mismatched = STYLES[domain], (split, index) == ("GTA5", MISMATCHED)
    size = (style.size[0] + 4, style.size[1] - 2) if mismatched else style.size
    rng = np.random.default_rng([seed, list(COUNTS).index(split), index])
    image, label = draw_scene(style, size, index, rng)
    ids = Image.fromarray(LABEL_ID_OF[label])
    base = root / domain
    if domain == "GTA5":
        image_path, label_path = (base / kind / f"{index + 1:05d}.png" for kind in ("images", "labels"))
        ids = ids.resize(style.size, Image.Resampling.NEAREST) if mismatched else ids
        palette = np.zeros((256, 3), np.uint8)
        palette[list(CITYSCAPES_LABEL_IDS)] = CITYSCAPES_PALETTE
        ids.putpalette(palette.tobytes())
    elif domain == "SYNTHIA":
        image_path, label_path = (base / kind / f"{index:07d}.png" for kind in ("RGB", "GT/LABELS"))
    else:
        city = CITIES[part][index % len(CITIES[part])]
        image_path, label_path = (
            base / kind / part / city / f"{city}_{index:06d}_000019_{kind}{ending}.png"
            for kind, ending in (("leftImg8bit", ""), ("gtFine", "_labelIds"))
        )
    for path in (image_path, label_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(image_path, compress_level=1)  # noisy images hardly shrink further
    if domain == "SYNTHIA":
        instances = np.isin(label, range(PERSON, BICYCLE + 1)).astype(np.uint16)  # not told apart here
        label_path.write_bytes(png16(np.stack([SYNTHIA_ID_OF[label], instances, 0 * instances], axis=2)))
    else:
        ids.save(label_path)


def read_recipe(root: Path) -> dict | None:
    """What `root` was drawn from, None if there is nothing yet; a folder of others is refused."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        return json.loads((root / "toy.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{root} is in use and holds no toy.json: choose another folder (data.toy_root=)") from None


def generate(root: str | Path = "data/toy", seed: int = 0, counts: dict[str, int] | None = None) -> Path:
    """Draw all splits below `root` unless they are there, and return `root` as an absolute path.

    `counts` overrides entries of `COUNTS`. The files are drawn into a hidden sibling folder that is renamed
    at the end, so an interrupted run leaves nothing half-made; a lock lets a second process wait its turn.
    """
    root, counts = Path(root).resolve(), COUNTS | (counts or {})
    if unknown := counts.keys() - COUNTS:
        raise UserError(f"unknown splits {sorted(unknown)} in counts: choose among {list(COUNTS)}")
    recipe = {"version": VERSION, "seed": seed, "counts": counts}
    recipe["styles"] = zlib.crc32(repr((LOOKS, STYLES)).encode())  # a tuned style is drawn again
    if read_recipe(root) == recipe:
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    partial, outdated = (root.with_name(f".{root.name}.{state}") for state in ("partial", "outdated"))
    with open(root.with_name(f".{root.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if read_recipe(root) == recipe:  # another process has drawn it meanwhile
            return root
        for leftover in (partial, outdated):
            shutil.rmtree(leftover, ignore_errors=True)
        jobs = [(partial, split, index, seed) for split, count in counts.items() for index in range(count)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write_pair, *zip(*jobs)))
        (partial / "toy.json").write_text(json.dumps(recipe, indent=2) + "\n")
        if root.exists():
            print(f"{root} held other drawings (another seed, number or version): drawn again")
            root.rename(outdated)
        partial.rename(root)
        shutil.rmtree(outdated, ignore_errors=True)
    return root


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the toy cities in the layouts of the real data sets.")
    parser.add_argument("--root", default="data/toy", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all drawings (default: %(default)s)")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed must be 0 or more")
    try:
        root = generate(args.root, args.seed)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{root}: " + ", ".join(f"{count} {split}" for split, count in COUNTS.items()) + " images")


if __name__ == "__main__":
    main()
