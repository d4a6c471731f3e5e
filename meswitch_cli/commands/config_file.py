"""A command's options from a YAML or TOML file, below those of the command line and of variables."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from meswitch_cli.errors import UsageError, plain_reason
from meswitch_cli.paths import user_path
from meswitch_cli.textfile import read_text

MAX_BYTES = 1 << 20


def take_config(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of an eager --config: what the file says becomes the command's defaults.

    Raises:
        UsageError: the file cannot be read, or holds what is no option or not a value of it.
    """
    if path is None or context.resilient_parsing:
        return path
    options = {parameter.name: parameter for parameter in context.command.params}
    found: dict[str, Any] = {}
    for key, value in read_config(user_path(path)).items():
        name = _option_name(key, options, path)
        if name in found:
            raise UsageError(f"{path}: {key}: given twice")
        if value is None:
            continue
        found[name] = _checked(options[name], value, context, f"{path}: {key}")
    context.default_map = found
    return path


def read_config(path: Path) -> dict[str, Any]:
    """The members of a file whose name ends in .yaml, .yml or .toml.

    Raises:
        UsageError: it is of another kind, cannot be read, or is not what its name says.
    """
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise UsageError(f"{path}: must end in .yaml, .yml or .toml")
    file = read_text(path, UsageError, "a configuration")
    if len(file.raw) > MAX_BYTES:
        raise UsageError(f"{path}: larger than a configuration can be")
    value = _toml(file.text, path) if suffix == ".toml" else _yaml(file.text, path)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{path}: must hold options by name, for instance `port: 8000`")
    return value


def _toml(text: str, path: Path) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML: {error}") from error


def _yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{path}: {where}not YAML: {getattr(error, 'problem', None) or error}") from error


def _option_name(key: str, options: Mapping[str, Any], path: Path) -> str:
    """The parameter that a key means: `max-queue` or `max_queue`; a list of several may be named in the plural."""
    name = key.replace("-", "_")
    singular = name.removesuffix("s")
    if name not in options and singular in options and options[singular].multiple:
        name = singular
    if name not in options or name in ("config", "help"):
        names = [str(option).replace("_", "-") for option in options if option not in ("config", "help")]
        near = difflib.get_close_matches(key.replace("_", "-"), names, n=1)
        raise UsageError(f"{path}: {key}: no such option" + (f"; is it {near[0]}?" if near else ""))
    return name


def _checked(option: Any, value: Any, context: typer.Context, where: str) -> Any:
    """The value as text that the command line could have held, a flag's as it is, once it is known to be good."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: must be true or false, not {value!r}")
        return value
    if option.multiple:
        pairs = [f"{name}={_text(item, where)}" for name, item in value.items()] if isinstance(value, dict) else None
        given: Any = pairs or [_text(item, where) for item in (value if isinstance(value, list) else [value])]
    else:
        given = _text(value, where)
    try:
        option.process_value(context, given)
    except typer.BadParameter as error:
        raise UsageError(f"{where}: {plain_reason(error.message)}") from error
    return given


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool):
        raise UsageError(f"{where}: true and false are no value of it; put a word such as off into quotes")
    if not isinstance(value, (str, int, float)):
        raise UsageError(f"{where}: must be a text, a number or a list of them, not {type(value).__name__}")
    return str(value)
