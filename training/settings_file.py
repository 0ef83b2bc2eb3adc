"""A YAML file, and the options of the command line that override it, as a dataclass: every script's settings.

A name that is not known is refused with the nearest that is, a value with what was expected. Which settings there are
is said by the dataclasses: those of training are in `arguments.py`, others beside what they set.
"""

import difflib
import json
from collections.abc import Collection
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml


def parse_settings(argv: list[str], kind: type | dict[str, type], script: str) -> Any:
    """
    Reads `CONFIG.yaml [--option value ...]` into a dataclass.

    An option takes `none` where the setting may be absent; a list takes several values; a dict takes JSON.

    Args:
        argv (`list[str]`): the command line.
        kind (`type` or `dict[str, type]`): the dataclass, or by its name the one of the `stage` that the YAML names.
        script (`str`): for the words on how it is used.

    Raises:
        ValueError: for an unknown stage or key (named, with the nearest right one) or a value that does not fit.
        OSError: if the file cannot be read.
        SystemExit: after `--help`.
    """
    usage = f"Usage: {script} CONFIG.yaml [--option value ...]; `{script} CONFIG.yaml --help` lists the options."
    if argv in (["-h"], ["--help"]):
        print(usage)
        raise SystemExit
    if not argv or argv[0].startswith("-"):
        raise ValueError(f"There is no settings file. {usage}")
    values = read_yaml(Path(argv[0]))
    if isinstance(kind, dict):
        stage = values.pop("stage", None)
        if str(stage) not in kind:
            raise ValueError(f"{argv[0]} says `stage: {stage}`; expected one of {', '.join(kind)}.")
        kind = kind[stage]
    options = _read_options(argv[1:])
    if options.keys() & {"help", "h"}:
        helps = {item.name: item.metadata.get("help", "") for item in fields(kind)}
        lines = [f"  --{name} ({default!r}): {helps[name]}" for name, default in list_defaults(kind).items()]
        print(usage, *(line.rstrip(": ") for line in lines), sep="\n")
        raise SystemExit
    check_names(options, get_type_hints(kind), "The command line")
    return build_settings(kind, {**values, **options}, argv[0])


def list_defaults(kind: type) -> dict[str, Any]:
    """The default of each setting of a dataclass."""
    return {
        item.name: item.default if item.default_factory is MISSING else item.default_factory() for item in fields(kind)
    }


def build_settings(kind: type, values: dict, where: str) -> Any:
    """The dataclass `kind` of `values`, each as its field's type; names and values are checked, `where` is named."""
    kinds = get_type_hints(kind)
    check_names(values, kinds, where)
    return kind(**{name: _convert(name, kinds[name], value) for name, value in values.items()})


def check_names(given: Collection[str], known: Collection[str], where: str) -> None:
    """Raises a `ValueError` for a name in `given` that is not `known`; it gives the nearest that is."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known are {', '.join(known)}."
            raise ValueError(f"{where} has an unknown key `{name}`. {hint}")


def read_yaml(path: Path) -> dict:
    """The `key: value` lines of a file; a `ValueError` says where it is no such thing."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines; got {type(values).__name__}.")
    return values


def _read_options(tokens: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name value value` (a list) and `--name` (true); the last of a name counts."""
    options, values = {}, None
    for token in tokens:
        if token.startswith("--") or token == "-h":
            name, is_joined, value = token.lstrip("-").partition("=")
            values = options[name.replace("-", "_")] = [value] if is_joined else []
        elif values is None:
            raise ValueError(f"Expected an option, `--name value`, but got {token!r}.")
        else:
            values.append(token)
    return {name: values if len(values) > 1 else (values or [True])[0] for name, values in options.items()}


def _convert(name: str, kind: Any, value: Any) -> Any:
    """A value of the YAML file, or the string of an option, as the setting's type."""
    may_be_none = isinstance(kind, UnionType)
    if may_be_none:
        if value in (None, "none"):
            return None
        kind = get_args(kind)[0]
    try:
        return _cast(kind, value)
    except (TypeError, ValueError) as error:
        words = getattr(kind, "__name__", "") if get_origin(kind) is None else str(kind).replace("typing.", "")
        raise ValueError(f"`{name}` is {value!r}; expected {words}{' or none' if may_be_none else ''}.") from error


def _cast(kind: Any, value: Any) -> Any:
    if get_origin(kind) is list:
        return [_cast(get_args(kind)[0], part) for part in (value if isinstance(value, list) else [value])]
    if get_origin(kind) is Literal:
        value = "no" if value is False else value  # YAML reads a bare `no` as false
        is_right = value in get_args(kind)
    elif kind is dict:
        value = json.loads(value) if isinstance(value, str) else value
        is_right = isinstance(value, dict)
    elif kind is bool:
        value = {"true": True, "false": False}.get(str(value).lower())
        is_right = value is not None
    else:
        is_right = isinstance(value, str | int | float) and not isinstance(value, bool)
        value = kind(str(value)) if is_right else value  # through str: a 2.5 is no int, a YAML 1e-4 is a string
    if not is_right:
        raise ValueError(value)
    return value
