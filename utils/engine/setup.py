"""What every script needs before its work starts: device, data, network. All inputs are checked before any is used."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from data import toy
from data.datasets import SegmentationDataset, build_dataset
from data.taxonomy import CLASS_SETS, check_classes, class_set
from models import WeightError, WeightFile, build_model, read_weights, released_dilations
from models.backbone import check_backbone
from models.build import default_stride
from models.weights import SIMCLR_SETTINGS
from utils.config import Config, ConfigError, UserError, load_config, reason
from utils.config.keys import COMPILED_STEPS, DEFAULT_ARCH, RESNETS, TRAINING_STAGES
from utils.engine import checkpoint, distributed
from utils.evaluation.batchnorm import recompute_batchnorm, set_batchnorm_statistics
from utils.evaluation.prediction import default_precision


def checked_config(stage_file: str | Path, overrides: list[str] = ()) -> Config:
    """`utils.config.load_config`; class lists are checked too, and that batches divide by the number of processes.

    Raises:
        ConfigError: as there; an id map or class set that cannot be meant; a batch that does not divide.
    """
    cfg = load_config(stage_file, overrides)
    check_classes(cfg.data)
    processes = distributed.world_size() if cfg.stage in TRAINING_STAGES else 1
    for key in ("batch_source", "batch_target"):
        batch, parts = getattr(cfg.train, key), processes * cfg.train.accumulate
        if batch % parts:
            raise ConfigError(f"train.{key}={batch} must be a multiple of {parts} (processes x train.accumulate)")
    return cfg


def _device_name(cfg: Config) -> str:
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return distributed.own_gpu(name) if name.startswith("cuda") else name


def choose_device(cfg: Config) -> torch.device:
    """The device that `device=` names; raises UserError if this machine has none such.

    Sets what `train.deterministic` and `train.precision` ask for too: it must be done before the device is used.
    """
    exact = cfg.train.deterministic
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable with a fixed workspace alone
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors lie on huge pages: CPU steps are faster
    torch.use_deterministic_algorithms(exact)
    torch.backends.cudnn.benchmark = False
    try:
        device = torch.device(_device_name(cfg))
        torch.zeros(1, device=device).item()
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # where collectives and random streams are by default
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"device={cfg.device} cannot be used: {reason(error)}") from None
    tf32 = cfg.train.precision == "tf32" and device.type == "cuda"
    # The older of torch's two interfaces: torch.compile of torch 2.11 refuses to run where the newer was used.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    return device


def prepare_data(cfg: Config) -> None:
    """Draw the toy cities where the benchmark asks for them; UserError if a dataset is nowhere."""
    read = {"pseudo_labels": ("target",), "test": ()}.get(cfg.stage, ("source", "target", "val"))
    for name in read:  # a test reads what `test` names, or photos
        if not getattr(cfg.data, name).root:
            raise UserError(f"data.{name} is missing, or has no root: {cfg.benchmark} must say where its images are")
    if cfg.data.toy_root:
        with distributed.main_first():
            toy.generate(cfg.data.toy_root)


def resolve_auto(cfg: Config, file: WeightFile | None = None) -> Config:
    """A copy of the configuration with every `auto` of network, classes and precision decided.

    What the file says of its network holds. A user's setting that contradicts it is an error, unless the file is a
    backbone alone: its settings are advice. Where neither says anything, the default holds.

    Raises:
        UserError: a contradiction, no class set of the file's size, batches too small for the network, or the file of
            a backbone that does not say which input it was trained on.
    """
    cfg = copy.deepcopy(cfg)
    m, file_settings = cfg.model, dict(file.settings) if file else {}
    if file and file.backbone_alone:
        # init=simclr and init=imagenet name published files, whose input statistics are known.
        file_settings |= {"simclr": SIMCLR_SETTINGS, "imagenet": {"normalization": "auto"}}.get(m.init, {})
        if m.arch == "deeplab_pbal":
            file_settings.pop("bn_clr", None)  # the variant is deeplabv2's
        if m.normalization == "auto" and "normalization" not in file_settings:
            raise UserError(
                f"{file.path} ({file.format}) does not say which input its weights expect: give model.normalization="
                "imagenet (ImageNet's mean and std), half (mean and std 0.5) or none ([0, 1] as it is, e.g. SimCLR)"
            )
    others = {key: value for key, value in file_settings.items() if getattr(m, key) not in ("auto", value)}
    if others and not file.backbone_alone:
        holds = " ".join(f"model.{key}={value}" for key, value in others.items())
        given = ", ".join(str(getattr(m, key)) for key in others)
        raise UserError(
            f"{file.path} ({file.format}) holds a network of {holds}, not {given}: give "
            + " ".join(f"model.{key}=auto" for key in others)
        )
    for key in file_settings.keys() - others.keys():
        setattr(m, key, file_settings[key])
    m.arch = DEFAULT_ARCH if m.arch == "auto" else m.arch
    m.backbone = m.backbone_name
    m.output_stride = default_stride(m.arch, m.backbone) if m.output_stride == "auto" else m.output_stride
    m.dilations = released_dilations(m.arch, m.output_stride) if m.dilations == "auto" else m.dilations
    m.bn_clr = m.bn_clr is True
    t = cfg.train
    t.precision = default_precision(torch.device(_device_name(cfg))) if t.precision == "auto" else t.precision
    t.compile = _compiles(cfg) if t.compile == "auto" else t.compile
    if cfg.data.class_set == "auto" and file:
        fitting = [name for name, classes in CLASS_SETS.items() if len(classes) == file.num_classes]
        if not fitting:
            raise UserError(f"{file.path} has {file.num_classes} classes: name them in a YAML, benchmark=mine.yml")
        cfg.data.class_set = fitting[0]
    on_gpu = _device_name(cfg).startswith("cuda")  # where BatchNorm is over the parts of all processes
    parts = t.accumulate * (1 if on_gpu else distributed.world_size())
    if cfg.stage in TRAINING_STAGES and m.arch == "deeplab_pbal" and parts in (t.batch_source, t.batch_target):
        raise UserError(
            "model.arch=deeplab_pbal normalises pooled features over the batch: train.batch_* must be 2 or more, and "
            "with train.accumulate, or several processes on a CPU, 2 or more in each part"
        )
    return cfg


def refuse_unusable_backbone(cfg: Config) -> None:
    """ConfigError if there is no network of the name that `model.backbone` gives, or not at `model.output_stride`."""
    m = cfg.model
    try:
        check_backbone(m.backbone, None if m.output_stride == "auto" else m.output_stride)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def build_network(cfg: Config, device: torch.device) -> nn.Module:
    """The network that a resolved configuration describes, with random weights; UserError if it cannot be built."""
    m = cfg.model
    torch.manual_seed(cfg.seed)
    try:
        model = build_model(
            m.arch,
            len(class_set(cfg.data)),
            backbone=m.backbone,
            output_stride=m.output_stride,
            dropout=m.dropout,
            normalization=m.normalization,
            bn_clr=m.bn_clr,
            dilations=m.dilations,
        )
        if cfg.train.checkpointing:
            model.backbone.set_checkpointing()
    except ValueError as error:
        raise UserError(str(error)) from None
    # Convolutions are at least as fast in this layout: an EfficientNet-Lite0's step takes 15 % less on a CPU.
    return model.to(device, memory_format=torch.channels_last)


def _compiles(cfg: Config) -> bool:
    """Whether train.compile=auto compiles: where the minutes of the first step were measured to be won back.

    Where that is so but the compiler does not work, a line says it.
    """
    t, m, device = cfg.train, cfg.model, _device_name(cfg)
    one_gpu = device.startswith("cuda") and distributed.world_size() == 1
    network = m.arch == "deeplabv2" and m.backbone in RESNETS and t.precision == "bfloat16"
    plain = t.accumulate == 1 and not (t.checkpointing or t.deterministic) and cfg.pseudo.labels == "offline"
    if not (one_gpu and network and plain and cfg.stage in TRAINING_STAGES and t.iterations >= COMPILED_STEPS):
        return False
    try:
        refuse_missing_compiler(torch.device(device))
    except UserError as error:
        print(f"steps stay slower: {error}", flush=True)
        return False
    return True


def refuse_missing_compiler(device: torch.device) -> None:
    """UserError if torch.compile does not work on the device."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, headers that are missing, …
        without = f"torch.compile does not work on {device} here; set train.compile=false"
        raise UserError(f"{without}: {reason(error)}") from None


def load_network(
    cfg: Config, weights: Path | WeightFile, device: torch.device, target: SegmentationDataset | None = None
) -> tuple[nn.Module, str]:
    """A trained network for inference, in eval mode, with the BatchNorm statistics that `batchnorm.statistics` names.

    Args:
        cfg: the network's configuration; `auto` follows the file.
        weights: a file of any known format.
        target: unlabelled target training images, for statistics=target; by default, those that `cfg` names.

    Returns:
        The network, and a line that says what was loaded.

    Raises:
        UserError, WeightError: the file cannot be read or does not fit.
    """
    file = weights if isinstance(weights, WeightFile) else read_weights(weights)
    if file.backbone_alone:
        raise UserError(f"{file.path} ({file.format}) holds a backbone alone, no trained network")
    cfg = resolve_auto(cfg, file)
    model = build_network(cfg, device)
    message = checkpoint.load_networks({"model": model}, file, cfg)
    if cfg.batchnorm.statistics == "running":
        set_batchnorm_statistics(model, file.running_statistics)
    elif cfg.batchnorm.statistics == "target":
        if target is None:
            skips = cfg.data.on_error == "skip"
            target = build_dataset(cfg.data.target, class_set(cfg.data), with_labels=False, skips=skips)
        recompute_batchnorm(model, target, cfg, device)
    return model.eval(), message


def check_inputs(*checks: Callable[[], object]) -> list:
    """Run every check, then raise one UserError with the messages of all that failed: users see all at once.

    A ConfigError is raised alone: what else is missing follows from another configuration.
    """
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except ConfigError:
            raise
        except (UserError, WeightError) as error:
            problems.append(str(error))
    if problems:
        raise UserError("\nerror: ".join(dict.fromkeys(problems)))
    return results
