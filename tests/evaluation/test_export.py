"""Predictions as files: sizes, ids, colours, and what the official scorer of Cityscapes makes of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from conftest import HEIGHT, NAMES, WIDTH
from PIL import Image
from torch import nn

import test
from data.datasets import Sample, SegmentationDataset, build_dataset
from data.taxonomy import CLASS_SETS, ID_TO_NAME, class_set, label_ids
from utils.config import ROOT, UserError
from utils.engine.setup import build_network, resolve_auto
from utils.evaluation.export import KINDS, Exporter
from utils.evaluation.prediction import evaluate

CPU = torch.device("cpu")
NINETEEN = CLASS_SETS["cityscapes19"]


class Noisy(nn.Module):
    """Guesses in blocks, always the same ones in turn."""

    mean, std = (0, 0, 0), (1, 1, 1)

    def __init__(self):
        super().__init__()
        self.rng = torch.Generator().manual_seed(0)

    def forward(self, x):
        return {"logits": torch.randn(len(x), 19, x.shape[2] // 4, x.shape[3] // 4, generator=self.rng)}


def officially(predictions: Path, truth: list[Path], folder: Path) -> dict[str, float]:
    """IoU per class, by the official scorer; it stops at 255, as which -1 is read, so that is 0 here."""
    args = official.args
    args.predictionPath, args.predictionWalk = str(predictions), None
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    given = []
    for path in truth:
        ids = np.asarray(Image.open(path))
        given.append(folder / path.name)
        Image.fromarray(np.where(ids == 255, 0, ids).astype(np.uint8)).save(given[-1])
    found = [official.getPrediction(args, str(path)) for path in given]
    scores = official.evaluateImgLists(found, list(map(str, given)), args)
    return scores["classScores"] | {"average": scores["averageScoreClasses"]}


@pytest.mark.parametrize("mode", [[], ["test.flip=true", "test.window=[48,40]"]], ids=["whole", "windows"])
def test_official_scorer_agrees(configure, trees, tmp_path, mode):
    cfg = configure("gta5_to_city", "test_from_gta_to_city.yml", tmp_path, *mode)
    tree = trees["cityscapes_val"]
    assert {*np.unique(np.stack(list(tree.ids.values())))} == {*range(34), 255}
    val = build_dataset(cfg.data.val, class_set(cfg.data))
    export = Exporter(tmp_path / "out", val, class_set(cfg.data), label_ids(cfg.data.val, class_set(cfg.data)))
    scores = evaluate(Noisy(), val, cfg, CPU, export)
    export.finish()
    theirs = officially(tmp_path / "out" / "label_ids", [s.label for s in val.samples], tmp_path)
    assert scores["miou"] > 1 and len(scores["iou"]) == 19
    for name in NAMES:
        assert scores["iou"][name] == pytest.approx(100 * theirs[name], abs=1e-9)
    assert scores["miou"] == pytest.approx(100 * theirs["average"], abs=1e-9)


def test_maps_are_of_the_size_of_their_files(configure, trees, tmp_path):
    cfg = configure("gta5_to_city", "test_from_gta_to_city.yml", tmp_path, "test.dataset=source")
    gta5 = build_dataset(cfg.data.source, class_set(cfg.data))
    seen = {}
    export = Exporter(tmp_path, gta5, class_set(cfg.data), label_ids(cfg.data.source, class_set(cfg.data)))
    evaluate(Noisy(), gta5, cfg, CPU, export, lambda i, _, prediction, __: seen.update({i: prediction}))
    export.finish()
    for index, sample in enumerate(gta5.samples):
        size = (WIDTH + 4, HEIGHT - 2) if sample.name.endswith("5") else (WIDTH, HEIGHT)
        maps = {kind: Image.open(next(tmp_path.glob(f"{kind}/{sample.name}.*"))) for kind in KINDS}
        assert {m.size for m in maps.values()} == {size}
        assert [maps[kind].mode for kind in KINDS] == ["RGB", "RGB", "L", "L"]
        train_ids, ids = (np.asarray(maps[kind]) for kind in ("train_ids", "label_ids"))
        if size == (WIDTH, HEIGHT):
            np.testing.assert_array_equal(train_ids, seen[index])
        np.testing.assert_array_equal(gta5.lookup_table[ids], train_ids)
        np.testing.assert_array_equal(np.asarray(maps["color"]), np.array(NINETEEN.palette)[train_ids])
        half = (np.asarray(Image.open(sample.image).convert("RGB")) / 2 + np.asarray(maps["color"]) / 2).mean()
        assert np.asarray(maps["overlay"]).mean() == pytest.approx(half, abs=2)  # a JPEG


@pytest.fixture
def weights(configure, tmp_path):
    """A network without training, as a file."""
    cfg = configure("gta5_to_city", "test_from_gta_to_city.yml", tmp_path)
    torch.save({"model": build_network(resolve_auto(cfg), CPU).state_dict(), "recipe": {}}, tmp_path / "weights.pth")
    yield tmp_path / "weights.pth"
    (tmp_path / "weights.pth").unlink()


def predict_images(configure, weights, images, *overrides):
    given = (f"checkpoint={weights}", f"test.images={images}", *overrides)
    cfg = configure("gta5_to_city", "test_from_gta_to_city.yml", weights.parent, *given)
    return test.main(cfg), cfg.run_dir / "predictions"


def test_images_of_any_kind_without_labels(configure, trees, weights, tmp_path):
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a turn by 90 degrees
    kinds = {"grey.png": "L", "clear.png": "RGBA", "palette.png": "P", "sub/cmyk.jpg": "CMYK", "turned.jpg": "RGB"}
    for name, mode in kinds.items():
        Image.new(mode, (53, 37)).save(photos / name, **({"exif": exif} if name == "turned.jpg" else {}))
    Image.new("RGB", (1, 1)).save(photos / "dot.bmp")
    (photos / "notes.txt").write_text("no image")
    # The benchmark's own images are not needed.
    result, folder = predict_images(configure, weights, photos, "data.val.root=nowhere", "data.target.root=nowhere")
    assert result["images"] == 6 and not (folder.parent / "metrics.json").exists()
    for name in (*kinds, "dot.bmp"):
        size = {"turned.jpg": (37, 53), "dot.bmp": (1, 1)}.get(name, (53, 37))
        for kind in KINDS:
            path = folder / kind / Path(name).with_suffix(".jpg" if kind == "overlay" else ".png")
            assert Image.open(path).size == size, path
    _, folder = predict_images(configure, weights, photos / "gr*.png")
    found = [p.name for p in sorted(folder.rglob("*.*"))]
    assert found == ["grey.png", "grey.png", "grey.jpg", "classes.json", "grey.png"]
    names = json.loads((folder / "train_ids" / "classes.json").read_text(encoding="utf-8"))
    assert names == {str(k): name for k, name in enumerate(NINETEEN.names)}
    shutil.rmtree(folder)


def test_an_image_that_no_jpeg_can_hold_is_named(tmp_path):
    sample = Sample(tmp_path / "wide.png", None, "wide")
    export = Exporter(tmp_path / "out", SegmentationDataset([sample]), NINETEEN, ID_TO_NAME["cityscapes"])
    with pytest.raises(UserError, match=r"cannot write .*overlay/wide\.jpg"):
        export(0, torch.zeros(3, 1, 66000, dtype=torch.uint8), torch.zeros(1, 66000, dtype=torch.uint8))


def test_a_test_keeps_its_folder_to_itself(configure, weights, tmp_path, monkeypatch):
    held = []

    def in_the_way(cfg):
        held.append(cfg.run_dir)
        code = "import pathlib, sys; from utils.engine.run_folder import run_lock as lock"
        code += "; lock(pathlib.Path(sys.argv[1])).__enter__()"
        command = [sys.executable, "-c", code, cfg.run_dir]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100).stderr

    monkeypatch.setattr(test, "_evaluated", in_the_way)
    said, _ = predict_images(configure, weights, tmp_path)
    assert f"{held[0]} is in use by process" in said


def test_a_test_that_fails_leaves_earlier_predictions(configure, weights, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    _, folder = predict_images(configure, weights, tmp_path / "a.png")
    before = sorted(folder.rglob("*.*"))
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot read image .*b\.png"):
        predict_images(configure, weights, tmp_path / "?.png")
    assert [p for p in sorted(folder.rglob("*.*")) if ".unfinished" not in p.parts] == before
    (tmp_path / "b.png").unlink()
    predict_images(configure, weights, tmp_path / "?.png")
    assert sorted(folder.rglob("*.*")) == before


def test_unusable_images_are_named(configure, weights, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot read image .*broken\.jpg"):
        predict_images(configure, weights, tmp_path / "broken.jpg")
    with pytest.raises(UserError, match=r"no image at .*nothing") as error:
        predict_images(configure, weights, tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_scores_and_worst_images_of_another_dataset(configure, trees, weights, tmp_path):
    given = (f"checkpoint={weights}", "test.dataset=source", "test.export=true", "test.scales=[0.5,1]", "name=on_gta5")
    cfg = configure("gta5_to_city", "test_from_gta_to_city.yml", tmp_path, *given)
    result = test.main(cfg)
    assert result["dataset"] == "source" and result["mode"]["scales"] == [0.5, 1]
    expected = trees["gta5"].pixels_of(NINETEEN.names)
    assert sum(map(sum, result["confusion"])) == pytest.approx(sum(map(sum, expected.values())), rel=0.01)
    assert not list(cfg.run_dir.glob("events.*")) and (cfg.run_dir / "report.html").is_file()
    worst = [entry["miou"] for entry in result["worst"]]
    assert len(worst) == 2 and worst == sorted(worst) and (cfg.run_dir / "panels" / "worst.png").is_file()
    assert {entry["image"] for entry in result["worst"]} <= set(expected)
    assert len(list((cfg.run_dir / "predictions" / "label_ids").rglob("*.png"))) == 5
    again = configure(
        "gta5_to_city", "test_from_gta_to_city.yml", tmp_path, *given, "test.export=false", "test.panels=0"
    )
    test.main(again)
    assert not (cfg.run_dir / "panels").exists()
    assert "predictions is of an earlier call" in (cfg.run_dir / "log.txt").read_text(encoding="utf-8")


def test_own_predictions_are_no_input(configure, weights, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "photos" / "x.png")
    _, folder = predict_images(configure, weights, tmp_path / "photos")
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    with pytest.raises(UserError, match=r"the images lie in .*predictions, which this test overwrites"):
        predict_images(configure, weights, folder / "color")
    assert before and before == {path: path.read_bytes() for path in folder.rglob("*.png")}
