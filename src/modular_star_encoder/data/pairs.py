"""The pairs of fine-tuning: one meaning in prose and code (retrieval), or two snippets and a label (clone detection).

Every source of retrieval gives the same rows: triplets (prose, a function, its translation), documented functions of
repositories (prose and a function), and parallel solutions of exercises (code alone).
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.data.functions import (
    DocumentedFunction,
    code_key,
    collect_functions,
    description_key,
    open_corpus,
)
from modular_star_encoder.data.languages.documentation import reads_as_prose
from modular_star_encoder.data.languages.registry import LANGUAGES, language_named
from modular_star_encoder.data.sources.dataset_rows import (
    BadLine,
    Row,
    Source,
    not_unicode,
    open_dataset_rows,
    row_example,
)
from modular_star_encoder.utils.errors import UserError


class Snippet(NamedTuple):
    """Code and the lower-case name of its language."""

    language: str
    code: str


@dataclass(frozen=True, slots=True)
class RetrievalExample:
    """One meaning in several texts: a row of fine-tuning for retrieval."""

    description: str  # the meaning in prose; empty if there is none
    snippets: tuple[Snippet, ...]  # the meaning in code, at least once; the description belongs to the first
    repository: str = ""  # rows are held out by repository; empty if it is unknown
    negative: Snippet | None = None  # similar code with another meaning (a hard negative)


@dataclass(slots=True)
class SourceExamples:
    """The rows that were read from one source."""

    texts: list[RetrievalExample] = field(default_factory=list)  # in the order of the source
    skipped: Counter[str] = field(default_factory=Counter)  # rows, or parts of rows, left out by reason
    examples: dict[str, str] = field(default_factory=dict)  # by reason, the first one: its place and its beginning

    def skip(self, reason: str, place: str, row: Any, strict: bool) -> None:
        """Count something that is left out; with `strict`, raise UserError (`data.row`)."""
        example = row_example(place, row)
        if strict:
            raise UserError("data.row", f"A row can't be used ({reason}): {example}")
        self.skipped[reason] += 1
        self.examples.setdefault(reason, example)


@dataclass(frozen=True, slots=True, kw_only=True)
class TripletColumns:
    """The names of the columns of a dataset of triplets; by default the columns of the published SynthCoNL.

    Without `other_code` (None), rows are pairs of a description and one snippet.
    `negative` is a column of hard negatives, which SynthCoNL does not have; `negative_language` is the column of their
    languages, by default `language`.
    """

    description: str = "func_documentation_string"
    code: str = "func1_CSN"
    language: str = "language1_CSN"
    other_code: str | None = "func2"
    other_language: str = "language2"
    repository: str = "repository_name"
    negative: str | None = None
    negative_language: str | None = None

    def __post_init__(self) -> None:
        if self.negative_language is not None and self.negative is None:
            message = f"negative_language is {self.negative_language!r}; name the column of the code, negative, too."
            raise UserError("data.triplets.negative_language", message)

    def names(self) -> list[str]:
        """The columns to read."""
        unused = "other_language" if self.other_code is None else None
        return [name for field, name in asdict(self).items() if name is not None and field != unused]


@dataclass
class TripletReader:
    """Iterates over the triplets of a dataset, as a stream, in a fixed order, again and again.

    `skipped` counts the rows left out of the last iteration by reason; `examples` has the first such row by reason.
    """

    rows: Iterable[tuple[str, Row]]
    columns: TripletColumns
    strict: bool
    fault: Callable[[RetrievalExample], str | None]
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[RetrievalExample]:
        # Each iteration has counters of its own; an abandoned iteration cannot add to the next one's.
        left_out = SourceExamples()
        self.skipped, self.examples = left_out.skipped, left_out.examples
        for place, row in self.rows:
            triplet = row.reason if isinstance(row, BadLine) else _triplet(row, self.columns)
            reason = triplet if isinstance(triplet, str) else self.fault(triplet)
            if reason is None and isinstance(triplet, RetrievalExample):
                yield triplet
            else:
                left_out.skip(reason or "", place, row, self.strict)


def open_triplets(
    source: Source,
    *,
    split: str = "train",
    columns: TripletColumns | Mapping[str, str] = TripletColumns(),
    strict: bool = False,
    fault: Callable[[RetrievalExample], str | None] = lambda _: None,
    **options: Any,
) -> TripletReader:
    """Open a dataset of triplets: rows with a description and two snippets.

    Args:
        source, split, options: See `open_dataset_rows`.
        columns: The names of its columns.
        strict: Whether a bad row is an error (`data.row`); otherwise it is skipped and counted. A triplet has a
            description, two codes that are not blank, two of `LANGUAGES` in any spelling (`C++` is `cpp`), and a text
            or nothing as repository.
        fault: Says why a triplet is a bad row for other reasons, or None.
    """
    columns = columns if isinstance(columns, TripletColumns) else TripletColumns(**columns)
    rows = open_dataset_rows(source, columns.names(), split=split, **options)
    return TripletReader(rows, columns, strict, fault)


def _triplet(row: Mapping[str, Any], columns: TripletColumns) -> RetrievalExample | str:
    """The triplet of a row, or why it is not one."""
    if missing := [name for name in columns.names() if name not in row]:
        return f"no column {missing[0]}"
    for name in filter(None, (columns.description, columns.code, columns.other_code, columns.negative)):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"empty {name}"
    sides = [(columns.code, columns.language)]
    if columns.other_code:
        sides.append((columns.other_code, columns.other_language))
    own = len(sides)
    if columns.negative:
        sides.append((columns.negative, columns.negative_language or columns.language))
    snippets = []
    for code, name in sides:
        language = language_named(row[name])
        if language not in LANGUAGES:
            return f"unknown {name}"
        snippets.append(Snippet(language, row[code]))
    repository = row[columns.repository] or ""
    if not isinstance(repository, str):
        return f"{columns.repository} is not a text"
    texts, negative = tuple(snippets[:own]), next(iter(snippets[own:]), None)
    return not_unicode(repository) or RetrievalExample(row[columns.description], texts, repository, negative)


def read_retrieval_examples(settings: Mapping[str, Any], *, progress: bool = True) -> dict[str, SourceExamples]:
    """Read every source in a recipe's `data`.

    Args:
        settings: One or several of these (None means left out)

            - `triplets`: the name of a dataset of the Hub, a file or a folder; or a mapping with `source` and the other
              arguments of `open_triplets`; with `columns: {negative: NAME}` each row also has a hard negative;
            - `functions`: the settings of a corpus (see `open_corpus`), whose documented functions are taken;
            - `parallel`: a file, folder or dataset with one exercise per row, `slug` and `code` (a mapping of languages
              to solutions); or a mapping with `source`, `name` and `code` (other names of these columns), `strict` and
              the arguments of `open_dataset_rows`.

            A row with empty code, an unknown language, or prose in place of code (see `reads_as_prose`) is skipped and
            counted; with `strict: true` it is an error (`data.row`).

    Returns:
        The rows by source, in this order.
    """
    # So that `data.triplets=null` removes a recipe's source.
    settings = {name: source for name, source in settings.items() if source is not None}
    unknown = sorted(set(settings) - set(_SOURCES))
    if unknown or not settings:
        given = f"not {', '.join(unknown)}" if unknown else "none is set"
        raise UserError("data.sources", f"data needs one or several of the sources {', '.join(_SOURCES)}; {given}.")
    if have_negatives(settings) and len(settings) > 1:
        others = " and ".join(f"data.{name}" for name in settings if name != "triplets")
        message = f"data.triplets has a column of hard negatives, and {others} has none: use triplets alone."
        raise UserError("data.sources.negatives", message)
    found = {}
    for name in (name for name in _SOURCES if name in settings):
        try:
            found[name] = _SOURCES[name](settings[name], progress)
        except TypeError as error:
            raise UserError("data.source.options", f"data.{name} can't be used: {error}.") from error
        if not found[name].texts:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in found[name].skipped.most_common())
            raise UserError("data.source.empty", f"data.{name} has no row to train on: {reasons or 'it is empty'}.")
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
    reader = open_triplets(**_options(settings), fault=_code_fault)
    texts = list(tqdm(reader, desc="Reading triplets", unit=" rows", disable=not progress))
    return SourceExamples(texts, reader.skipped, reader.examples)


def _code_fault(row: RetrievalExample) -> str | None:
    codes = [*row.snippets, *([row.negative] if row.negative else [])]
    faults = [*(_not_code(one.code, row.description) for one in codes), not_unicode(row.description)]
    if row.negative and code_key(row.negative.code) in {code_key(one.code) for one in row.snippets}:
        faults.append("its own code as the negative")
    return next(filter(None, faults), None)


def _functions(settings: Any, progress: bool) -> SourceExamples:
    if not isinstance(settings, Mapping):
        message = f"data.functions must be the settings of a corpus such as `folder: PATH`, not {settings!r}."
        raise UserError("data.functions", message)
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
            found.skip(fault, place, row, strict)
            continue
        snippets: list[Snippet] = []
        for language, solution in solutions.items():
            if solution is None:  # parquet has every language in every row
                continue
            known = language_named(language)
            if reason := _not_code(solution) if known in LANGUAGES else f"language {language}, none of ours":
                found.skip(reason, place, solution, strict)
            else:
                snippets.append(Snippet(known or "", solution))
        if reason := not_unicode(slug):
            found.skip(reason, place, row, strict)
        elif len(snippets) > 1:
            found.texts.append(RetrievalExample("", tuple(snippets), slug))
        else:
            found.skip("fewer than two solutions", place, slug, strict)
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


_LABELLED_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class LabelledPairs:
    """Pairs of snippets of one split for clone detection, labelled by whether both do the same."""

    codes: list[str]  # the snippets, each once
    pairs: np.ndarray  # int64 (pairs, 2), places in `codes`
    labels: np.ndarray  # int64 (pairs,), 1 where both do the same, otherwise 0

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, count: int, seed: int) -> "LabelledPairs":
        """At most `count` of the pairs, drawn at random, in their order."""
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return LabelledPairs(self.codes, self.pairs[chosen], self.labels[chosen])


def read_labelled_pairs(settings: Mapping[str, Any]) -> dict[str, LabelledPairs]:
    """The pairs of the splits in a recipe's `data`: `train`, `valid` and, if there is one, `test`.

    Args:
        settings: `train`, `valid` and optionally `test`, each a JSON Lines or parquet file with the columns `first`,
            `second` (snippets) and `label` (0 or 1); or `bigclonebench`, a folder with the files of CodeXGLUE
            (github.com/microsoft/CodeXGLUE, Clone-detection-BigCloneBench): `data.jsonl` holds functions (`func`,
            `idx`), and `train.txt`, `valid.txt` and `test.txt` two ids and a label per line.
    """
    for name, source in settings.items():
        if not isinstance(source, str | os.PathLike) or not os.fspath(source):
            raise UserError("data.pairs.settings", f"data.{name} must be the name of a file or folder, not {source!r}.")
    if set(settings) == {"bigclonebench"}:
        return _bigclonebench(Path(settings["bigclonebench"]).expanduser())
    if not {"train", "valid"} <= set(settings) <= set(_LABELLED_SPLITS):
        given = ", ".join(map(str, settings))
        message = f"data must name bigclonebench, a folder, or the files train, valid and test; not {given}."
        raise UserError("data.pairs.settings", message)
    return {split: _pairs_of_rows(settings[split]) for split in _LABELLED_SPLITS if split in settings}


def _bigclonebench(folder: Path) -> dict[str, LabelledPairs]:
    functions: dict[str, str] = {}
    for where, row in open_dataset_rows(folder / "data.jsonl", ["func", "idx"]):
        if not isinstance(row, dict) or not _is_code(row.get("func")) or "idx" not in row:
            raise UserError("data.row", f"{where} must have func, in whole characters, and idx.")
        functions[str(row["idx"])] = row["func"]
    places, codes = {name: place for place, name in enumerate(functions)}, list(functions.values())
    paths = {split: folder / f"{split}.txt" for split in _LABELLED_SPLITS}
    if not (paths["train"].is_file() and paths["valid"].is_file()):
        raise UserError("data.source.no_files", f"{folder} must hold train.txt and valid.txt besides data.jsonl.")
    return {split: _pairs_of_lines(path, codes, places) for split, path in paths.items() if path.is_file()}


def _pairs_of_lines(path: Path, codes: list[str], places: Mapping[str, int]) -> LabelledPairs:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            match line.split():
                case [first, second, "0" | "1" as label] if first in places and second in places:
                    rows.append((places[first], places[second], int(label)))
                case _:
                    message = f"{path}, line {number}, must have two ids of data.jsonl and a label 0 or 1."
                    raise UserError("data.row", message)
    return _pairs(codes, rows, path)


def _pairs_of_rows(source: str | os.PathLike[str]) -> LabelledPairs:
    places: dict[str, int] = {}
    rows = []
    for where, row in open_dataset_rows(source, ["first", "second", "label"]):
        values = row if isinstance(row, dict) else {}
        first, second, label = values.get("first"), values.get("second"), values.get("label")
        if not (_is_code(first) and _is_code(second)) or label not in (0, 1):
            message = f"{where} must have code as first and second, in whole characters, and a label 0 or 1."
            raise UserError("data.row", message)
        a, b = (places.setdefault(str(text), len(places)) for text in (first, second))
        rows.append((a, b, int(label)))
    return _pairs(list(places), rows, source)


def _is_code(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip()) and not_unicode(text) is None


def _pairs(codes: list[str], rows: list[tuple[int, int, int]], source: str | os.PathLike[str]) -> LabelledPairs:
    if not rows:
        raise UserError("data.source.empty", f"{source} holds no pair.")
    table = np.array(rows, dtype=np.int64)
    return LabelledPairs(codes, table[:, :2], table[:, 2])
