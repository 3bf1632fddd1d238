"""The rows of fine-tuning for retrieval: one meaning, in prose and in code of one or several languages.

Every source gives the same rows: triplets (prose, a function, its translation), documented functions of repositories
(prose and a function), and parallel solutions of exercises (code alone).
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from modular_star_encoder.data.functions import (
    DocumentedFunction,
    code_key,
    collect_functions,
    description_key,
    open_corpus,
)
from modular_star_encoder.data.languages.documentation import reads_as_prose
from modular_star_encoder.data.languages.registry import language_named
from modular_star_encoder.data.sources.dataset_rows import BadLine, not_unicode, open_dataset_rows, row_example
from modular_star_encoder.utils.errors import UserError


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
            raise UserError(
                "data.triplets.negative_language",
                f"columns: negative_language is {self.negative_language!r}, and negative, the column of the code, is "
                "not set.",
            )

    def names(self) -> list[str]:
        """The columns to read."""
        named = [getattr(self, name) for name in self.__slots__]
        return [name for name in named if name is not None]


SYNTHCONL_COLUMNS = TripletColumns()


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
        skipped: Counter[str] = Counter()
        examples: dict[str, str] = {}
        self.skipped, self.examples = skipped, examples
        for place, row in self._rows:
            triplet = row.reason if isinstance(row, BadLine) else _triplet(row, self._columns)
            if isinstance(triplet, Triplet):
                yield place, triplet
                continue
            example = row_example(place, row)
            if self._strict:
                raise UserError("data.row", f"A row is not a triplet ({triplet}): {example}")
            skipped[triplet] += 1
            examples.setdefault(triplet, example)


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
        strict: Whether a bad row is an error (`data.row`); otherwise it is skipped and counted. A triplet has a
            description, two codes that are not blank, two of our languages, in any spelling (`C++` is `cpp`), and as
            repository a text or nothing.
        options: `config`, `revision` and `data_dir` of a dataset of the Hub; see `open_rows`.

    Raises:
        UserError: `data.source.*` if the dataset cannot be read, has no such split, or lacks a column.
    """
    return TripletReader(open_dataset_rows(source, columns.names(), split=split, **options), columns, strict)


def _triplet(row: Mapping[str, Any], columns: TripletColumns) -> Triplet | str:
    """The triplet of a row, or why it is not one."""
    for name in columns.names():
        if name not in row:
            return f"no column {name}"
    for name in filter(None, (columns.description, columns.code, columns.other_code, columns.negative)):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"empty {name}"
    languages = []
    for name in (columns.language, columns.other_language, columns.negative_language or columns.language):
        language = language_named(row[name])
        if language is None:
            return f"unknown {name}"
        languages.append(language)
    repository = row[columns.repository] or ""
    if not isinstance(repository, str):
        return f"{columns.repository} is not a text"
    code, other_code = row[columns.code], row[columns.other_code]
    negative = (row[columns.negative], languages[2]) if columns.negative else ()
    triplet = Triplet(row[columns.description], code, languages[0], other_code, languages[1], repository, *negative)
    return not_unicode(repository) or triplet


class Snippet(NamedTuple):
    """Code and the lower-case name of its language."""

    language: str
    code: str


@dataclass(frozen=True, slots=True)
class RetrievalExample:
    """One meaning in several texts: a row of fine-tuning for retrieval.

    Attributes:
        description: The meaning in prose; empty if there is none.
        snippets: The meaning in code, at least once; the description was written for the first.
        repository: Where it is from. Rows are held out by repository; empty if it is unknown.
        negative: Code that is much like it and means something else (a hard negative).
    """

    description: str
    snippets: tuple[Snippet, ...]
    repository: str = ""
    negative: Snippet | None = None


@dataclass(slots=True)
class SourceExamples:
    """What was read from one source.

    Attributes:
        texts: The rows, in the order of the source.
        skipped: Number of rows, or parts of rows, left out by reason.
        examples: The first of them by reason: where it is, and how it begins.
    """

    texts: list[RetrievalExample] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, example: str, strict: bool) -> None:
        """Count something that is left out; with `strict`, raise UserError (`data.row`)."""
        if strict:
            raise UserError("data.row", f"A row can't be trained on ({reason}): {example}")
        self.skipped[reason] += 1
        self.examples.setdefault(reason, example)


def read_retrieval_examples(settings: Mapping[str, Any], *, progress: bool = True) -> dict[str, SourceExamples]:
    """Read every source in a recipe's `data`.

    Args:
        settings: One or several of (None is as if left out)

            - `triplets`: the name of a dataset of the Hub, a file or a folder; or a mapping with `source` and the other
              arguments of `open_triplets`; with `columns: {negative: NAME}` each row also has a hard negative;
            - `functions`: the settings of a corpus (see `open_corpus`), whose documented functions are taken;
            - `parallel`: a file, folder or dataset with one exercise a row, `slug` and `code` (a mapping of languages
              to solutions); or a mapping with `source`, `name` and `code` (other names of these columns), `strict` and
              the arguments of `open_dataset_rows`.

            A row with empty code, an unknown language, or prose in place of code (see `reads_as_prose`) is skipped and
            counted; with `strict: true` it is an error (`data.row`).

    Returns:
        The rows by source, in this order.

    Raises:
        UserError: `data.sources` if no source is set, or one is unknown; `data.sources.negatives` if only one of
            several has hard negatives; `data.source.*` if one can't be read or has no good row.
    """
    # So that `data.triplets=null` removes a recipe's source.
    settings = {name: source for name, source in settings.items() if source is not None}
    unknown = sorted(set(settings) - set(_SOURCES))
    if unknown or not settings:
        given = f"not {', '.join(unknown)}" if unknown else "none is set"
        raise UserError("data.sources", f"data needs one or several of the sources {', '.join(_SOURCES)}; {given}.")
    if have_negatives(settings) and len(settings) > 1:
        others = " and ".join(f"data.{name}" for name in settings if name != "triplets")
        raise UserError(
            "data.sources.negatives",
            f"data.triplets has a column of hard negatives, and {others} has none: use triplets alone.",
        )
    found = {}
    for name in (name for name in _SOURCES if name in settings):
        try:
            found[name] = _SOURCES[name](settings[name], progress)
        except TypeError as error:
            raise UserError("data.source.options", f"data.{name} can't be used: {error}.") from error
        if not found[name].texts:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in found[name].skipped.most_common())
            raise UserError(
                "data.source.empty", f"data.{name} has no row to train on{': ' if reasons else '.'}{reasons}"
            )
    return found


def have_negatives(settings: Mapping[str, Any]) -> bool:
    """Whether the rows of these sources (see `read_retrieval_examples`) each have a hard negative."""
    triplets = settings.get("triplets")
    columns = triplets.get("columns") if isinstance(triplets, Mapping) else None
    return isinstance(columns, Mapping) and columns.get("negative") is not None


def described(functions: Iterable[DocumentedFunction]) -> list[RetrievalExample]:
    """Documented functions as rows."""
    return [RetrievalExample(one.description, (Snippet(one.language, one.code),), one.repository) for one in functions]


def _triplets(settings: Any, progress: bool) -> SourceExamples:
    options = _options(settings)
    strict = options.get("strict", False)
    if "columns" in options:
        options["columns"] = TripletColumns(**options["columns"])
    reader, found = open_triplets(**options), SourceExamples()
    for place, row in tqdm(reader.placed(), desc="Reading triplets", unit=" rows", disable=not progress):
        snippets = (Snippet(row.language, row.code), Snippet(row.other_language, row.other_code))
        negative = Snippet(row.negative_language, row.negative) if row.negative else None
        codes = snippets if negative is None else (*snippets, negative)
        faults = [_not_code(snippet.code, row.description) for snippet in codes]
        reason = next(filter(None, [*faults, not_unicode(row.description)]), None)
        if reason is None and negative and code_key(negative.code) in {code_key(one.code) for one in snippets}:
            reason = "its own code as the negative"
        if reason is None:
            found.texts.append(RetrievalExample(row.description, snippets, row.repository, negative))
        else:
            found.skip(reason, row_example(place, snippets), strict)
    found.skipped += reader.skipped
    found.examples |= reader.examples
    return found


def _functions(settings: Any, progress: bool) -> SourceExamples:
    if not isinstance(settings, Mapping):
        raise UserError(
            "data.functions",
            f"data.functions must be the settings of a corpus such as `folder: PATH`, not {settings!r}.",
        )
    reader = open_corpus(settings)
    collection = collect_functions(reader, progress=progress)
    dropped = Counter({reason: count for reason, count in collection.counts.items() if reason.startswith("dropped")})
    return SourceExamples(described(collection.functions), dropped + reader.skipped)


def _parallel(settings: Any, progress: bool) -> SourceExamples:
    options = _options(settings)
    strict, name, code = options.pop("strict", False), options.pop("name", "slug"), options.pop("code", "code")
    found = SourceExamples()
    rows = open_dataset_rows(options.pop("source"), [name, code], **options)
    for place, row in tqdm(rows, desc="Reading parallel solutions", unit=" rows", disable=not progress):
        slug, solutions = (row.get(name), row.get(code)) if isinstance(row, dict) else (None, None)
        if not isinstance(solutions, Mapping) or not isinstance(slug, str):
            fault = row.reason if isinstance(row, BadLine) else f"no {name}, or no mapping {code}"
            found.skip(fault, row_example(place, row), strict)
            continue
        snippets: list[Snippet] = []
        for language, solution in solutions.items():
            if solution is None:  # parquet has every language in every row
                continue
            known = language_named(language)
            reason = f"language {language}, none of ours" if known is None else _not_code(solution)
            if reason is None:
                snippets.append(Snippet(known or "", solution))
            else:
                found.skip(reason, row_example(place, solution), strict)
        if reason := not_unicode(slug):
            found.skip(reason, row_example(place, row), strict)
        elif len(snippets) > 1:
            found.texts.append(RetrievalExample("", tuple(snippets), slug))
        else:
            found.skip("fewer than two solutions", row_example(place, slug), strict)
    return found


_SOURCES: dict[str, Callable[[Any, bool], SourceExamples]] = {
    "triplets": _triplets,
    "functions": _functions,
    "parallel": _parallel,
}


def _options(settings: Any) -> dict[str, Any]:
    options = dict(settings) if isinstance(settings, Mapping) else {"source": settings}
    if not options.get("source"):
        raise TypeError("source, the name of a dataset, a file or a folder, is missing")
    return options


def _not_code(code: Any, description: str = "") -> str | None:
    """Why a text is not code; None if it is."""
    if not isinstance(code, str) or not code.strip():
        return "empty code"
    if description and description_key(code) == description_key(description):
        return "description in place of code"
    return "prose in place of code" if reads_as_prose(code) else not_unicode(code)
