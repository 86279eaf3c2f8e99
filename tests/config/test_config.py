"""Configuration: what is refused, in which words, and what wins over what."""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CUSTOM

from data.taxonomy import class_set
from data.verify import READS
from utils.ablate import read_variants
from utils.config import ROOT, ConfigError, UserError, all_keys, key_help, read_yaml, to_dict
from utils.config.keys import STAGES
from utils.engine.command_line import guarded, run_cli, warn_of_unread_keys
from utils.engine.setup import checked_config

BPL = ROOT / "configs" / "stage1_BPL.yml"
STAGE_FILES = sorted((ROOT / "configs").glob("*.yml"))
BENCHMARKS = sorted(path.stem for path in (ROOT / "configs" / "benchmarks").glob("*.yml"))


def refused(match, *overrides, stage_file=BPL):
    """The config is refused with one line."""
    with pytest.raises(ConfigError, match=match) as error:
        checked_config(stage_file, list(overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BENCHMARKS)  # "benchmark" is a fixture of the plugin pytest-benchmark
@pytest.mark.parametrize("stage_file", STAGE_FILES, ids=lambda path: path.stem)
def test_every_stage_goes_with_every_benchmark(stage_file, name):
    cfg = checked_config(stage_file, [f"benchmark={name}"])
    assert cfg.benchmark_name == name


@pytest.mark.parametrize("file", ["pseudo_labels.yml", "test_from_gta_to_city.yml"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_network_is_used_as_it_was_validated(name, file):
    """No benchmark says which statistics a network had, nor asks for target images that `test.images` lacks."""
    cfg = checked_config(ROOT / "configs" / file, [f"benchmark={name}"])
    assert cfg.batchnorm.statistics == "saved"


def test_the_released_recipe_is_the_default():
    cfg = checked_config(BPL)
    assert (cfg.benchmark, cfg.stage) == ("gta5_to_cityscapes", "bpl")
    assert (cfg.model.backbone, cfg.model.init) == ("auto", "warmup")
    assert (cfg.train.lr, cfg.train.iterations, cfg.train.horizon) == (1e-4, 60_000, 90_000)
    assert (cfg.loss.adversarial, cfg.loss.bidirectional, cfg.data.crop) == (0.01, 0.1, [896, 512])
    assert checked_config(ROOT / "configs/stage2_PST.yml").train.lr == 2.5e-4
    assert checked_config(ROOT / "configs/stage0_warmup.yml").loss.bidirectional == 0
    assert len(class_set(checked_config(ROOT / "configs/test_from_synthia_to_city.yml").data)) == 16


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
    refused(r"model\.output_stride=9 is not one of auto \| 8 \| 14 \| 16 \| 32; nearest is 8", "model.output_stride=9")
    refused(r"model\.output_stride=32, but model\.backbone=resnet101 has 8 and 16", "model.output_stride=32")
    refused("data.class_set='cityscapes13' .*; nearest is cityscapes1[69]", "data.class_set=cityscapes13")
    refused("model.backbone='resnet102' is unknown; nearest is 'resnet1", "model.backbone=resnet102")
    refused("benchmark='gta_to_cityscapes' .*nearest is 'gta5_to_cityscapes'", "benchmark=gta_to_cityscapes")
    for path in ("configs/benchmarks/toy", "../toy", "../benchmarks/toy"):
        refused(rf"benchmark='{re.escape(path)}' is neither .* nor one of .*; nearest is", f"benchmark={path}")


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("train.iterations=90001", r"train\.iterations.*train\.horizon"),
        ("train.iterations=0", r"train\.iterations"),
        ("train.lr=-1e-4", r"train\.lr"),
        ("train.weight_decay=-1", r"train\.weight_decay"),
        ("train.head_lr_factor=-1", r"train\.head_lr_factor"),
        ("train.lr_discriminator=-1", r"train\.lr_discriminator"),
        ("data.workers=-1", r"data\.workers"),
        ("data.base_width=-5", r"data\.base_width"),
        ("batchnorm.images=-3", r"batchnorm\.images"),
        ("batchnorm.statistics=saved", r"batchnorm\.statistics"),
        ("data.randaugment=[2, 20]", r"data\.randaugment"),
        ("data.randaugment=[2, 1]", r"data\.randaugment"),
        ("data.crop=[16, 64]", r"data\.crop"),
        ("data.scale=[1.5, 0.5]", r"data\.scale"),
        ("data.source.size=[640]", r"data\.source\.size"),
        ("data.target.split=training", r"data\.target\.split"),
        (
            "data.source.format=synthia data.source.split=train",
            r"data\.source\.split='train' is not one of those of synthia: all",
        ),
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
        ("name=v1.pt", "name='v1.pt' would be taken for a file of weights"),
        ("seed=-1", "seed"),
    ],
)
def test_impossible_combination_names_the_key(override, names):
    refused(names, *re.split(r" (?=model|data)", override))


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
        f"benchmark: {benchmark}\nstage: warmup\nloss: {{bidirectional: 0}}\n"
        "train: {lr: 2, head_lr_factor: 2, weight_decay: 0.2}"
    )
    content = {
        "train": {"lr": 3, "head_lr_factor": 3},
        "stages": {"warmup": {"train": {"lr": 4}}, "bpl": {"train": {"lr": 9}}},
    }
    benchmark.write_text(yaml.safe_dump(content))
    train = checked_config(stage).train
    assert (train.iterations, train.weight_decay, train.head_lr_factor, train.lr) == (60_000, 0.2, 3, 4)
    assert checked_config(stage, ["train.lr=5"]).train.lr == 5
    content["stages"]["source_only"] = {"train": {"head_lr_factor": 6}}
    benchmark.write_text(yaml.safe_dump(content))
    train = checked_config(stage, ["name=source_only"]).train  # a warm-up with deltas of its own
    assert (train.lr, train.head_lr_factor) == (4, 6)
    assert checked_config(stage).train.head_lr_factor == 3
    assert checked_config(stage, ["name=bpl"]).train.lr == 4  # a name chooses no other stage's section
    for odd in ([], False):
        benchmark.write_text(yaml.safe_dump(content | {"stages": odd}))
        with pytest.raises(ConfigError, match="must hold one section per stage"):
            checked_config(stage)


def test_numbers_as_people_write_them(tmp_path):
    assert checked_config(BPL, ["train.lr=1e-3"]).train.lr == 1e-3  # text to YAML
    assert checked_config(BPL, ["train.lr=1"]).train.lr == 1.0
    (tmp_path / "stage.yml").write_text("train: {lr: 1e-3}\ndata: {scale: [5e-1, 2]}")
    cfg = checked_config(tmp_path / "stage.yml")
    assert cfg.train.lr == 1e-3 and cfg.data.scale == [0.5, 2.0]
    assert checked_config(BPL, ["name=2024"]).name == "2024"  # text stays text
    cfg = checked_config(BPL, ["train.iterations=1e3", "data.crop=[64.0, 6.4e1]"])  # whole numbers
    assert (cfg.train.iterations, cfg.data.crop) == (1000, [64, 64]) and isinstance(cfg.train.iterations, int)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {lr: 1}\nseed: 1\ntrain: {}", r"key 'train' stands twice, in lines 1 and 3"),
        ("stages:\n  pst: {}\n  bpl: {}\n  pst: {}", r"key 'pst' stands twice, in lines 2 and 4"),
        ("stages:\n  pst: {train: {lr: 1,\n lr: 2}}", r"key 'lr' stands twice, in lines 2 and 3"),
        ("data:\n  source: {id_map: {0: sky, 2: car, 2: road}}", r"key 2 stands twice, in line 2"),
        ("data:\n  source: {id_map: {16: sky, 0x10: car}}", r"key 16 stands twice, in line 2"),
        ("bpl:\n  x: []\n  x: []", r"key 'x' stands twice"),
        ("seed: 1\ndata: {source: {id_map: &a {0: sky, 1: *a}}}", "the value that begins in line 2 contains itself"),
        ("train: &train\n- *train", "the value that begins in line 1 contains itself"),
    ],
)
def test_what_yaml_alone_would_take_is_refused(tmp_path, text, said):
    """In sections, stages, id maps and variants, of benchmarks and of stage files: of two keys YAML takes the last."""
    file = tmp_path / "mine.yml"
    file.write_text(text)
    refused(rf"{re.escape(str(file))}: {said}", stage_file=file)
    refused(rf"{re.escape(str(file))}: {said}", f"benchmark={file}")
    with pytest.raises(ConfigError, match=said):
        read_variants(file)


def test_what_looks_like_a_key_that_stands_twice_is_read(tmp_path):
    """A merged section may be overridden, wherever it stands."""
    text = "a: {b: {c: &base {x: 1, y: 1}, d: &more {<<: *base, x: 2}}}\ne: {<<: *more, y: 3}\nf: [{x: 1}, {x: 2}]"
    (tmp_path / "mine.yml").write_text(text)
    assert read_yaml(tmp_path / "mine.yml") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 010", "010 means 8 in YAML"),
        ("seed: 1:30", "1:30 means 90 in YAML"),
        ("train: {lr: 1:30.5}", "1:30.5 means 90.5 in YAML"),
        ("data: {source: {id_map: {000: sky, 026: car}}}", "000 means 0 in YAML"),
        ("", "holds no key"),
        ("train.lr: 5", r"'train\.lr' in .*: a YAML has sections in place of dots, as in 'train: {lr: …}'"),
        ("runs: ~/r", r"runs='~/r' in a YAML must be a relative path"),
        ("data: {val: {format: cityscapes, images: [a.png]}}", r"data\.val\.images is set, but format=cityscapes"),
        ("data: {palette: [[0, 0, 0]]}", r"data\.palette is set, but data\.class_set=cityscapes19"),
    ],
)
def test_what_a_benchmark_does_not_mean_is_named(tmp_path, text, said):
    (tmp_path / "mine.yml").write_text(text)
    refused(said, f"benchmark={tmp_path / 'mine.yml'}")


def test_numbers_and_names_of_the_command_line_that_are_not_meant():
    refused(r"seed='010': 010 means 8 in YAML", "seed=010")
    refused("benchmark= is empty", "benchmark=")
    assert checked_config(BPL, ["seed=0", "train.lr=0.5"]).seed == 0


def test_a_benchmark_is_no_stage_file(tmp_path):
    (tmp_path / "mine.yml").write_text("data: {source: {root: mine}, val: {root: mine}}")
    refused(
        r"mine\.yml has domains and no stage, .* give it as benchmark=.*mine\.yml", stage_file=tmp_path / "mine.yml"
    )


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "day").mkdir()
    cfg = checked_config(BPL, ["data.source.root=~/day", "runs=~/r"])
    assert cfg.data.source.root == str(tmp_path / "day") and cfg.run_dir == tmp_path / "r/gta5_to_cityscapes/bpl"


def test_a_key_that_stands_twice_on_the_command_line_is_named():
    refused(r"data\.source\.id_map=.* key 2 stands twice", "data.source.id_map={2: car, 2: road}")


@pytest.mark.parametrize("text", ["train: {lr: 1", "train:\n\tlr: 1", "a: b: c", "train: {lr: 2020-13-45}", "\x00"])
def test_malformed_yaml_is_named(tmp_path, text):
    (tmp_path / "mine.yml").write_text(text)
    refused(r"mine\.yml is not valid YAML", stage_file=tmp_path / "mine.yml")


def test_unusable_files_are_named(tmp_path):
    refused(r"cannot read config /.*none\.yml", stage_file=tmp_path / "none.yml")
    refused(rf"cannot read config {re.escape(os.path.abspath('none.yml'))}", stage_file="none.yml")
    refused(r"cannot read config .*none\.yml", f"benchmark={tmp_path / 'none.yml'}")
    (tmp_path / "mine.yml").write_text("- a\n- b")
    refused(r"mine\.yml holds list, not keys and values", stage_file=tmp_path / "mine.yml")
    (tmp_path / "mine.yml").write_bytes(b"\xff\xfe\x00")
    refused(r"mine\.yml is not valid YAML", stage_file=tmp_path / "mine.yml")


def test_custom_benchmark_gives_its_classes(benchmarks):
    cfg = checked_config(BPL, [f"benchmark={benchmarks['day_to_dusk']}"])
    assert list(class_set(cfg.data).names) == CUSTOM["class_names"]
    assert [list(colour) for colour in class_set(cfg.data).palette] == CUSTOM["palette"]
    assert cfg.run_dir == Path.cwd() / "runs/day_to_dusk/bpl"


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


def shown(monkeypatch, capsys, *arguments):
    """What a script prints that does not run."""
    start(monkeypatch, *arguments, main=pytest.fail)
    return capsys.readouterr().out


def test_config_of_another_stage_is_named_by_its_whole_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yml").write_text("stage: pst")
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, "--config", "mine.yml", main=pytest.fail)
    assert stop.value.code == 2 and f"{tmp_path}/mine.yml is of stage 'pst'" in capsys.readouterr().err


def test_help_shows_the_values_that_are_used_and_the_keys_that_the_stage_reads(monkeypatch, capsys):
    out = shown(monkeypatch, capsys, "--help")
    assert "Usage of the script." in out and "model.output_stride=auto [auto | 8 | 14 | 16 | 32]" in out
    assert "\ntrain\n  train.iterations=60000\n      steps to run (as released)\n" in out
    assert "loss.bidirectional=0.1\n" in out and "loss.contrast" not in out and "distill." not in out
    out = shown(monkeypatch, capsys, "benchmark=toy", "--help", "loss.bidirectional=0.3")
    assert "train.iterations=420\n      steps to run (as released); default 60000\n" in out
    assert "loss.bidirectional=0.3\n" in out and "data.source.root=data/toy/GTA5\n" in out
    warmup = ("--config", str(ROOT / "configs/stage0_warmup.yml"))
    assert "loss.bidirectional" not in shown(monkeypatch, capsys, "-h", *warmup)
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, "--help", "train.itertions=3", main=pytest.fail)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_every_key_is_read_by_a_stage():
    stages = {stage: checked_config(file) for file in STAGE_FILES for stage in [read_yaml(file)["stage"]]}
    assert set(stages) == set(STAGES)
    texts = {stage: key_help(cfg) for stage, cfg in stages.items()}
    for key in all_keys().keys() - {"stage"}:
        assert any(f"\n  {key}=" in text for text in texts.values()), key
    assert "pseudo.threshold" in texts["pseudo_labels"] and "train.lr" not in texts["pseudo_labels"]
    assert "train.precision" in texts["test"] and "data.source.root" not in texts["pseudo_labels"]


def test_print_config_is_the_whole_configuration(monkeypatch, capsys):
    out = shown(monkeypatch, capsys, "--print-config", "benchmark=toy", "train.lr=3e-3")
    printed = yaml.safe_load(out)
    assert printed.pop("git") and printed == to_dict(checked_config(BPL, ["benchmark=toy", "train.lr=3e-3"]))


def test_several_gpus_that_one_process_sees_are_named(monkeypatch, capsys):
    for count, lines in ((1, 0), (4, 1)):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        start(monkeypatch)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines and all("--nproc_per_node=4" in line for line in said)
    start(monkeypatch, "device=cuda:1")
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------------------------- paths


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder outside the checkout, and a benchmark of the user's in another one."""
    (tmp_path / "own").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    content = {"data": {"source": {"root": "d/day"}}, "stages": {"bpl": {"model": {"init": "start.pth"}}}}
    (tmp_path / "own" / "mine.yml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_a_dataset_is_looked_for_beside_the_users_yaml_then_from_the_start_then_in_the_checkout(elsewhere, monkeypatch):
    def found(*overrides):
        cfg = checked_config(BPL, ["benchmark=../own/mine.yml", *overrides])
        return cfg.data.source.root, cfg.model.init

    monkeypatch.setattr("utils.config.loading.ROOT", elsewhere / "checkout")
    assert found() == ("d/day", "start.pth")  # nowhere: as it is
    for folder, named in (("checkout", str(elsewhere / "checkout")), ("work", ""), ("own", str(elsewhere / "own"))):
        (elsewhere / folder / "d/day").mkdir(parents=True)
        (elsewhere / folder / "start.pth").touch()
        assert found() == (os.path.join(named, "d/day"), os.path.join(named, "start.pth"))
    root, _ = found("data.source.root=d")  # on the command line: not beside the YAML
    assert root == "d"
    monkeypatch.chdir(elsewhere / "own")  # the same place by both rules: as it is, so that older runs are resumed
    assert checked_config(BPL, ["benchmark=mine.yml"]).data.source.root == "d/day"


def test_a_runs_name_is_no_path(elsewhere):
    (elsewhere / "own" / "warmup").mkdir()
    (elsewhere / "work" / "warmup").mkdir()
    assert checked_config(BPL, ["benchmark=../own/mine.yml", "model.init=warmup"]).model.init == "warmup"


def test_the_checkouts_files_are_found_from_anywhere_and_runs_stay_where_one_starts(elsewhere, monkeypatch):
    cfg = checked_config("configs/stage1_BPL.yml", ["benchmark=toy"])
    assert cfg.run_dir == elsewhere / "work/runs/toy/bpl"
    assert cfg.data.toy_root == str(ROOT / "data/toy")
    assert cfg.data.source.root == str(ROOT / "data/toy/GTA5")  # drawn or not
    assert cfg.data.val.root == str(ROOT / "data/toy/Cityscapes")
    assert checked_config(BPL, ["benchmark=configs/benchmarks/toy.yml"]).data == cfg.data
    monkeypatch.chdir(ROOT)
    cfg = checked_config(BPL, ["benchmark=toy"])
    assert (cfg.data.toy_root, cfg.data.source.root) == ("data/toy", "data/toy/GTA5")
    moved = checked_config(BPL, ["benchmark=toy", f"data.toy_root={elsewhere}/t", f"data.val.root={elsewhere}/v"]).data
    assert (moved.toy_root, moved.source.root) == (f"{elsewhere}/t", f"{elsewhere}/t/GTA5")
    assert (moved.target.root, moved.val.root) == (f"{elsewhere}/t/Cityscapes", f"{elsewhere}/v")


def test_a_benchmark_is_looked_for_beside_the_users_stage_file(elsewhere):
    (elsewhere / "own" / "stage.yml").write_text(
        BPL.read_text().replace("benchmark: gta5_to_cityscapes", "benchmark: mine.yml")
    )
    assert checked_config(elsewhere / "own" / "stage.yml").data.source.root == "d/day"
    with pytest.raises(ConfigError, match=r"work/mine\.yml"):  # on the command line: not beside the YAML
        checked_config(elsewhere / "own" / "stage.yml", ["benchmark=mine.yml"])


def test_a_glob_of_photos_is_looked_for_beside_the_users_yaml(elsewhere):
    (elsewhere / "own/in [2024]").mkdir()
    (elsewhere / "own/in [2024]/x.png").touch()
    (elsewhere / "own/mine.yml").write_text("test: {images: 'in [2024]/*.png'}")
    cfg = checked_config(ROOT / "configs/test_from_gta_to_city.yml", ["benchmark=../own/mine.yml"])
    assert cfg.test.images == str(elsewhere / "own/in [2024]/*.png")


def test_own_classes_need_no_dataset_to_predict_photos(tmp_path):
    (tmp_path / "mine.yml").write_text("data: {class_set: custom, class_names: [road, sky]}")
    words = [f"benchmark={tmp_path}/mine.yml", f"test.images={tmp_path}"]
    assert checked_config(ROOT / "configs/test_from_gta_to_city.yml", words).data.class_names == ["road", "sky"]


def test_what_leads_another_command_to_the_same_runs():
    assert checked_config(BPL, ["benchmark=toy"]).words == "benchmark=toy"
    given = checked_config(BPL, ["benchmark=toy", "runs=my runs", "seed=3"])  # quoted for a shell
    assert given.words == "benchmark=toy 'runs=my runs' seed=3"


def test_where_a_yaml_may_not_write_the_command_line_may(tmp_path):
    (tmp_path / "mine.yml").write_text(f"runs: {tmp_path}/out")
    with pytest.raises(ConfigError, match=r"in a YAML must be a relative path .*; give it as runs="):
        checked_config(BPL, [f"benchmark={tmp_path}/mine.yml"])
    assert checked_config(BPL, [f"benchmark={tmp_path}/mine.yml", f"runs={tmp_path}/mine"]).runs == f"{tmp_path}/mine"


def test_data_verify_reads_what_it_checks():
    read = [key for key in all_keys() if key.startswith(READS)]
    assert {"data.toy_root", "data.val.root", "data.class_set", "data.workers", "runs"} < set(read)
    assert not {"data.crop", "data.scale", "train.lr", "seed"} & set(read)


def test_a_command_names_the_keys_that_it_does_not_read(capsys):
    warn_of_unread_keys(checked_config(BPL), ["train.lr=1", "data.workers=1"], reads=("data.workers",))
    assert capsys.readouterr().err == "warning: train.lr= is not read by this command\n"


def test_users_mistakes_are_status_1_and_bugs_keep_their_traceback(capsys):
    def mistake():
        raise UserError("no data")

    with pytest.raises(SystemExit) as stop:
        guarded(mistake)
    assert stop.value.code == 1 and capsys.readouterr().err == "error: no data\n"
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)


@pytest.mark.parametrize("allocate", [lambda: torch.zeros(1 << 60), lambda: b"x" * (1 << 60)])
def test_a_full_memory_is_one_line(capsys, allocate):
    with pytest.raises(SystemExit) as stop:
        guarded(allocate)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: see train.checkpointing") and said.count("\n") == 1


def test_a_number_of_processes_that_is_none(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SystemExit):
        guarded(lambda: None)
    assert capsys.readouterr().err == "error: WORLD_SIZE='many' is set, but is no number of processes\n"
    monkeypatch.setenv("WORLD_SIZE", "")
    guarded(lambda: None)
