"""Rows of SynthCoNL: a description, the function that it describes, and that function in another language.

Read from what its authors publish on the Hub (`modularStarEncoder/SynthCoNL`, `…-neardedup`), from what
`mose dataset build` writes, or from any parquet or JSON Lines files with such columns.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modular_star_encoder.data.dataset_rows import BadLine, not_unicode, open_dataset_rows, row_example
from modular_star_encoder.data.source_files import LANGUAGES, language_named


@dataclass(frozen=True, slots=True)
class Triplet:
    """One row.

    Attributes:
        description: What the function does, in prose.
        code: The function as its author wrote it.
        language: Its language, one of `LANGUAGES`.
        other_code: The same function in another language.
        other_language: That language, one of `LANGUAGES`.
        repository: Name of the repository of `code`; empty if the row does not say.
        negative: Code that is much like `code` and does not do what the description says; empty if there is none.
        negative_language: Its language; empty if there is none.
    """

    description: str
    code: str
    language: str
    other_code: str
    other_language: str
    repository: str = ""
    negative: str = ""
    negative_language: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TripletColumns:
    """The names of the columns of a dataset of triplets; by default those of SynthCoNL as published.

    `negative` is a column of hard negatives, which SynthCoNL does not have; `negative_language` that of their
    languages, by default the column `language`.
    """

    description: str = "func_documentation_string"
    code: str = "func1_CSN"
    language: str = "language1_CSN"
    other_code: str = "func2"
    other_language: str = "language2"
    repository: str = "repository_name"
    negative: str | None = None
    negative_language: str | None = None

    def __post_init__(self) -> None:
        if self.negative_language is not None and self.negative is None:
            raise ValueError("columns: negative_language is named, and negative, the column of the code, is not.")

    def names(self) -> list[str]:
        """The columns to read."""
        named = [getattr(self, name) for name in self.__slots__]
        return [name for name in named if name is not None]


SYNTHCONL_COLUMNS = TripletColumns()


class BadRowError(ValueError):
    """A row that is no triplet, where none may be skipped."""


class TripletReader:
    """Iterates over the triplets of a dataset, as a stream, in a fixed order, again and again.

    Attributes:
        skipped: Number of rows left out by reason, of the last iteration.
        examples: The first such row by reason: where it is, and how it begins.
    """

    def __init__(self, rows: Iterable[tuple[str, Any]], columns: TripletColumns, strict: bool) -> None:
        """`rows` yields (where a row is, the row); see `open_triplets`."""
        self._rows, self._columns, self._strict = rows, columns, strict
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def __iter__(self) -> Iterator[Triplet]:
        return (triplet for _, triplet in self.placed())

    def placed(self) -> Iterator[tuple[str, Triplet]]:
        """Iterate over pairs of where a triplet is, for messages, and the triplet."""
        # Each iteration has counters of its own; one that was abandoned cannot add to those of the next.
        self.skipped, self.examples = skipped, examples = Counter(), {}
        for place, row in self._rows:
            reason = row.reason if isinstance(row, BadLine) else _fault(row, self._columns)
            if reason is None:
                yield place, _triplet(row, self._columns)
                continue
            example = row_example(place, row)
            if self._strict:
                raise BadRowError(f"A row is no triplet ({reason}): {example}")
            skipped[reason] += 1
            examples.setdefault(reason, example)


def open_triplets(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str = "train",
    columns: TripletColumns = SYNTHCONL_COLUMNS,
    strict: bool = False,
    **options: Any,
) -> TripletReader:
    """Open a dataset of triplets.

    Args:
        source: A parquet or JSON Lines file, a list of them, a folder of them, or the name of a dataset of the Hub.
        split: The split to read; see `open_dataset_rows`.
        columns: The names of its columns.
        strict: Whether a row that is no triplet is an error; otherwise it is skipped and counted. A triplet has a
            description, two codes that are not blank, two of our languages, in any spelling (`C++` is `cpp`), and as
            repository a text or nothing.
        options: `config`, `revision` and `data_dir` of a dataset of the Hub; see `open_rows`.

    Raises:
        ValueError: If the dataset cannot be read, has no such split, or lacks a column.
    """
    return TripletReader(open_dataset_rows(source, columns.names(), split=split, **options), columns, strict)


def _fault(row: Mapping[str, Any], columns: TripletColumns) -> str | None:
    """Why a row is no triplet; None if it is one."""
    for name in columns.names():
        if name not in row:
            return f"no column {name}"
    for name in filter(None, (columns.description, columns.code, columns.other_code, columns.negative)):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"empty {name}"
    for name in filter(None, (columns.language, columns.other_language, columns.negative_language)):
        if not isinstance(row[name], str) or language_named(row[name]) not in LANGUAGES:
            return f"unknown {name}"
    repository = row[columns.repository]
    if repository is not None and not isinstance(repository, str):
        return f"{columns.repository} is no text"
    return not_unicode(repository or "")


def _triplet(row: Mapping[str, Any], columns: TripletColumns) -> Triplet:
    return Triplet(
        row[columns.description],
        row[columns.code],
        language_named(row[columns.language]) or "",
        row[columns.other_code],
        language_named(row[columns.other_language]) or "",
        row[columns.repository] or "",
        *_negative(row, columns),
    )


def _negative(row: Mapping[str, Any], columns: TripletColumns) -> tuple[str, str]:
    if columns.negative is None:
        return "", ""
    return row[columns.negative], language_named(row[columns.negative_language or columns.language]) or ""
