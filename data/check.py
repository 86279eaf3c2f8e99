"""A look at a few samples before the work starts: what is wrong with all of them is said in seconds, not in an hour."""

from __future__ import annotations

import copy

from data.datasets import UNREADABLE, SegmentationDataset
from data.loaders import spread
from data.taxonomy import IGNORE
from utils.config import Config, UserError

CHECKED = 8  # samples of each dataset that are looked at


def check_samples(dataset: SegmentationDataset, name: str, cfg: Config) -> SegmentationDataset:
    """Read `CHECKED` samples, spread evenly, and give the dataset back.

    Args:
        dataset: where it has a transform, it is trained on.
        name: source, target or val.

    Raises:
        UserError: the batch is larger than the dataset, a file is empty, a sample cannot be used, no label looked at
            has a pixel of any class, every image is smaller than the crop at every scale.
    """
    key, trained = f"data.{name}", dataset.transform is not None
    batch = getattr(cfg.train, f"batch_{name}") if trained else 0
    if batch > len(dataset):
        raise UserError(f"train.batch_{name}={batch} is larger than {key}: {len(dataset)} images")
    paths = [path for s in dataset.samples for path in (s.image, s.label) if path]
    empty = [path for path in paths if path.stat().st_size == 0]
    if empty and not dataset.skips:
        raise UserError(f"{len(empty)} files of {key} are empty, the first is {empty[0]}")
    plain = copy.copy(dataset)
    plain.transform = None
    looked = [s for s in map(plain.__getitem__, spread(len(plain), CHECKED)) if UNREADABLE not in s]
    labels = [s["label"] for s in looked if "label" in s]
    pseudo = name == "target"  # an unsure network may have labelled nothing in some
    if labels and not pseudo and all((label == IGNORE).all() for label in labels):
        raise UserError(
            f"no pixel of any class in {len(labels)} labels of {key} that were looked at, the first is "
            f"{dataset.samples[looked[0]['index']].label}: are its label ids those of another format or id_map?"
        )
    if trained and looked:
        _refuse_small([s["image"].shape[1:] for s in looked], key, cfg)
    return dataset


def _refuse_small(sizes: list[tuple[int, int]], key: str, cfg: Config) -> None:
    """UserError if no image fills the crop even at the largest scale: every crop would have a dead rim."""
    d = cfg.data
    height, width = max(sizes, key=min)
    factor = d.scale[1] * (d.base_width or width) / width
    if round(width * factor) < d.crop[0] or round(height * factor) < d.crop[1]:
        raise UserError(
            f"data.crop={d.crop} is larger than the images of {key}: {width}x{height} at data.scale's {d.scale[1]:g} "
            f"and data.base_width={d.base_width} is {round(width * factor)}x{round(height * factor)}"
        )
