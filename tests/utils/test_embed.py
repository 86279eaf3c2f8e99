"""Compactness and separation of features made by hand; the files of the projector."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FOLDER_NAMES

import train_bpl
from data.taxonomy import IGNORE
from utils.config import UserError
from utils.embed import LEAST_PIXELS, ClassCentres, run

N = LEAST_PIXELS


def centres_of(*features, classes=3):
    """Features by class: a list of lists of vectors."""
    centres = ClassCentres(classes)
    for k, vectors in enumerate(features):
        centres.update(torch.tensor(vectors, dtype=torch.float).view(len(vectors), -1), torch.full((len(vectors),), k))
    return centres


def test_orthogonal_and_perfectly_compact_classes():
    centres = centres_of([[1, 0, 0]] * N, [[0, 1, 0]] * N, [[0, 0, 1]] * N)
    assert centres.compactness() == pytest.approx({0: 1, 1: 1, 2: 1}) and centres.separation() == pytest.approx(1)


def test_classes_in_opposite_directions_and_collapsed_ones():
    assert centres_of([[1, 0]] * N, [[-1, 0]] * N).separation() == pytest.approx(2)
    collapsed = centres_of([[1, 1]] * N, [[1, 1]] * N)
    assert collapsed.separation() == pytest.approx(0, abs=1e-9) and collapsed.compactness()[0] == pytest.approx(1)


def test_angles_by_hand():
    """Half of a class at +60, half at -60 degrees: the centre lies between, every cosine to it is 1/2."""
    up, down = [0.5, math.sqrt(3) / 2], [0.5, -math.sqrt(3) / 2]
    centres = centres_of([up, down] * (N // 2), [up] * N)
    assert centres.compactness() == pytest.approx({0: 0.5, 1: 1.0})
    assert centres.separation() == pytest.approx(1 - 0.5)


def test_scale_of_features_changes_nothing_and_batches_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    feat, label = torch.randn(300, 8, generator=generator), torch.randint(0, 3, (300,), generator=generator)
    scale = torch.rand(300, 1, generator=generator) * 100 + 0.01
    whole, scaled, parts = (ClassCentres(3) for _ in range(3))
    whole.update(feat, label)
    scaled.update(feat * scale, label)
    for i in range(0, 300, 70):
        parts.update(feat[i : i + 70], label[i : i + 70])
    for other in (scaled, parts):
        assert other.compactness() == pytest.approx(whole.compactness(), rel=1e-5)
        assert other.separation() == pytest.approx(whole.separation(), rel=1e-5)
    cosines = F.normalize(feat, dim=1) @ F.normalize(F.normalize(feat, dim=1)[label == 1].mean(0), dim=0)
    assert whole.compactness()[1] == pytest.approx(cosines[label == 1].mean().item(), rel=1e-5)  # the definition


def test_every_class_weighs_the_same_and_ignored_pixels_nothing():
    few = centres_of([[1, 0]] * N, [[0, 1]] * N)
    many = centres_of([[1, 0]] * N, [[0, 1]] * (50 * N))
    many.update(torch.tensor([[-1.0, -1.0]] * 500), torch.full((500,), IGNORE))
    assert many.separation() == pytest.approx(few.separation()) and many.compactness() == few.compactness()


def test_classes_with_too_few_pixels_have_no_centre():
    centres = centres_of([[1, 0]] * N, [[0, 1]] * (N - 1))
    assert list(centres.compactness()) == [0] and centres.separation() is None


def test_command_measures_every_run(configure, benchmarks, tmp_path):
    given = [f"benchmark={benchmarks['day_to_dusk']}", f"runs={tmp_path}", "device=cpu"]
    folder = tmp_path / "day_to_dusk"
    with pytest.raises(UserError, match="holds no run"):
        run(given)
    train_bpl.main(configure("day_to_dusk", "stage0_warmup.yml", tmp_path))
    train_bpl.main(configure("day_to_dusk", "stage1_BPL.yml", tmp_path))
    result = run(given)
    assert json.loads((folder / "features.json").read_text()) == result and list(result["runs"]) == ["warmup", "bpl"]
    for numbers in result["runs"].values():
        assert 0 < numbers["compactness"] <= 1 and 0 <= numbers["separation"] <= 2
        assert numbers["compactness"] == pytest.approx(sum(numbers["by_class"].values()) / len(numbers["by_class"]))
    labels = (folder / "embed" / "00000" / "bpl" / "metadata.tsv").read_text(encoding="utf-8").splitlines()
    assert labels[0] == "class\tkind" and labels[-4:] == [f"{name}\tprototype" for name in FOLDER_NAMES]
    assert {line.split("\t")[0] for line in labels[1:-4]} == set(FOLDER_NAMES)

    with pytest.raises(UserError, match="checkpoint= is not read here: all runs"):
        run([*given, "checkpoint=bpl"])
    assert (folder / "embed").is_dir()

    shutil.rmtree(folder / "embed")
    shutil.copytree(folder / "bpl", folder / "embed")  # the user's own run of that name
    with pytest.raises(UserError, match=r"embed is a training run, and where this is written to: rename it"):
        run(given)
    assert (folder / "embed" / "checkpoints" / "last.pth").is_file()
