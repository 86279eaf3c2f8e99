"""Typed configuration: defaults here, deltas in YAML, the last word on the command line.

    defaults  <  configs/<stage>.yml  <  benchmark YAML  <  its `stages: {<name>: …}` part  <  key=value

Every key is a field of `utils.schema`. An unknown key, a wrong type or an impossible
combination raises `ConfigError` before data or GPU are touched; `run_cli` turns it into one line and exit 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from data.taxonomy import ID_TO_NAME, resolve_id_map
from utils import distributed
from utils.errors import ConfigError, UserError
from utils.schema import DEFAULT_BACKBONE, RESNETS, RUNS, SIMCLR_RESNETS, TRAINING_STAGES, Config

ROOT = Path(__file__).resolve().parent.parent


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
    if typing.get_origin(hint) is typing.Union:
        return " | ".join(map(_type_name, typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    return str(hint) if typing.get_origin(hint) else hint.__name__


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as type `hint`, or ConfigError. An int is a float; YAML reads '1e-4' as text, which is one too."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        alike = [a for a in args if type(a) is type(value)] or args
        near = difflib.get_close_matches(str(value), map(str, alike), 1, 0)
        raise ConfigError(f"{key}={value!r} is not one of {_type_name(hint)}; nearest is {near[0]}")
    for arg in args if origin is typing.Union else ():  # a word or a list
        if value in typing.get_args(arg) or typing.get_origin(arg) is type(value):
            return _coerce(value, arg, key)
    if origin is list and isinstance(value, list):
        return [_coerce(v, args[0], key) for v in value]
    if hint is dict and isinstance(value, dict):
        return dict(value)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    if isinstance(hint, type) and type(value) is hint and not (hint is str and "\0" in value):  # no path holds NUL
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


def read_yaml(path: Path) -> dict:
    """The mapping that a YAML file holds, {} of an empty one; ConfigError if it holds anything else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except Exception as error:  # of a tag that does not fit its value, the loader raises anything
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())[:500]}") from None
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
    except Exception:
        raise ConfigError(f"{key}={text!r}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return key, value


def default_config() -> Config:
    """Every key at its default."""
    return _default(Config)


def load_config(stage_file: str | Path, overrides: list[str] = ()) -> Config:
    """The checked configuration of one stage.

    Args:
        stage_file: a YAML of `configs/`, or the user's own.
        overrides: `key=value` strings; values are YAML, keys dotted.

    Raises:
        ConfigError: unknown key, wrong type, impossible combination, unreadable file.
    """
    config = default_config()
    stage_file = Path(stage_file)
    stage_delta = read_yaml(stage_file)
    commands = [_override(o) for o in overrides]
    if any(key == "stage" for key, _ in commands):
        raise ConfigError("stage is set by the stage file: give another one with --config")
    chosen = {key: next(iter(value.values())) for key, value in commands if key in ("benchmark", "name")}
    benchmark = chosen.get("benchmark") or stage_delta.get("benchmark") or config.benchmark
    _apply(config, stage_delta, str(stage_file))
    benchmark_file = _find_benchmark(str(benchmark))
    benchmark_delta = read_yaml(benchmark_file)
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
        _apply(default_config(), delta, where)  # sections of other stages are checked as well
    for run in dict.fromkeys((config.stage, run_name)):  # source_only is a warm-up with deltas of its own
        _apply(config, by_stage.get(run, {}), f"stages.{run} of {benchmark_file}")
    for key, value in (("runs", config.runs), ("data.toy_root", config.data.toy_root)):
        if leaves_folder(value):  # who passes a YAML on does not decide where it writes
            raise ConfigError(f"{key}={value!r} in a YAML must be a relative path without '..'; give it as {key}=…")
    for _, delta in commands:
        _apply(config, delta, "the command line")
    config.benchmark = str(benchmark)
    _check(config)
    return config


def _numbers(value: Any) -> list[int | float]:
    """A number, or those in a nested list."""
    if isinstance(value, list):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, int | float) else []


def leaves_folder(path: str) -> bool:
    """Whether a path from a file leads out of the folder that it is meant to be below."""
    return Path(path).is_absolute() or ".." in Path(path).parts


def _check(c: Config) -> None:
    """Raise ConfigError, naming the key, for values that cannot work together."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)

    t, d = c.train, c.data
    values = flatten(to_dict(c))
    for key, (_, f) in _all_keys().items():
        least, most = f.metadata["least"], f.metadata["most"]
        inside = all(least <= number <= most and number < math.inf for number in _numbers(values[key]))
        span = f"in {least:g}..{most:g}" if most < math.inf else f"at least {least:g}" if least else "0 or more"
        require(inside, f"{key}={values[key]} must be {span.replace('at least 1e-12', 'above 0')}")
    section = ""
    try:
        classes = c.classes
        for section in ("data.source.", "data.target.", "data.val."):
            id_to_name = ID_TO_NAME.get(values[f"{section}format"]) or resolve_id_map(
                values[f"{section}id_map"], classes
            )
            untaught = [n for n in classes.names if n not in id_to_name.values()]
            if untaught and section == "data.source.":
                raise ValueError(f"format and id_map have no label id for class {untaught[0]!r} of the class set")
    except ValueError as error:
        raise ConfigError(f"{section}{error}") from None
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
    for key in ("crop", "scale", "jitter_factor", "randaugment"):
        value = getattr(d, key)
        require(len(value) == 2, f"data.{key}={value} must hold two numbers")
        require(key in ("crop", "randaugment") or value[0] <= value[1], f"data.{key}={value} must be [low, high]")
    require(len(c.test.window) in (0, 2), f"test.window={c.test.window}: [width, height]")
    require(bool(c.test.scales), "test.scales=[] must hold a number; [1] is the image as it is")
    require(
        t.iterations <= t.horizon,
        f"train.iterations={t.iterations} is beyond train.horizon={t.horizon}, where the learning rate reaches zero",
    )
    processes = distributed.world_size() if c.stage in TRAINING_STAGES else 1
    for key in ("batch_source", "batch_target"):
        batch, parts = getattr(t, key), processes * t.accumulate
        of = f"{processes} processes with train.accumulate={t.accumulate}"
        into = f"train.accumulate={t.accumulate} equal parts" if processes == 1 else f"equal parts for {of}"
        require(batch % parts == 0, f"train.{key}={batch} cannot be split into {into}; multiples of {parts} can")
    require(
        not (c.stage in TRAINING_STAGES and c.batchnorm.statistics == "saved"),
        "batchnorm.statistics=saved is for test.py and gen_pseudo_labels.py; training takes running or target",
    )
    require(
        c.stage != "warmup" or c.loss.bidirectional == 0,
        f"loss.bidirectional={c.loss.bidirectional} in the warm-up: that is BPL, use configs/stage1_BPL.yml",
    )
    rounds = c.distill.rounds
    require(rounds and rounds == sorted(set(rounds)), f"distill.rounds={rounds} must be [1], [2] or [1, 2]")
    for key, value in (("name", c.name), ("pseudo_labels", c.pseudo_labels)):
        require(not leaves_folder(value), f"{key}={value!r} must be a folder below runs/<benchmark>")
    require(c.benchmark_name not in ("", ".", ".."), f"benchmark={c.benchmark!r} names no folder below {c.runs}")
    backbone = DEFAULT_BACKBONE if c.model.backbone == "auto" else c.model.backbone
    if not backbone.startswith("timm/") and backbone not in RESNETS:
        near = difflib.get_close_matches(backbone, RESNETS, 1, 0)
        raise ConfigError(f"model.backbone={backbone!r} is unknown; nearest is {near[0]!r}, or timm/NAME")
    start = "distill.init_round1" if c.stage == "distill" else "model.init"
    simclr = c.stage in TRAINING_STAGES and values[start] == "simclr"
    said = f"{start}=simclr, but there are no SimCLR weights of model.backbone={backbone}; nearest is imagenet"
    require(not simclr or backbone in SIMCLR_RESNETS, said)
    variant = c.model.bn_clr is not True or c.model.arch != "deeplab_pbal"
    require(variant, f"model.bn_clr is a variant of deeplabv2, not of model.arch={c.model.arch}")
    require(d.class_set != "auto" or c.stage == "test", "data.class_set=auto is for test.py alone: name the classes")


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
    default = flatten(to_dict(default_config()))
    lines = ["keys, with their defaults before any YAML:"]
    for key, (hint, f) in _all_keys().items():
        why = f.metadata["help"]
        kind = f" [{_type_name(hint)}]" if typing.get_origin(hint) is Literal else ""
        value = default[key]
        shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
        lines.append(f"  {key}={shown}{kind}\n      {why}")
    return "\n".join(lines)


def run_cli(main: Callable[[Config], Any], default_config: str, usage: str, stages: tuple[str, ...]) -> None:
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

    def call() -> None:
        config = load_config(args.config, args.overrides)
        if config.stage not in stages:
            raise ConfigError(
                f"{args.config} is of stage {config.stage!r}; {Path(sys.argv[0]).name} is for {' and '.join(stages)}"
            )
        main(config)

    guarded(call, args.debug)


def run_words(call: Callable[[list[str]], Any], usage: str, words: str = "key=value") -> None:
    """Parse the command line of a module without a stage file and run `call(words)`; errors end as in `run_cli`."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of the user's mistakes too")
    parser.add_argument("words", nargs="*", metavar=words, help="see `python train_bpl.py --help`")
    args = parser.parse_args()
    guarded(lambda: call(args.words), args.debug)


def guarded(call: Callable[[], Any], debug: bool = False) -> None:
    """Run `call`; a `UserError` becomes its message on stderr and its exit status, as does what the system refuses.

    Where torchrun has started several processes, they meet here, and part here when all are done. Of what ends one of
    them, one line is said; it ends the others too.
    """
    try:
        try:
            distributed.start()
            call()
        except SystemExit:  # on a signal: every process leaves after the same step
            distributed.end()
            raise
        distributed.end()
    except (UserError, OSError) as error:  # the latter: no space left, a read-only folder, …
        if debug:
            traceback.print_exc()
        if isinstance(error, OSError):
            error = UserError(f"{error.filename or 'the system says'}: {error.strerror or error}")
        _say_and_leave(f"error: {error}", error.status)
    except torch.OutOfMemoryError as error:
        if debug:
            traceback.print_exc()
        _say_and_leave(
            f"error: {str(error).split('. ')[0]}: see train.checkpointing, train.accumulate, data.crop and test.batch; "
            "`python -m utils.benchmark plan` says what fits",
            1,
        )
    except KeyboardInterrupt:
        _say_and_leave("interrupted", 130)
    except Exception as error:
        if distributed.world_size() == 1:
            raise
        gone = distributed.others_are_gone(error) and not debug
        _say_and_leave(f"error: {distributed.GONE}" if gone else traceback.format_exc(), 1)


def _say_and_leave(line: str, status: int) -> None:
    if distributed.first_to_say():
        print(line, file=sys.stderr)
    distributed.leave(status)
