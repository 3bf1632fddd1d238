"""Completions on disk: a journal while they come, a parquet file when those of one file of rows are all there.

Rows lie in files of a few thousand (`rows-00000.parquet`, …). The completions of a file are appended to its journal,
one line each, as they come; when there is one for every row, they are written as a parquet file of the same name, in
the order of the rows, and the journal goes. Killed at any point, a run loses what was under way and nothing else.
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from modular_star_encoder.dataset.completions import Completion
from modular_star_encoder.dataset.row_files import write_parquet

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("error", pa.string()),
    ]
)

_SECONDS_BETWEEN_SYNCS = 1.0


class CompletionFiles:
    """The completions of a folder of rows, file by file; several files may be open at once.

    Use it as a context manager, so that journals are closed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Name the folder, which exists."""
        self._folder = Path(folder)
        self._open: dict[str, _OpenFile] = {}
        self._file_of: dict[str, str] = {}

    def __enter__(self) -> "CompletionFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.journal.close()

    def is_complete(self, name: str) -> bool:
        """Whether there is a completion for every row of the file `name`."""
        return (self._folder / name).is_file()

    def open(self, name: str, ids: Sequence[str]) -> set[str]:
        """Open the file `name` for the rows with these ids, and return those that have no completion yet.

        Raises:
            ValueError: If its journal is damaged, or is of other rows.
        """
        if self.is_complete(name):
            self._journal_path(name).unlink(missing_ok=True)
            return set()
        path = self._journal_path(name)
        answered = _read_journal(path)
        strangers = answered.keys() - set(ids)
        if strangers:
            raise ValueError(
                f"{path} holds an answer to {min(strangers)}, which is no row of {name}: name another folder."
            )
        self._open[name] = _OpenFile(tuple(ids), answered, path.open("ab"))
        missing = set(ids) - answered.keys()
        self._file_of |= dict.fromkeys(missing, name)
        if not missing:
            self._finish(name)
        return missing

    def add(self, completions: Iterable[Completion]) -> None:
        """Keep completions of rows that are open and have none yet.

        Raises:
            ValueError: If a completion is of no such row.
        """
        for completion in completions:
            name = self._file_of.pop(completion.id, None)
            if name is None:
                raise ValueError(
                    f"The back end answered {completion.id!r}, which it was not asked, or asked once only."
                )
            file = self._open[name]
            file.append(completion)
            if len(file.answered) == len(file.ids):
                self._finish(name)

    def _finish(self, name: str) -> None:
        file = self._open.pop(name)
        rows = [asdict(file.answered[row_id]) for row_id in file.ids]
        write_parquet(self._folder / name, [pa.Table.from_pylist(rows, SCHEMA)], SCHEMA)
        file.journal.close()
        self._journal_path(name).unlink()

    def _journal_path(self, name: str) -> Path:
        return self._folder / f"{name}.journal"


class _OpenFile:
    """The rows of a file, their completions so far, and the journal that they go to."""

    def __init__(self, ids: tuple[str, ...], answered: dict[str, Completion], journal: BinaryIO) -> None:
        self.ids, self.answered, self.journal = ids, answered, journal
        self._synced = time.monotonic()

    def append(self, completion: Completion) -> None:
        """Write a completion through to the system, and at least once a second to the disk."""
        completion = _without_halves(completion)
        self.answered[completion.id] = completion
        self.journal.write(json.dumps(asdict(completion)).encode() + b"\n")
        self.journal.flush()
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            os.fsync(self.journal.fileno())
            self._synced = time.monotonic()


def _without_halves(completion: Completion) -> Completion:
    """The completion with question marks for lone surrogates, which JSON can escape and parquet can't hold."""
    texts = {name: getattr(completion, name) for name in ("text", "finish_reason", "error")}
    return replace(completion, **{name: text.encode(errors="replace").decode() for name, text in texts.items()})


def _read_journal(path: Path) -> dict[str, Completion]:
    """Return the completions of a journal by id, after cutting off a last line that was not written to its end.

    Raises:
        ValueError: If another line is damaged.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    answered = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            completion = _without_halves(Completion(**json.loads(line)))
        except (ValueError, TypeError, AttributeError):
            raise ValueError(
                f"{path} is damaged in line {number}: delete that line to have its row asked again."
            ) from None
        answered[completion.id] = completion
    return answered
