"""Published files through the scripts: scores at once, and the released numbers of four training steps.

Batches and initial weights of the steps are the test's (tests/golden/README.md), all else is the engine's.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import NAMES as NINETEEN
from golden_vectors import GOLDEN, save_published
from PIL import ExifTags, Image

import test
import train_bpl
import train_pst
from data import pseudo_labels
from data.datasets import build_dataset
from data.taxonomy import IGNORE, class_set
from models import PatchDiscriminator, WeightError, build_model, load_model, predict, read_checkpoint, read_weights
from models.backbone import IMAGENET_MEAN, IMAGENET_STD
from utils.config import UserError
from utils.engine import checkpoint, loop
from utils.engine.checkpoint import write_json

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
@pytest.mark.parametrize(("stage", "fused"), [("bpl", False), ("bpl", True), ("pst", False), ("pst", True)])
def test_four_released_steps(configure, weights, tmp_path, monkeypatch, stage, fused):
    script, file, overrides = {
        "bpl": (train_bpl, "stage1_BPL.yml", ("train.lr=1e-4", "model.init_discriminator=checkpoint")),
        "pst": (train_pst, "stage2_PST.yml", ("train.lr=2.5e-4", "loss.prototype_gradient=true")),
    }[stage]
    for module in (loop, train_bpl):
        monkeypatch.setattr(module, "fuses", lambda device: fused)
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
    state = read_checkpoint(cfg.run_dir / "checkpoints" / "last.pth")
    rates = [group["lr"] for group in state["optimizers"]["model"]["param_groups"]]
    assert rates == pytest.approx(golden["final_lrs"].tolist(), rel=1e-12)
    ours = [state["model"][OURS[key]].norm().item() for key in golden["norm_keys"].tolist()]
    assert ours == pytest.approx(golden["norms"].tolist(), rel=0.015)
    assert read_weights(cfg.run_dir / "checkpoints" / "last.pth").settings["arch"] == "deeplab_pbal"


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

    model = load_model(path)
    hits, said, true = np.zeros(classes), np.zeros(classes), np.zeros(classes)
    val = build_dataset(cfg.data.val, class_set(cfg.data))
    for i in range(len(val)):
        label = val[i]["label"].numpy()
        prediction = predict(model, val[i]["image"]).numpy()
        for k in range(classes):
            hits[k] += ((prediction == k) & (label == k)).sum()
            said[k] += ((prediction == k) & (label != IGNORE)).sum()
            true[k] += (label == k).sum()
    iou = dict(zip(names, 100 * hits / (said + true - hits)))
    assert scores["iou"] == pytest.approx(iou) and scores["miou"] == pytest.approx(np.mean(list(iou.values())))
    if classes == 16:
        thirteen = [value for key, value in iou.items() if key not in ("wall", "fence", "pole")]
        assert scores["miou16"] == scores["miou"] and scores["miou13"] == pytest.approx(np.mean(thirteen))
        with pytest.raises(WeightError, match="16-class file, 19-class model"):
            test.main(configure("gta5_to_city", "test_from_gta_to_city.yml", runs, *given, "name=other"))
        follows = configure("gta5_to_city", "test_from_gta_to_city.yml", runs, *given, "data.class_set=auto")
        assert test.main(follows)["miou13"] == pytest.approx(scores["miou13"])  # the same images
    with pytest.raises(UserError, match=rf"model\.arch={arch}, not "):
        other = "deeplab_pbal" if arch == "deeplabv2" else "deeplabv2"
        test.main(configure(layout, "test_from_gta_to_city.yml", runs, *given, f"model.arch={other}"))
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "discriminator"), [("gta5_to_city", "new"), ("synthia_to_city", "checkpoint")])
def test_prodas_warm_up_starts_bpl(configure, tmp_path, monkeypatch, layout, discriminator):
    """Found under its published name, of 19 and 16 classes; its discriminator is not of our form."""
    classes = len(NAMES[layout])
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path)
    path = save_published(tmp_path / "gta5_warmup.pkl", "proda", classes)
    auto = ("model.backbone=auto", "model.output_stride=auto", "train.panels=0")
    given = ("model.published=[gta5_warmup.pkl]", f"model.init_discriminator={discriminator}")
    cfg = configure(layout, "stage1_BPL.yml", tmp_path / "runs", *auto, *given)
    assert configure(layout, "stage1_BPL.yml", tmp_path / "runs").model.init_discriminator == "new"  # as released
    train_bpl.main(cfg)
    log = (cfg.run_dir / "log.txt").read_text()
    said = {
        "new": "a new discriminator begins (model.init_discriminator=new)",
        "checkpoint": "a new discriminator begins: the file's has another form "
        f"(conv1.weight (64, {classes}, 3, 3), here (64, {classes}, 4, 4))",
    }[discriminator]
    assert f"{path}: ProDA: " in log and said in log
    state = read_checkpoint(cfg.run_dir / "checkpoints" / "last.pth")
    assert state["iteration"] == 2
    fresh = 2 / (16 * classes)
    assert state["networks"]["discriminator"]["conv1.weight"].var().item() == pytest.approx(fresh, rel=0.1)
    shutil.rmtree(cfg.run_dir / "checkpoints")  # large
    path.unlink()


def test_discriminator_of_our_form_is_gone_on_with_or_begun_anew(configure, weights, tmp_path):
    file = read_weights(weights)
    theirs = file.networks["discriminator"]
    model = build_model("deeplab_pbal", 19)
    for choice, said in (("checkpoint", "; discriminator too"), ("new", "; a new discriminator begins")):
        cfg = configure("gta5_to_city", "stage1_BPL.yml", tmp_path, f"model.init_discriminator={choice}")
        networks = {"model": model, "discriminator": PatchDiscriminator(19)}
        assert said in checkpoint.load_networks(networks, file, cfg)
        ours = networks["discriminator"].state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs) == (choice == "checkpoint")


FILES = {
    "PBAL 19": ("pbal_release", 19),
    "ProDA 19": ("proda", 19),
    "ProDA 16 bn_clr": ("proda_bn_clr", 16),
}


@pytest.mark.parametrize("kind", list(FILES))
def test_load_model_predicts_as_test_does(configure, tmp_path, kind):
    name, classes = FILES[kind]
    path = save_published(tmp_path / "published.pkl", name, classes)
    layout = "gta5_to_city" if classes == 19 else "synthia_to_city"
    auto = ("model.backbone=auto", "model.output_stride=auto", "test.panels=0", "batchnorm.statistics=saved")
    cfg = configure(layout, "test_from_gta_to_city.yml", tmp_path, f"checkpoint={path}", "test.export=true", *auto)
    test.main(cfg)
    model = load_model(path)
    assert not model.training and model.class_names is None and len(model.classifier.weight) == classes
    compare_with_exported(model, cfg)
    path.unlink()


def compare_with_exported(model, cfg):
    """`predict` gives for every validation image, as path, picture and tensor, the train ids that test.py wrote."""
    samples = build_dataset(cfg.data.val, class_set(cfg.data)).samples
    seen = set()
    for sample in samples:
        with Image.open(cfg.run_dir / "predictions" / "train_ids" / f"{sample.name}.png") as picture:
            written = torch.from_numpy(np.array(picture))
        with Image.open(sample.image) as picture:
            image = picture.convert("RGB")
        as_tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        found = [predict(model, given) for given in (sample.image, str(sample.image), image, as_tensor)]
        assert all(f.dtype == torch.uint8 and torch.equal(f, found[0]) for f in found)
        assert found[0].shape == written.shape and (found[0] != written).float().mean() < 1e-3  # ties by rounding
        seen |= set(found[0].unique().tolist())
    assert len(seen) > 1


@pytest.mark.parametrize("arch", ["deeplabv2", "deeplab_pbal"])
def test_load_model_on_our_own_checkpoints(configure, tmp_path, arch):
    """Of settings that are nowhere the default; images of odd sizes too."""
    own = (f"model.arch={arch}", "model.dilations=[2, 3]", "model.output_stride=8", "model.normalization=half")
    own = (*own, "model.bn_clr=true") if arch == "deeplabv2" else own
    train_bpl.main(configure("day_to_dusk", "stage0_warmup.yml", tmp_path, "name=own", "loss.adversarial=0", *own))
    model = load_model(tmp_path / "day_to_dusk" / "own" / "checkpoints" / "last.pth")
    assert (model.arch, model.output_stride, model.dilations) == (arch, 8, [2, 3])
    assert model.mean == model.std == (0.5, 0.5, 0.5) and model.class_names == ["sky", "building", "street", "car"]
    given = ("checkpoint=own", "test.export=true", "model.output_stride=auto", "batchnorm.statistics=saved")
    cfg = configure("day_to_dusk", "test_from_gta_to_city.yml", tmp_path, *given)
    test.main(cfg)
    compare_with_exported(model, cfg)
    for size in ((1, 33), (130, 47)):
        assert predict(model, torch.zeros(3, *size, dtype=torch.uint8)).shape == size


def test_predict_turns_pictures_upright_and_refuses_what_is_no_image(tmp_path):
    torch.manual_seed(0)
    model = build_model("deeplabv2", 7, "resnet18", 16).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    upright = torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1)
    assert torch.equal(predict(model, tmp_path / "x.png"), predict(model, upright))
    assert predict(model.bfloat16(), upright).shape == (64, 40)
    of_type = torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), Image.new("I;16", (8, 8)), pixels, b""
    for wrong in of_type:
        with pytest.raises(ValueError, match="is needed, not"):
            predict(model, wrong)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        predict(model.train(), upright)


def test_load_model_refuses_a_backbone(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "x.pth")
    with pytest.raises(WeightError, match=r"x\.pth \(ImageNet ResNet\) holds a backbone alone, no trained network"):
        load_model(tmp_path / "x.pth")
