"""The rows and settings of a search index, and the protocol `VectorStore` of the classes that store them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from modular_star_encoder.data.languages.registry import ALL_LANGUAGES
from modular_star_encoder.data.sources.ignore_files import glob_expression
from modular_star_encoder.search.pieces import Snippet
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import check_types

QDRANT, MEMORY = "qdrant:", "memory://"
FORMAT = 5
DEFAULT_CHECKPOINT = "mose-code"  # the model that is packaged with the code
LONGEST_PATH = 4096  # largest number of characters of a path or of a path pattern, as on Linux
REBUILD = "`mose index FOLDER --rebuild`"  # the advice of errors
INDEX_FOLDER = ".mose"  # default folder of an index in its code folder; it is hidden, so no index reads it


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an index: a piece of a file, with the piece's words and embeddings."""

    place: int  # number of the row within its file
    file_id: str  # hash of the path's bytes, which need not be text
    file_hash: str  # hash of the file's content
    file_rows: int  # number of rows of the file; if the store has fewer, writing was interrupted
    snippet: Snippet  # the piece; in its path, `\x..` replaces bytes that are not UTF-8
    words: str  # words that a search by words compares, with spaces between
    vectors: Mapping[int, np.ndarray]  # exit_layer → (D,) float32


@dataclass(slots=True)  # not frozen: that takes three times as long to make, and a search makes hundreds
class Found:
    """A row that a store found. The piece is read when `snippet` is used, because most rows are never shown."""

    row_id: Hashable  # identifies the row in its store until the store changes
    path: str
    score: float  # a cosine similarity or a BM25 score, or the score of the ranking rules; higher is better
    read: Callable[[], Snippet]  # reads the piece from the store
    exit_layer: int | None = None  # the exit whose embeddings ranked the row; None if only words did
    reasons: Mapping[str, float] = field(default_factory=dict)  # {ranking rule: what it added to the score}

    @property
    def snippet(self) -> Snippet:
        return self.read()


@dataclass(frozen=True, slots=True)
class Filter:
    """A condition on files. A search considers only rows of the files that meet the condition."""

    languages: tuple[str, ...] = ()  # names of languages; empty for all
    path: re.Pattern[bytes] | None = None  # regular expression that the bytes of a path must match, or None
    file: str | None = None  # id of the only file to search, or None

    def fits_file(self, key: str, path: str, language: str) -> bool:
        """Return whether the filter accepts a file with this id, path and language."""
        fits_path = self.path is None or self.path.match(path.encode()) is not None
        return fits_path and self.file in (None, key) and (not self.languages or language in self.languages)


Stamps = dict[str, list[Any]]
"""How to recognise unchanged files: {file_id: [hash of size, times and inode; hash of content, None if left out]}."""


class VectorStore(Protocol):
    """Stores the rows of one index in a folder, in memory or on a server. `create` and `replace_files` change rows."""

    location: str
    folder: Path | None = None  # the folder that holds the index; None in memory and on a server

    def locked(self, seconds: float = 3.0) -> AbstractContextManager[None]:
        """Return a context manager that locks the index; UserError if another process keeps the lock for `seconds`."""
        return nullcontext()

    def snapshot(self) -> AbstractContextManager[None]:
        """Return a context manager in which reads see the rows stored when it began; by default, no effect."""
        return nullcontext()

    def settings(self) -> dict[str, Any] | None:
        """Return the settings that `create` stored; None without an index; UserError if the settings are damaged."""

    def create(self, settings: Mapping[str, Any]) -> None:
        """Create an empty index, in place of an older one; UserError if `location` has data of another program."""

    def files(self) -> dict[str, str | None]:
        """Return {file_id: hash of the file's content, or None if only a part of the file's rows is stored}."""

    def stamps(self) -> Stamps:
        """Return the `Stamps` of files that `keep_stamps` stored last; {} if this store keeps no stamps."""
        return {}

    def keep_stamps(self, stamps: Stamps) -> None:
        """Store the stamps (see `Stamps`) that files had when they were last read; by default, do nothing."""
        return None

    def replace_files(self, known: Collection[str], rows: Sequence[Row]) -> None:
        """Delete all rows of the files with the ids `known`, and add `rows`: all rows of each new or changed file."""

    def finish(self) -> None:
        """Optimise the store for searching, and free the space of replaced rows; by default, do nothing."""
        return None

    def nearest(self, vector: np.ndarray, exit_layer: int, limit: int, where: Filter) -> list[Found]:
        """Return the `limit` rows that fit `where` and are nearest to `vector` by cosine at an exit, best first."""

    def lexical(self, words: Sequence[str], limit: int, where: Filter) -> list[Found]:
        """Return up to `limit` rows that fit `where` with a BM25 score above 0 for `words`, highest score first."""

    def vectors(self, found: Sequence[Found], exit_layer: int) -> np.ndarray:
        """Return the embeddings (N, D) float32 of N rows that `nearest` or `lexical` found; zeros for deleted rows."""

    def count(self) -> int: ...


def file_id(path: str) -> str:
    """Return a hash of a path as 32 hexadecimal digits. The path's bytes may be invalid UTF-8."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:32]


def content_hash(text: str) -> str:
    """Return a hash of a text as 32 hexadecimal digits."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def readable_path(path: str) -> str:
    """Return a path as Unicode text; bytes that aren't UTF-8 become `\\x..`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def path_expression(pattern: str) -> re.Pattern[bytes]:
    """Return a regex for paths (as bytes) that fit a `.gitignore` pattern; UserError if the pattern is invalid."""
    whole = pattern.removeprefix("./").removeprefix("/") if "/" in pattern else f"**/{pattern}"
    if len(pattern) > LONGEST_PATH:
        fault = "long", f"The path pattern has {len(pattern):,} characters; shorten it to at most {LONGEST_PATH:,}."
    elif not pattern.strip():
        fault = "blank", "A path pattern must not be blank. Examples: '*.py', 'src/**'."
    else:
        try:
            name = os.fsencode(whole + "**" * whole.endswith("/"))
            return re.compile(glob_expression(name) + rb"\Z", re.DOTALL)
        except UnicodeEncodeError:
            fault = "surrogates", f"The path pattern {pattern!a} must be text without lone surrogates."
        except re.error as error:
            fault = "bracket", f"The path pattern {pattern!r} is invalid ({error}). To match '[', write '[[]'."
    raise UserError(f"search.path.{fault[0]}", fault[1])


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """The settings that an index was built with."""

    checkpoint: str  # absolute path of a folder, or a repository's name
    checksum: str  # checksum of the checkpoint's weights, configuration and tokenizer (see `checkpoint_checksum`)
    exit_layers: tuple[int, ...]  # exits at which code was embedded, ascending
    dimension: int  # number of components of an embedding
    prompts: Mapping[str, str]  # `query` and `document`, the prompts put before questions and code
    folder: str  # absolute path of the indexed folder; an index inside it stores a relative path, so both move together
    languages: tuple[str, ...]  # languages that are read, in the order of `ALL_LANGUAGES`
    tests: bool = True  # whether test code is read
    vendored: bool = False  # whether copied and generated code is read
    format: int = FORMAT  # version of the index's file format

    def __post_init__(self) -> None:
        languages = tuple(name for name in ALL_LANGUAGES if name in self.languages)
        object.__setattr__(self, "languages", languages)  # because the class is frozen

    def to_dict(self, location: str) -> dict[str, Any]:
        """Return the settings as JSON values; if the index is inside `folder`, this path is relative to the index."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        index = _real_path(location)
        if index is not None and os.path.commonpath([self.folder, index]) == self.folder:
            values["folder"] = os.path.relpath(self.folder, index)
        return values

    @classmethod
    def stored_in(cls, store: VectorStore) -> IndexSettings | None:
        """Return the settings of the index in `store`; None if `store` has no index. For errors see `from_dict`."""
        values = store.settings()
        return None if values is None else cls.from_dict(values, store.location)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], location: str) -> IndexSettings:
        """Restore settings from the result of `to_dict`; UserError if they are damaged or have another `format`."""
        key, fault = "format", f"The index {location} has format {values.get('format')}, not {FORMAT}"
        options: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}
        if values.get("format") == FORMAT:
            try:
                settings = cls(**options)
                check_types(settings)
                folder = os.path.normpath(os.path.join(_real_path(location) or "", settings.folder))
                return replace(settings, folder=folder)
            except TypeError as error:
                key, fault = "unreadable", f"The settings of the index {location} are damaged ({error})"
        raise UserError(f"search.index.{key}", f"{fault}. Rebuild it: {REBUILD}.")

    def refuse_others(self, asked: IndexSettings, location: str) -> None:
        """Raise UserError if `asked`, the settings for an update, differ from the index's; the message says how."""
        self.refuse_checkpoint(asked.checkpoint, asked.checksum, location)
        pairs = [(label, getattr(self, name), getattr(asked, name)) for name, label in _LABELS.items()]
        differences = [
            f"with {label} {_shown(own)}, not {_shown(other)}" for label, own, other in pairs if own != other
        ]
        for word, some, others in (("without", asked, self), ("also with", self, asked)):  # each has up to 22 languages
            if names := [name for name in some.languages if name not in others.languages]:
                differences.append(f"{word} {_shown(tuple(names))}")
        if differences:
            message = f"The index {location} was built {'; '.join(differences)}."
            raise UserError("search.index.other_settings", f"{message} Name another index, or add --rebuild.")

    def refuse_checkpoint(self, checkpoint: str, checksum: str, location: str) -> None:
        """Raise UserError if `checksum` differs from the index's checksum; the message names both checkpoints."""
        if checksum != self.checksum:
            raise UserError(
                "search.index.other_model",
                f"The index {location} was built with another checkpoint: {self.checkpoint} (checksum "
                f"{self.checksum}), not {checkpoint} ({checksum}). Use the index's checkpoint, or rebuild the index: "
                f"`mose index FOLDER --model {checkpoint} --rebuild`.",
            )

    def check_exit(self, exit_layer: int | None, location: str) -> int:
        """Return `exit_layer`; if it is None, the index's deepest exit. UserError if the index lacks the exit."""
        if exit_layer is None:
            return self.exit_layers[-1]
        if exit_layer not in self.exit_layers:
            exits = _shown(self.exit_layers)
            message = f"The index {location} was built at exit {exits}, not {exit_layer}. Choose an exit of the index."
            raise UserError("search.index.exit_layer", message)
        return exit_layer


_LABELS = {"folder": "the folder", "exit_layers": "exit", "dimension": "dimension", "prompts": "prompts"}
_LABELS |= {"tests": "tests read:", "vendored": "vendored code read:"}


def _real_path(location: str) -> str | None:
    """Return the absolute path of an index, with links resolved; None if it is in memory or on a server."""
    if "://" in location or location.startswith(QDRANT):
        return None
    return os.path.realpath(os.path.expanduser(location))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
