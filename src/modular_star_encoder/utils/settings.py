"""Turns YAML files (recipes, manifests) and `KEY=VALUE` arguments into checked dataclasses; lists the known keys.

A settings class is a dataclass whose fields are the known keys. The decorator `settings_class` makes a frozen dataclass
that checks each value by the type and the constraints of its field. With `OPEN_KEYS = (NAME, OTHER)`, a settings class
also accepts the fields of another dataclass, OTHER, as keys; its own field NAME, a mapping, collects their values.

YAML is read by the safe loader, without aliases and within the limits `MAX_YAML_BYTES`, `MAX_YAML_NODES`,
`MAX_YAML_DEPTH` and `MAX_YAML_NUMBER`.
"""

import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, StrictBool, TypeAdapter, ValidationError
from pydantic import Field as Constraint
from pydantic.dataclasses import dataclass as pydantic_dataclass

from modular_star_encoder.utils.errors import UserError

Settings = TypeVar("Settings")

MAX_YAML_BYTES = 2**19
MAX_YAML_NODES = 20_000
MAX_YAML_DEPTH = 32
MAX_YAML_NUMBER = 100
"""Largest number of characters in a number or a date of a YAML file."""

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may be installed without its parser in C

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120
_shown = _short.repr


def _number(value: Any) -> Any:
    """Convert a string such as `1e5`, which YAML reads as text, to a number. ValueError for other text or booleans."""
    try:
        if not isinstance(value, bool):
            return float(value) if isinstance(value, str) else value
    except ValueError:
        pass
    raise ValueError("must be a number")


def _different(values: Any) -> Any:
    if len(set(values)) < len(values):
        raise ValueError("must not repeat a value")
    return values


Int = Annotated[int, BeforeValidator(_number), Constraint(ge=-(2**63), lt=2**63)]
Float = Annotated[float, BeforeValidator(_number), Constraint(allow_inf_nan=False)]
Count = Annotated[Int, Constraint(gt=0)]
ExitLayer = Annotated[Int, Constraint(ge=0)]
Seed = Annotated[Int, Constraint(ge=0, lt=2**32)]
Positive = Annotated[Float, Constraint(gt=0)]
NonNegative = Annotated[Float, Constraint(ge=0)]
Probability = Annotated[Float, Constraint(ge=0, le=1)]
Share = Annotated[Float, Constraint(gt=0, lt=1)]
Different = AfterValidator(_different)
Switch = StrictBool

_AnyFloat = Annotated[float, BeforeValidator(_number)]
# Type of a field → check of its values, for dataclasses made without `settings_class`.
_PLAIN: dict[Any, TypeAdapter[Any]] = {
    int: TypeAdapter(Int),
    float: TypeAdapter(_AnyFloat),
    bool: TypeAdapter(Switch),
    int | None: TypeAdapter(Int | None),
    float | None: TypeAdapter(_AnyFloat | None),
}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings_class(kind: type[Settings]) -> type[Settings]:
    """Class decorator: make a frozen dataclass that converts and checks its keyword arguments by their types.

    The constructor raises UserError if a value is wrong (`settings.value`), or if a key is missing (`settings.missing`)
    or unknown (`settings.unknown`).
    """
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(kind)
    check: Any = made.__init__

    @wraps(check)
    def __init__(self: Any, *positional: Any, **values: Any) -> None:
        try:
            check(self, *positional, **values)
        except ValidationError as error:
            raise UserError(*_fault(error, kind.__name__)) from error

    made.__init__ = __init__
    return made


def load_settings(kind: type[Settings], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Settings:
    """Return an instance of the settings class `kind` with the values of a YAML file, changed by `overrides`.

    Each override is `key=value` with a YAML value; dots lead to nested settings (`corpus.folder=~/code`). The message
    of a UserError says whether the fault is in the file or on the command line.
    """
    try:
        return build_settings(kind, read_mapping(path, overrides), str(path))
    except UserError as error:
        message, of_file = str(error), ""
        try:
            build_settings(kind, read_mapping(path), str(path))
        except UserError as own:
            of_file = str(own)
        shown = message if message == of_file else message.replace(str(path), "command line", 1)
        raise UserError(error.key, shown) from error


def read_mapping(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file, changed by `overrides` (see `load_settings`). Its keys are not checked."""
    file = Path(path)
    content: Any = None
    fault = "is not a file" if file.exists() else "does not exist"
    if file.is_file():
        with file.open("rb") as opened:
            content = read_yaml(opened.read(MAX_YAML_BYTES + 1), str(path))
        fault = "must be a mapping of settings, such as `seed: 1`"
    if not isinstance(content, dict):
        raise UserError("settings.file", f"{path} {fault}.")
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            value = read_yaml(text.encode(errors="surrogateescape"), key)
        except UserError:
            equals, value = "", None
        set_dotted(content, key if equals and text.strip() else "", value, _shown(override))
    return content


def read_yaml(data: bytes, where: str) -> Any:
    """Return the value of a YAML document; UserError (`settings.file`) if it is no YAML, too large or too deep."""
    try:
        if not (fault := _yaml_fault(data)):
            return yaml.load(data.decode("utf-8-sig"), Loader=_Loader)  # noqa: S506 - it is a safe loader
    except (yaml.YAMLError, ValueError, ArithmeticError, AttributeError, TypeError, LookupError) as error:
        fault = " ".join(str(error).split())
    raise UserError("settings.file", f"{where} can't be read as YAML: {fault}")


def _yaml_fault(data: bytes) -> str:
    """Return a clause that says why a YAML document is rejected, or ""; parse it without building its values."""
    if len(data) > MAX_YAML_BYTES:
        return f"it is larger than {MAX_YAML_BYTES:,} bytes"
    depth = 0
    for count, event in enumerate(yaml.parse(data.decode("utf-8-sig"), Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            return f"it is nested more than {MAX_YAML_DEPTH} levels deep"
        if count > MAX_YAML_NODES:
            return f"it has more than {MAX_YAML_NODES:,} values"
        if isinstance(event, yaml.AliasEvent):
            return f"it has the alias *{event.anchor}; write the value there instead"
        if tag := getattr(event, "tag", None):
            return f"it has the tag {tag}; remove this tag"
        if isinstance(event, yaml.ScalarEvent):
            if re.search(r"[\0\ud800-\udfff]", event.value):
                return "it has a text with a null character or half a surrogate pair"
            if not event.style and re.fullmatch(rf"[-+.\d][-+.:\w]{{{MAX_YAML_NUMBER},}}", event.value):
                return f"it has a number or date of more than {MAX_YAML_NUMBER} characters"
    return ""


def set_dotted(content: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key such as `a.b.c` in the nested mappings of `content`; add missing mappings.

    UserError (`settings.override`) if a part of the key is empty, or if `a` or `a.b` exists and is not a mapping. The
    message begins with `where`.
    """
    *parents, last = names = key.split(".")
    if not all(names):
        form = "must have the form key=value with a YAML value, such as seed=1 or data=null"
        raise UserError("settings.override", f"{where} {form}.")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            cause = f"because {parent} is not a mapping of settings"
            raise UserError("settings.override", f"{where} cannot set {key}, {cause}.")
    content[last] = value


def build_settings(kind: type[Settings], content: Any, where: str) -> Settings:
    """Return an instance of the settings class `kind` with the values of the mapping `content`.

    UserError if a name or value is wrong. The message begins with `where`; the error's key is one that `settings_class`
    lists, or the key of a check in `kind`.
    """
    if not isinstance(content, Mapping):
        raise UserError("settings.value", f"{where} must be a mapping of settings, not {_shown(content)}.")
    made: Any = kind
    values, known = dict(content), {one.name: one for one in _keys(kind)}
    check_names([str(name) for name in values], known, where)
    try:
        for name, value in values.items():
            expected = known[name].type
            if isinstance(expected, type) and is_dataclass(expected) and isinstance(value, Mapping):
                values[name] = build_settings(expected, value, name)
            elif (check := _PLAIN.get(expected)) is not None:
                values[name] = check.validate_python(value)
        if collected := getattr(kind, "OPEN_KEYS", None):
            open_names = {one.name for one in fields(collected[1])} - {one.name for one in fields(made)}
            values[collected[0]] = {name: values.pop(name) for name in list(values) if name in open_names}
        return kind(**values)
    except (TypeError, ValueError) as error:
        key, sentence = getattr(error, "key", "settings.value"), f"{where}: {error}"
        if isinstance(error.__cause__, ValidationError):  # raised by `kind`, which does not know `where`
            key, sentence = _fault(error.__cause__, where)
        elif isinstance(error, ValidationError):  # raised by a check of `_PLAIN`
            sentence = f"{where}: {name} {_sentence(error.errors()[0])}"
        elif isinstance(error, TypeError) and "required" in str(error):
            key, sentence = "settings.missing", f"{where} is incomplete: {error}."
        # An error of `_PLAIN` is not passed on: an outer call would take it for an error of its own `kind`.
        raise UserError(key, sentence) from (None if isinstance(error, ValidationError) else error)


def as_settings(kind: type[Settings], value: Any) -> Settings:
    """Return `value` if it is a `kind`; else make a `kind` from the mapping `value`, or from defaults if it is None."""
    return value if isinstance(value, kind) else build_settings(kind, {} if value is None else value, kind.__name__)


def check_names(names: Sequence[str], known: Mapping[str, Any] | Sequence[str], where: str) -> None:
    """Raise UserError (`settings.unknown`) if a name is not in `known`; the message suggests the nearest known name."""
    for name in names:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {nearest[0]}?" if nearest else f"available: {', '.join(sorted(known))}."
            raise UserError("settings.unknown", f"{where}: unknown setting {name}; {hint}")


def _keys(kind: Any) -> list[Field[Any]]:
    """Return the fields whose names a settings class accepts as keys: its own and those of the class in `OPEN_KEYS`."""
    own = {one.name: one for one in fields(kind) if one.init}
    if not (collected := getattr(kind, "OPEN_KEYS", None)):
        return list(own.values())
    more = {one.name: one for one in fields(collected[1])}
    return [one for name, one in (own | more | own).items() if name != collected[0]]


def _fault(error: ValidationError, where: str) -> tuple[str, str]:
    """Return (key, message) of a UserError for the first fault that pydantic found; the message begins with `where`."""
    faults = error.errors()
    fault = next((one for one in faults if one["type"] == "unexpected_keyword_argument"), faults[0])
    parts = [part for part in map(str, fault["loc"]) if not re.search(r"[\[(]|^(int|tuple|dict|literal)$", part)]
    place = ".".join(parts)
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause.key, f"{where}: {f'{place}: ' if place else ''}{cause}"
    if fault["type"] == "unexpected_keyword_argument":
        parent, _, name = place.rpartition(".")
        return "settings.unknown", f"{where}: unknown setting {name}{f' of {parent}' if parent else ''}."
    if fault["type"].startswith("missing"):
        return "settings.missing", f"{where} is incomplete: {place} is missing."
    return "settings.value", f"{where}: {place} {_sentence(fault)}".replace(":  ", ": ")


def _sentence(fault: Any) -> str:
    message = re.sub(r"^(Value error, |Input )", "", fault["msg"]).replace("should be", "must be")
    return f"{message}, not {_shown(fault['input'])}."


def _reference(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text with type, default and meaning) for each setting of the settings class `kind`.

    `kind.OPEN_KEYS` may be a dataclass whose fields are keys, too. Of these fields, only those are yielded that
    `kind.DEFAULTS` or the section `Args:` of a docstring names.
    """
    meanings = _meanings(kind)
    hints = get_type_hints(kind, include_extras=False)
    collected = getattr(kind, "OPEN_KEYS", None)
    defaults: Mapping[str, Any] = getattr(kind, "DEFAULTS", {})
    if collected:
        meanings |= {name: text for name, text in _meanings(collected[1]).items() if name not in meanings}
        hints = get_type_hints(collected[1]) | hints
    for one in _keys(kind):
        if one not in fields(kind) and one.name not in meanings and one.name not in defaults:
            continue
        inner = next((part for part in (hints[one.name], *get_args(hints[one.name])) if is_dataclass(part)), None)
        if isinstance(inner, type):
            yield from _reference(inner, f"{prefix}{one.name}.")
            continue
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        default = defaults.get(one.name, default)
        required = default is MISSING or one.name in getattr(kind, "REQUIRED", ())
        text = str(default)
        text = text if text and text.isprintable() else repr(default)  # an empty text, or one of several lines
        shown = "required" if required else f"default {text}"
        meaning = meanings.get(one.name) or (f"see {collected[1].__base__.__name__}." if collected else "")
        yield prefix + one.name, f"{_type_name(hints[one.name])}, {shown}{f'; {meaning}' if meaning else ''}"


def format_reference(kind: type) -> str:
    """Return a text with one line per key of a settings class: the dotted key, its type, default and meaning."""
    keys = list(_reference(kind))
    width = max(len(name) for name, _ in keys)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in keys)


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "None"
    if get_origin(hint) is Annotated:
        return _type_name(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_type_name, get_args(hint)))
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return re.sub(r"\b(\w+\.)+", "", str(hint)).replace("NoneType", "None")


def _meanings(kind: type) -> dict[str, str]:
    """Return {key: first sentence about the key} from the sections `Args:` of `kind` and its base classes."""
    found: dict[str, str] = {}
    for base in kind.__mro__:
        if not is_dataclass(base) or base.__module__.startswith("transformers."):
            continue
        _, _, block = (base.__doc__ or "").partition("Args:\n")
        for names, text in re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", block, flags=re.MULTILINE):
            for name in names.split(", "):
                found.setdefault(name, re.split(r"(?<=[.;]) ", " ".join(text.split()))[0].rstrip(";"))
    return found
