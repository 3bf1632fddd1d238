"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_writable(path: str | Path) -> None:
    """Say now, not after an hour of measuring, that a result file couldn't be written.

    Raises:
        ValueError: `path` is a folder, or the folder that it would lie in doesn't exist or is read-only.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file to write to.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} can't be written: there is no folder {path.absolute().parent}.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path} can't be written: its folder is read-only.")


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented UTF-8 JSON; see `write_text`.

    Raises:
        TypeError, ValueError: `data` isn't JSON (NaN isn't either); `path` stays as it was.
        OSError: the folder can't be written to.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it, so that no reader sees half a file.

    Raises:
        OSError: the folder can't be written to.
    """
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def staged_file(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `target` whose file takes its name when the block ends without an error."""
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name when the block ends without an error.

    Raises:
        ValueError: `target` exists and is not an empty folder.
    """
    target = Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} already exists; name a folder that does not exist yet, or an empty one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        os.chmod(staging, 0o777 & ~_umask())
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    """The process's file mode mask, which `mkdtemp` does not follow."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
