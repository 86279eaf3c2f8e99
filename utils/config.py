"""Typed configuration: defaults here, deltas in YAML, the last word on the command line.

    defaults  <  configs/<stage>.yml  <  benchmark YAML  <  its `stages: {<name>: …}` part  <  key=value

Every key is a field below, with its type, default and reason. An unknown key, a wrong type or an impossible
combination raises `ConfigError` before data or GPU are touched; `run_cli` turns it into one line and exit 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import traceback
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from data.taxonomy import CLASS_SETS, ClassSet, custom_class_set, resolve_id_map

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("warmup", "bpl", "pseudo_labels", "pst", "distill", "test")
RUNS = (*STAGES, "source_only")  # what a benchmark's `stages` may name
TRAINING_STAGES = ("warmup", "bpl", "pst", "distill")


class UserError(ValueError):
    """The user's mistake (a missing file, unusable data): one line, exit status 1."""

    status = 1


class ConfigError(UserError):
    """A configuration that cannot be meant: one line, exit status 2."""

    status = 2


def opt(default: Any, why: str) -> Any:
    """A config field: its default (copied if mutable) and the one-line reason that `--help` shows."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": why})
    return field(default=default, metadata={"help": why})


@dataclass
class DatasetConfig:
    format: Literal["gta5", "synthia", "cityscapes", "folder"] = opt("gta5", "layout and label ids on disk")
    root: str = opt("data/GTA5", "folder of the dataset, relative to where the script is started")
    split: str = opt(
        "all", "cityscapes: train | val | test; gta5: all, or train | val | test of split.mat; else unused"
    )
    size: list[int] = opt([], "[width, height] that images and labels are brought to when read; [] keeps each as it is")
    images: list[str] = opt([], "folder: globs below root, e.g. ['images/*.jpg']")
    labels: str = opt("", "folder: label of an image, from {dir} {parent} {stem}, e.g. 'labels/{stem}.png'; '' = none")
    strip: str = opt("", "folder: ending cut from an image's stem before {stem} is filled in")
    id_map: dict = opt({}, "folder: {label id: class name or 'ignore'}; ids not named are ignored; {} = train ids")


@dataclass
class DataConfig:
    class_set: Literal["cityscapes19", "cityscapes16", "custom"] = opt("cityscapes19", "which classes are learnt")
    class_names: list[str] = opt([], "custom: class names in train-id order")
    palette: list[list[int]] = opt([], "custom: one [r, g, b] per class; [] spreads colours over the hue circle")
    source: DatasetConfig = opt(None, "labelled domain")
    target: DatasetConfig = opt(None, "domain adapted to; its labels are never read in training")
    val: DatasetConfig = opt(None, "labelled split of the target domain, for measuring only")
    base_width: int = opt(2200, "width in px that scale 1 stands for (as released); 0 = the image's own width")
    scale: list[float] = opt([0.5, 1.5], "uniform range of the random resize, aspect kept (as released)")
    crop: list[int] = opt([896, 512], "[width, height] of training crops (as released)")
    hflip: float = opt(0.5, "probability of mirroring (as released)")
    jitter: bool = opt(True, "colour jitter in the strong view; off: strong = weak")
    jitter_hue: float = opt(0.2, "strong view: hue shift in +-this (as released)")
    jitter_factor: list[float] = opt([0.5, 1.5], "strong view: brightness, contrast, saturation (as released)")
    randaugment: list[int] = opt([2, 10], "distillation's strong view: number and magnitude of operations (ProDA)")
    cutout: float = opt(0.25, "distillation's strong view: side of the hole as a share of the crop's; 0 = none")
    workers: int = opt(4, "loader processes per domain; 0 loads in the training process")
    toy_root: str = opt("", "draw the toy cities into this folder on first use; '' = real data")


@dataclass
class ModelConfig:
    arch: Literal["deeplabv2"] = opt("deeplabv2", "segmentation architecture")
    backbone: str = opt("resnet101", "resnet18 | resnet34 | resnet50 | resnet101 | resnet152 | timm/NAME")
    output_stride: Literal[8, 16] = opt(8, "input pixels per feature pixel")
    normalization: Literal["auto", "imagenet", "half", "none"] = opt(
        "auto", "input statistics; auto = what the backbone's weights expect (ImageNet for torchvision's)"
    )
    dropout: float = opt(0.1, "channel dropout before the classifier (as released)")
    init: str = opt("imagenet", "start from: scratch | imagenet | a run's name (e.g. bpl) | a file")
    published: str = opt("", "file tried when the run named by init is not there")


@dataclass
class LossConfig:
    adversarial: float = opt(0.01, "weight of output-space alignment (as released); 0 trains without adversary")
    bidirectional: float = opt(0.1, "weight of each of the two prototype terms (as released); 0 = warm-up")
    pseudo_ce: float = opt(1.0, "weight of cross-entropy on pseudo labels (as released)")
    contrast: float = opt(1.0, "weight of prototypical contrast, each domain (as released)")
    temperature: float = opt(0.07, "tau of prototypical contrast (as released)")
    distill: float = opt(1.0, "weight of KL(teacher || student) (ProDA)")


@dataclass
class TrainConfig:
    iterations: int = opt(60_000, "steps to run (as released)")
    horizon: int = opt(90_000, "steps over which the poly schedule would reach zero (as released)")
    lr: float = opt(1e-4, "learning rate of the backbone; the head has ten times as much (as released)")
    head_lr_factor: float = opt(10.0, "head's learning rate over the backbone's (as released)")
    power: float = opt(0.9, "exponent of the poly schedule (as released)")
    momentum: float = opt(0.9, "SGD momentum (as released)")
    weight_decay: float = opt(2e-4, "SGD weight decay (as released)")
    lr_discriminator: float = opt(
        1e-4, "Adam on the discriminator, betas (0.9, 0.99), same poly schedule (as released)"
    )
    batch_source: int = opt(4, "source crops a step (as released)")
    batch_target: int = opt(4, "target crops a step (as released)")
    precision: Literal["float32", "bfloat16"] = opt("float32", "autocast type of the forward passes")
    val_every: int = opt(1000, "steps between validations (as released)")
    save_every: int = opt(1000, "steps between writes of checkpoints/last.pth")
    log_every: int = opt(20, "steps between log lines")
    panels: int = opt(4, "validation images drawn into panels/ at each validation")
    restart: bool = opt(False, "begin anew although the run folder holds a run; else it is resumed")


@dataclass
class BatchNormConfig:
    statistics: Literal["running", "target", "saved"] = opt(
        "running",
        "running = as released; target = recomputed on unlabelled target training images before "
        "validation, pseudo labels and saving; saved = whatever the checkpoint holds (not in training)",
    )
    images: int = opt(256, "target images that statistics are recomputed on; 0 = all")


@dataclass
class PseudoConfig:
    threshold: float = opt(0.95, "pixels less confident than this become ignore (ProDA, CAG)")
    selection: Literal["constant", "class_balanced"] = opt(
        "constant", "class_balanced: per class min(threshold, the confidence that keeps `keep` of its pixels)"
    )
    keep: float = opt(0.66, "class_balanced: share of each class's pixels that is kept at least")
    flip: bool = opt(True, "average with the prediction of the mirrored image (ProDA)")


@dataclass
class DistillConfig:
    rounds: list[int] = opt([1, 2], "rounds to run; round 2 learns from round 1's result (ProDA)")
    init_round1: str = opt("imagenet", "student of round 1: imagenet | scratch | teacher | a run's name | a file")


@dataclass
class TestConfig:
    flip: bool = opt(False, "average with the prediction of the mirrored image")
    batch: int = opt(1, "images predicted at once, in validation and pseudo labels too")
    panels: int = opt(8, "images drawn into panels/")


@dataclass
class Config:
    benchmark: str = opt("gta5_to_cityscapes", "who adapts to whom: a name in configs/benchmarks/ or a YAML file")
    stage: Literal["warmup", "bpl", "pseudo_labels", "pst", "distill", "test"] = opt("bpl", "set by the stage file")
    name: str = opt("", "run folder below runs/<benchmark>/; '' = the stage's name")
    runs: str = opt("runs", "folder of all runs")
    checkpoint: str = opt("", "test and pseudo labels: the network, a run's name or a file; distill: the teacher")
    which: Literal["last", "best"] = opt("last", "checkpoint of a named run; best was chosen by looking at val labels")
    pseudo_labels: str = opt("pseudo_labels", "run that holds the pseudo labels")
    seed: int = opt(0, "of weights, data order and augmentation")
    device: str = opt("auto", "auto = cuda where there is one | cpu | cuda:N")
    data: DataConfig = opt(None, "")
    model: ModelConfig = opt(None, "")
    loss: LossConfig = opt(None, "")
    train: TrainConfig = opt(None, "")
    batchnorm: BatchNormConfig = opt(None, "")
    pseudo: PseudoConfig = opt(None, "")
    distill: DistillConfig = opt(None, "")
    test: TestConfig = opt(None, "")

    @property
    def classes(self) -> ClassSet:
        """The class set of this configuration."""
        if self.data.class_set == "custom":
            return custom_class_set(self.data.class_names, self.data.palette)
        return CLASS_SETS[self.data.class_set]

    @property
    def benchmark_name(self) -> str:
        """`benchmark` without folder and ending: the folder below `runs`."""
        return Path(self.benchmark).stem

    @property
    def run_dir(self) -> Path:
        """Where this run writes: `runs/<benchmark>/<name>`."""
        return self.sibling_run(self.name or self.stage)

    def sibling_run(self, name: str) -> Path:
        """Folder of another run of the same benchmark."""
        return Path(self.runs) / self.benchmark_name / name


# ------------------------------------------------------------------------------------------ building and checking


def _fields(cls: type) -> dict[str, tuple[Any, dataclasses.Field]]:
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f) for f in dataclasses.fields(cls)}


def _default(cls: type) -> Any:
    nested = {k: _default(t) for k, (t, _) in _fields(cls).items() if dataclasses.is_dataclass(t)}
    return cls(**nested)


def _all_keys(cls: type = Config, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field]]:
    keys = {}
    for name, (hint, f) in _fields(cls).items():
        if dataclasses.is_dataclass(hint):
            keys.update(_all_keys(hint, f"{prefix}{name}."))
        else:
            keys[prefix + name] = (hint, f)
    return keys


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    return str(hint) if typing.get_origin(hint) else hint.__name__


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as type `hint`, or ConfigError. An int is a float; YAML reads '1e-4' as text, which is one too."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        near = difflib.get_close_matches(str(value), map(str, args), 1, 0)
        raise ConfigError(f"{key}={value!r} is not one of {_type_name(hint)}; nearest is {near[0]}")
    if origin is list and isinstance(value, list):
        return [_coerce(v, args[0], key) for v in value]
    if hint is dict and isinstance(value, dict):
        return dict(value)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ConfigError(f"{key}={value!r} has the wrong type: {_type_name(hint)} is needed")


def _unknown(key: str, where: str) -> ConfigError:
    keys = list(_all_keys())
    leaf = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = leaf or difflib.get_close_matches(key, keys, 1, 0)
    return ConfigError(f"unknown key {key!r} in {where}; nearest is {near[0]!r}")


def _apply(config: Any, delta: dict, where: str, prefix: str = "") -> None:
    """Write the nested mapping `delta` into the nested dataclass `config`, checking keys and types."""
    known = _fields(type(config))
    for name, value in delta.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise _unknown(key, where)
        hint = known[name][0]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"{key} in {where} is a section: its keys go below it, not {value!r}")
            _apply(getattr(config, name), value, where, f"{key}.")
        else:
            setattr(config, name, _coerce(value, hint, key))


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not keys and values")
    return content


def _find_benchmark(name: str) -> Path:
    if name.endswith((".yml", ".yaml")):
        return Path(name)
    path = ROOT / "configs" / "benchmarks" / f"{name}.yml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yml"))
        near = difflib.get_close_matches(name, known, 1, 0)
        raise ConfigError(
            f"benchmark={name!r} is neither a .yml file nor one of {', '.join(known)}; nearest is {near[0]!r}"
        )
    return path


def _override(assignment: str) -> tuple[str, dict]:
    """'train.lr=1e-3' -> ('train.lr', {'train': {'lr': 1e-3}})."""
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"{assignment!r} is not of the form key=value")
    keys = _all_keys()
    if key not in keys:
        raise _unknown(key, "the command line")
    try:
        value = text if keys[key][0] is str else yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}={text!r}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return key, value


def load_config(stage_file: str | Path, overrides: list[str] = ()) -> Config:
    """The checked configuration of one stage.

    Args:
        stage_file: a YAML of `configs/`, or the user's own.
        overrides: `key=value` strings; values are YAML, keys dotted.

    Raises:
        ConfigError: unknown key, wrong type, impossible combination, unreadable file.
    """
    config = _default(Config)
    stage_file = Path(stage_file)
    stage_delta = _read_yaml(stage_file)
    commands = [_override(o) for o in overrides]
    chosen = {key: next(iter(value.values())) for key, value in commands if key in ("benchmark", "stage", "name")}
    benchmark = chosen.get("benchmark") or stage_delta.get("benchmark") or config.benchmark
    _apply(config, stage_delta, str(stage_file))
    benchmark_file = _find_benchmark(str(benchmark))
    benchmark_delta = _read_yaml(benchmark_file)
    by_stage = benchmark_delta.pop("stages", None) or {}
    _apply(config, benchmark_delta, str(benchmark_file))
    if not isinstance(by_stage, dict):
        raise ConfigError(f"stages in {benchmark_file} must hold one section per stage, not {by_stage!r}")
    run_name = chosen.get("name") or config.name or config.stage
    for run, delta in by_stage.items():
        where = f"stages.{run} of {benchmark_file}"
        if run not in RUNS:
            raise ConfigError(f"unknown {where}; nearest is {difflib.get_close_matches(str(run), RUNS, 1, 0)[0]!r}")
        if not isinstance(delta, dict):
            raise ConfigError(f"{where} is a section, not {delta!r}")
        _apply(_default(Config), delta, where)  # sections of other stages are checked as well
    for run in dict.fromkeys((config.stage, run_name)):  # source_only is a warm-up with deltas of its own
        _apply(config, by_stage.get(run, {}), f"stages.{run} of {benchmark_file}")
    for _, delta in commands:
        _apply(config, delta, "the command line")
    config.benchmark = str(benchmark)
    _check(config)
    return config


def _check(c: Config) -> None:
    """Raise ConfigError, naming the key, for values that cannot work together."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)

    t, d = c.train, c.data
    try:
        classes = c.classes
        for name in ("source", "target", "val"):
            resolve_id_map(getattr(d, name).id_map, classes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    custom = d.class_set == "custom"
    require(custom or not d.class_names, f"data.class_names is set, but data.class_set={d.class_set}; use custom")
    for name in ("source", "target", "val"):
        ds = getattr(d, name)
        folder = ds.format == "folder"
        require(not folder or bool(ds.images), f"data.{name}.images is empty, but format=folder needs globs")
        require(folder or not ds.id_map, f"data.{name}.id_map is set, but format={ds.format} has its own; use folder")
        require(folder or not custom, f"data.class_set=custom needs data.{name}.format=folder, not {ds.format}")
        require(len(ds.size) in (0, 2) and all(v > 0 for v in ds.size), f"data.{name}.size={ds.size}: [width, height]")
        splits = {"cityscapes": ("train", "val", "test"), "gta5": ("all", "train", "val", "test")}.get(ds.format)
        require(not splits or ds.split in splits, f"data.{name}.split={ds.split!r} is not one of {splits}")
        outside = Path(ds.labels.replace("{dir}", "d")).is_absolute() if ds.labels else False
        require(not outside, f"data.{name}.labels={ds.labels!r} must be relative to root")
    require(len(d.crop) == 2 and min(d.crop) >= 32, f"data.crop={d.crop} must be [width, height], at least 32 each")
    require(
        len(d.scale) == 2 and 0 < d.scale[0] <= d.scale[1], f"data.scale={d.scale} must be [low, high], 0 < low <= high"
    )
    require(
        len(d.jitter_factor) == 2 and 0 <= d.jitter_factor[0] <= d.jitter_factor[1],
        f"data.jitter_factor={d.jitter_factor} must be [low, high]",
    )
    require(len(d.randaugment) == 2, f"data.randaugment={d.randaugment} must be [number, magnitude]")
    for key, value, low, high in (
        ("data.hflip", d.hflip, 0, 1),
        ("data.jitter_hue", d.jitter_hue, 0, 0.5),
        ("data.cutout", d.cutout, 0, 1),
        ("pseudo.threshold", c.pseudo.threshold, 0, 1),
        ("pseudo.keep", c.pseudo.keep, 0, 1),
        ("model.dropout", c.model.dropout, 0, 0.99),
    ):
        require(low <= value <= high, f"{key}={value} must lie in {low}..{high}")
    for key, value in (
        ("train.iterations", t.iterations),
        ("train.horizon", t.horizon),
        ("train.lr", t.lr),
        ("train.batch_source", t.batch_source),
        ("train.batch_target", t.batch_target),
        ("train.val_every", t.val_every),
        ("train.save_every", t.save_every),
        ("train.log_every", t.log_every),
        ("test.batch", c.test.batch),
        ("loss.temperature", c.loss.temperature),
    ):
        require(value > 0, f"{key}={value} must be above 0")
    for key, value in dataclasses.asdict(c.loss).items():
        require(value >= 0, f"loss.{key}={value} must not be negative")
    require(
        t.iterations <= t.horizon,
        f"train.iterations={t.iterations} is beyond train.horizon={t.horizon}, where the learning rate reaches zero",
    )
    require(
        not (c.stage in TRAINING_STAGES and c.batchnorm.statistics == "saved"),
        "batchnorm.statistics=saved is for test.py and gen_pseudo_labels.py; training takes running or target",
    )
    require(
        c.stage != "warmup" or c.loss.bidirectional == 0,
        f"loss.bidirectional={c.loss.bidirectional} in the warm-up: that is BPL, use configs/stage1_BPL.yml",
    )
    require(
        set(c.distill.rounds) <= {1, 2} and c.distill.rounds == sorted(set(c.distill.rounds)) and c.distill.rounds,
        f"distill.rounds={c.distill.rounds} must be [1], [2] or [1, 2]",
    )
    for key, value in (("name", c.name), ("pseudo_labels", c.pseudo_labels)):
        require(
            not Path(value).is_absolute() and ".." not in Path(value).parts,
            f"{key}={value!r} must be a folder below runs/<benchmark>",
        )
    known = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    if not c.model.backbone.startswith("timm/") and c.model.backbone not in known:
        near = difflib.get_close_matches(c.model.backbone, known, 1, 0)
        raise ConfigError(f"model.backbone={c.model.backbone!r} is unknown; nearest is {near[0]!r}, or timm/NAME")


# -------------------------------------------------------------------------------------------------- command line


def to_dict(config: Config) -> dict:
    """The configuration as plain nested dicts, for YAML and checkpoints."""
    return dataclasses.asdict(config)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{'train': {'lr': 1}} -> {'train.lr': 1}; an `id_map` stays whole."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key != "id_map"
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def _key_help() -> str:
    default = flatten(to_dict(_default(Config)))
    lines = ["keys, with their defaults before any YAML:"]
    for key, (hint, f) in _all_keys().items():
        why = f.metadata["help"]
        kind = f" [{_type_name(hint)}]" if typing.get_origin(hint) is Literal else ""
        value = default[key]
        shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
        lines.append(f"  {key}={shown}{kind}\n      {why}")
    return "\n".join(lines)


def run_cli(main: Callable[[Config], Any], default_config: str, usage: str) -> None:
    """Parse `[--config FILE] [key=value …]`, run `main(config)`, and end with the exit status users expect.

    0 done · 1 the user's mistake beyond the config (one line) · 2 a config that cannot be meant (one line).
    `--debug` shows the traceback of such errors.
    """
    parser = argparse.ArgumentParser(
        description=usage, epilog=_key_help(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=str(ROOT / "configs" / default_config),
        help=f"stage YAML (default: configs/{default_config})",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of the user's mistakes too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, e.g. train.iterations=200")
    args = parser.parse_intermixed_args()
    guarded(lambda: main(load_config(args.config, args.overrides)), args.debug)


def guarded(call: Callable[[], Any], debug: bool = False) -> None:
    """Run `call`; a `UserError` becomes its message on stderr and its exit status."""
    try:
        call()
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
