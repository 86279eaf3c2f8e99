"""Checkpoints: whole or not at all, and found by name."""

import random

import numpy as np
import pytest
import torch

from models import WeightError, read_checkpoint
from utils.config import UserError
from utils.engine import checkpoint


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "checkpoints" / "last.pth"
    checkpoint.save_checkpoint(path, {"step": 1})

    def half(temporary):
        temporary.write_bytes(path.read_bytes()[:50])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.atomic_write(path, half)
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"not": object()})
    assert read_checkpoint(path) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.pth"]
    checkpoint.save_checkpoint(path, {"step": 2})
    assert read_checkpoint(path) == {"step": 2}


def test_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    draw()
    checkpoint.save_checkpoint(tmp_path / "x.pth", checkpoint.rng_state())
    expected = [draw() for _ in range(3)]
    checkpoint.set_rng_state(read_checkpoint(tmp_path / "x.pth"))
    assert [draw() for _ in range(3)] == expected


@pytest.fixture
def cfg(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "pretrain_model")
    return configure("gta5_to_city", "stage1_BPL.yml", tmp_path / "runs", "model.published=[theirs.pkl, pbals.pkl]")


def test_weights_are_found_by_run_then_published_file_then_path(cfg, tmp_path, monkeypatch):
    def find():
        return checkpoint.find_init(cfg)

    with pytest.raises(UserError) as error:
        find()
    message = str(error.value)
    assert "\n" not in message and "runs/gta5_to_city/warmup/checkpoints/last.pth" in message
    assert "python train_bpl.py --config configs/stage0_warmup.yml" in message
    assert f"{tmp_path}/pretrain_model/theirs.pkl or {tmp_path}/pretrain_model/pbals.pkl" in message
    published, second = (tmp_path / "pretrain_model" / name for name in ("theirs.pkl", "pbals.pkl"))
    own = {which: cfg.sibling_run("warmup") / "checkpoints" / f"{which}.pth" for which in ("last", "best")}
    for path in (published, second, *own.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find() == own["last"]
    cfg.which = "best"
    assert find() == own["best"]
    own["best"].unlink()
    assert find() == published
    published.unlink()
    assert find() == second
    cfg.model.init = "warmup_2"  # a run of the user's own: no published file takes its place
    with pytest.raises(UserError, match=r"warmup_2/checkpoints/best\.pth; train that run, or name a file$"):
        find()
    cfg.model.init = str(own["last"])
    assert find() == own["last"]
    monkeypatch.chdir(tmp_path)
    for cfg.model.init in ("none.pth", "none.safetensors"):
        with pytest.raises(UserError, match=f"no weights at {tmp_path}/{cfg.model.init}$"):
            find()
    cfg.model.init = "simclr"
    with pytest.raises(WeightError, match=r"r18_1x_sk0\.pth does not exist"):
        find()
    cfg.model.init = "scratch"
    assert find() is None


@pytest.mark.parametrize("name", ["model_best.pth.tar", "weights.v2", "weights"])
def test_path_that_exists_is_a_file_whatever_its_ending(cfg, tmp_path, name):
    (tmp_path / name).touch()
    assert checkpoint.find_checkpoint(cfg, str(tmp_path / name)) == tmp_path / name
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"no weights .*{name}"):
        checkpoint.find_checkpoint(cfg, str(tmp_path / name))


def test_a_folder_of_a_run_is_a_checkpoint(cfg, tmp_path, monkeypatch):
    (tmp_path / "moved/bpl/checkpoints").mkdir(parents=True)
    (tmp_path / "moved/bpl/checkpoints/last.pth").touch()
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find_checkpoint(cfg, "moved/bpl") == tmp_path / "moved/bpl/checkpoints/last.pth"


def test_a_run_behind_a_link_knows_what_it_was_started_from(tmp_path):
    for folder in ("runs", "big/pst"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs/bpl.pth").write_bytes(b"x")
    (tmp_path / "runs/pst").symlink_to(tmp_path / "big/pst")
    upstream = {"../bpl.pth": checkpoint.file_hash(tmp_path / "runs/bpl.pth")}
    checkpoint.refuse_changed_upstream(upstream, tmp_path / "runs/pst")
    (tmp_path / "runs/bpl.pth").write_bytes(b"y")
    with pytest.raises(UserError, match="has been made anew since"):
        checkpoint.refuse_changed_upstream(upstream, tmp_path / "runs/pst")


def test_hash_follows_the_content(tmp_path):
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (checkpoint.file_hash(tmp_path / name) for name in "abc")
    assert a == b != c and len(a) == 16
