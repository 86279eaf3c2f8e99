"""How fast this code is on this machine, and how much memory it takes: each optimisation beside its plain form.

    python -m utils.benchmark                          every section but the plan, at sizes that fit the machine
    python -m utils.benchmark losses data              some of them: losses, data, step, eval, scaling
    python -m utils.benchmark step benchmark=toy       by a benchmark's own network and sizes
    python -m utils.benchmark plan benchmark=gta5_to_cityscapes    memory that a recipe needs, and settings that fit

Variants run in turn within one process; each row gives median, minimum and maximum, the factor to the first row (the
plain form), and the peak memory of tensors.
"""

from __future__ import annotations

import os
import platform

import torch

from utils.benchmark import data, evaluation, losses, plan, scaling, step
from utils.config import ROOT, ConfigError
from utils.engine.command_line import run_words
from utils.engine.setup import choose_device, load_config

SECTIONS = {"losses": losses, "data": data, "step": step, "eval": evaluation, "scaling": scaling, "plan": plan}


def _hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {device} ({name}), {os.cpu_count()} CPU cores ({capability})"


def main() -> None:
    """Command line."""

    def call(words: list[str]) -> None:
        overrides = [w for w in words if "=" in w]
        sections = [w for w in words if "=" not in w] or [s for s in SECTIONS if s != "plan"]
        if unknown := [s for s in sections if s not in SECTIONS]:
            raise ConfigError(f"unknown section {unknown[0]!r}; known are {', '.join(SECTIONS)}")
        cfg = load_config(ROOT / "configs" / "stage1_BPL.yml", overrides)
        device = choose_device(cfg)
        print(_hardware(device) + "\n")
        for section in sections:
            SECTIONS[section].run(cfg, device)

    run_words(call, __doc__, "section or key=value")


if __name__ == "__main__":
    main()
