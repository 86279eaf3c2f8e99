"""The data check passes what is right and names what is not."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import HEIGHT, LAYOUTS, WIDTH, Tree
from PIL import Image

from data import verify
from data.toy import png16
from utils.config import ROOT, UserError


@pytest.fixture
def check(configure, tmp_path, capsys):
    """Call with a layout and replaced trees for the fault lines, and the table."""

    def run(layout: str, **replaced: Tree) -> tuple[list[str], str]:
        roots = [f"data.{name}.root={tree.root}" for name, tree in replaced.items()]
        cfg = configure(layout, "stage1_BPL.yml", tmp_path / "runs", *roots)
        try:
            verify.main(cfg)
        except UserError as error:
            assert "\n" not in str(error)
        faults = (cfg.sibling_run("verify") / "faults.txt").read_text("utf-8").splitlines()
        return faults, capsys.readouterr().out

    return run


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_clean_trees_pass(check, trees, layout, tmp_path):
    faults, said = check(layout)
    assert not faults and "no fault" in said
    _, source, _, val = LAYOUTS[layout]
    rows = {name: cells for name, *cells in (re.split(r" {2,}", line) for line in said.splitlines())}
    assert rows["images"] == ["5", "5", "5"] and rows["labels"] == ["5", "0", "5"]
    name = "car"
    for column, tree in ((0, trees[source]), (2, trees[val])):
        share = sum((ids == tree.id_of[name]).sum() for ids in tree.ids.values()) / (5 * WIDTH * HEIGHT)
        assert rows[name][column] == f"{share:.3%}"
    for domain, columns in (("source", 3), ("target", 1), ("val", 3)):
        sheet = Image.open(tmp_path / "runs" / layout / "verify" / f"{domain}.png")
        assert sheet.width // 320 == columns and sheet.height > 5 * 200


def files_of(tree: Tree, pattern: str):
    return sorted(tree.root.glob(pattern))


def missing_label(tree):
    path = files_of(tree, "GT/LABELS/*")[1]
    path.unlink()
    return "image without label", path


def extra_image(tree):
    path = tree.root / "RGB" / "0000099.png"
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(path)
    return "image without label", path


def extra_label(tree):
    path = tree.root / "GT/LABELS" / "0000099.png"
    shutil.copy(files_of(tree, "GT/LABELS/*")[0], path)
    return "label without image", path


def truncated_image(tree):
    path = files_of(tree, "RGB/*")[2]
    path.write_bytes(path.read_bytes()[:-2000])
    return "image cannot be read", path


def truncated_label(tree):
    path = files_of(tree, "GT/LABELS/*")[2]
    path.write_bytes(path.read_bytes()[:-200])
    return "label cannot be read", path


def wrong_size(tree):
    path = files_of(tree, "RGB/*")[3]
    Image.open(path).resize((WIDTH // 2, HEIGHT // 2)).save(path)
    return "image and label differ in size", path


def wrong_size_of_both(tree):
    """They fit each other, but not the others."""
    path = wrong_size(tree)[1]
    label = tree.root / "GT/LABELS" / path.name
    label.write_bytes(png16(np.zeros((HEIGHT // 2, WIDTH // 2, 3), np.uint16)))
    return "image of another size than the rest", path


def labels_cut_to_8_bits(tree):
    """As Pillow writes back what it read."""
    for path in files_of(tree, "GT/LABELS/*"):
        Image.new("L", (WIDTH, HEIGHT)).save(path)
    return "no label holds any class", "5 labels below"


def renumbered_8_bit_label(tree):
    path = files_of(tree, "GT/LABELS/*")[0]
    Image.fromarray(np.full((HEIGHT, WIDTH), 13, np.uint8)).save(path)
    return "SYNTHIA label of 8 bits", path


def id_out_of_range(tree):
    path = files_of(tree, "GT/LABELS/*")[4]
    path.write_bytes(png16(np.full((HEIGHT, WIDTH, 3), 23, np.uint16)))
    return "label ids that synthia does not have", f"{path}: 23"


def swapped_folders(tree):
    (tree.root / "RGB").rename(tree.root / "x")
    (tree.root / "GT/LABELS").rename(tree.root / "RGB")
    (tree.root / "x").rename(tree.root / "GT/LABELS")
    return "label cannot be read", tree.root / "GT/LABELS" / "0000000.png"


def empty_split(tree):
    for path in files_of(tree, "RGB/*"):
        path.unlink()
    return "no files", "no synthia image matches"


def unreadable_image(tree):
    path = files_of(tree, "RGB/*")[0]
    path.unlink()
    path.mkdir()
    return "image cannot be read", path


FAULTS = [
    missing_label,
    extra_image,
    extra_label,
    truncated_image,
    truncated_label,
    wrong_size,
    wrong_size_of_both,
    labels_cut_to_8_bits,
    renumbered_8_bit_label,
    id_out_of_range,
    swapped_folders,
    empty_split,
    unreadable_image,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_planted_fault_is_named(check, copied, plant):
    tree = copied("synthia")
    kind, name = plant(tree)
    faults, said = check("synthia_to_city", source=tree)
    hits = [line for line in faults if line.startswith(f"source: {kind}") and str(name) in line]
    assert hits and hits[0] in said


def test_validation_image_that_is_trained_on(check, copied):
    tree = copied("cityscapes")
    train, val = (files_of(tree, f"leftImg8bit/{split}/*/*.png") for split in ("train", "val"))
    Image.open(train[2]).save(val[1], compress_level=1)  # the same pixels in another file
    faults, _ = check("gta5_to_city", target=tree, val=tree)
    assert faults == [f"val: validation image that is in target too: {train[2]} = {val[1]}"]


def test_label_maps_in_place_of_target_images(check, copied):
    tree = copied("cityscapes")
    for path in files_of(tree, "leftImg8bit/train/*/*.png"):
        city, stem = path.parent.name, path.stem.removesuffix("_leftImg8bit")
        shutil.copy(tree.root / f"gtFine/train/{city}/{stem}_gtFine_labelIds.png", path)
    faults, _ = check("gta5_to_city", target=tree)
    assert sum(line.startswith("target: image looks like a label map") for line in faults) == 5


def test_missing_dataset_leaves_the_others_checked(check, trees, tmp_path):
    gone = Tree({"root": str(tmp_path / "gone")}, {}, {})
    faults, said = check("gta5_to_city", source=gone)
    assert len(faults) == 1 and "gone does not exist" in faults[0] and "96x64" in said


def test_many_faults_are_printed_in_part(check, copied):
    tree = copied("synthia")
    shutil.rmtree(tree.root / "GT")
    for i in range(10, 20):
        shutil.copy(files_of(tree, "RGB/*")[0], tree.root / f"RGB/{i:07d}.png")
    faults, said = check("synthia_to_city", source=tree)
    assert sum("image without label" in line for line in faults) == 15
    assert said.count("image without label") == 9 and "image without label: and 7 more" in said


def test_exit_status(benchmarks, copied, tmp_path):
    tree = copied("gta5")
    command = [sys.executable, "-m", "data.verify", f"benchmark={benchmarks['gta5_to_city']}", f"runs={tmp_path / 'r'}"]
    # In two worker processes, as users run it.
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*command, "data.workers=2"], **options)
    assert done.returncode == 0, done.stderr
    files_of(tree, "labels/*")[0].write_bytes(b"no picture")
    done = subprocess.run([*command, "data.workers=2", f"data.source.root={tree.root}"], **options)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: 1 faults, listed in ")
    assert "00001.png" in done.stdout and "Traceback" not in done.stderr


def test_names_that_are_no_utf8_and_warnings(check, copied):
    tree = copied("day")
    photo = files_of(tree, "day/photos/seq0/*.jpg")[0]
    photo.rename(photo.with_name("stra\udcdfe_rgb.jpg"))
    (photo.parent / "left.png").write_bytes(b"")
    faults, said = check("day_to_dusk", source=tree)
    (line,) = faults
    assert "stra\\xdfe_rgb.jpg" in line and "image without label" in line
    warnings = (tree.root.parent / "runs/day_to_dusk/verify/warnings.txt").read_text("utf-8").splitlines()
    assert "source: warning: not taken: 1 files" in warnings[0] and warnings[0] in said
    assert any("source: warning: ids that id_map does not name are ignored: 11 (" in line for line in warnings)
