"""What every script needs before its work starts: device, data, network. All inputs are checked before any is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from data import toy
from data.datasets import SegmentationDataset
from models import build_model
from utils import checkpoint
from utils.config import Config, UserError
from utils.inference import recompute_batchnorm


def choose_device(cfg: Config) -> torch.device:
    """The device that `device=` names; raises UserError if this machine has none such.

    Sets what `train.deterministic` asks for too: it must be done before the device is used.
    """
    exact = cfg.train.deterministic
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable with a fixed workspace alone
    torch.use_deterministic_algorithms(exact)
    torch.backends.cudnn.benchmark = False
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"device={cfg.device} cannot be used: {reason}") from None


def prepare_data(cfg: Config) -> None:
    """Draw the toy cities where the benchmark asks for them."""
    if cfg.data.toy_root:
        toy.generate(cfg.data.toy_root)


def build_network(cfg: Config, device: torch.device) -> nn.Module:
    """The segmentation network of a configuration, with random weights; raises UserError if it cannot be built."""
    m = cfg.model
    torch.manual_seed(cfg.seed)
    try:
        model = build_model(m.arch, len(cfg.classes), m.backbone, m.output_stride, m.dropout, m.normalization)
    except ValueError as error:
        raise UserError(str(error)) from None
    # Convolutions of every kind are at least as fast in this layout, depthwise ones on a CPU by a third.
    return model.to(device, memory_format=torch.channels_last)


def load_network(
    cfg: Config, weights: Path, device: torch.device, target: SegmentationDataset | None = None
) -> tuple[nn.Module, str]:
    """A trained network for inference, in eval mode, with the BatchNorm statistics that `batchnorm.statistics` names.

    Args:
        cfg: the network's configuration.
        weights: a file of any known format.
        target: unlabelled target training images, for statistics=target.

    Returns:
        The network, and a line that says what was loaded.

    Raises:
        UserError: the file cannot be read or does not fit.
    """
    model = build_network(cfg, device)
    message = checkpoint.load(model, weights, cfg)
    if cfg.batchnorm.statistics == "running":
        checkpoint.use_running_statistics(model, weights)
    elif cfg.batchnorm.statistics == "target":
        recompute_batchnorm(model, target, cfg, device)
    return model.eval(), message


def check_inputs(*checks: Callable[[], object]) -> list:
    """Run every check, then raise one UserError with the messages of all that failed: the user sees all at once."""
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\nerror: ".join(dict.fromkeys(problems)))
    return results
