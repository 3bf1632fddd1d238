"""Writes files and folders so that they appear complete or not at all; reads and checks JSON."""

import fnmatch
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from modular_star_encoder.utils.errors import UserError

MAX_JSON_BYTES, MAX_JSON_VALUES = 2**26, 2**23
MAX_FOLDER_DEPTH = 200
LOCK, LOCK_SECONDS = ".lock", 5.0


def check_writable(path: str | os.PathLike[str], *, is_folder: bool = False) -> None:
    """Raise UserError (`files.not_writable`) if no file (with `is_folder`, no folder) can be written at `path`."""
    path = Path(path).absolute()
    parent = next(one for one in path.parents if not is_folder or os.path.lexists(one))
    if os.path.lexists(path) and not path.exists():
        reason = "it is a link that leads nowhere"
    elif path.exists() and path.is_dir() != is_folder:
        reason = "it is a file; name a folder" if is_folder else "it is a folder; name a file"
    elif not parent.is_dir():
        reason = f"{parent} is not a folder" if os.path.lexists(parent) else f"{parent} does not exist; create it"
    elif not os.access(parent, os.W_OK) and not (is_folder and path.exists()):
        reason = f"the folder {parent} is read-only; name a path in another folder"
    else:
        return
    raise UserError("files.not_writable", f"{path} can't be written: {reason}.")


@contextmanager
def folder_lock(folder: Path, seconds: float | None = None) -> Iterator[None]:
    """Context manager: create `folder` if missing, and hold its lock. One process may hold the same lock several times.

    UserError (`files.locked`) if another process still has the lock after `seconds`, or (`files.lock`) if `.lock` in
    `folder` is not a file. By default wait `LOCK_SECONDS`, because workers of a killed process keep its lock for a
    moment.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    if (path := folder / LOCK).is_symlink() or (path.exists() and not path.is_file()):
        raise UserError("files.lock", f"{path} must be a plain file, not a link or folder. Delete it.")
    lock = FileLock(path, is_singleton=True)
    try:
        lock.acquire(timeout=LOCK_SECONDS if seconds is None else seconds)
    except Timeout as error:
        message = f"Another process is writing {folder}. Wait until that process has ended, or name another folder."
        raise UserError("files.locked", message) from error
    try:
        yield
    finally:
        lock.release()


def user_path(path: str | os.PathLike[str], *parts: str) -> Path:
    """Return a path with the home folder in place of `~`; if the home folder is unknown, `~` stays."""
    return Path(os.path.expanduser(Path(path, *parts)))


def cache_folder(name: str, *, create: bool = False) -> Path | None:
    """Return this package's cache folder `name`, below `$XDG_CACHE_HOME` or `~/.cache`; None if no home is known.

    With `create`, make the folder if it is missing, and return None if it can't be written.
    """
    path = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "modular-star-encoder", name)
    if create and path.is_absolute():
        with suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
    return path if path.is_absolute() and (not create or (path.is_dir() and os.access(path, os.W_OK))) else None


def similar_files(path: str | os.PathLike[str]) -> str:
    """Return ` (similar: PATH, PATH)`: up to 3 paths in the folder of `path` whose names resemble its name; else ""."""
    path = user_path(path)
    there = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    near = get_close_matches(path.name, there, n=3, cutoff=0.6)
    return f" (similar: {', '.join(str(path.parent / name) for name in near)})" if near else ""


def files_below(folder: str | os.PathLike[str], pattern: str = "*", *, links: bool = True) -> list[Path]:
    """Return the sorted paths of all files below `folder` whose names fit `pattern`; links to folders are not followed.

    Without `links`, links to files are left out. With `links`, UserError (`files.folder.links`) if a link leads out of
    `folder`. UserError (`files.folder.too_deep`) if folders are nested more than `MAX_FOLDER_DEPTH` deep.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        if folders and len(Path(parent).relative_to(folder).parts) >= MAX_FOLDER_DEPTH:
            message = f"{os.fspath(folder)} has folders nested more than {MAX_FOLDER_DEPTH} deep. Move or delete some."
            raise UserError("files.folder.too_deep", message)
        paths = (Path(parent, name) for name in fnmatch.filter(names, pattern))
        found += [path for path in paths if links or not path.is_symlink()]
    if outside := sorted(path for path in found if links and path.is_symlink() and leads_outside(path, folder)):
        message = f"{len(outside)} links, such as {outside[0]}, lead out of {folder}. Name their targets instead."
        raise UserError("files.folder.links", message)
    return sorted(found)


def leads_outside(path: Path, folder: str | os.PathLike[str]) -> bool:
    """Return whether `path` leads out of `folder` by a link. A link within the Hub's cache doesn't count."""
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = [one.parent / "blobs" for one in (root, *root.parents) if one.name == "snapshots"]
    return target.parent not in blobs and not target.is_relative_to(root)


def read_json(path: str | os.PathLike[str], *, most_bytes: int = MAX_JSON_BYTES, finite: bool = True) -> Any:
    """Return the value of a JSON file; ValueError if the file is not JSON in UTF-8, too large or nested too deeply.

    If `finite`, also ValueError if a number is NaN, infinite, or 2**63 or more in magnitude.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() and path.stat().st_size <= most_bytes):  # a pipe never ends
        raise ValueError(f"not a regular file, or larger than {most_bytes:,} bytes")
    return parse_json(path.read_text(encoding="utf-8"), finite=finite)


def read_record(path: Path, key: str, remedy: str = "", *, each: bool = False, **kinds: Any) -> dict[str, Any]:
    """Return the mapping in a JSON file. If it is damaged, raise UserError `key` with the advice `remedy`.

    `kinds` are the needed entries, {name: type}; if `each`, every value of the mapping must be a mapping with these
    entries.
    """
    try:
        content = read_json(path, finite=False)
        if not fits(content, dict[str, dict] if each else dict):
            raise ValueError("not a mapping")
        records = content.values() if each else [content]
        if wrong := [name for one in records for name, kind in kinds.items() if not fits(one.get(name), kind)]:
            raise ValueError(f"{wrong[0]} is missing or has a wrong type")
        return content
    except ValueError as error:
        remedy = remedy or "Restore the file, or name another folder"
        raise UserError(key, f"{path} is damaged ({error}). {remedy}.") from error


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Return the value of a JSON text; ValueError for the faults that `read_json` lists."""
    checks: dict[str, Any] = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), _number) if finite else {}
    check_json_values(text, MAX_JSON_VALUES)
    try:
        return json.loads(text, **checks)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def check_json_values(text: str, most: int) -> int:
    """Return an upper bound of the number of values in a JSON text, unparsed; ValueError if it exceeds `most`."""
    if (values := sum(map(text.count, ",[{"))) > most:
        raise ValueError(f"more than {most:,} values")
    return values


def _number(text: str) -> int | float:
    number = float(text) if {*text} & {*".eEN"} else int(text)
    if not abs(number) < 2**63:
        raise ValueError(f"{text[:40]} is not a finite number below 2**63")
    return number


def write_json(path: str | os.PathLike[str], data: Any, *, resumable: bool = False) -> None:
    """Write `data` as indented JSON in UTF-8, atomically; for `resumable` see `staged_file`."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # UTF-8 can't encode a lone surrogate. `backslashreplace` writes it as `\ud800`, which JSON reads back.
    write_text(path, text.encode(errors="backslashreplace").decode(), resumable=resumable)


def write_text(path: str | os.PathLike[str], text: str, *, resumable: bool = False) -> None:
    """Write text in UTF-8 atomically: no reader sees half a file. For `resumable` see `staged_file`."""
    with staged_file(path, resumable=resumable) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def staged_file(target: str | os.PathLike[str], *, resumable: bool = False) -> Iterator[Path]:
    """Context manager: yield a temporary path. What is written there replaces `target` at the end, if no error occurs.

    `resumable` is for jobs that run in one process at a time and may be killed: the data is flushed to the disk before
    it replaces `target`. The temporary name is always the same, so that a new attempt removes what a killed one left.
    """
    target = Path(target)
    mark = "" if resumable else f".{os.getpid()}.{_machine()}"
    temporary = target.with_name(f".{target.name}{mark}.tmp")
    _remove(temporary)
    _sweep(target)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        # safetensors writes files that only their owner reads; give them the mode of other new files.
        for path in (temporary, *temporary.rglob("*.safetensors")):
            if path.is_file():
                path.chmod(mode)
        if resumable:
            for path in filter(Path.is_file, (temporary, *temporary.rglob("*"))):
                with path.open("rb") as written:
                    os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        _remove(temporary)


@contextmanager
def staged_folder(target: str | os.PathLike[str], *, resumable: bool = False) -> Iterator[Path]:
    """Context manager: yield a temporary folder that becomes `target` at the end (see `staged_file`).

    Missing parents are created. UserError (`files.folder.not_empty`) if `target` is a file or a folder with files, or
    (`files.folder.in_use`) if `target` is the current folder or a mount point, which can't be replaced.
    """
    target = Path(os.path.realpath(target))  # the place of a link, which a rename would replace

    def check() -> None:
        if os.path.ismount(target) or (target.is_dir() and target.samefile(os.curdir)):
            message = f"{target} is the current folder or a mount point; name a new folder in it."
            raise UserError("files.folder.in_use", message)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(
                "files.folder.not_empty", f"{target} already exists and is not an empty folder; name another folder."
            )

    check()
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(target, resumable=resumable) as temporary:
        temporary.mkdir()
        yield temporary
        check()  # another process may have filled `target` meanwhile


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Context manager: yield a temporary folder. It is removed at the end or by the next call for `name`."""
    target = Path(tempfile.gettempdir(), f"mose-{name}")
    _sweep(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.{_machine()}.", suffix=".tmp"))
    try:
        yield folder
    finally:
        _remove(folder)


def _machine() -> str:
    """Return a hash of the machine or container, because another one that shares a folder has the same process ids."""
    name = platform.node()
    with suppress(OSError):  # Linux alone numbers the processes of a container separately
        name += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _sweep(target: Path) -> None:
    """Remove temporary files and folders of `target` that killed processes of this machine or container left behind."""
    form = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.{_machine()}\.(\w+\.)?tmp")
    for name in os.listdir(target.parent) if target.parent.is_dir() else ():
        if match := form.fullmatch(name):
            with suppress(OSError):  # the process, or the file, is another user's
                try:
                    os.kill(int(match[1]), 0)
                except (ProcessLookupError, OverflowError):
                    _remove(target.with_name(name))


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except KeyboardInterrupt:
        _remove(path)
        raise


def check_types(record: Any) -> None:
    """Raise TypeError if a field of the dataclass instance `record`, or of a nested one, has a wrong type."""
    for name, kind in _hints(type(record)).items():
        if not fits(value := getattr(record, name), kind):
            raise TypeError(f"{name} has a value of the wrong type or size: {str(value)[:60]}")


_hints: Any = lru_cache(get_type_hints)


def fits(value: Any, kind: Any) -> bool:
    """Return whether `value`, for example read from JSON, has the type `kind`, such as `Mapping[str, list[int]]`."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in kinds)
    if origin is tuple:
        is_tuple = isinstance(value, tuple) and (kinds[-1] is ... or len(kinds) == len(value))
        return is_tuple and all(map(fits, value, repeat(kinds[0]) if kinds[-1] is ... else kinds))
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(k, kinds[0]) and fits(v, kinds[1]) for k, v in value.items())
    if origin is not None:
        return isinstance(value, list | tuple) and all(fits(one, kinds[0]) for one in value)
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) < 2**63  # not NaN
    if is_dataclass(value):
        check_types(value)
    return kind is Any or isinstance(value, kind)


def folder_checksum(
    folder: str | os.PathLike[str], patterns: Sequence[str] = ("config.json", "tokenizer.json", "model*.safetensors")
) -> str:
    """Return 16 hexadecimal digits of a SHA-256 over the names and contents of the files that match `patterns`."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in Path(folder).glob(pattern)}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
