"""What is checked before a script's work starts."""

import re

import pytest

from data.taxonomy import class_set
from distill import teacher_config
from models import WeightFile, read_weights
from utils.config import UserError
from utils.engine import checkpoint, setup
from utils.engine.setup import build_network, check_inputs, choose_device, prepare_data, resolve_auto


@pytest.fixture
def cfg(configure, tmp_path):
    return resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", tmp_path))


PBAL = {"arch": "deeplab_pbal", "backbone": "resnet101", "output_stride": 16, "dilations": [6, 12, 18], "bn_clr": False}
AUTO = dict.fromkeys((*PBAL, "normalization"), "auto")


def settled(cfg, given=(), file=None, alone=False, classes=19):
    """The model section after `resolve_auto`, the user having set `given`."""
    for key, value in (AUTO | dict(given)).items():
        setattr(cfg.model, key, value)
    state = {} if alone else {"classifier.weight": range(classes)}
    weights = None if file is None else WeightFile("x.pkl", "PBAL", state, file, alone)
    model = resolve_auto(cfg, weights).model
    return tuple(getattr(model, key) for key in AUTO)


def test_settings_follow_the_file_then_the_default(cfg):
    v2 = ("deeplabv2", "resnet101", 8, [6, 12, 18, 24], False)
    assert settled(cfg) == (*v2, "auto")
    assert settled(cfg, {"arch": "deeplab_pbal"}) == (*PBAL.values(), "auto")
    own = {"output_stride": 16, "dilations": [2, 4]}
    assert settled(cfg, {"output_stride": 16}) == (*v2[:2], 16, [3, 6, 9, 12], False, "auto")
    assert settled(cfg, own) == settled(cfg, {}, own) == (*v2[:2], 16, [2, 4], False, "auto")
    assert settled(cfg, {}, PBAL | {"normalization": "imagenet"}) == (*PBAL.values(), "imagenet")
    assert settled(cfg, {"arch": "deeplab_pbal", "output_stride": 16}, PBAL) == (*PBAL.values(), "auto")
    simclr = {"normalization": "none", "bn_clr": True}
    assert settled(cfg, {}, simclr, alone=True) == (*v2[:4], True, "none")
    # A backbone's settings are advice: it may be trained on otherwise.
    assert settled(cfg, {"normalization": "imagenet", "bn_clr": False}, simclr, alone=True) == (*v2, "imagenet")
    assert settled(cfg, {"arch": "deeplab_pbal"}, simclr, alone=True) == (*PBAL.values(), "none")
    assert cfg.model.output_stride == "auto"  # the caller's own is left alone


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arch", "deeplabv2"),
        ("backbone", "resnet50"),
        ("output_stride", 8),
        ("dilations", [3, 6]),
        ("bn_clr", True),
        ("normalization", "none"),
    ],
)
def test_contradiction_of_the_file_is_said(cfg, key, value):
    told = PBAL | {"normalization": "imagenet"}
    said = re.escape(f"model.{key}={told[key]}, not {value}")
    with pytest.raises(UserError, match=rf"x\.pkl \(PBAL\) .*{said}: give model\.{key}=auto$"):
        settled(cfg, {key: value}, told)


def test_contradictions_of_the_file_are_said_at_once(cfg):
    with pytest.raises(UserError, match=r"give model\.arch=auto model\.output_stride=auto$"):
        settled(cfg, {"arch": "deeplabv2", "output_stride": 8}, PBAL)


def test_classes_follow_the_file_where_they_are_auto(cfg):
    cfg.data.class_set = "auto"
    for classes in (16, 19):
        weights = WeightFile("x.pkl", "PBAL", {"classifier.weight": range(classes)})
        assert len(class_set(resolve_auto(cfg, weights).data)) == classes
    with pytest.raises(UserError, match=r"x\.pkl has 7 classes"):
        resolve_auto(cfg, WeightFile("x.pkl", "PBAL", {"classifier.weight": range(7)}))


def test_batch_of_one_is_refused_where_pooled_features_are_normalised(cfg):
    cfg.train.batch_target = 1
    settled(cfg)
    with pytest.raises(UserError, match="deeplab_pbal"):
        settled(cfg, {"arch": "deeplab_pbal"})
    assert settled(teacher_config(cfg), {}, PBAL)[0] == "deeplab_pbal"  # a teacher does not learn


def test_a_teacher_is_what_its_file_says_and_may_be_a_published_one(cfg):
    cfg.model.output_stride, cfg.model.published = 16, ["theirs.pkl"]
    cfg.train.checkpointing = True
    teacher = teacher_config(cfg)
    assert teacher.model.output_stride == "auto" and teacher.model.published == ["theirs.pkl"]
    assert not teacher.train.checkpointing  # some networks refuse it; a teacher needs no gradient


def test_own_checkpoints_tell_all(cfg, tmp_path):
    cfg.model.normalization = "none"
    cfg = resolve_auto(cfg)
    model = build_network(cfg, choose_device(cfg))
    checkpoint.save_checkpoint(
        tmp_path / "x.pth", {"model": model.state_dict(), "recipe": checkpoint.recipe(cfg, model)}
    )
    told = read_weights(tmp_path / "x.pth").settings
    assert told == {key: getattr(cfg.model, key) for key in AUTO} and told["normalization"] == "none"
    (tmp_path / "x.pth").unlink()


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "hpu"])
def test_device_that_is_not_there(cfg, name):
    cfg.device = name
    with pytest.raises(UserError, match=f"^device={name} cannot be used: .+$"):
        choose_device(cfg)


def test_foreign_folder_is_not_drawn_into(cfg, tmp_path):
    cfg.data.toy_root = str(tmp_path / "photos")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"photos is in use and holds no toy\.json"):
        prepare_data(cfg)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["mine.txt"]


def test_network_follows_the_seed(cfg):
    first, again = (build_network(cfg, choose_device(cfg)).classifier.weight for _ in range(2))
    cfg.seed = 1
    other = build_network(cfg, choose_device(cfg)).classifier.weight
    assert (first == again).all() and (first != other).any() and len(first) == 19


def test_every_problem_is_said_once():
    def fail(message):
        raise UserError(message)

    assert check_inputs(lambda: 1, lambda: None) == [1, None]
    with pytest.raises(UserError) as error:
        check_inputs(lambda: fail("no images"), lambda: 1, lambda: fail("no weights"), lambda: fail("no images"))
    assert str(error.value).splitlines() == ["no images", "error: no weights"]  # `guarded` puts "error: " before all


@pytest.mark.parametrize(
    ("given", "compiles"),
    [
        ("train.iterations=5000", True),
        ("train.iterations=4999", False),
        ("train.iterations=5000 train.deterministic=true", False),
        ("train.iterations=5000 model.backbone=timm/resnet18", False),
        ("train.iterations=5000 device=cpu", False),
        ("train.iterations=5000 train.precision=float32", False),
        ("train.iterations=5000 train.precision=float16", False),
        ("train.iterations=5000 train.checkpointing=true", False),
        ("train.iterations=5000 train.accumulate=2", False),
        ("train.iterations=5000 model.arch=deeplab_pbal", False),
        ("train.iterations=5000 train.compile=false", False),
        ("train.iterations=10 train.compile=true", True),
    ],
)
def test_compile_auto(configure, tmp_path, monkeypatch, given, compiles):
    """A long run of a ResNet on one GPU is compiled by itself."""
    monkeypatch.setattr(setup, "_device_name", lambda cfg: "cpu" if cfg.device == "cpu" else "cuda:0")
    monkeypatch.setattr(setup, "refuse_missing_compiler", lambda device: None)
    given = ["device=auto", "train.precision=bfloat16", "train.horizon=9000", *given.split()]
    assert resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", tmp_path, *given)).train.compile is compiles


def test_compile_auto_without_compiler(configure, tmp_path, monkeypatch, capsys):
    def no_compiler(function):
        raise RuntimeError("no Triton")

    monkeypatch.setattr(setup, "_device_name", lambda cfg: "cuda:0")
    monkeypatch.setattr(setup.torch, "compile", no_compiler)
    given = ("train.iterations=5000", "train.horizon=9000", "train.precision=bfloat16")
    assert resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", tmp_path, *given)).train.compile is False
    assert "steps stay slower: torch.compile does not work on cuda:0 here" in capsys.readouterr().out
