"""Every stage runs two real steps on every layout, leaves what it should, and resumes exactly."""

import contextlib
import itertools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import FOLDER_NAMES, LAYOUTS, NAMES
from PIL import Image
from survival import metrics_of, same

import distill
import gen_pseudo_labels
import test
import train_bpl
import train_pst
from data import pseudo_labels as store
from data.datasets import build_dataset, fingerprint, list_samples
from data.loaders import training_batches
from data.taxonomy import IGNORE, class_set
from loss import (
    bidirectional_prototype_loss,
    discriminator_loss,
    distillation_loss,
    generator_loss,
    prototype_contrast_loss,
    segmentation_loss,
)
from models import build_model, upsample
from models import read_checkpoint as read
from utils import pipeline
from utils.config import UserError, load_config, to_dict
from utils.engine import checkpoint, loop
from utils.engine.loop import refuse_other_experiment
from utils.engine.setup import load_network, resolve_auto
from utils.evaluation.prediction import default_precision, predict_confidence

STAGES = (
    ("warmup", train_bpl, "stage0_warmup.yml"),
    ("bpl", train_bpl, "stage1_BPL.yml"),
    ("pseudo_labels", gen_pseudo_labels, "pseudo_labels.yml"),
    ("pst", train_pst, "stage2_PST.yml"),
    ("distill", distill, "stage3_distill.yml"),
    ("test", test, "test_from_gta_to_city.yml"),
)
TERMS = {
    "warmup": {"ce_source", "adversarial", "discriminator"},
    "bpl": {"ce_source", "adversarial", "discriminator", "s2t", "t2s"},
    "pst": {"ce_source", "ce_target", "contrast_source", "contrast_target"},
    "distill/round1": {"ce_source", "ce_target", "distill"},
    "distill/round2": {"ce_source", "ce_target", "distill"},
}
CLASSES = {
    "gta5_to_city": NAMES,
    "synthia_to_city": [n for n in NAMES if n not in ("terrain", "truck", "train")],
    "day_to_dusk": FOLDER_NAMES,
}


@dataclass(frozen=True)
class Finished:
    """All stages of a layout, as they were run; `folder` is runs/<benchmark>."""

    layout: str
    runs: Path
    returned: dict[str, dict]

    @property
    def folder(self) -> Path:
        return self.runs / self.layout


@pytest.fixture(scope="module", params=list(LAYOUTS))
def finished(request, configure, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    returned = {stage: script.main(configure(request.param, file, runs)) for stage, script, file in STAGES}
    yield Finished(request.param, runs, returned)
    shutil.rmtree(runs)  # checkpoints are large


@pytest.fixture
def runs(tmp_path):
    yield tmp_path / "runs"
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


one_layout = pytest.mark.parametrize("finished", ["gta5_to_city"], indirect=True)


def work(*args, **kwargs):
    """Stands in for what must not be called again."""
    raise AssertionError("work was done")


def forbid_training(monkeypatch):
    for stage_type in (train_bpl.BPL, train_pst.PST, distill.Distillation):
        monkeypatch.setattr(stage_type, "step", work)
    monkeypatch.setattr(gen_pseudo_labels, "predict_confidence", work)


@pytest.mark.parametrize("run", list(TERMS))
def test_what_a_run_leaves_behind(finished, run):
    folder, names = finished.folder / run, CLASSES[finished.layout]
    saved = yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))
    assert saved["git"] and saved["seed"] == 0 and saved["train"]["batch_source"] == 2
    with pytest.raises(UserError, match=r"config\.yml is what a run has written"):  # a benchmark's keys would win
        load_config(folder / "config.yml")

    first, second, val = metrics_of(folder)
    assert [(x["step"], x["group"]) for x in (first, second, val)] == [(1, "train"), (2, "train"), (2, "val")]
    for entry, step in ((first, 1), (second, 2)):
        assert set(entry["loss"]) == TERMS[run] and all(math.isfinite(v) for v in entry["loss"].values())
        assert entry["lr"] == pytest.approx(1e-3 * (1 - step / 4) ** 0.9)  # the first step is step 1
    assert list(val["iou"]) == names

    metrics = json.loads((folder / "metrics.json").read_text())
    for scores in (metrics["last"], metrics["best"]):  # one validation: the last is the best
        assert scores["miou"] == val["miou"] and 0 <= scores["miou"] <= 100 and list(scores["iou"]) == names
    assert ("miou13" in val) == ("miou16" in val) == (finished.layout == "synthia_to_city")
    assert f"step 2: mIoU {val['miou']:.2f}" in (folder / "log.txt").read_text(encoding="utf-8")
    assert list(folder.glob("events.out.tfevents*"))
    assert Image.open(folder / "panels" / "000002.png").width > 3 * 300

    last, best = (read(folder / "checkpoints" / f"{which}.pth") for which in ("last", "best"))
    assert last["iteration"] == best["iteration"] == 2 and same(last["model"], best["model"])
    assert last["recipe"]["class_names"] == names and last["config"]["seed"] == 0
    assert all(v.isfinite().all() for v in last["model"].values())
    rates = [group["lr"] for group in last["optimizers"]["model"]["param_groups"]]
    assert rates[1] == pytest.approx(10 * rates[0])  # the head
    assert ("discriminator" in last["networks"]) == ("discriminator" in TERMS[run])


def test_each_stage_starts_from_the_one_before(finished):
    for run, start in (
        ("bpl", "warmup"),
        ("pst", "bpl"),
        ("distill/round1", "pst"),
        ("distill/round2", "distill/round1"),
    ):
        log = (finished.folder / run / "log.txt").read_text(encoding="utf-8")
        assert f"{start}/checkpoints/last.pth: " in log
        before, after = (read(finished.folder / r / "checkpoints" / "last.pth")["model"] for r in (start, run))
        change = (after["classifier.weight"] - before["classifier.weight"]).norm() / before["classifier.weight"].norm()
        assert 0 < change < 0.5  # two steps further on, not anew
    for number, teacher in ((1, "pst"), (2, "distill/round1")):
        labels = finished.folder / f"distill/round{number}_pseudo_labels"
        made_by = json.loads((labels / "manifest.json").read_text(encoding="utf-8"))["weights"]
        # Relative to the labels: from any working directory it is the teacher.
        assert (labels / made_by).samefile(finished.folder / teacher / "checkpoints/last.pth")
    assert "a new discriminator begins" in (finished.folder / "bpl" / "log.txt").read_text(encoding="utf-8")


def test_scores_of_the_result(finished):
    folder = finished.folder / "test"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == finished.returned["test"]
    assert "distill/round2" in metrics["checkpoint"] and metrics["images"] == 5
    assert list(metrics["iou"]) == CLASSES[finished.layout]
    table = (folder / "log.txt").read_text(encoding="utf-8")
    assert f"{metrics['miou']:.2f}" in table and all(name in table for name in metrics["iou"])
    assert (folder / "panels" / "test.png").is_file() and (folder / "config.yml").is_file()
    # The same network, statistics and images as in the last validation of the run.
    assert metrics["miou"] == pytest.approx(finished.returned["distill"]["last"]["miou"])
    if finished.layout == "synthia_to_city":
        iou = {name: value for name, value in metrics["iou"].items() if value is not None}
        thirteen = [value for name, value in iou.items() if name not in ("wall", "fence", "pole")]
        assert metrics["miou"] == metrics["miou16"] == pytest.approx(sum(iou.values()) / len(iou))
        assert metrics["miou13"] == pytest.approx(sum(thirteen) / len(thirteen))


def test_pseudo_labels_one_for_each_image(finished, trees):
    folder, manifest = finished.folder / "pseudo_labels", finished.returned["pseudo_labels"]
    names = sorted(trees[LAYOUTS[finished.layout][2]].ids)
    for kind in ("labels", "confidence"):
        found = [p.relative_to(folder / kind).with_suffix("").as_posix() for p in (folder / kind).rglob("*.*")]
        assert sorted(found) == names
    assert manifest == json.loads((folder / "manifest.json").read_text()) and manifest["images"] == len(names) == 5
    labels, confidence = (
        np.stack([np.asarray(Image.open(folder / kind / f"{name}.png")) for name in names])
        for kind in ("labels", "confidence")
    )
    assert labels.shape == confidence.shape == (5, 64, 96)
    assert sum(c["predicted"] for c in manifest["classes"].values()) == labels.size
    for k, (name, said) in enumerate(manifest["classes"].items()):
        assert name == CLASSES[finished.layout][k]
        assert (labels == k).sum() == said["kept"] >= 0.5 * said["predicted"]  # pseudo.keep
        if said["kept"]:
            assert confidence[labels == k].min() >= round(255 * said["threshold"])
    assert 0 < (labels == IGNORE).mean() <= 0.5


@one_layout
def test_confidence_is_that_of_the_mirrored_average(finished, configure):
    cfg = configure(finished.layout, "pseudo_labels.yml", finished.runs)
    target = build_dataset(cfg.data.target, class_set(cfg.data), with_labels=False)
    model, _ = load_network(cfg, finished.folder / "bpl" / "checkpoints" / "last.pth", torch.device("cpu"))
    for index, sample in enumerate(target.samples):
        image = target[index]["image"][None]
        written = np.asarray(
            Image.open(finished.folder / "pseudo_labels" / "confidence" / f"{sample.name}.png")
        ).astype(int)
        averaged, plain, after = (
            255 * predict_confidence(model, image, flip=flip, softmax_first=first)[1][0].numpy()
            for flip, first in ((True, True), (False, True), (True, False))
        )
        rounding = 0.51  # of a level; these networks are hardly sure of anything, so the ways are not far apart
        assert np.abs(written - averaged).max() <= rounding
        assert np.abs(written - plain).max() > 1 and np.abs(written - after).max() > rounding


@one_layout
def test_finished_stages_do_no_work(finished, configure, monkeypatch):
    forbid_training(monkeypatch)
    files = {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*") if p.suffix in (".pth", ".png")}
    for stage, script, file in STAGES[:-1]:
        assert script.main(configure(finished.layout, file, finished.runs)) == finished.returned[stage]
    assert files == {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*") if p.suffix in (".pth", ".png")}


@one_layout
def test_a_dataset_may_move_between_the_parts_of_a_run(finished, configure, tmp_path, monkeypatch):
    forbid_training(monkeypatch)
    cfg = configure(finished.layout, "stage1_BPL.yml", finished.runs)
    for name in ("source", "target", "val"):
        moved = tmp_path / name
        moved.symlink_to(getattr(cfg.data, name).root)
        getattr(cfg.data, name).root = str(moved)
    assert train_bpl.main(cfg) == finished.returned["bpl"]


@one_layout
def test_a_run_does_not_go_on_with_other_images(finished, configure, tmp_path):
    cfg = configure(finished.layout, "stage1_BPL.yml", finished.runs)
    shutil.copytree(cfg.data.target.root, tmp_path / "target")
    moved = ["data.target.root=" + str(tmp_path / "target")]
    labels = configure(finished.layout, "pseudo_labels.yml", finished.runs, *moved)
    before, images = gen_pseudo_labels.main(labels)["files"], list_samples(labels.data.target, with_labels=False)
    with open(images[0].image, "ab") as file:  # other content under the same name
        file.write(b"\0")
    for stage, script, file in (
        ("target", train_bpl, "stage1_BPL.yml"),
        ("files", gen_pseudo_labels, "pseudo_labels.yml"),
    ):
        with pytest.raises(UserError, match=rf"{stage}.*{before}"):
            script.main(configure(finished.layout, file, finished.runs, *moved))
    with pytest.raises(UserError, match=rf"pseudo labels in .* are of other images \({before}, not "):
        train_pst.main(configure(finished.layout, "stage2_PST.yml", finished.runs, "name=x", *moved))


@one_layout
def test_pseudo_labels_of_another_size_are_not_taken(finished, configure):
    other = configure(finished.layout, "pseudo_labels.yml", finished.runs, "data.target.size=[64, 32]")
    with pytest.raises(UserError, match=r"other pseudo labels \(size: \[\] -> \[64, 32\]\); choose a name="):
        gen_pseudo_labels.main(other)


@one_layout
@pytest.mark.parametrize("key", ["train.lr", "loss.bidirectional"])
def test_another_experiment_is_not_resumed(finished, configure, key):
    cfg = configure(finished.layout, "stage1_BPL.yml", finished.runs, f"{key}=0.5")
    with pytest.raises(
        UserError, match=rf"bpl holds another experiment \({key}: [\d.]+ -> 0\.5\); .*train\.restart=true"
    ):
        train_bpl.main(cfg)


@one_layout
@pytest.mark.parametrize(
    ("name", "stage", "file"),
    [
        ("val", train_bpl, "stage1_BPL.yml"),
        ("source", train_bpl, "stage1_BPL.yml"),
        ("target", train_pst, "stage2_PST.yml"),
    ],
)
def test_changed_labels_are_noticed(finished, configure, monkeypatch, name, stage, file):
    cfg = configure(finished.layout, file, finished.runs)
    images = list_samples(getattr(cfg.data, name), with_labels=False)

    def changed(samples, labels=False):
        return "others" if labels and samples[0].image == images[0].image else fingerprint(samples, labels)

    monkeypatch.setattr(loop, "fingerprint", changed)
    begun = rf"data\.{name}\.labels has others, but .*/{cfg.stage} has begun with \d+ labels of hash"
    with pytest.raises(UserError, match=begun):
        stage.main(cfg)


@one_layout
def test_distillation_looks_for_its_start_before_the_teacher_labels(finished, configure, monkeypatch):
    forbid_training(monkeypatch)
    cfg = configure(finished.layout, "stage3_distill.yml", finished.runs, "name=d", "distill.init_round1=nope")
    with pytest.raises(UserError, match="no weights of 'nope'"):
        distill.main(cfg)


@one_layout
def test_a_broken_target_image_is_left_out_of_the_statistics_of_a_test(finished, configure, tmp_path):
    given = configure(finished.layout, "test_from_gta_to_city.yml", finished.runs).data.target.root
    shutil.copytree(given, tmp_path / "target")
    target = configure(
        finished.layout, "test_from_gta_to_city.yml", finished.runs, f"data.target.root={tmp_path}/target"
    )
    list_samples(target.data.target, with_labels=False)[0].image.write_bytes(b"broken")
    target.checkpoint, target.batchnorm.statistics = "bpl", "target"
    with pytest.raises(UserError, match="cannot read image"):
        load_network(target, finished.runs / finished.layout / "bpl/checkpoints/last.pth", torch.device("cpu"))
    target.data.on_error = "skip"
    load_network(target, finished.runs / finished.layout / "bpl/checkpoints/last.pth", torch.device("cpu"))


@one_layout
@pytest.mark.parametrize(("name", "kind"), [("pseudo_labels", "a folder of pseudo labels"), ("test", "a test's")])
def test_no_run_begins_where_something_else_lies(finished, configure, name, kind):
    cfg = configure(finished.layout, "stage1_BPL.yml", finished.runs, f"name={name}")
    before = sorted(cfg.run_dir.rglob("*"))
    with pytest.raises(UserError, match=rf"/{name} is {kind}: choose another name="):
        train_bpl.main(cfg)
    assert sorted(cfg.run_dir.rglob("*")) == before


def test_the_file_that_a_run_began_with_may_have_another_path(configure, runs, tmp_path):
    cfg = configure("gta5_to_city", "stage1_BPL.yml", runs)
    saved = to_dict(cfg) | {"model": to_dict(cfg)["model"] | {"init": "w.pth"}}
    (tmp_path / "w.pth").write_bytes(b"weights")
    cfg.model.init = str(tmp_path / "w.pth")
    refuse_other_experiment(saved, cfg, [checkpoint.file_hash(tmp_path / "w.pth")])
    with pytest.raises(UserError, match=r"model\.init: w\.pth -> "):
        refuse_other_experiment(saved, cfg, ["another"])


@pytest.mark.parametrize(("file", "refused"), [("stage1_BPL.yml", False), ("stage3_distill.yml", True)])
def test_only_what_a_stage_reads_makes_another_experiment(configure, runs, file, refused):
    cfg = configure("gta5_to_city", file, runs)
    saved = to_dict(cfg)
    saved["data"]["cutout"] = 0.25  # an older default, of distillation's
    with pytest.raises(UserError, match=r"data\.cutout: 0\.25 -> ") if refused else contextlib.nullcontext():
        refuse_other_experiment(saved, cfg)


def test_a_key_newer_than_the_run_counts_as_its_default(configure, runs):
    cfg = configure("gta5_to_city", "stage1_BPL.yml", runs)
    saved = to_dict(cfg)
    del saved["loss"]["directions"]
    refuse_other_experiment(saved, cfg)
    cfg.loss.directions = "s2t"
    with pytest.raises(UserError, match="directions: both -> s2t"):
        refuse_other_experiment(saved, cfg)


@one_layout
def test_other_pseudo_labels_are_refused_until_they_are_to_be_replaced(finished, configure):
    changes = ("name=pseudo_labels_again", "pseudo.keep=0.4")
    before = gen_pseudo_labels.main(configure(finished.layout, "pseudo_labels.yml", finished.runs, *changes))
    cfg = configure(finished.layout, "pseudo_labels.yml", finished.runs, *changes, "pseudo.threshold=0.01")
    with pytest.raises(UserError, match=r"holds other pseudo labels \(threshold: 0\.95 -> 0\.01\)"):
        gen_pseudo_labels.main(cfg)
    cfg.train.restart = True
    after = gen_pseudo_labels.main(cfg)
    assert before["kept"] < 1 and after["kept"] == 1
    cfg.pseudo.selection, cfg.pseudo.threshold = "constant", 1.0
    with pytest.raises(UserError, match="no pixel of any class reaches"):
        gen_pseudo_labels.main(cfg)
    cfg.pseudo.selection, cfg.pseudo.threshold = "class_balanced", 0.01
    assert store.read_manifest(cfg.run_dir) == after  # what was there stays until new labels are whole
    lost = sorted((cfg.run_dir / "labels").rglob("*.png"))[0]
    lost.unlink()
    assert gen_pseudo_labels.main(cfg) == after and lost.is_file()  # of the same settings too


@one_layout
def test_pseudo_labels_do_not_replace_another_run(finished, configure):
    weights = finished.folder / "precious" / "checkpoints" / "last.pth"
    weights.parent.mkdir(parents=True)
    weights.write_text("days of training")
    cfg = configure(finished.layout, "pseudo_labels.yml", finished.runs, "name=precious")
    with contextlib.suppress(UserError):  # how it is refused matters less than that nothing is lost
        gen_pseudo_labels.main(cfg)
    assert weights.read_text() == "days of training"


@one_layout
def test_missing_pseudo_labels_are_said_before_training(finished, configure):
    cfg = configure(finished.layout, "stage2_PST.yml", finished.runs, "name=pst_again", "pseudo_labels=nowhere")
    with pytest.raises(UserError, match=r"nowhere/manifest\.json does not exist; make them with"):
        train_pst.main(cfg)
    assert not cfg.run_dir.exists()


class MarkedViews:
    """Each view leaves a mark of its own on the images."""

    def weak(self, images):
        return images / 255

    def strong(self, images):
        return 1 - images / 255

    def distill(self, images, labels):
        return (images / 255) ** 2, labels.where(labels > 3, IGNORE)


def cross_entropy(logits, labels):
    """At the labels' size."""
    return segmentation_loss(upsample(logits, labels.shape[1:]), labels)


def compare_step(stage, expected_of):
    """A step's gradients and terms against `expected_of(source, target)`: {network: its total loss}, terms."""
    torch.manual_seed(0)
    source, target = (
        {"image": torch.randint(0, 256, (2, 3, 32, 64)), "label": torch.randint(0, 19, (2, 32, 64))} for _ in range(2)
    )
    stage.views, terms = MarkedViews(), {}
    for network in stage.networks.values():
        network.eval()  # without dropout and batch statistics, two passes agree

    def backward(total, **named):
        total.backward()
        terms.update(named)

    stage.step(source, target, backward)
    totals, expected_terms = expected_of(source, target)
    assert terms.keys() == expected_terms.keys()
    for name, term in expected_terms.items():
        torch.testing.assert_close(terms[name], term)
    for name, total in totals.items():
        parameters = list(stage.networks[name].parameters())
        for p, expected in zip(parameters, torch.autograd.grad(total, parameters, retain_graph=True)):
            assert (p.grad - expected).norm() <= 1e-4 * expected.norm()  # float32, summed in another order


@pytest.mark.parametrize(("gan", "directions"), [("bce", "both"), ("ls", "s2t"), ("bce", "t2s")])
def test_equation_of_bpl(configure, runs, gan, directions):
    weights = ("loss.adversarial=0.3", "loss.bidirectional=0.7")
    weights = (*weights, f"loss.gan={gan}", f"loss.directions={directions}")
    stage = train_bpl.BPL(
        resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", runs, *weights)), torch.device("cpu")
    )

    def expected_of(source, target):
        out_s, out_t = stage.model(1 - source["image"] / 255), stage.model(target["image"] / 255)
        maps_s, maps_t = (upsample(out["logits"], (32, 64)).softmax(1) for out in (out_s, out_t))
        terms = {"ce_source": cross_entropy(out_s["logits"], source["label"])}
        terms["adversarial"] = generator_loss(stage.discriminator(maps_t), gan)
        prototypes = stage.model.classifier.weight.detach().flatten(1)
        terms["s2t"], terms["t2s"] = bidirectional_prototype_loss(out_t["feat"], out_t["logits"], prototypes)
        terms["discriminator"] = discriminator_loss(stage.discriminator(maps_s), stage.discriminator(maps_t), gan)
        learnt = [terms["s2t"], terms["t2s"]] if directions == "both" else [terms[directions]]
        total = terms["ce_source"] + 0.3 * terms["adversarial"] + 0.7 * sum(learnt)
        return {"model": total, "discriminator": terms["discriminator"]}, terms

    compare_step(stage, expected_of)


@pytest.mark.parametrize(
    ("switches", "contrast"),
    [((), 0.4), (("loss.prototype_gradient=true", "loss.projection=mlp"), 0.4), ((), 0)],
    ids=["default", "switched", "no_contrast"],
)
def test_equation_of_pst(configure, runs, switches, contrast):
    weights = (f"loss.contrast={contrast}", "loss.pseudo_ce=0.6", "loss.temperature=0.2", *switches)
    stage = train_pst.PST(
        resolve_auto(configure("gta5_to_city", "stage2_PST.yml", runs, *weights)), torch.device("cpu")
    )
    g = stage.projection.layers if switches else torch.nn.Identity()

    def expected_of(source, target):
        prototypes, terms = stage.model.classifier.weight.flatten(1), {}
        prototypes = g(torch.nn.functional.normalize(prototypes if switches else prototypes.detach()))
        for domain, batch in (("source", source), ("target", target)):
            out = stage.model(1 - batch["image"] / 255)
            terms[f"ce_{domain}"] = cross_entropy(out["logits"], batch["label"])
            feat = g(out["feat"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            if contrast:
                terms[f"contrast_{domain}"] = prototype_contrast_loss(feat, batch["label"], prototypes, 0.2)
        total = terms["ce_source"] + 0.6 * terms["ce_target"]
        if contrast:
            total = total + contrast * (terms["contrast_source"] + terms["contrast_target"])
        return dict.fromkeys(stage.networks, total), terms

    compare_step(stage, expected_of)
    trained = [p for group in stage.optimizers["model"].param_groups for p in group["params"]]
    parameters = [p for network in stage.networks.values() for p in network.parameters()]
    assert len(trained) == len(parameters) and set(trained) == set(parameters)


@pytest.mark.parametrize(
    ("arch", "form", "resolution"),
    [("deeplabv2", "kl", "full"), ("deeplab_pbal", "released", "full"), ("deeplabv2", "kl", "quarter")],
)
def test_equation_of_distillation(configure, runs, arch, form, resolution):
    """The teacher is of its own architecture and sees images in [0, 1], the student normalised ones."""
    teacher = build_model(arch, 19, "resnet18", 16).eval()
    runs.mkdir()
    recipe = {"arch": arch, "backbone": "resnet18", "output_stride": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}
    torch.save({"model": teacher.state_dict(), "recipe": recipe}, runs / "teacher.pth")
    weights = ("loss.distill=0.9", "loss.pseudo_ce=0.6", f"checkpoint={runs / 'teacher.pth'}")
    weights += (f"loss.distill_form={form}", f"distill.resolution={resolution}")
    cfg = configure("gta5_to_city", "stage3_distill.yml", runs, *weights)
    cfg.model.arch = "deeplabv2"
    stage = distill.Distillation(resolve_auto(cfg), torch.device("cpu"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (stage.model.mean, stage.model.std))

    def expected_of(source, target):
        view = (target["image"] / 255) ** 2
        logits, logits_s = stage.model(view)["logits"], stage.model(source["image"] / 255)["logits"]
        terms = {"ce_source": cross_entropy(logits_s, source["label"])}
        label, size = target["label"].where(target["label"] > 3, IGNORE), logits.shape[2:]
        if resolution == "quarter":  # of the crop: labels by nearest neighbour, logits bilinear (ProDA)
            size = [side // 4 for side in label.shape[1:]]
            label, logits = label[:, ::4, ::4], upsample(logits, size)
        terms["ce_target"] = cross_entropy(logits, label)
        terms["distill"] = distillation_loss(logits, upsample(teacher(view * std + mean)["logits"], size), form)
        return {"model": terms["ce_source"] + 0.6 * terms["ce_target"] + 0.9 * terms["distill"]}, terms

    compare_step(stage, expected_of)
    assert not any(p.requires_grad for p in stage.teacher.parameters())


@one_layout
def test_a_published_file_may_be_the_teacher(finished, configure, monkeypatch):
    monkeypatch.setattr(checkpoint, "PRETRAINED", finished.folder / "pst/checkpoints")
    given = ("checkpoint=source_only", "model.published=[last.pth]")  # which was not trained
    cfg = resolve_auto(configure(finished.layout, "stage3_distill.yml", finished.runs, *given))
    teacher, own = distill.Distillation(cfg, torch.device("cpu")).teacher, read(checkpoint.PRETRAINED / "last.pth")
    assert same(teacher.state_dict(), own["model"])


def test_the_last_online_steps_see_target_images_as_they_are(configure, runs):
    given = ("model.init=scratch", "train.iterations=4", "train.horizon=8", "pseudo.mix=0.25")
    stage = train_pst.OnlinePST(
        resolve_auto(configure("gta5_to_city", "stage2_PST_online.yml", runs, *given)), torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    images, pasted = (torch.randint(256, (2, 3, 32, 64), dtype=torch.uint8, generator=generator) for _ in range(2))
    source = {"image": pasted, "label": torch.randint(19, (2, 32, 64), dtype=torch.uint8, generator=generator)}
    with torch.no_grad():
        confidence = upsample(stage.teacher(stage.views.weak(images))["logits"], (32, 64)).softmax(1).amax(1)
    stage.cfg.pseudo.confidence = confidence.median().item()  # of random weights: close to 1 / 19
    for iteration in range(1, 5):
        stage.before_step(iteration)
        batch = stage._labelled(source, images)
        own = (batch["image"] == images).all(1)
        assert own.all() == (iteration > 2)
        assert (batch["label"][~own] == source["label"][~own]).all() and (batch["weight"][~own] == 1).all()
        weights = [weight[mask].unique() for weight, mask in zip(batch["weight"], own)]
        assert all(len(weight) == 1 and 0 < weight < 1 for weight in weights)  # one for an image


def test_links_of_a_chain_draw_apart(configure, runs, monkeypatch):
    """A stage that began with the crops of the one before would learn from a few hundred for the second time."""
    drawn = []

    def batches(dataset, *others):
        drawn.append((dataset.seed, torch.initial_seed()))
        return training_batches(dataset, *others)

    monkeypatch.setattr(loop, "training_batches", batches)

    def run(script, file, *given):
        drawn.clear()
        script.main(configure("gta5_to_city", file, runs, "train.iterations=1", "train.restart=true", *given))
        return list(drawn)

    source_only = ["name=source_only", "loss.adversarial=0"]
    longer = ["name=longer", "loss.adversarial=0", "model.init=source_only"]
    links = [run(train_bpl, "stage0_warmup.yml", *given) for given in (source_only, longer, [])]
    links += [run(train_bpl, "stage1_BPL.yml"), run(distill, "stage3_distill.yml", "checkpoint=bpl")]
    assert [len(link) for link in links] == [1, 1, 2, 2, 4]  # source alone; source and target; the same in two rounds
    every = list(itertools.chain(*links))
    assert len({seed for seed, _ in every}) == len(every)
    assert len({seed for _, seed in every}) == 6  # of dropout and colours: one a link
    assert run(train_bpl, "stage1_BPL.yml") == links[3]
    assert not {*run(train_bpl, "stage1_BPL.yml", "seed=1")} & {*every}


def test_round_2_alone_needs_round_1(configure, runs):
    with pytest.raises(UserError, match=r"distill\.rounds=\[2\].* round 1.*distill/round1/checkpoints/last\.pth"):
        distill.main(configure("gta5_to_city", "stage3_distill.yml", runs, "distill.rounds=[2]"))
    assert not runs.exists()


def test_pipeline_says_missing_pretrained_weights_before_the_first_stage(benchmarks, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path)
    overrides = [f"benchmark={benchmarks['day_to_dusk']}", f"runs={runs}", "distill.init_round1=simclr"]
    with pytest.raises(UserError, match=r"distill\.init_round1=simclr"):
        pipeline.run([*overrides, "device=cpu"])  # there are none of a ResNet-18
    with pytest.raises(UserError, match=r"r50_1x_sk0\.pth does not exist"):
        pipeline.run([*overrides, "model.backbone=resnet50"])
    assert not runs.exists()


@one_layout
@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (3, 2), (8, 1)])
def test_pseudo_labels_whatever_batch_and_workers(finished, configure, batch, workers, monkeypatch):
    given = (f"name=labels_{batch}", f"test.batch={batch}", f"data.workers={workers}")
    cfg = configure(finished.layout, "pseudo_labels.yml", finished.runs, *given)
    gen_pseudo_labels.main(cfg)
    written = {p.relative_to(cfg.run_dir): p.read_bytes() for p in cfg.run_dir.rglob("*.png")}
    before = finished.folder / "pseudo_labels"
    assert len(written) == 2 * 5 and written.keys() == {p.relative_to(before) for p in before.rglob("*.png")}
    forbid_training(monkeypatch)
    gen_pseudo_labels.main(cfg)


def train(configure, runs, *overrides):
    """Four steps of BPL from scratch, with everything random switched on."""
    given = ("model.init=scratch", "train.iterations=4", "train.horizon=8", "batchnorm.statistics=target", *overrides)
    cfg = configure("gta5_to_city", "stage1_BPL.yml", runs, *given)
    return train_bpl.main(cfg)


def killed_in_fourth_step(configure, runs, monkeypatch, *overrides):
    step, calls = train_bpl.BPL.step, []

    def killed(*args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(train_bpl.BPL, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(configure, runs, *overrides)
    monkeypatch.undo()


@pytest.mark.parametrize("way", ["killed", "extended"])
def test_two_and_two_steps_are_four_steps(configure, runs, monkeypatch, way):
    given = () if way == "killed" else ("train.accumulate=2", "train.checkpointing=true")
    expected = train(configure, runs / "at_once", *given)
    if way == "killed":  # in the fourth step, after the third was logged and the second saved
        killed_in_fourth_step(configure, runs / "in_parts", monkeypatch)
    else:
        train(configure, runs / "in_parts", "train.iterations=2", *given)
    torch.rand(7)  # the new process would be elsewhere in its stream
    assert train(configure, runs / "in_parts", *given) == expected
    folders = [runs / kind / "gta5_to_city" / "bpl" for kind in ("at_once", "in_parts")]
    assert metrics_of(folders[0]) == metrics_of(folders[1])
    once, parts = (read(folder / "checkpoints" / "last.pth") for folder in folders)
    for key in ("model", "running_statistics", "networks", "optimizers", "rng", "best", "iteration", "step"):
        assert same(once[key], parts[key]), key


def test_momenta_that_were_laid_out_otherwise_are_resumed_by_fused_optimizers(configure, runs, monkeypatch):
    for module in (loop, train_bpl):
        monkeypatch.setattr(module, "fuses", lambda device: True)
    for kind in ("at_once", "in_parts"):
        train(configure, runs / kind, "train.iterations=2")
    last = runs / "in_parts" / "gta5_to_city" / "bpl" / "checkpoints" / "last.pth"
    saved = read(last)
    for optimizer in saved["optimizers"].values():
        for state in optimizer["state"].values():
            state |= {name: value.contiguous() for name, value in state.items()}
    torch.save(saved, last)
    at_once, in_parts = (train(configure, runs / kind) for kind in ("at_once", "in_parts"))
    assert at_once == in_parts


def test_a_run_that_is_shortened_reports_the_network_it_has(configure, runs, monkeypatch):
    given = ("train.val_every=2", "train.save_every=3")
    killed_in_fourth_step(configure, runs, monkeypatch, *given)
    ended = train(configure, runs, "train.iterations=3", *given)
    assert ended["last"]["iteration"] == read(runs / "gta5_to_city/bpl/checkpoints/last.pth")["iteration"] == 3
    assert train(configure, runs, "train.iterations=3", *given) == ended


def test_restart_begins_anew(configure, runs):
    train(configure, runs, "train.iterations=2")
    train(configure, runs, "train.iterations=2", "seed=1", "train.restart=true")
    folder = runs / "gta5_to_city" / "bpl"
    assert yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))["seed"] == 1
    assert [entry["step"] for entry in metrics_of(folder)] == [1, 2, 2]
    last = folder / "checkpoints" / "last.pth"
    assert read(last)["config"]["seed"] == 1
    with pytest.raises(UserError, match=r"last\.pth belongs to this run, .*: give the new run a name="):
        train(configure, runs, "model.init=bpl", "train.restart=true")
    assert last.is_file()


def test_restart_leaves_no_checkpoint_of_the_old_run(tmp_path):
    files = checkpoint.RunFiles(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("last", "previous", "best", "not_finite", "teacher"):
        files.of(name).touch()
    (tmp_path / "panels").mkdir()
    for name in ("panels/000002.png", "metrics.json", "report.html", "notes.txt"):
        (tmp_path / name).touch()
    files.clear()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["notes.txt"]  # the user's own


def test_target_statistics_stand_in_the_checkpoint_and_running_ones_beside(configure, runs):
    train(configure, runs, "train.iterations=2")
    state = read(runs / "gta5_to_city" / "bpl" / "checkpoints" / "last.pth")
    statistics = {k for k in state["model"] if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert set(state["running_statistics"]) == statistics
    assert not torch.equal(
        state["model"]["backbone.bn1.running_mean"], state["running_statistics"]["backbone.bn1.running_mean"]
    )

    def confidence(kind):
        overrides = (f"name=labels_{kind}", f"batchnorm.statistics={kind}", "train.batch_target=2")
        cfg = configure("gta5_to_city", "pseudo_labels.yml", runs, *overrides)
        gen_pseudo_labels.main(cfg)
        paths = sorted((cfg.run_dir / "confidence").rglob("*.png"))
        return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)

    saved, target, running = map(confidence, ("saved", "target", "running"))
    assert abs(saved - target).max() <= 1  # recomputed on the same images; one level of rounding
    assert abs(saved - running).max() > 1

    scores = {}
    for kind in ("saved", "target", "running"):
        overrides = ("checkpoint=bpl", f"batchnorm.statistics={kind}", f"name=test_{kind}")
        scores[kind] = test.main(configure("gta5_to_city", "test_from_gta_to_city.yml", runs, *overrides))
    assert scores["saved"]["iou"] == pytest.approx(scores["target"]["iou"], abs=0.1)
    assert scores["saved"]["iou"] != scores["running"]["iou"]


def test_precision_is_settled_and_stays_and_changes_the_losses_little(configure, runs):
    folder, given = runs / "gta5_to_city", {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
    for name, precision in given.items():
        train(configure, runs, "train.iterations=1", f"train.precision={precision}", f"name={name}")
    exact, *half = (metrics_of(folder / name)[0]["loss"] for name in given)
    train(configure, runs, "train.iterations=1", "train.precision=auto", "name=auto")
    for losses in half:
        assert losses == pytest.approx(exact, rel=0.05) and losses != exact  # bfloat16 has eight bits

    train(configure, runs, "train.iterations=2", "train.precision=auto", "name=bfloat16")  # auto: as it was
    for name, precision in (("auto", default_precision(torch.device("cpu"))), ("bfloat16", "bfloat16")):
        assert yaml.safe_load((folder / name / "config.yml").read_text("utf-8"))["train"]["precision"] == precision
        assert read(folder / name / "checkpoints" / "last.pth")["config"]["train"]["precision"] == precision
    with pytest.raises(UserError, match=r"another experiment \(train\.precision: bfloat16 -> float32\)"):
        train(configure, runs, "train.precision=float32", "name=bfloat16")


def test_diverging_training_stops_with_a_line(configure, runs):
    with pytest.raises(UserError, match=r"^(loss|gradient of) \w+ is (nan|inf) in step \d") as error:
        train(configure, runs, "train.lr=1e30")
    assert "\n" not in str(error.value)


def test_validation_without_any_label_is_no_crash(configure, runs, monkeypatch):
    monkeypatch.setattr("data.check.CHECKED", 0)
    overrides = ("model.init=scratch", "data.val.id_map={200: car}")
    cfg = configure("day_to_dusk", "stage0_warmup.yml", runs, *overrides)
    train_bpl.main(cfg)
    json.loads((cfg.run_dir / "metrics.json").read_text(), parse_constant=work)  # NaN is no JSON


@pytest.fixture(scope="module")
def summary(benchmarks, tmp_path_factory):
    """The pipeline's overrides and what it returned."""
    runs = tmp_path_factory.mktemp("pipeline")
    overrides = [f"benchmark={benchmarks['day_to_dusk']}", f"runs={runs}", "device=cpu"]
    yield overrides, runs / "day_to_dusk", pipeline.run(overrides, control=False)
    shutil.rmtree(runs)


def test_pipeline_sums_up_every_stage(summary):
    _, folder, returned = summary
    assert json.loads((folder / "summary.json").read_text()) == returned
    rows = returned["stages"]
    assert list(rows) == ["source_only", "source_only_target_bn", "warmup", "bpl", "pst", "distill"]
    for stage, run in (
        ("source_only",) * 2,
        ("warmup",) * 2,
        ("bpl",) * 2,
        ("pst",) * 2,
        ("distill", "distill/round2"),
    ):
        metrics = json.loads((folder / run / "metrics.json").read_text())
        assert rows[stage]["miou"] == metrics["last"]["miou"] and list(rows[stage]["iou"]) == FOLDER_NAMES
    assert rows["source_only_target_bn"]["miou"] == rows["source_only"]["miou_target_bn"]
    panel = Image.open(folder / "panel.png")
    assert panel.width > 7 * 300  # image, five stages, truth
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "mIoU by stage" in page and "data:image/jpeg" in page and (folder / "pst" / "report.html").is_file()
    assert set(metrics_of(folder / "source_only")[0]["loss"]) == {"ce_source"}


def test_second_call_of_the_pipeline_does_no_work(summary, monkeypatch):
    overrides, _, returned = summary
    forbid_training(monkeypatch)
    monkeypatch.setattr(test, "main", work)
    assert pipeline.run(overrides, control=False) == returned
    with pytest.raises(UserError, match=r"test\.flip: False -> True"):  # other modes are other scores
        pipeline.run([*overrides, "test.flip=true"], control=False)
