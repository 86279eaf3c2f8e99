"""Typed configuration: defaults in code, changes in YAML, and the command line last.

    defaults  <  configs/<stage>.yml  <  benchmark YAML  <  its `stages: {<name>: …}` part  <  key=value

Every key is a field of `utils.config.keys`. An unknown key, a wrong type or an impossible combination raises
`ConfigError` before data or GPU are touched.

A relative path is looked for beside the user's own YAML that names it, then in the folder that the script is started
from, then in the checkout; see `find_path`. Runs are written below the folder that the script is started from.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from utils.config.errors import ConfigError
from utils.config.keys import RUNS, TINY, WEIGHT_ENDINGS, Config, DataConfig, leaves_folder, nearest, require

ROOT = Path(__file__).resolve().parents[2]  # the checkout


# ------------------------------------------------------------------------------------------------------------ keys


class _Key(typing.NamedTuple):
    """One key: its type, what `utils.config.keys.opt` said of it, and the stages that read it (None: all)."""

    hint: Any
    metadata: Any
    stages: tuple[str, ...] | None


def _fields(cls: type) -> Iterator[tuple[str, Any, Any]]:
    """(name, type, metadata) of a section's fields."""
    hints = typing.get_type_hints(cls)
    return ((f.name, hints[f.name], f.metadata) for f in dataclasses.fields(cls))


def all_keys(cls: type = Config, prefix: str = "", stages: tuple[str, ...] | None = None) -> dict[str, _Key]:
    """Every key by its dotted name."""
    keys = {}
    for name, hint, metadata in _fields(cls):
        own = stages if metadata["stages"] is None else metadata["stages"]
        if dataclasses.is_dataclass(hint):
            keys |= all_keys(hint, f"{prefix}{name}.", own)
        else:
            keys[prefix + name] = _Key(hint, metadata, own)
    return keys


to_dict = dataclasses.asdict  # a configuration as plain nested dicts, for YAML and checkpoints


def to_yaml(content: dict) -> str:
    """As text, in the order of the keys."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{'train': {'lr': 1}} -> {'train.lr': 1}; an `id_map` stays whole."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key != "id_map"
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def key_help(config: Config, reads: tuple[str, ...] = ()) -> str:
    """The keys that the configuration's stage reads, with their values and reasons, by section.

    `reads`: prefixes of the keys to show; () shows all.
    """
    values, defaults = flatten(to_dict(config)), flatten(to_dict(Config()))
    datasets = {f"data.{name}": metadata["help"] for name, _, metadata in _fields(DataConfig)}
    sections: dict[str, list[str]] = {}
    for key, (hint, metadata, stages) in all_keys().items():
        if (stages is not None and config.stage not in stages) or not key.startswith(reads or ""):
            continue
        choices = f" [{_type_name(hint)}]" if typing.get_origin(hint) is Literal else ""
        changed = f"; default {_shown(defaults[key])}" if values[key] != defaults[key] else ""
        lines = sections.setdefault(key.rpartition(".")[0] or "run", [])
        if not lines and (about := datasets.get(key.rpartition(".")[0])):
            lines.append(f"      {about}")
        lines += [f"  {key}={_shown(values[key])}{choices}", f"      {metadata['help']}{changed}"]
    parts = ("\n".join([name, *lines]) for name, lines in sections.items())
    return "\n\n".join(
        [f"keys{'' if reads else f' of stage {config.stage}'}, with the values of this command:", *parts]
    )


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf).split("\n...")[0].strip()


# ----------------------------------------------------------------------------------------------------------- types


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, Literal):
        return " | ".join(map(_type_name, typing.get_args(hint)))
    return hint.__name__ if type(hint) is type else str(hint)


def _number(value: Any, hint: type) -> int | float | None:
    """`value` as an int or float, None if it is none. YAML reads '1e3' as text; a whole float is an int too."""
    if type(value) is hint:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if hint is float:
        return number
    return int(number) if number.is_integer() else None


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as type `hint`, or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        near = nearest(value, [a for a in args if type(a) is type(value)] or args)
        raise ConfigError(f"{key}={value!r} is not one of {_type_name(hint)}; nearest is {near}")
    for arg in args if origin is typing.Union else ():  # a word or a list
        if value in typing.get_args(arg) or typing.get_origin(arg) is type(value):
            return _coerce(value, arg, key)
    if hint == list[str] and isinstance(value, str):  # one name
        value = [value]
    if origin is list and isinstance(value, list):
        return [_coerce(v, args[0], key) for v in value]
    if hint is dict and isinstance(value, dict):
        return dict(value)
    if hint in (int, float) and not isinstance(value, bool) and (number := _number(value, hint)) is not None:
        return number
    if hint in (bool, str) and type(value) is hint and not (hint is str and "\0" in value):  # no path holds NUL
        return value
    raise ConfigError(f"{key}={value!r} has the wrong type: {_type_name(hint)} is needed")


def _unknown(key: str, where: str) -> ConfigError:
    keys = list(all_keys())
    if key in keys:
        nested = "".join(f"{{{part}: " for part in key.split("."))[1:] + "…" + "}" * key.count(".")
        return ConfigError(f"{key!r} in {where}: a YAML has sections in place of dots, as in {nested!r}")
    same_leaf = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_leaf[0] if same_leaf else nearest(key, keys)
    return ConfigError(f"unknown key {key!r} in {where}; nearest is {near!r}")


def _numbers(value: Any) -> list[int | float]:
    """A number, or those in a nested list."""
    if isinstance(value, list):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, int | float) else []


def _check_ranges(config: Config) -> None:
    """Raise ConfigError for a number outside the range of its key."""
    values = flatten(to_dict(config))
    for key, (_, metadata, _) in all_keys().items():
        least, most = metadata["least"], metadata["most"]
        inside = all(least <= number <= most and number < math.inf for number in _numbers(values[key]))
        span = {0: "0 or more", TINY: "above 0"}.get(least, f"at least {least:g}")
        span = f"in {least:.12g}..{most:.12g}" if most < math.inf else span
        require(inside, f"{key}={values[key]} must be {span}")


# ----------------------------------------------------------------------------------------------------------- files


def find_path(path: str, is_there: Callable[[str], bool] = os.path.exists, beside: Path | None = None) -> str:
    """A relative path from the first folder that has it: `beside`, the working folder, the checkout.

    Returns:
        `path` as it is where it is absolute, found from the working folder, or found nowhere; ~ is the home folder.
    """
    path = os.path.expanduser(path)
    if path and not os.path.isabs(path):
        for folder in (beside or os.curdir, os.curdir, ROOT):
            found = os.path.join(folder, path)
            if is_there(found):
                return path if os.path.realpath(found) == os.path.realpath(path) else found
    return path


class _Loader(yaml.SafeLoader):
    """Refuses what YAML misreads silently: a key that stands twice (the last wins), 010 (octal), 1:30 (seconds).

    And a value that contains itself, which YAML allows.
    """

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        if node is not None and node.end_mark is None:  # an alias of a value that has not ended yet
            raise ConfigError(f"the value that begins in line {node.start_mark.line + 1} contains itself")
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        mapping, lines = super().compose_mapping_node(anchor), {}
        for node, _ in mapping.value:
            if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:merge":
                key, line = self.construct_object(node), node.start_mark.line + 1
                if key in lines:
                    first = f"lines {lines[key]} and" if lines[key] != line else "line"
                    raise ConfigError(f"key {key!r} stands twice, in {first} {line}")
                lines[key] = line
        return mapping


def _plain_number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    kind = node.tag.rpartition(":")[2]
    value = getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node)
    misread = ":" in node.value or (kind == "int" and re.match(r"[-+]?0[\d_]", node.value))
    require(not misread, f"{node.value} means {value} in YAML: write the number without leading zeros and colons")
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _plain_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _plain_number)


def read_yaml(path: Path) -> dict:
    """The mapping that a YAML file holds, {} of an empty one; ConfigError if it holds anything else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # of a tag that does not fit its value, the loader raises anything
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())[:500]}") from None
    if content is None:
        return {}
    require(isinstance(content, dict), f"{path} holds {type(content).__name__}, not keys and values")
    return content


def _find_benchmark(name: str, beside: Path | None) -> Path:
    if name.endswith((".yml", ".yaml")):
        return Path(os.path.abspath(find_path(name, os.path.isfile, beside)))
    folder = ROOT / "configs" / "benchmarks"
    known = sorted(path.stem for path in folder.glob("*.yml"))
    if name not in known:
        unknown = f"benchmark={name!r} is neither a .yml file nor one of {', '.join(known)}"
        raise ConfigError(f"{unknown}; nearest is {nearest(name, known)!r}")
    return folder / f"{name}.yml"


# ------------------------------------------------------------------------------------------------ filling the keys


def _apply(config: Any, delta: dict, where: str, beside: Path | None = None, prefix: str = "") -> None:
    """Write the nested mapping `delta` into the nested dataclass `config`, checking keys and types.

    `beside` is the folder of the user's own YAML that `delta` is from.
    """
    known = {name: (hint, metadata) for name, hint, metadata in _fields(type(config))}
    for name, value in delta.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise _unknown(key, where)
        hint, metadata = known[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"{key} in {where} is a section: its keys go below it, not {value!r}")
            _apply(getattr(config, name), value, where, beside, f"{key}.")
        else:
            value = _coerce(value, hint, key)
            setattr(config, name, find_path(value, metadata["path"], beside) if metadata["path"] else value)


def _override(assignment: str) -> tuple[str, Any]:
    """'train.lr=0.1' -> ('train.lr', 0.1)."""
    key, equals, text = assignment.partition("=")
    if not equals:
        weights = assignment.endswith(WEIGHT_ENDINGS) or os.path.isfile(assignment)
        ways = f"model.init={assignment} (to train from it) or checkpoint={assignment} (other scripts)"
        hint = f"; give a weight file as {ways}" if weights else ""
        raise ConfigError(f"{assignment!r} is not of the form key=value{hint}")
    keys = all_keys()
    if key not in keys:
        raise _unknown(key, "the command line")
    try:
        return key, text if keys[key].hint is str else yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{key}={text!r}: {error}") from None
    except Exception:
        quoted = f"; text may need quotes of its own: '{key}=[\"{text}\"]'" if text.startswith(("*", "&", "!")) else ""
        raise ConfigError(f"{key}={text!r}: the value is not valid YAML{quoted}") from None


def _stage_deltas(content: Any, file: Path) -> dict[str, dict]:
    """A benchmark's `stages:`, by the name of a run, every one of them checked."""
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"stages in {file} must hold one section per stage, not {content!r}")
    for run, delta in content.items():
        where = f"stages.{run} of {file}"
        if run not in RUNS:
            raise ConfigError(f"unknown {where}; nearest is {nearest(run, RUNS)!r}")
        if not isinstance(delta, dict):
            raise ConfigError(f"{where} is a section, not {delta!r}")
        _refuse_choices(delta, where)
        _apply(Config(), delta, where)
        stage = "warmup" if run == "source_only" else run
        for key in flatten(delta):
            readers = all_keys()[key].stages
            read = readers is None or stage in readers
            require(read, f"{key} in {where} is not read by stage {stage}, but by {', '.join(readers or ())}")
    return content


def _refuse_choices(delta: dict, where: str) -> None:
    """ConfigError for keys that say which files are read."""
    for key in ("stage", "benchmark"):
        require(key not in delta, f"{key} does not belong in {where}: --config and benchmark= choose")


def _place_toy(config: Config, in_yaml: str) -> None:
    """Find the folder that the toy cities are drawn into, and move the datasets below it along.

    The command line may have named another folder than the YAML, which is `in_yaml`.
    """
    data, folder = config.data, config.data.toy_root
    data.toy_root = find_path(folder, lambda place: os.path.isdir(os.path.dirname(place)))
    places = [place for name in (folder, in_yaml) if name for place in (Path(name), ROOT / name)]
    for section in (data.source, data.target, data.val) if folder else ():
        before = next((place for place in places if Path(section.root).is_relative_to(place)), None)
        if before:
            section.root = os.path.join(data.toy_root, Path(section.root).relative_to(before))


def load_config(stage_file: str | Path, overrides: list[str] = ()) -> Config:
    """The configuration of one stage, with keys, types, ranges and combinations checked.

    Scripts and commands call `utils.engine.setup.checked_config`, which checks classes and batches too.

    Args:
        stage_file: a YAML of `configs/`, or the user's own.
        overrides: `key=value` strings; values are YAML, keys dotted.

    Raises:
        ConfigError: unknown key, wrong type, impossible combination, unreadable file.
    """
    config = Config()
    stage_file = Path(os.path.abspath(find_path(str(stage_file), os.path.isfile)))
    stage_delta = read_yaml(stage_file)
    written = f"{stage_file} is what a run has written, or --print-config; give that command's own --config and keys"
    require("git" not in stage_delta, written)
    data = stage_delta.get("data")
    domains = {"source", "target", "val"} & (data.keys() if isinstance(data, dict) else set())
    other = f"{stage_file} has domains and no stage, so it is no stage file; give it as benchmark={stage_file}"
    require("stage" in stage_delta or "benchmark" in stage_delta or not domains, other)
    commands = [_override(o) for o in overrides]
    chosen = dict(commands)
    require(
        "stage" not in chosen,
        "stage= cannot be given: each script has its own, and its stage file (--config) says which",
    )
    benchmark = str(chosen.get("benchmark", stage_delta.get("benchmark", config.benchmark)) or "")
    require(benchmark, "benchmark= is empty: a name or a .yml file is needed")
    benchmark_file = _find_benchmark(benchmark, None if "benchmark" in chosen else stage_file.parent)
    benchmark_delta = read_yaml(benchmark_file)
    require(benchmark_delta, f"{benchmark_file} holds no key")
    _refuse_choices(benchmark_delta, str(benchmark_file))
    by_stage = _stage_deltas(benchmark_delta.pop("stages", None), benchmark_file)

    def apply(delta: dict, file: Path, where: str) -> None:
        folder = file.resolve().parent
        _apply(config, delta, where, None if folder.is_relative_to(ROOT / "configs") else folder)

    apply(stage_delta, stage_file, str(stage_file))
    apply(benchmark_delta, benchmark_file, str(benchmark_file))
    source_only = config.stage == "warmup" and (chosen.get("name") or config.name) == "source_only"
    for run in (config.stage, *(["source_only"] if source_only else [])):  # a warm-up with deltas of its own
        apply(by_stage.get(run, {}), benchmark_file, f"stages.{run} of {benchmark_file}")
    for key, value in (("runs", config.runs), ("data.toy_root", config.data.toy_root)):
        # Who passes a YAML on does not decide where it writes.
        message = f"{key}={value!r} in a YAML must be a relative path without '..'; give it as {key}=…"
        require(key in chosen or not leaves_folder(os.path.expanduser(value)), message)
    toy_root = config.data.toy_root
    for key, value in commands:
        for part in reversed(key.split(".")):
            value = {part: value}
        _apply(config, value, "the command line")
    config.benchmark = benchmark
    _place_toy(config, toy_root)
    _check_ranges(config)
    config.validate()
    return config
