"""Files of a work folder: flat little-endian arrays, read memory-mapped, and files that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`; the file or folder made there takes the place of `path` if no error occurs.

    The name is always the same, so that what a killed process has left goes when its work is done again.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)
    try:
        yield temporary
        for file in (temporary, *temporary.rglob("*")):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: It isn't JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove its folder and start again.") from error


def write_array(path: Path, values: np.ndarray) -> None:
    """Write one array."""
    np.save(path, values, allow_pickle=False)


def read_array(path: Path, mapped: bool = False) -> np.ndarray:
    """Read what `write_array` wrote, or map it into memory."""
    return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def flat_array(path: Path, dtype: str, columns: int | None = None) -> np.ndarray:
    """Map a file of nothing but numbers: (entries,), or (rows, columns)."""
    shape = (-1,) if columns is None else (-1, columns)
    # An empty file cannot be mapped. Slices of an ordinary array over the map cost less than those of numpy's class.
    values = np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.empty(0, dtype)
    return values.reshape(shape)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
