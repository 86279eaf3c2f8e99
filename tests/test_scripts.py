"""The scripts as programs: what they say where data and weights are missing, and how long they are."""

import subprocess
import sys

import pytest

from utils.config import ROOT

SCRIPTS = ("train_bpl.py", "train_pst.py", "distill.py", "gen_pseudo_labels.py", "test.py")
GTA5 = ("data/GTA5", "https://download.visinf.tu-darmstadt.de")
CITYSCAPES = ("data/Cityscapes", "https://www.cityscapes-dataset.com")


def run(folder, *command):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("script", "overrides", "problems"),
    [
        (
            "train_bpl.py",
            ["model.published=absent.pkl"],
            [GTA5, CITYSCAPES, ("'warmup'", "runs/gta5_to_cityscapes/warmup", "stage0_warmup.yml", "absent.pkl")],
        ),
        (
            "train_pst.py",
            ["model.init=bpl", "benchmark=synthia_to_cityscapes"],
            [
                ("data/SYNTHIA", "https://synthia-dataset.net"),
                CITYSCAPES,
                ("'bpl'", "runs/synthia_to_cityscapes/bpl", "python train_bpl.py benchmark=synthia_to_cityscapes"),
                ("runs/synthia_to_cityscapes/pseudo_labels", "python gen_pseudo_labels.py"),
            ],
        ),
        ("test.py", [], [CITYSCAPES, ("distill/round2", "runs/gta5_to_cityscapes/distill", "python distill.py")]),
    ],
)
def test_everything_that_is_missing_is_said_at_once(tmp_path, script, overrides, problems):
    done = run(tmp_path, ROOT / script, "device=cpu", *overrides)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and all(line.startswith("error: ") for line in lines)
    for said in problems:
        assert any(all(part in line for part in said) for line in lines), said
    assert len(lines) == len(set(lines)) == len(problems)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_refused_config_leaves_with_status_2(tmp_path):
    done = run(tmp_path, ROOT / "distill.py", "distil.rounds=[1]")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key 'distil.rounds' in the command line; nearest is 'distill.rounds'\n"
    assert not list(tmp_path.iterdir())


def test_config_of_another_script_is_refused(tmp_path):
    done = run(tmp_path, ROOT / "train_pst.py", "--config", ROOT / "configs/stage1_BPL.yml", "device=cpu")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "stage" in done.stderr


@pytest.mark.parametrize("command", [["gen_pseudo_labels.py"], ["-m", "utils.pipeline"]], ids=" ".join)
def test_help(command):
    done = run(ROOT, *command, "--help")
    assert (done.returncode, done.stderr) == (0, "") and "benchmark=" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_the_method_and_little_else(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert text.startswith('"""') and "def main(cfg: Config)" in text
