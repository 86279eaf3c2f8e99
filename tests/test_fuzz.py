"""Damaged and hostile files end in our own errors: no other exception, no hang, no memory for what a file claims."""

import contextlib
import io
import resource

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from survival import FORK
from test_bad_input import png

from data.images import read_image, read_label_ids
from data.toy import png16
from models import read_checkpoint
from utils.config import ROOT, ConfigError, UserError, all_keys
from utils.config.keys import STAGES
from utils.engine.setup import checked_config

KEYS = sorted(all_keys())
quick = settings(
    max_examples=150, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
hard = st.sampled_from([10**400, -(10**30), "a\0b", [[1, 2], [3]], [[]], {0: [1]}])  # each was a traceback once
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates()
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(scalars, v, max_size=3), max_leaves=12
)


def parse(*overrides, stage="stage1_BPL.yml"):
    try:
        checked_config(ROOT / "configs" / stage, list(overrides))
    except ConfigError as error:
        assert str(error)


@quick
@given(st.lists(st.tuples(st.sampled_from(KEYS), values | hard | st.text(max_size=20)), max_size=3))
def test_any_value_of_any_key(pairs):
    parse(*(f"{key}={value if isinstance(value, str) else yaml.safe_dump(value).strip()}" for key, value in pairs))


@quick
@given(st.text(max_size=60))
def test_any_text_on_the_command_line(text):
    parse(text)
    parse(f"data.source.id_map={text}")


@quick
@given(st.one_of(st.binary(max_size=120), st.text(max_size=120).map(lambda t: t.encode("utf-8", "replace"))))
def test_any_file_as_benchmark(tmp_path, content):
    (tmp_path / "b.yml").write_bytes(content)
    parse(f"benchmark={tmp_path / 'b.yml'}")


@quick
@given(st.dictionaries(st.sampled_from([k.split(".")[0] for k in KEYS] + ["stages"]) | scalars, values, max_size=4))
def test_any_yaml_as_benchmark(tmp_path, content):
    (tmp_path / "b.yml").write_text(yaml.safe_dump(content))
    parse(f"benchmark={tmp_path / 'b.yml'}")
    (tmp_path / "b.yml").write_text(yaml.safe_dump({"stages": {s: content for s in STAGES}}))
    parse(f"benchmark={tmp_path / 'b.yml'}")


@pytest.mark.parametrize("depth", [10**2, 10**5])
def test_deep_yaml(tmp_path, depth):
    (tmp_path / "b.yml").write_text("[" * depth)
    parse(f"benchmark={tmp_path / 'b.yml'}")
    parse("data.palette=" + "[" * depth)


def weight_file(zipped):
    buffer = io.BytesIO()
    content = {"model": {"a": torch.arange(40.0), "b": torch.ones(3, 3)}, "recipe": {"arch": "x"}, "iteration": 3}
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES = {zipped: weight_file(zipped) for zipped in (True, False)}


def read_weights(path):
    try:
        return read_checkpoint(path)
    except ValueError as error:
        assert str(path) in str(error)
        return None


@quick
@given(st.booleans(), st.data())
def test_weights_cut_anywhere(tmp_path, zipped, data):
    content = FILES[zipped]
    (tmp_path / "w.pth").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert read_weights(tmp_path / "w.pth") is None


@quick
@given(st.booleans(), st.data())
def test_weights_flipped_anywhere(tmp_path, zipped, data):
    content = bytearray(FILES[zipped])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / "w.pth").write_bytes(content)
    read_weights(tmp_path / "w.pth")  # refused in words, or read; never another error


@quick
@given(st.binary(max_size=300))
def test_any_bytes_as_weights(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    assert read_weights(tmp_path / "w.pth") in (None, {})


def picture_file(kind):
    ids = np.random.default_rng(0).integers(0, 19, (24, 32)).astype(np.uint8)
    if kind == "16":
        return png16(np.stack([ids, ids, ids], 2).astype(np.uint16))
    buffer = io.BytesIO()
    picture = Image.fromarray(ids)
    if kind == "palette":
        picture.putpalette(bytes(range(256)) * 3)
    picture.save(buffer, "JPEG" if kind == "jpeg" else "PNG")
    return buffer.getvalue()


PICTURES = {kind: picture_file(kind) for kind in ("grey", "palette", "16", "jpeg")}


def read_picture(path, content):
    path.write_bytes(content)
    for read in (read_image, read_label_ids):
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@quick
@given(st.sampled_from(sorted(PICTURES)), st.data())
def test_pictures_cut_or_flipped_anywhere(tmp_path, kind, data):
    content = bytearray(PICTURES[kind])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    read_picture(tmp_path / "x.png", bytes(content[: data.draw(st.integers(0, len(content)))]))


@quick
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.binary(max_size=50))
def test_pictures_that_claim_any_size(tmp_path, width, height, rows):
    read_picture(tmp_path / "x.png", png(width, height, rows))


@pytest.mark.parametrize("kind", ["weights", "picture", "grey picture"])
def test_small_file_takes_little_memory(tmp_path, kind):
    path = tmp_path / "bomb"
    if kind == "weights":
        size = b"K(N"  # pickle's 40, the elements of a storage
        assert FILES[False].count(size) == 1
        path.write_bytes(FILES[False].replace(size, b"J" + (2**31 - 1).to_bytes(4, "little") + b"N"))
    else:
        path.write_bytes(png(20000, 20000) if kind == "picture" else png(9000, 9000, bytes(9001 * 9000)))
    assert path.stat().st_size < 2**21

    def child():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for read in (read_checkpoint,) if kind == "weights" else (read_image, read_label_ids):
            with contextlib.suppress(ValueError):
                read(path)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        raise SystemExit(0 if grown < 900 * 2**10 else 1)  # KiB; the largest picture allowed takes half of it

    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
