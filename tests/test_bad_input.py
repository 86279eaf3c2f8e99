"""What is wrong is said in one line that names it, before anything is half-written."""

import json
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import HEIGHT, WIDTH
from PIL import Image
from survival import use_tiny_networks

import distill
import gen_pseudo_labels
import test
import train_bpl
import train_pst
from utils.config import ROOT
from utils.engine.checkpoint import file_hash
from utils.engine.command_line import guarded
from utils.engine.setup import checked_config

STAGES = {
    "warmup": (train_bpl, "stage0_warmup.yml"),
    "bpl": (train_bpl, "stage1_BPL.yml"),
    "labels": (gen_pseudo_labels, "pseudo_labels.yml"),
    "pst": (train_pst, "stage2_PST.yml"),
    "distill": (distill, "stage3_distill.yml"),
    "test": (test, "test_from_gta_to_city.yml"),
}
GTA5, CITY, RUNS, OWN = "GTA5", "Cityscapes", "runs", "own"
USUAL = ["benchmark=gta5_to_city.yml", f"data.source.root={GTA5}", f"data.target.root={CITY}", f"data.val.root={CITY}"]
LABELS = f"{RUNS}/gta5_to_city/pseudo_labels"
CITY_LABEL = f"{CITY}/gtFine/val/aachen/aachen_000002_000019_gtFine_labelIds.png"


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny_networks(monkeypatch)
        yield


@pytest.fixture(scope="module")
def whole(trees, benchmarks, tmp_path_factory):
    """Datasets and finished runs, to be copied and damaged."""
    root = tmp_path_factory.mktemp("whole")
    for name, folder in (("gta5", GTA5), ("cityscapes", CITY), ("day", OWN)):
        shutil.copytree(trees[name].root, root / folder)
    shutil.copy(benchmarks["gta5_to_city"], root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        for stage in ("warmup", "bpl", "labels"):
            script, file = STAGES[stage]
            script.main(checked_config(ROOT / "configs" / file, USUAL))
    return root


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy of it as the working folder."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def png(width, height, rows=b""):
    """A PNG of a few bytes that claims any size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write(path, content):
    def damage(place):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content)

    return damage


def cut(path):
    return lambda place: (place / path).write_bytes((place / path).read_bytes()[: (place / path).stat().st_size // 2])


def fill(path, value, size=(WIDTH, HEIGHT)):
    return lambda place: Image.fromarray(np.full(size[::-1], value, np.uint8)).save(place / path)


def fill_all(pattern, value):
    def damage(place):
        for path in place.glob(pattern):
            fill(path.relative_to(place), value)(place)

    return damage


def remove(*paths):
    def damage(place):
        for path in paths:
            shutil.rmtree(place / path) if (place / path).is_dir() else (place / path).unlink()

    return damage


def manifest(**changes):
    def damage(place):
        path = place / LABELS / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def first_label(place):
    return sorted((place / LABELS / "labels").rglob("*.png"))[0]


def damaged_state(place):
    for name in ("last", "previous"):
        (place / f"{RUNS}/gta5_to_city/warmup/checkpoints/{name}.pth").write_bytes(b"PK\x03\x04 cut")


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def backbone(place):
    torch.save(torchvision.models.resnet18().state_dict(), place / "net.pth")


def evil(place):
    with open(place / "evil.pth", "wb") as file:
        pickle.dump({"model": Attack()}, file)


def other_classes(place):
    torch.save({"model": {"classifier.weight": torch.zeros(7, 8, 1, 1)}, "recipe": {}}, place / "seven.pth")


def retrained(place):
    path = place / RUNS / "gta5_to_city/bpl/checkpoints/last.pth"
    torch.save(torch.load(path, weights_only=True) | {"iteration": 9}, path)


def linked(path):
    """Moved away, with a link in its place."""

    def damage(place):
        moved = place / "elsewhere" / path
        moved.parent.mkdir(parents=True)
        (place / path).rename(moved)
        (place / path).symlink_to(moved)

    return damage


def own_yaml(**changes):
    """The user's own benchmark, bad.yml."""

    def damage(place):
        section = {"format": "folder", "root": OWN, "images": ["day/photos/*/*.jpg"]}
        labelled = section | {"labels": "truth/day/{parent}/{stem}_L.png", "strip": "_rgb", "id_map": {0: "a", 1: "b"}}
        data = {"class_set": "custom", "class_names": ["a", "b"], "base_width": 0, "crop": [64, 32], "workers": 0}
        content = {"data": data | {"source": labelled, "target": dict(section), "val": dict(labelled)}}
        for key, value in changes.items():
            part = content
            *parents, leaf = key.split("__")
            for name in parents:
                part = part[name]
            part[leaf] = value
        (place / "bad.yml").write_text(yaml.safe_dump(content))

    return damage


def twins(place):
    own_yaml(data__target__images=["day/photos/*/*"])(place)
    photo = sorted((place / OWN).glob("day/photos/*/*.jpg"))[0]
    Image.open(photo).save(photo.with_suffix(".png"))


def nothing(place):
    pass


def case(name, stage, overrides, damage, *said, status=1):
    return pytest.param(stage, overrides.split(), damage, said, status, id=name)


CASES = [
    case("no dataset", "warmup", "data.source.root=nowhere", nothing, "nowhere does not exist"),
    case("dataset is a file", "warmup", "data.source.root=file", write("file", b""), "file does not exist"),
    case("no images", "warmup", "", remove(f"{GTA5}/images"), "no gta5 image matches images/*.png below"),
    case("image missing", "warmup", "", remove(f"{GTA5}/labels/00002.png"), "labels/00002.png"),
    case("image cut", "warmup", "", cut(f"{GTA5}/images/00002.png"), "cannot read image", "00002.png"),
    case("image empty", "warmup", "", write(f"{GTA5}/images/00003.png", b""), "empty", "images/00003.png"),
    case("image is text", "warmup", "", write(f"{GTA5}/images/00003.png", b"hello"), "cannot read image", "00003.png"),
    case("image is PostScript", "warmup", "", write(f"{GTA5}/images/00003.png", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "00003"),
    case(
        "image of absurd size", "warmup", "", write(f"{GTA5}/images/00001.png", png(30000, 30000)), "images/00001.png"
    ),
    case("image of large size", "warmup", "", write(f"{GTA5}/images/00001.png", png(20000, 10000)), "exceeds limit"),
    case("label cut", "warmup", "", cut(f"{GTA5}/labels/00004.png"), "cannot read label", "00004.png"),
    case("label empty", "warmup", "", write(f"{GTA5}/labels/00004.png", b""), "empty", "labels/00004.png"),
    case(
        "label of absurd size", "warmup", "", write(f"{GTA5}/labels/00001.png", png(10**6, 10**6)), "labels/00001.png"
    ),
    case("label of another size", "warmup", "", fill(CITY_LABEL, 7, (50, 40)), "96x64", "is 50x40", "aachen_000002"),
    case("label id of no class", "warmup", "", fill(CITY_LABEL, 77), "holds id 77", "aachen_000002"),
    case("GTA5 label id of no class", "warmup", "", fill(f"{GTA5}/labels/00002.png", 99), "holds id 99", "00002.png"),
    case("source all void", "warmup", "", fill_all(f"{GTA5}/labels/*.png", 0), "no pixel of any class", "data.source"),
    case(
        "val all void", "warmup", "", fill_all(f"{CITY}/gtFine/val/*/*.png", 255), "no pixel of any class", "data.val"
    ),
    case("empty split", "warmup", "data.val.split=test", nothing, "no cityscapes image matches leftImg8bit/test"),
    case("no split.mat", "warmup", "data.source.split=train", nothing, "split.mat"),
    case("bad split.mat", "warmup", "data.source.split=train", write(f"{GTA5}/split.mat", b"x" * 300), "split.mat"),
    case(
        "cut image met in training",
        "warmup",
        "unchecked train.iterations=4 train.val_every=9 train.save_every=9",
        cut(f"{GTA5}/images/00002.png"),
        "00002.png",
    ),
    case(
        "… by a process",
        "warmup",
        "unchecked data.workers=1 train.iterations=4 train.val_every=9 train.save_every=9",
        cut(f"{GTA5}/images/00002.png"),
        "00002.png",
    ),
    case(
        "too many skipped",
        "warmup",
        "data.on_error=skip none_skipped train.iterations=4 train.val_every=9 train.save_every=9",
        cut(f"{GTA5}/images/00002.png"),
        "more than 0 files",
        "00002.png",
    ),
    case(
        "nothing to skip to",
        "warmup",
        "data.on_error=skip unchecked",
        fill_all(f"{GTA5}/labels/*.png", 99),
        "10 samples in a row cannot be used",
    ),
    case("batch beyond source", "warmup", "train.batch_source=6", nothing, "train.batch_source=6", "data.source: 5"),
    case("batch beyond target", "warmup", "train.batch_target=9", nothing, "train.batch_target=9", "data.target: 5"),
    case("no pseudo labels", "pst", "pseudo_labels=none", nothing, "none/manifest.json", "gen_pseudo_labels.py"),
    case("manifest cut", "pst", "", cut(f"{LABELS}/manifest.json"), "manifest.json is not valid JSON"),
    case("manifest a list", "pst", "", write(f"{LABELS}/manifest.json", b"[]"), "manifest.json is not valid JSON"),
    case("manifest deep", "pst", "", write(f"{LABELS}/manifest.json", b"[" * 10**5), "manifest.json is not valid JSON"),
    case("pseudo label missing", "pst", "", lambda p: first_label(p).unlink(), "1 of 5 pseudo labels are missing"),
    case("pseudo label empty", "pst", "", lambda p: first_label(p).write_bytes(b""), "1 of 5 pseudo labels"),
    case("pseudo label cut", "pst", "", lambda p: cut(first_label(p))(p), "cannot read label", "pseudo_labels"),
    case("pseudo label id of no class", "pst", "", lambda p: fill(first_label(p), 19)(p), "holds id 19"),
    case(
        "pseudo labels stale", "pst", "", retrained, "are stale", "bpl/checkpoints/last.pth has been trained on since"
    ),
    case("… behind a link", "pst", "", lambda p: (linked(LABELS)(p), retrained(p)), "are stale"),
    case(
        "pseudo labels of other classes", "pst", "", manifest(classes={"a": {}}), "pseudo_labels are of other classes"
    ),
    case(
        "two images, one pseudo label",
        "labels",
        f"benchmark=bad.yml checkpoint={RUNS}/gta5_to_city/bpl/checkpoints/last.pth",
        twins,
        ".jpg and ",
        ".png would",
    ),
    case(
        "nothing sure enough", "labels", "name=x pseudo.threshold=1 pseudo.selection=constant", nothing, "threshold=1"
    ),
    case("other pseudo labels there", "labels", "pseudo.keep=0.1", nothing, "keep: 0.5 -> 0.1", "train.restart=true"),
    case("K differs", "warmup", "name=x model.init=seven.pth", other_classes, "seven.pth", "7-class file, 19-class"),
    case("weights missing", "bpl", "name=x model.init=none.pth", nothing, "no weights at /", "/none.pth"),
    case("weights of no run", "bpl", "name=x model.init=nobody", nothing, "no weights of 'nobody'"),
    case("weights cut", "bpl", "name=x", cut(f"{RUNS}/gta5_to_city/warmup/checkpoints/last.pth"), "warmup/checkpoints"),
    case("weights are text", "bpl", "name=x model.init=a.pth", write("a.pth", b"hello"), "a.pth is not a weight file"),
    case("weights hold code", "bpl", "name=x model.init=evil.pth", evil, "evil.pth is refused: it holds"),
    case("weights to test missing", "test", "checkpoint=none.pth", nothing, "no weights at /", "/none.pth"),
    case("a backbone to test", "test", "checkpoint=net.pth", backbone, "net.pth", "holds a backbone alone"),
    case(
        "a backbone to label by", "labels", "name=x checkpoint=net.pth", backbone, "net.pth", "holds a backbone alone"
    ),
    case("teacher missing", "distill", "checkpoint=none.pth", nothing, "no weights at /", "/none.pth"),
    case(
        "both states damaged",
        "warmup",
        "name= train.iterations=3",
        damaged_state,
        "last.pth",
        "previous.pth",
        "restart=true",
    ),
    case(
        "another experiment",
        "warmup",
        "name= train.lr=0.5",
        nothing,
        "holds another experiment (train.lr: 0.001 -> 0.5)",
    ),
    case("another stage", "bpl", "name=warmup", nothing, "warmup holds another experiment (stage: warmup -> bpl, "),
    case("longer than asked", "warmup", "name= train.iterations=1", nothing, "steps, more than train.iterations=1"),
    case("runs is a file", "warmup", "runs=file", write("file", b""), "file"),
    case(
        "checkpoints is a file",
        "warmup",
        "name=new",
        write(f"{RUNS}/gta5_to_city/new/checkpoints", b""),
        "cannot write",
        "new/checkpoints",
    ),
    case("folder cannot be written", "warmup", "runs=/proc/runs", nothing, "/proc/runs"),
    case("unknown device", "warmup", "device=warp", nothing, "device=warp cannot be used"),
    case("no such GPU", "warmup", "device=cuda:63", nothing, "device=cuda:63 cannot be used"),
    case("unknown backbone", "warmup", "model.backbone=resnet19", nothing, "model.backbone='resnet19'", status=2),
    case("unknown key", "warmup", "train.itertions=3", nothing, "'train.itertions'", "train.iterations", status=2),
    case("stage given", "warmup", "stage=bpl", nothing, "stage= cannot be given", status=2),
    case("wrong type", "warmup", "train.iterations=many", nothing, "train.iterations='many'", status=2),
    case("out of range", "warmup", "train.lr=-1", nothing, "train.lr=-1.0", status=2),
    case("not YAML", "warmup", "benchmark=bad.yml", write("bad.yml", b"a: [b"), "bad.yml is not valid YAML", status=2),
    case(
        "YAML with code",
        "warmup",
        "benchmark=bad.yml",
        write("bad.yml", b"a: !!python/name:os.system"),
        "bad.yml",
        status=2,
    ),
    case(
        "key twice",
        "warmup",
        "benchmark=bad.yml",
        write("bad.yml", b"train: {lr: 1}\ndata: {}\ntrain: {}"),
        "bad.yml: key 'train' stands twice, in lines 1 and 3",
        status=2,
    ),
    case("no YAML there", "warmup", "benchmark=none.yml", nothing, "none.yml: No such file", status=2),
    case(
        "untaught class",
        "warmup",
        "benchmark=bad.yml",
        own_yaml(data__source__id_map={0: "a"}),
        "no label id for class 'b'",
        status=2,
    ),
    case("name leads out", "warmup", "name=../../x", nothing, "name='../../x'", status=2),
    case("name is no folder", "warmup", "name=.", nothing, "name='.'", status=2),
    case("no val", "warmup", "data.val.root=", nothing, "data.val is missing, or has no root"),
    case("no target", "labels", "data.target.root=", nothing, "data.target is missing, or has no root"),
    case("no val to test on", "test", "checkpoint=bpl data.val.root=", nothing, "a dataset has no root"),
    case(
        "stage in a benchmark", "warmup", "benchmark=bad.yml", own_yaml(stage="bpl"), "stage does not belong", status=2
    ),
    case(
        "stages with a key of another stage",
        "warmup",
        "benchmark=bad.yml",
        own_yaml(stages={"pst": {"pseudo": {"threshold": 0.4}}}),
        "pseudo.threshold in stages.pst of",
        "not read by stage pst, but by pseudo_labels",
        status=2,
    ),
    case("pseudo labels lead out", "pst", "pseudo_labels=/tmp", nothing, "pseudo_labels='/tmp'", status=2),
    case(
        "benchmark leads out",
        "warmup",
        "benchmark=...yml",
        lambda p: (own_yaml()(p), os.rename("bad.yml", "...yml")),
        "...yml",
        status=2,
    ),
    case(
        "YAML writes elsewhere",
        "warmup",
        "benchmark=bad.yml",
        own_yaml(runs="/tmp/x"),
        "runs='/tmp/x' in a YAML",
        status=2,
    ),
    case(
        "YAML draws elsewhere",
        "warmup",
        "benchmark=bad.yml",
        own_yaml(data__toy_root="../x"),
        "data.toy_root='../x'",
        status=2,
    ),
    case(
        "images lead out",
        "warmup",
        "benchmark=bad.yml model.init=scratch",
        own_yaml(data__target__images=["../*/*.png"]),
        "without '..'",
    ),
]


def refusal(capfd, stage, overrides, debug=False):
    """Exit status and the lines on stderr of a new run, or of what `name=` says."""
    script, file = STAGES[stage]
    usual = [] if any(o.startswith("benchmark=") for o in overrides) else USUAL
    fresh = ["name=fresh"] if stage in ("warmup", "bpl") else []
    given = {o.split("=")[0]: o for o in (*usual, *fresh, "device=cpu", *overrides)}
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        guarded(lambda: script.main(checked_config(ROOT / "configs" / file, list(given.values()))), debug)
    return left.value.code, capfd.readouterr().err.splitlines()


@pytest.mark.parametrize(("stage", "overrides", "damage", "said", "status"), CASES)
def test_one_line_names_it(place, capfd, monkeypatch, stage, overrides, damage, said, status):
    for word, constant in (("unchecked", "data.check.CHECKED"), ("none_skipped", "utils.engine.loop.MAX_SKIPPED")):
        if word in overrides:
            monkeypatch.setattr(constant, 0)
            overrides = [o for o in overrides if o != word]
    damage(place)
    weights = {p: file_hash(p) for p in place.rglob("*.pth")}
    code, lines = refusal(capfd, stage, overrides)
    assert code == status and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(part in lines[0] for part in said), lines[0]
    assert "train.checkpointing" not in lines[0]  # the advice for want of memory
    assert not list(place.rglob("*.partial"))
    assert weights == {p: file_hash(p) for p in place.rglob("*.pth")}  # nothing trained, nothing lost
    assert not (place / "attacked").exists()


def test_every_problem_has_its_line(place, capfd):
    code, lines = refusal(capfd, "warmup", ["data.crop=[512,256]", "data.val.root=nowhere"])
    assert code == 1 and len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    for name, line in zip(("data.source", "data.target"), lines):
        assert f"data.crop=[512, 256] is larger than the images of {name}: 96x64" in line


def test_debug_shows_the_traceback(place, capfd):
    for debug in (False, True):
        code, lines = refusal(capfd, "warmup", ["data.source.root=nowhere"], debug)
        assert code == 1 and any("Traceback" in line for line in lines) == debug


def test_skipped_files_are_counted_and_left_out_of_pseudo_labels(place, benchmarks, configure, capsys):
    images = sorted((place / CITY / "leftImg8bit/train").rglob("*.png"))
    images[1].write_bytes(images[1].read_bytes()[:200])
    (place / GTA5 / "images/00002.png").write_bytes(b"no image")
    roots = (f"data.source.root={GTA5}", f"data.target.root={CITY}", f"data.val.root={CITY}", "data.on_error=skip")

    def run(script, file, *overrides):
        return script.main(configure("gta5_to_city", file, place / RUNS, *roots, *overrides))

    run(train_bpl, "stage1_BPL.yml", "name=skipping", "train.iterations=4")
    folder = place / RUNS / "gta5_to_city"
    log = (folder / "skipping" / "log.txt").read_text()
    assert log.count("left out (") == 2 and "images/00002.png" in log and images[1].name in log
    assert '"unreadable_files": 2' in (folder / "skipping" / "metrics.jsonl").read_text()
    made = run(gen_pseudo_labels, "pseudo_labels.yml", "name=some")
    assert [name.rsplit("/")[-1] for name in made["left_out"]] == [images[1].stem]
    assert f"{images[1].name}: the file is cut off" in capsys.readouterr().out.split("left out: ")[1].splitlines()[0]
    run(train_pst, "stage2_PST.yml", "pseudo_labels=some")
    assert ", 4 target " in (folder / "pst" / "log.txt").read_text()
