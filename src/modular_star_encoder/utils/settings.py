"""Settings out of YAML files: mappings that become dataclasses, with one sentence for every mistake."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

_OPTIONAL = {int | None: int, float | None: float}


def load_settings(kind: type, path: str | os.PathLike, overrides: Sequence[str] = (), *, example: str = "") -> Any:
    """Read a recipe: an instance of a dataclass from a YAML file.

    Args:
        kind: the dataclass.
        path: a YAML file.
        overrides: `key=value`, with dots for settings inside settings (`corpus.folder=~/code`); values are YAML.
        example: a recipe to name when there is no file `path`.

    Raises:
        ValueError: the file or an override is not of this form, or a setting is unknown, missing or out of range.
        OSError: the file is there and can't be read.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = f"; ours are {example} and others" if example else ""
        raise ValueError(f"There is no recipe {path}{hint}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping of settings.")
    for override in overrides:
        _override(content, override)
    return build_settings(kind, content, str(path))


def build_settings(kind: type, content: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping.

    Raises:
        ValueError: a setting is unknown, missing, of the wrong kind, or refused by the class; the message names it.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of settings.")
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(set(content) - set(known), key=str)
    if unknown:
        names = ", ".join(map(str, unknown))
        raise ValueError(f"{where} has unknown settings {names}; known are {', '.join(sorted(known))}.")
    values = {name: _checked(value, known[name].type, f"{where}: {name}") for name, value in content.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        message = f"is incomplete: {error}." if isinstance(error, TypeError) else f"can't be used: {error}"
        raise ValueError(f"{where} {message}") from error


def _checked(value: Any, kind: Any, where: str) -> Any:
    """A number where one is wanted, or None where that is allowed: YAML reads `1e5`, which has no point, as a word.

    What is to be true or false must be that: a word, such as a misspelt `flase`, would count as true.
    """
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, not {value!r}.")
    if kind in _OPTIONAL:
        if value is None:
            return None
        kind = _OPTIONAL[kind]
    if kind not in (int, float):
        return value
    try:
        given = float(value) if isinstance(value, str) else value
        number = kind(given) if not isinstance(given, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or (kind is int and number != given):
        raise ValueError(f"{where} must be a number{' without fraction' if kind is int else ''}, not {value!r}.")
    return number


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"{override!r} must have the form key=value, for example steps=1000.")
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ValueError(f"{override!r}: {parent} is not a mapping of settings.")
    try:
        content[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: {text!r} is not a YAML value.") from error
