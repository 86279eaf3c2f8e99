"""The scripts as programs: what they say where data and weights are missing, and how long they are."""

import json
import os
import subprocess
import sys

import pytest
import yaml

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
        said = [f"{tmp_path}/{part}" if part.startswith(("data/", "runs/")) else part for part in said]
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


def test_keys_that_a_script_does_not_read_are_named(tmp_path):
    given = ["device=cpu", "pseudo.threshold=0.5", "checkpoint=mine.pth", "train.lr=1e-3"]
    done = run(tmp_path, ROOT / "train_pst.py", *given)
    warned = [line.split(" is not read by stage pst")[0] for line in done.stderr.splitlines() if "not read" in line]
    assert done.returncode == 1 and warned == ["warning: pseudo.threshold=", "warning: checkpoint="]
    read = ["batchnorm.statistics=target", "train.batch_target=2", "train.deterministic=true", "checkpoint=none"]
    done = run(tmp_path, ROOT / "test.py", "device=cpu", *read)
    assert done.returncode == 1 and "is not read" not in done.stderr


@pytest.mark.parametrize("command", [["gen_pseudo_labels.py"], ["-m", "utils.pipeline"]], ids=" ".join)
def test_help(command):
    done = run(ROOT, *command, "--help")
    assert (done.returncode, done.stderr) == (0, "") and "benchmark=" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_the_method_and_little_else(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert text.startswith('"""') and "def main(cfg: Config)" in text


TALK = """
import sys
from utils.engine.command_line import guarded
from utils.engine.log import progress

def call():
    for i in progress(range(3000)):
        print("one line", i)
        sys.stdout.flush()
    print("seen", file=sys.stderr)
    open(sys.argv[1], "w").close()

guarded(call)
"""


def talk(tmp_path, **options):
    return subprocess.Popen([sys.executable, "-c", TALK, tmp_path / "done"], cwd=ROOT, **options)


def test_a_run_goes_on_where_the_reader_of_its_output_is_gone(tmp_path):
    process = talk(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"seen\n" and process.wait(60) == 0 and (tmp_path / "done").exists()


def test_a_run_goes_on_where_its_terminal_is_gone(tmp_path):
    ours, its = os.openpty()
    process = talk(tmp_path, stdin=subprocess.DEVNULL, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    os.read(ours, 100)
    os.close(ours)
    assert process.wait(60) == 0 and (tmp_path / "done").exists()


def test_a_run_that_is_started_with_closed_output(tmp_path):
    command = ["sh", "-c", f'exec "$0" -c "$1" {tmp_path}/done >&- 2>&-', sys.executable, TALK]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0 and (tmp_path / "done").exists()


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


SAYS = """
import sys
sys.path.insert(0, ".")
from utils.config import load_config
from utils.engine.command_line import guarded
from utils.engine.log import RunLog

def call():
    log = RunLog(load_config("configs/stage1_BPL.yml", sys.argv[1:]))
    log.record(1, "val", {"iou": {"chaussée": 1.0}})
    log.info("chaussée \\udcff")

guarded(call)
"""


def test_text_beyond_ascii_in_an_ascii_locale(tmp_path):
    """The terminal gets escapes; files are UTF-8. A file's name may be no text at all."""
    section = {"format": "folder", "images": ["*.png"]}
    data = {"class_set": "custom", "class_names": ["ciel", "chaussée"], "source": section, "target": section}
    text = yaml.safe_dump({"data": data | {"val": section}}, allow_unicode=True)
    (tmp_path / "mine.yml").write_text(text, encoding="utf-8")
    (tmp_path / "says.py").write_text(SAYS, encoding="utf-8")
    command = [sys.executable, tmp_path / "says.py", f"benchmark={tmp_path}/mine.yml", f"runs={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ASCII, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout == b"chauss\\xe9e \\udcff\n", done.stderr
    run = tmp_path / "mine" / "bpl"
    config = yaml.safe_load((run / "config.yml").read_text(encoding="utf-8"))
    assert config["data"]["class_names"] == ["ciel", "chaussée"]
    assert (run / "log.txt").read_text(encoding="utf-8").endswith("chaussée \\udcff\n")
    assert json.loads((run / "metrics.jsonl").read_text(encoding="utf-8"))["iou"] == {"chaussée": 1.0}
