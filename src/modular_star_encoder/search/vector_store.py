"""Where the rows of an index lie: one protocol, an embedded store and a server behind it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol
from uuid import UUID

import numpy as np

from modular_star_encoder.evaluation.lexical import identifier_tokens
from modular_star_encoder.search.snippets import Snippet

QDRANT = "qdrant:"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an index.

    Attributes:
        row_id: a UUID made of its file and its place among the file's rows: a file never has two rows of one id.
        file_id: made of the bytes of the path, which need not be text.
        file_hash: of the file's content.
        file_rows: number of rows of its file. Fewer in the store means that writing was cut short.
        text_hash: of `snippet.text`.
        snippet: what was found in the file. Its path is text, with `\\x..` for bytes that aren't.
        words: what lexical search compares.
        vectors: exit_layer → (D,) float32.
        states: (T, H) states of the shallowest exit before the final norm, for a deeper pass; None if not kept.
    """

    row_id: str
    file_id: str
    file_hash: str
    file_rows: int
    text_hash: str
    snippet: Snippet
    words: str
    vectors: Mapping[int, np.ndarray]
    states: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A row that a store found, and its score: cosine similarity, or that of the words (higher is better).

    `exit_layer` is the exit that gave it its place: None from a store, and where only words did.
    """

    row_id: str
    text_hash: str
    snippet: Snippet
    score: float
    vectors: Mapping[int, np.ndarray] = field(default_factory=dict)
    states: np.ndarray | None = None
    exit_layer: int | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows count.

    Attributes:
        languages: names of languages; empty for all.
        path: regular expression that a path must match, or None.
    """

    languages: tuple[str, ...] = ()
    path: str | None = None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What a store holds of one file.

    Attributes:
        file_hash: None unless all its rows are there and of one content.
        rows: how many there are.
    """

    file_hash: str | None
    rows: int


class ForeignDataError(ValueError):
    """What lies where an index should be is none of ours, and is never replaced."""


class VectorStore(Protocol):
    """Rows of one index. `replace_files` is the only way to change them."""

    location: str

    def settings(self) -> dict[str, Any] | None:
        """What `create` was given, or None where there is no index yet.

        Raises:
            ForeignDataError: there is something that is no index of ours.
            ValueError: there is an index that can't be read.
        """

    def create(self, settings: Mapping[str, Any]) -> None:
        """Make an empty index, in place of the one that is there."""

    def files(self) -> dict[str, StoredFile]:
        """What is held of each file, by file_id."""

    def replace_files(self, known: Collection[str], rows: Sequence[Row]) -> None:
        """Put `rows` in the place of all rows of their files and of the files `known`.

        Args:
            known: ids of files of which the store may hold rows, those without new rows included. Files of `rows` that
                aren't named here have none.
            rows: all rows of each of their files.
        """

    def finish(self) -> None:
        """Bring indexes up to date, and give back the space of replaced rows."""

    def nearest(
        self, vector: np.ndarray, exit_layer: int, limit: int, where: Filter, extras: Sequence[str] = ()
    ) -> list[Found]:
        """Rows of the highest cosine similarity at an exit, best first; `extras` names `states` or `vector_K`."""

    def lexical(self, words: Sequence[str], limit: int, where: Filter) -> list[Found]:
        """Rows of the highest BM25 score, best first."""

    def count(self) -> int:
        """Number of rows."""

    def sample(self, limit: int) -> list[Found]:
        """Rows with a description, at most `limit`, in an order that doesn't change; their score is 0."""


def open_store(location: str | os.PathLike[str]) -> VectorStore:
    """The store of a location: `qdrant:NAME@URL` is a collection of a server, all else an embedded LanceDB.

    A LanceDB lies in a folder, or on object storage (`s3://bucket/path`; LanceDB reads credentials from the
    environment). The key of a Qdrant server is read from QDRANT_API_KEY.

    Raises:
        ImportError: the extra isn't installed.
        ValueError: not of these forms.
    """
    location = os.fspath(location)
    if location.startswith(QDRANT):
        from modular_star_encoder.search.qdrant_store import QdrantStore, connect

        return QdrantStore(*connect(location), location)
    from modular_star_encoder.search.lance_store import LanceStore

    return LanceStore(location)


def told_clearly(sentence: Callable[[str, Exception], str | None]) -> Callable[[Callable], Callable]:
    """A decorator for a store's methods: errors of the library behind it become an `OSError` of one sentence.

    Args:
        sentence: of the store's location and an error; None leaves the error as it is.
    """

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def told(self: Any, *arguments: Any, **options: Any) -> Any:
            try:
                return method(self, *arguments, **options)
            except Exception as error:
                if (words := sentence(self.location, error)) is None:
                    raise
                raise OSError(words) from error

        return told

    return decorate


def file_id(path: str) -> str:
    """32 hexadecimal digits for a path, of whatever bytes."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:32]


def content_hash(text: str) -> str:
    """32 hexadecimal digits for a text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def readable_path(path: str) -> str:
    """A path as text that any program can hold: bytes that aren't UTF-8 become `\\x..`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def row_id(file: str, place: int) -> str:
    """The id of a file's row at a place; a UUID, since Qdrant takes no other names."""
    return str(UUID(hex=hashlib.sha256(f"{file}:{place}".encode()).hexdigest()[:32]))


def words_of(snippet: Snippet) -> str:
    """What lexical search compares: parts of identifiers of path, name, description and code, with spaces between."""
    return " ".join(identifier_tokens(f"{snippet.path} {snippet.name} {snippet.description} {snippet.text}"))


def stored_files(rows: Iterable[tuple[str, str, int]]) -> dict[str, StoredFile]:
    """From (file_id, file_hash, file_rows) of all rows."""
    held: dict[str, tuple[str | None, int, int]] = {}
    for file, file_hash, expected in rows:
        first_hash, count, first_expected = held.get(file, (file_hash, 0, expected))
        agrees = first_hash == file_hash and first_expected == expected
        held[file] = (first_hash if agrees else None, count + 1, first_expected)
    return {
        file: StoredFile(file_hash if count == expected else None, count)
        for file, (file_hash, count, expected) in held.items()
    }
