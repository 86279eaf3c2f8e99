"""Configuration: what is refused, in which words, and what wins over what."""

import re

import pytest
import yaml
from conftest import CUSTOM

from data.taxonomy import class_set
from utils.config import ROOT, ConfigError, UserError
from utils.engine.command_line import guarded, run_cli
from utils.engine.setup import load_config

BPL = ROOT / "configs" / "stage1_BPL.yml"
STAGE_FILES = sorted((ROOT / "configs").glob("*.yml"))
BENCHMARKS = sorted(path.stem for path in (ROOT / "configs" / "benchmarks").glob("*.yml"))


def refused(match, *overrides, stage_file=BPL):
    """The config is refused with one line."""
    with pytest.raises(ConfigError, match=match) as error:
        load_config(stage_file, list(overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BENCHMARKS)  # "benchmark" is a fixture of the plugin pytest-benchmark
@pytest.mark.parametrize("stage_file", STAGE_FILES, ids=lambda path: path.stem)
def test_every_stage_goes_with_every_benchmark(stage_file, name):
    cfg = load_config(stage_file, [f"benchmark={name}"])
    assert cfg.benchmark_name == name


@pytest.mark.parametrize("file", ["pseudo_labels.yml", "test_from_gta_to_city.yml"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_network_is_used_as_it_was_validated(name, file):
    """No benchmark decides for a network which statistics it had, nor asks for target images that `test.images` lacks."""
    cfg = load_config(ROOT / "configs" / file, [f"benchmark={name}"])
    assert cfg.batchnorm.statistics == "saved"


def test_the_released_recipe_is_the_default():
    cfg = load_config(BPL)
    assert (cfg.benchmark, cfg.stage) == ("gta5_to_cityscapes", "bpl")
    assert (cfg.model.backbone, cfg.model.init) == ("auto", "warmup")
    assert (cfg.train.lr, cfg.train.iterations, cfg.train.horizon) == (1e-4, 60_000, 90_000)
    assert (cfg.loss.adversarial, cfg.loss.bidirectional, cfg.data.crop) == (0.01, 0.1, [896, 512])
    assert load_config(ROOT / "configs/stage2_PST.yml").train.lr == 2.5e-4
    assert load_config(ROOT / "configs/stage0_warmup.yml").loss.bidirectional == 0
    assert len(class_set(load_config(ROOT / "configs/test_from_synthia_to_city.yml").data)) == 16


def test_unknown_key_names_the_nearest():
    refused(
        r"unknown key 'train\.iteratoins' in the command line; nearest is 'train\.iterations'", "train.iteratoins=3"
    )
    refused(r"unknown key 'iterations' .* nearest is 'train\.iterations'", "iterations=3")
    refused(r"'train\.lr' is not of the form key=value", "train.lr")


def test_unknown_key_of_a_file_names_the_file(tmp_path):
    (tmp_path / "mine.yml").write_text("data: {crops: [64, 64]}")
    refused(r"unknown key 'data\.crops' in .*mine\.yml; nearest is 'data\.crop'", f"benchmark={tmp_path / 'mine.yml'}")
    refused(r"unknown key 'data\.crops' in .*mine\.yml", stage_file=tmp_path / "mine.yml")
    (tmp_path / "mine.yml").write_text("train: 3")
    refused(r"train in .*mine\.yml is a section", stage_file=tmp_path / "mine.yml")
    for section in (
        "{pst: {train: {lrr: 1}}}",
        "{pts: {train: {lr: 1}}}",
        "{pst: 3}",
        "[1]",
    ):  # of other stages as well
        (tmp_path / "mine.yml").write_text(f"stages: {section}")
        refused(r"stages(\.pst|\.pts)? .*mine\.yml", f"benchmark={tmp_path / 'mine.yml'}")


@pytest.mark.parametrize(
    "override",
    [
        "train.iterations=many",
        "train.iterations=2.5",
        "train.iterations=true",
        "train.lr=fast",
        "train.lr=",
        "data.jitter=1",
        "data.crop=64",
        "model.dilations=6",
        "data.crop=[64.5, 32]",
        "data.source.id_map=[1]",
    ],
)
def test_wrong_type_names_the_key(override):
    key = override.partition("=")[0]
    refused(re.escape(key) + "=.* has the wrong type", override)


def test_unknown_choice_names_the_nearest():
    refused(r"model\.output_stride=9 is not one of auto \| 8 \| 16; nearest is 8", "model.output_stride=9")
    refused("data.class_set='cityscapes13' .*; nearest is cityscapes1[69]", "data.class_set=cityscapes13")
    refused("model.backbone='resnet102' is unknown; nearest is 'resnet1", "model.backbone=resnet102")
    refused("benchmark='gta_to_cityscapes' .*nearest is 'gta5_to_cityscapes'", "benchmark=gta_to_cityscapes")


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("train.iterations=90001", r"train\.iterations.*train\.horizon"),
        ("train.iterations=0", r"train\.iterations"),
        ("train.lr=-1e-4", r"train\.lr"),
        ("train.momentum=-1", r"train\.momentum"),
        ("train.weight_decay=-1", r"train\.weight_decay"),
        ("train.head_lr_factor=-1", r"train\.head_lr_factor"),
        ("train.lr_discriminator=-1", r"train\.lr_discriminator"),
        ("data.workers=-1", r"data\.workers"),
        ("data.base_width=-5", r"data\.base_width"),
        ("batchnorm.images=-3", r"batchnorm\.images"),
        ("batchnorm.statistics=saved", r"batchnorm\.statistics"),
        ("data.randaugment=[2, 20]", r"data\.randaugment"),
        ("data.crop=[16, 64]", r"data\.crop"),
        ("data.scale=[1.5, 0.5]", r"data\.scale"),
        ("data.source.size=[640]", r"data\.source\.size"),
        ("data.target.split=training", r"data\.target\.split"),
        ("data.source.format=folder", r"data\.source\.images"),
        ("data.source.id_map={1: road}", r"data\.source\.id_map"),
        ("data.class_names=[sky, road]", r"data\.class_names"),
        ("data.class_set=custom", r"data\.class_names"),
        ("pseudo.threshold=95", r"pseudo\.threshold"),
        ("loss.temperature=0", r"loss\.temperature"),
        ("loss.adversarial=.nan", r"loss\.adversarial"),
        ("test.window=[1024]", r"test\.window"),
        ("test.window=[8, 8]", r"test\.window"),
        ("test.scales=[]", r"test\.scales"),
        ("test.scales=[0]", r"test\.scales"),
        ("test.overlap=1", r"test\.overlap"),
        ("distill.rounds=[2, 1]", r"distill\.rounds"),
        ("data.class_set=auto", r"data\.class_set"),
        ("loss.gan=wasserstein", r"loss\.gan.*nearest"),
        ("model.init=simclr model.backbone=resnet18", r"model\.init=simclr.*resnet18"),
        ("model.arch=deeplab_pbal model.bn_clr=true", r"model\.bn_clr.*deeplab_pbal"),
        ("name=../elsewhere", "name"),
        ("seed=-1", "seed"),
    ],
)
def test_impossible_combination_names_the_key(override, names):
    refused(names, *re.split(r" (?=model)", override))


def test_warmup_is_not_bpl():
    refused(r"loss\.bidirectional=0\.1", "loss.bidirectional=0.1", stage_file=ROOT / "configs/stage0_warmup.yml")


def test_id_map_with_an_unknown_class_names_key_and_class(benchmarks):
    refused(
        r"data\.target\.id_map: label id 3 -> 'streat' is not a class; nearest is 'street'",
        f"benchmark={benchmarks['day_to_dusk']}",
        "data.target.id_map={3: streat}",
    )


def test_what_wins_over_what(tmp_path):
    """Defaults < stage file < benchmark < its section of the stage < command line."""
    stage, benchmark = tmp_path / "stage.yml", tmp_path / "mine.yml"
    stage.write_text(
        f"benchmark: {benchmark}\nstage: warmup\nloss: {{bidirectional: 0}}\ntrain: {{lr: 2, power: 2, momentum: 0.2}}"
    )
    content = {"train": {"lr": 3, "power": 3}, "stages": {"warmup": {"train": {"lr": 4}}, "bpl": {"train": {"lr": 9}}}}
    benchmark.write_text(yaml.safe_dump(content))
    train = load_config(stage).train
    assert (train.weight_decay, train.momentum, train.power, train.lr) == (2e-4, 0.2, 3, 4)
    assert load_config(stage, ["train.lr=5"]).train.lr == 5
    content["stages"]["source_only"] = {"train": {"power": 6}}
    benchmark.write_text(yaml.safe_dump(content))
    train = load_config(stage, ["name=source_only"]).train  # a warm-up with deltas of its own
    assert (train.lr, train.power) == (4, 6)
    assert load_config(stage).train.power == 3


def test_numbers_as_people_write_them(tmp_path):
    assert load_config(BPL, ["train.lr=1e-3"]).train.lr == 1e-3  # text to YAML
    assert load_config(BPL, ["train.lr=1"]).train.lr == 1.0
    (tmp_path / "stage.yml").write_text("train: {lr: 1e-3}\ndata: {scale: [5e-1, 2]}")
    cfg = load_config(tmp_path / "stage.yml")
    assert cfg.train.lr == 1e-3 and cfg.data.scale == [0.5, 2.0]
    assert load_config(BPL, ["name=2024"]).name == "2024"  # text stays text


@pytest.mark.parametrize("text", ["train: {lr: 1", "train:\n\tlr: 1", "a: b: c", "train: {lr: 2020-13-45}", "\x00"])
def test_malformed_yaml_is_named(tmp_path, text):
    (tmp_path / "mine.yml").write_text(text)
    refused(r"mine\.yml is not valid YAML", stage_file=tmp_path / "mine.yml")


def test_unusable_files_are_named(tmp_path):
    refused(r"cannot read config .*none\.yml", stage_file=tmp_path / "none.yml")
    refused(r"cannot read config .*none\.yml", f"benchmark={tmp_path / 'none.yml'}")
    (tmp_path / "mine.yml").write_text("- a\n- b")
    refused(r"mine\.yml holds list, not keys and values", stage_file=tmp_path / "mine.yml")
    (tmp_path / "mine.yml").write_bytes(b"\xff\xfe\x00")
    refused(r"mine\.yml is not valid YAML", stage_file=tmp_path / "mine.yml")


def test_custom_benchmark_gives_its_classes(benchmarks):
    cfg = load_config(BPL, [f"benchmark={benchmarks['day_to_dusk']}"])
    assert list(class_set(cfg.data).names) == CUSTOM["class_names"]
    assert [list(colour) for colour in class_set(cfg.data).palette] == CUSTOM["palette"]
    assert cfg.run_dir.as_posix() == "runs/day_to_dusk/bpl"


def start(monkeypatch, *arguments, main=lambda cfg: None):
    monkeypatch.setattr("sys.argv", ["train_bpl.py", *arguments])
    run_cli(main, "stage1_BPL.yml", "Usage of the script.", ("warmup", "bpl"))


def test_command_line(monkeypatch, capsys):
    seen = []
    start(monkeypatch, "train.lr=1", "--config", str(ROOT / "configs/stage0_warmup.yml"), "seed=3", main=seen.append)
    assert (seen[0].stage, seen[0].train.lr, seen[0].seed) == ("warmup", 1.0, 3)
    assert capsys.readouterr().err == ""


def test_refused_config_is_one_line_and_status_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, "train.lr=fast", main=pytest.fail)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: train.lr='fast'")


def test_help_lists_every_key_with_default_and_reason(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.count("\n") > 100 and "Usage of the script." in out
    assert "train.horizon=90000\n      steps over which" in out and "model.output_stride=auto [auto | 8 | 16]" in out


def test_users_mistakes_are_status_1_and_bugs_keep_their_traceback(capsys):
    def mistake():
        raise UserError("no data")

    with pytest.raises(SystemExit) as stop:
        guarded(mistake)
    assert stop.value.code == 1 and capsys.readouterr().err == "error: no data\n"
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)
