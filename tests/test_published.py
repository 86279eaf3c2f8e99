"""Published files through the scripts: scores at once, and the released numbers of four training steps.

Batches and initial weights of the steps are the test's (tests/golden/README.md), all else is the engine's.
"""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import NAMES as NINETEEN
from golden_vectors import GOLDEN, save_published

import test
import train_bpl
import train_pst
from data import pseudo_labels
from data.datasets import build_dataset
from data.taxonomy import IGNORE, class_set
from models import build_model, load_weights, open_weights
from models.backbone import IMAGENET_MEAN, IMAGENET_STD
from utils.config import UserError
from utils.engine import loop
from utils.engine.checkpoint import write_json
from utils.evaluation.prediction import predict_labels

COLUMNS = {
    "bpl": ("ce_source", "adversarial", "s2t", "t2s", "discriminator"),
    "pst": ("ce_source", "ce_target", "contrast_source", "contrast_target"),
}
NAMES = {
    "gta5_to_city": NINETEEN,
    "synthia_to_city": [n for n in NINETEEN if n not in ("terrain", "truck", "train")],
}
OURS = {
    "backbone.conv1.weight": "backbone.conv1.weight",
    "backbone.layer4.2.conv3.weight": "backbone.layer4.2.conv3.weight",
    "aspp.conv1.weight": "head.project.0.weight",
    "decoder.head.weight": "classifier.weight",
    "decoder.head.bias": "classifier.bias",
    "backbone.bn1.running_mean": "backbone.bn1.running_mean",
}
AS_RELEASED = (
    "model.dropout=0",  # as the golden run has it
    "data.jitter=false",
    "batchnorm.statistics=running",
    "train.iterations=4",
    "train.horizon=90000",
    "train.val_every=1000",
    "train.panels=0",
)


def golden_batches(domain):
    """The batches of one domain; images as bytes would be, for they are drawn as they enter the network."""
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    for step in range(4):
        r = np.random.default_rng(1000 + step)
        batches = {}
        for name, ignored in (("source", 0.1), ("target", 0.5)):
            images, labels = r.standard_normal((3, 3, 97, 161)), r.integers(0, 19, (3, 97, 161))
            labels[r.random(labels.shape) < ignored] = IGNORE
            batches[name] = {
                "image": torch.from_numpy(255 * (images.astype(np.float32) * std + mean)),
                "label": torch.from_numpy(labels.astype(np.uint8)),
            }
        yield batches[domain]


@pytest.fixture
def weights(tmp_path):
    path = save_published(tmp_path / "released.pkl", "pbal_release")
    yield path
    for file in tmp_path.rglob("*.p*"):  # hundreds of megabytes
        if file.suffix in (".pkl", ".pth"):
            file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "script", "file", "overrides"),
    [
        ("bpl", train_bpl, "stage1_BPL.yml", ("train.lr=1e-4",)),
        ("pst", train_pst, "stage2_PST.yml", ("train.lr=2.5e-4", "loss.prototype_gradient=true")),
    ],
)
def test_four_released_steps(configure, weights, tmp_path, monkeypatch, stage, script, file, overrides):
    domains = iter(("source", "target"))
    monkeypatch.setattr(loop, "training_batches", lambda *args: golden_batches(next(domains)))
    overrides = (*AS_RELEASED, *overrides, f"model.init={weights}", "model.backbone=auto", "model.output_stride=auto")
    cfg = configure("gta5_to_city", file, tmp_path / "runs", *overrides)
    # Pseudo labels come with the batches.
    monkeypatch.setattr(pseudo_labels, "attach", lambda *args: None)
    write_json(cfg.sibling_run(cfg.pseudo_labels) / "manifest.json", {})
    script.main(cfg)

    golden = np.load(GOLDEN / f"steps_{stage}_1.npz")
    entries = [json.loads(line) for line in (cfg.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["loss"] for entry in entries if entry["group"] == "train"]
    losses = np.array([[step[column] for column in COLUMNS[stage]] for step in steps])
    assert losses.shape == golden["losses"].shape
    error = np.abs(losses / golden["losses"] - 1)
    assert error[0].max() < 2e-4
    assert error[1:].max() < 0.015  # BatchNorm on few pixels amplifies rounding
    state = loop.checkpoint.read(cfg.run_dir / "checkpoints" / "last.pth")
    rates = [group["lr"] for group in state["optimizers"]["model"]["param_groups"]]
    assert rates == pytest.approx(golden["final_lrs"].tolist(), rel=1e-12)
    ours = [state["model"][OURS[key]].norm().item() for key in golden["norm_keys"].tolist()]
    assert ours == pytest.approx(golden["norms"].tolist(), rel=0.015)
    assert open_weights(cfg.run_dir / "checkpoints" / "last.pth").settings["arch"] == "deeplab_pbal"


@pytest.mark.parametrize(
    ("name", "layout", "arch", "normalization"),
    [
        ("pbal_release", "gta5_to_city", "deeplab_pbal", "imagenet"),
        ("proda_bn_clr", "synthia_to_city", "deeplabv2", "none"),
    ],
)
def test_published_files_are_tested_at_once(configure, tmp_path, name, layout, arch, normalization):
    names, runs = NAMES[layout], tmp_path / "runs"
    classes = len(names)
    path = save_published(tmp_path / "published.pkl", name, classes)
    auto = ("model.backbone=auto", "model.output_stride=auto", "test.panels=0", "device=cpu")
    given = (f"checkpoint={path}", "batchnorm.statistics=saved", *auto)
    cfg = configure(layout, "test_from_gta_to_city.yml", runs, *given)
    scores = test.main(cfg)
    saved = yaml.safe_load((cfg.run_dir / "config.yml").read_text(encoding="utf-8"))
    assert (saved["model"]["arch"], saved["model"]["normalization"]) == (arch, normalization)

    model = build_model(arch, classes, normalization=normalization, bn_clr=name == "proda_bn_clr").eval()
    load_weights(model, path)
    hits, said, true = np.zeros(classes), np.zeros(classes), np.zeros(classes)
    val = build_dataset(cfg.data.val, class_set(cfg.data))
    for i in range(len(val)):
        label = val[i]["label"].numpy()
        prediction = predict_labels(model, val[i]["image"][None])[0][0].numpy()
        for k in range(classes):
            hits[k] += ((prediction == k) & (label == k)).sum()
            said[k] += ((prediction == k) & (label != IGNORE)).sum()
            true[k] += (label == k).sum()
    iou = dict(zip(names, 100 * hits / (said + true - hits)))
    assert scores["iou"] == pytest.approx(iou) and scores["miou"] == pytest.approx(np.mean(list(iou.values())))
    if classes == 16:
        thirteen = [value for key, value in iou.items() if key not in ("wall", "fence", "pole")]
        assert scores["miou16"] == scores["miou"] and scores["miou13"] == pytest.approx(np.mean(thirteen))
        with pytest.raises(UserError, match="16-class file, 19-class model"):
            test.main(configure("gta5_to_city", "test_from_gta_to_city.yml", runs, *given, "name=other"))
        follows = configure("gta5_to_city", "test_from_gta_to_city.yml", runs, *given, "data.class_set=auto")
        assert test.main(follows)["miou13"] == pytest.approx(scores["miou13"])  # the same images
    with pytest.raises(UserError, match=rf"model\.arch={arch}, not "):
        other = "deeplab_pbal" if arch == "deeplabv2" else "deeplabv2"
        test.main(configure(layout, "test_from_gta_to_city.yml", runs, *given, f"model.arch={other}"))
    path.unlink()
