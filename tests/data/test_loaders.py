"""The stream of samples depends on seed and step alone."""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import build_dataset
from data.loaders import endless_draws, training_batches, whole_images
from data.taxonomy import CLASS_SETS
from data.transforms import RandomScaleCropFlip
from utils.config import ROOT
from utils.config.keys import DatasetConfig
from utils.engine.setup import checked_config


@pytest.fixture
def dataset(trees):
    cfg = checked_config(ROOT / "configs/stage1_BPL.yml", ["data.crop=[64,32]", "data.base_width=96"]).data
    cfg.source = DatasetConfig(**vars(cfg.source) | trees["synthia"].section | {"size": []})
    return build_dataset(cfg.source, CLASS_SETS["cityscapes16"], transform=RandomScaleCropFlip(cfg), seed=3)


def take(stream, count):
    return list(itertools.islice(stream, count))


def test_every_index_once_an_epoch():
    draws = take(endless_draws(7, seed=1), 21)
    assert [draw for _, draw in draws] == list(range(21))
    epochs = [[index for index, _ in draws[i : i + 7]] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert take(endless_draws(7, seed=2), 7) != draws[:7]


@pytest.mark.parametrize("start", [1, 6, 7, 10, 14])
def test_starting_further_on_is_skipping(start):
    assert take(endless_draws(7, 1, start), 10) == take(endless_draws(7, 1), start + 10)[start:]


def test_batches_do_not_depend_on_workers_or_on_where_they_start(dataset):
    alone = take(training_batches(dataset, 2, workers=0), 6)
    assert alone[0]["image"].shape == (2, 3, 32, 64) and alone[0]["label"].shape == (2, 32, 64)
    for other in (
        take(training_batches(dataset, 2, workers=2), 6),
        alone[:2] + take(training_batches(dataset, 2, workers=0, start_step=2), 4),
    ):
        for a, b in zip(alone, other, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in ("image", "label", "index"))
    assert torch.cat([b["index"] for b in alone])[:5].sort()[0].tolist() == list(range(5))


def test_loader_processes_of_another_thread(dataset):
    with ThreadPoolExecutor(1) as pool:  # where Python takes no handler of signals
        (batch,) = pool.submit(lambda: take(training_batches(dataset, 2, workers=1), 1)).result()
    assert torch.equal(batch["image"], take(training_batches(dataset, 2, workers=0), 1)[0]["image"])


def test_every_draw_of_an_image_is_another_crop(dataset):
    crops = {dataset[0, draw]["image"].numpy().tobytes() for draw in range(8)}
    assert len(crops) == 8
    np.testing.assert_array_equal(dataset[0, 5]["label"], dataset[0, 5]["label"])


def test_whole_images_come_once_in_order(dataset):
    dataset.transform = None
    batches = list(whole_images(dataset, 2, workers=0))
    assert [[s["index"] for s in batch] for batch in batches] == [[0, 1], [2, 3], [4]]
    chosen = list(whole_images(dataset, 2, workers=0, indices=[3, 1]))
    assert [[s["index"] for s in batch] for batch in chosen] == [[3, 1]]


SCRIPT = """
import os, resource, signal, sys, time
from pathlib import Path
from data.datasets import Sample, SegmentationDataset
from data.loaders import training_batches, whole_images
from data.transforms import RandomScaleCropFlip
from utils.config import ROOT
from utils.engine.command_line import guarded
from utils.engine.setup import checked_config

kind, way, workers = sys.argv[2:]
files = sorted(Path(sys.argv[1]).glob("*.png"))
dataset = SegmentationDataset([Sample(f, None, f.stem) for f in files])
if kind == "files":
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12,) * 2)

def main():
    if way == "training":
        crop = ["data.crop=[512,256]", "data.scale=[1,1]", "data.base_width=0"]
        dataset.transform = RandomScaleCropFlip(checked_config(ROOT / "configs/stage1_BPL.yml", crop).data)
        batches = training_batches(dataset, 8, int(workers))
    else:
        batches = whole_images(dataset, 8, int(workers))
    for number, batch in enumerate(batches):
        if kind == "killed" and number == 1:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            sum(range(10**8))  # not waiting for a batch
        time.sleep(0.1)
        if number == 9:
            break

guarded(main)
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(120):  # more than a killed process may have read ahead
        Image.new("RGB", (512, 256)).save(folder / f"{number:03d}.png")
    return folder


def said_by(pictures, *words, before=()):
    """Exit status and stderr of `SCRIPT`, which must end by itself."""
    command = [*before, sys.executable, "-W", "ignore", "-c", SCRIPT, str(pictures), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("way", ["training", "whole"])
@pytest.mark.parametrize(("kind", "remedy"), [("killed", "data.workers"), ("files", "ulimit -n")])
def test_loader_processes_that_suffer_are_one_line(pictures, way, kind, remedy):
    status, lines = said_by(pictures, kind, way, "2")
    assert status == 1 and len(lines) == 1 and lines[0].startswith("error: loading images: ") and remedy in lines[0]


SMALL = ("unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"', "_")


@pytest.mark.parametrize("way", ["training", "whole"])
def test_full_shared_memory_is_one_line(pictures, way):
    if subprocess.run([*SMALL, "true"], capture_output=True).returncode:
        pytest.skip("another /dev/shm cannot be mounted here")
    status, lines = said_by(pictures, "shm", way, "2", before=SMALL)
    assert status == 1 and len(lines) == 1 and "--shm-size" in lines[0] and "data.workers" in lines[0]
    assert said_by(pictures, "shm", way, "0", before=SMALL) == (0, [])  # the remedy
