"""Typed configuration: defaults here, deltas in YAML, the last word on the command line.

    defaults  <  configs/<stage>.yml  <  benchmark YAML  <  its `stages: {<name>: …}` part  <  key=value

Every key is a field of `utils.config.keys`. An unknown key, a wrong type or an impossible
combination raises `ConfigError` before data or GPU are touched.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from utils.config.errors import ConfigError
from utils.config.keys import RUNS, Config, leaves_folder, require

ROOT = Path(__file__).resolve().parents[2]


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
    if hint == list[str] and isinstance(value, str):  # one name
        value = [value]
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
        weights = Path(assignment).suffix in (".pth", ".pt", ".pkl", ".tar")
        hint = f"; a weight file is named by checkpoint={assignment}" if weights else ""
        raise ConfigError(f"{assignment!r} is not of the form key=value{hint}")
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


def read_config(stage_file: str | Path, overrides: list[str] = ()) -> Config:
    """The configuration of one stage, with keys, types, ranges and combinations checked.

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
    _check_ranges(config)
    config.validate()
    return config


def _numbers(value: Any) -> list[int | float]:
    """A number, or those in a nested list."""
    if isinstance(value, list):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, int | float) else []


def _check_ranges(config: Config) -> None:
    """Raise ConfigError for a number outside the range of its key."""
    values = flatten(to_dict(config))
    for key, (_, f) in _all_keys().items():
        least, most = f.metadata["least"], f.metadata["most"]
        inside = all(least <= number <= most and number < math.inf for number in _numbers(values[key]))
        span = f"in {least:g}..{most:g}" if most < math.inf else f"at least {least:g}" if least else "0 or more"
        require(inside, f"{key}={values[key]} must be {span.replace('at least 1e-12', 'above 0')}")


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


def key_help() -> str:
    default = flatten(to_dict(default_config()))
    lines = ["keys, with their defaults before any YAML:"]
    for key, (hint, f) in _all_keys().items():
        why = f.metadata["help"]
        kind = f" [{_type_name(hint)}]" if typing.get_origin(hint) is Literal else ""
        value = default[key]
        shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
        lines.append(f"  {key}={shown}{kind}\n      {why}")
    return "\n".join(lines)
