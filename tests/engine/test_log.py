"""What TensorBoard is told, and by which names."""

import re
import subprocess

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_bpl
from utils.engine import log
from utils.engine.log import RunLog, peak_memory

IDENTITY = ["-c", "user.name=x", "-c", "user.email=x@example.org"]


def test_a_run_in_tensorboard(configure, tmp_path):
    cfg = configure("gta5_to_city", "stage1_BPL.yml", tmp_path, "model.init=scratch", "train.val_every=1")
    result = train_bpl.main(cfg)
    board = EventAccumulator(str(cfg.run_dir)).Reload()
    scalars = set(board.Tags()["scalars"])
    assert {"loss/ce_source", "loss/t2s", "loss/discriminator"} <= scalars
    assert {"learning rate/backbone", "learning rate/head", "learning rate/discriminator"} <= scalars
    assert {"speed/images per second", "memory/peak GiB", "validation/mIoU", "validation/pixel accuracy"} <= scalars
    assert not any("pixels" in tag or "iteration" in tag or tag.startswith("None") for tag in scalars)
    names = [name for name, value in result["last"]["iou"].items() if value is not None]
    assert names and {f"IoU/{name}" for name in names} <= scalars
    values = {tag: [e.value for e in board.Scalars(tag)] for tag in scalars}
    assert values["validation/mIoU"][-1] == pytest.approx(result["last"]["miou"], rel=1e-5)
    assert values["learning rate/head"] == pytest.approx([10 * v for v in values["learning rate/backbone"]], rel=1e-5)
    assert [e.step for e in board.Images("val/panel")] == [1, 2]  # one at each validation
    assert (cfg.run_dir / "report.html").is_file()


def test_the_commit_is_the_codes_own(tmp_path, monkeypatch):
    for command in (["init", "-q"], [*IDENTITY, "commit", "-q", "--allow-empty", "-m", "another project's"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(log, "ROOT", tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", log.git_sha())
    (tmp_path / "pbal").mkdir()  # unpacked there without a repository of its own
    monkeypatch.setattr(log, "ROOT", tmp_path / "pbal")
    assert log.git_sha() == "unknown"


def test_numbers_that_are_none_are_left_out(configure, tmp_path):
    cfg = configure("gta5_to_city", "stage1_BPL.yml", tmp_path)
    log = RunLog(cfg)
    log.record(1, "val", {"miou": 1.0, "iou": {"road": None, "sky": 2}, "confusion": [[1]], "further_score": 3.0})
    log.picture(1, "x", np.zeros((4, 4, 3), np.uint8))
    log.close()
    board = EventAccumulator(str(cfg.run_dir)).Reload()
    assert set(board.Tags()["scalars"]) == {"validation/mIoU", "IoU/sky", "validation/further score"}


def test_peak_memory_of_the_process():
    (before,) = peak_memory(torch.device("cpu")).values()
    block = torch.ones(2**26)  # 256 MiB
    (after,) = peak_memory(torch.device("cpu")).values()
    assert 0.01 < before <= after < 100 and block.numel()
