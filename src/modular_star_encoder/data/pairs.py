"""Reads fine-tuning data: prose and code with the same meaning (retrieval), or labelled pairs (clone detection)."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.data import functions
from modular_star_encoder.data.functions import DocumentedFunction, code_key, description_key
from modular_star_encoder.data.languages.documentation import reads_as_prose
from modular_star_encoder.data.languages.registry import LANGUAGES, language_named
from modular_star_encoder.data.sources import dataset_rows
from modular_star_encoder.data.sources.dataset_rows import BadLine, Rows, Source, not_unicode, open_dataset_rows
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import user_path
from modular_star_encoder.utils.settings import check_names

MAX_CHARACTERS = 100_000  # of a text of `data.pairs`
_EXAMPLE_LENGTH, _EXAMPLES = 200, 3

# Role of a column of pairs → names that such a column may have, in any letter case; the first that exists is used.
_PAIR_COLUMNS = {
    "query": "query anchor question description docstring func_documentation_string documentation doc comment summary "
    "intent title instruction prompt input nl sentence1 text",
    "positive": "positive code snippet function func func_code_string whole_func_string answer document solution "
    "response output passage content body sentence2 text",
    "negative": "negative negatives hard_negative negative_1 neg",
    "score": "score label similarity relevance",
    "language": "language lang programming_language",
    "repository": "repository repo repository_name repo_name package project",
}


class Snippet(NamedTuple):
    """Code, and the lower-case name of its programming language."""

    language: str
    code: str


@dataclass(frozen=True, slots=True)
class RetrievalExample:
    """A row for fine-tuning a model for retrieval: prose and code with the same meaning."""

    description: str  # the meaning in prose; empty if there is none
    snippets: tuple[Snippet, ...]  # one or more codes with this meaning; the description was written for the first
    repository: str = ""  # rows are held out by repository; empty if it is unknown
    negative: Snippet | None = None  # similar code with another meaning (a hard negative)


class SourceExamples(NamedTuple):
    """The rows that were read from one source of data, and what was skipped."""

    texts: list[RetrievalExample]  # in the order of the source
    skipped: Counter[str]  # reason → number of rows, or parts of rows, left out for this reason
    examples: dict[str, list[str]]  # reason → the first three rows or parts, as `FILE, line N: beginning of the text`


# An example, the reason why a whole row is left out, or (reason, the part of a row that is left out).
_Found = RetrievalExample | str | tuple[str, Any]


class ExampleReader:
    """Iterates over the retrieval examples in a dataset's rows. `skipped` and `examples` are as in `SourceExamples`."""

    def __init__(self, rows: Rows, make: Callable[[dict[str, Any]], Iterable[_Found]], strict: bool) -> None:
        """`make(row)` yields examples, or reasons to skip the row or a part; if `strict`, a reason raises UserError."""
        self._rows, self._make, self._strict = rows, make, strict
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[RetrievalExample]:
        # Each iteration has counters of its own; an abandoned iteration cannot add to the next one's.
        skipped, examples = Counter[str](), defaultdict[str, list[str]](list)
        self.skipped, self.examples = skipped, examples
        for place, row in self._rows:
            for found in [row.reason] if isinstance(row, BadLine) else self._make(row):
                if isinstance(found, RetrievalExample):
                    yield found
                    continue
                reason, part = (found, row) if isinstance(found, str) else found
                skipped[reason] += 1
                if skipped[reason] > _EXAMPLES:
                    continue
                text = part.text if isinstance(part, BadLine) else json.dumps(part, ensure_ascii=False, default=str)
                shown = f"{place}: {text[:_EXAMPLE_LENGTH]}".encode(errors="backslashreplace").decode()
                if self._strict:
                    raise UserError("data.row", f"A row can't be used ({reason}): {shown}")
                examples[reason].append(shown)

    def read(self, what: str, progress: bool) -> SourceExamples:
        """Return all examples, and show a progress bar with the words "Reading {what}"."""
        texts = list(tqdm(self, desc=f"Reading {what}", unit=" rows", disable=not progress))
        return SourceExamples(texts, self.skipped, self.examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class TripletColumns:
    """The column names of a dataset of triplets: a description, a function, and the function in another language.

    `negative` is the column of hard negatives. A column that is None is not read. The defaults are those of SynthCoNL.
    """

    description: str = "func_documentation_string"
    code: str = "func1_CSN"
    language: str = "language1_CSN"
    other_code: str | None = "func2"
    other_language: str = "language2"
    repository: str | None = "repository_name"
    negative: str | None = None
    negative_language: str | None = None

    def __post_init__(self) -> None:
        if None in (self.description, self.code, self.language):
            message = "`columns` must name columns for `description`, `code` and `language`."
            raise UserError("data.triplets.columns", message)
        if self.negative_language is not None and self.negative is None:
            message = f"With negative_language={self.negative_language!r}, set `negative`, the column of negatives."
            raise UserError("data.triplets.negative_language", message)

    def names(self) -> list[str]:
        """Return the names of the columns to read."""
        unused = "other_language" if self.other_code is None else None
        return [name for field, name in asdict(self).items() if name is not None and field != unused]


def open_triplets(
    source: Source,
    *,
    split: str = "train",
    columns: TripletColumns | Mapping[str, str] = TripletColumns(),
    strict: bool = False,
    fault: Callable[[RetrievalExample], str | None] = lambda _: None,
    **options: Any,
) -> ExampleReader:
    """Return a reader of triplets, which skips unusable rows, and rows for which `fault` returns a reason.

    If `strict`, a row to skip raises UserError (`data.row`). `source`, `split`, `options`: see `open_dataset_rows`.
    """
    columns = columns if isinstance(columns, TripletColumns) else TripletColumns(**columns)
    rows = open_dataset_rows(source, columns.names(), split=split, **options)
    return ExampleReader(rows, lambda row: [_triplet(row, columns, fault)], strict)


def _triplet(
    row: Mapping[str, Any], columns: TripletColumns, fault: Callable[[RetrievalExample], str | None]
) -> RetrievalExample | str:
    """Return the triplet in `row`, or the reason to skip `row`: a wrong value, or what `fault(triplet)` returns."""
    if missing := [name for name in columns.names() if name not in row]:
        return f"no column {', '.join(missing)}; name the columns in `columns`"
    for name in filter(None, (columns.description, columns.code, columns.other_code, columns.negative)):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"empty {name}"
    codes = [
        (columns.code, columns.language),
        (columns.other_code, columns.other_language),
        (columns.negative, columns.negative_language or columns.language),
    ]
    if unknown := [name for code, name in codes if code and language_named(row[name]) not in LANGUAGES]:
        return f"unknown language in {unknown[0]}"
    first, other, negative = (
        Snippet(language_named(row[name]) or "", row[code]) if code else None for code, name in codes
    )
    repository = row[columns.repository] or "" if columns.repository else ""
    if not isinstance(repository, str):
        return f"{columns.repository} is not a text"
    snippets = tuple(one for one in (first, other) if one)
    triplet = RetrievalExample(row[columns.description], snippets, repository, negative)
    return not_unicode(repository) or fault(triplet) or triplet


def read_retrieval_examples(settings: Mapping[str, Any], *, progress: bool = True) -> dict[str, SourceExamples]:
    """Read the retrieval rows of every source in a recipe's `data`; return {name of the source: rows}.

    `settings` is this `data`, with one or several of the keys below. A value is a SOURCE of `open_dataset_rows`, such
    as a file, or a mapping with `source` and other arguments. A key with the value None is not used.

    - `pairs`: pairs of texts, such as questions and code (see `resolve_pairs`). All other keys are then ignored;
    - `triplets`: see `open_triplets`. With `columns: {negative: NAME}`, each row also has a hard negative;
    - `functions`: a folder, or the settings of a corpus (see `open_corpus`), to read documented functions from;
    - `parallel`: one programming exercise per row, with its name in the column `slug`, and its solutions, as a mapping
      {language: code}, in the column `code`. Options `name` and `code` name other columns.

    A row that can't be used is skipped and counted: for example if its code is empty, in an unknown language, or prose.
    With the option `strict: true` of any key but `functions`, a row that can't be used raises UserError (`data.row`).
    """
    settings = _without_none(resolve_pairs(settings))
    if not settings:
        raise UserError("data.sources", f"`data` must have one or more of the keys {', '.join(_SOURCES)}; not none.")
    if have_negatives(settings) and len(settings) > 1:
        others = " and ".join(f"data.{name}" for name in settings if name != "triplets")
        message = f"Triplets with hard negatives exclude {others}: remove {others}, or data.triplets.columns.negative."
        raise UserError("data.sources.negatives", message)
    found = {}
    for name in (name for name in _SOURCES if name in settings):
        default = "folder" if name == "functions" else "source"
        options = settings[name] if isinstance(settings[name], Mapping) else {default: settings[name]}
        with functions.checking_options("data.source.options", f"data.{name}"):
            found[name] = _SOURCES[name](progress, **_without_none(options))
        if not found[name].texts:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in found[name].skipped.most_common())
            first = "; the first one: " + next(iter(found[name].examples.values()))[0] if found[name].examples else ""
            place = f"data.{name} ({options.get(default)})"
            skipped = f"no usable row (skipped: {reasons}{first})" if reasons else "no row"
            raise UserError("data.source.empty", f"{place} has {skipped}.")
    return found


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not None, so that `data.triplets=null` removes a source from a recipe."""
    return {name: value for name, value in settings.items() if value is not None}


def have_negatives(settings: Mapping[str, Any]) -> bool:
    """Return whether a recipe's `data` names a column of hard negatives."""
    source = settings.get("pairs") or settings.get("triplets")
    columns = source.get("columns") if isinstance(source, Mapping) else None
    return isinstance(columns, Mapping) and columns.get("negative") is not None


def resolve_pairs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's `data` as `{"pairs": …}`, with the source, its options, and the column for each role.

    Without the key `pairs`, `data` is returned unchanged. `data.pairs` is a SOURCE of `open_dataset_rows`, such as a
    file, or a mapping with `source` and options. `data.columns`, or `columns` in this mapping, is {role: name of the
    column}. The roles are `query`, `positive` (the text to find), `negative`, `score`, `language` and `repository`. A
    role that is null has no column. A role that is not in `columns` gets a column of a usual name, such as `docstring`;
    for `query` and `positive`, one word of the name is enough (`user_question`) if it fits only one column and role.
    UserError if a key, the source or a column does not exist, or `query` or `positive` gets no column. Readers skip
    rows with a score below `min_score`.
    """
    of_pairs = ("columns", "min_score")
    check_names(list(map(str, settings)), [*_SOURCES, *(of_pairs if settings.get("pairs") else ())], "data")
    if settings.get("pairs") is None:
        return dict(settings)
    pairs, beside = settings["pairs"], set(of_pairs) & settings.keys()
    options = dict(pairs) if isinstance(pairs, Mapping) else {"source": pairs}
    options |= {name: settings[name] for name in beside}
    columns, source = options.get("columns") or {}, options.get("source")
    if not isinstance(columns, Mapping) or not source:
        message = "data.pairs must name a source, and data.columns must be like {query: COLUMN, positive: COLUMN}."
        raise UserError("data.pairs.columns", message)
    columns = dict(columns)
    check_names(list(map(str, columns)), _PAIR_COLUMNS, "data.columns")
    if columns.keys() < _PAIR_COLUMNS.keys():
        own = {"source", "columns", "min_score", "strict"}
        try:
            there = dataset_rows.column_names(source, **{name: options[name] for name in options.keys() - own})
        except UserError as error:
            advice = ""
            if error.key == "data.source.no_files" and os.path.isdir(os.path.expanduser(str(source))):
                advice = f' If it holds source code, set "data.functions={{folder: {source}}}" in place of data.pairs.'
            raise UserError(error.key, f"{error}{advice}") from error
        missing = [str(name) for name in columns.values() if name is not None and name not in there]
        by_name = {name.strip().lower(): name for name in there if name not in columns.values()}
        for role, names in _PAIR_COLUMNS.items():
            if role not in columns:
                columns[role] = next((by_name.pop(name) for name in names.split() if name in by_name), None)
        fit: dict[str, list[str]] = {role: [] for role in _PAIR_COLUMNS}
        known = {role: set(names.split()) - {"text"} for role, names in _PAIR_COLUMNS.items()}
        for name, column in by_name.items():
            words = set(re.split(r"[^a-z]+", name))
            roles = [role for role in known if words & known[role]]
            if len(roles) == 1 and "id" not in words:
                fit[roles[0]].append(column)
        for role in (one for one in ("query", "positive") if columns[one] is None and len(fit[one]) == 1):
            columns[role] = fit[role][0]
        if missing:
            message = f"{source} has no column {', '.join(missing)}; its columns are {', '.join(there)}."
            raise UserError("data.source.column", message)
        if unknown := " and the ".join(role for role in ("query", "positive") if columns[role] is None):
            message = f"Set data.columns={{query: NAME, positive: NAME}}, because no column of {source} has a usual"
            message += f" name for the {unknown}. Its columns are {', '.join(there)}."
            raise UserError("data.pairs.columns", message)
    return {"pairs": options | {"columns": columns}}


def check_sources(settings: Mapping[str, Any]) -> None:
    """Raise UserError if a local source in a recipe's `data` is missing, or `resolve_pairs` rejects local `pairs`."""
    for name in ("pairs",) if settings.get("pairs") else ("triplets", "parallel"):
        source = settings.get(name)
        source = source.get("source") if isinstance(source, Mapping) else source
        if isinstance(source, str):
            dataset_rows.check_source(source)
            if name == "pairs" and os.path.exists(os.path.expanduser(source)):
                resolve_pairs(settings)


def described(found: Iterable[DocumentedFunction]) -> list[RetrievalExample]:
    """Return one retrieval row, with description and code, for each documented function in `found`."""
    return [RetrievalExample(one.description, (Snippet(one.language, one.code),), one.repository) for one in found]


def _pairs(
    progress: bool,
    *,
    source: Source,
    columns: Mapping[str, Any],
    min_score: float = 0.5,
    strict: bool = False,
    **options: Any,
) -> SourceExamples:
    rows = open_dataset_rows(source, list(_without_none(columns).values()), **options)
    found = ExampleReader(rows, lambda row: [_pair(row, columns, min_score)], strict).read("pairs", progress)
    if len({text.repository for text in found.texts}) == 1:  # a single repository can't be split: hold out single rows
        found = found._replace(texts=[replace(text, repository="") for text in found.texts])
    return found


def _pair(row: Mapping[str, Any], columns: Mapping[str, Any], min_score: float) -> RetrievalExample | str:
    """Return the pair in `row`, or the reason why `row` must be skipped."""
    value: dict[str, Any] = {role: None if name is None else row.get(name) for role, name in columns.items()}
    if isinstance(value["negative"], list | tuple):
        value["negative"] = next(iter(value["negative"]), None)
    for role in ("query", "positive", "negative"):
        text, name = value[role], columns[role]
        if name is None:
            continue
        if text is None or (isinstance(text, str) and not text.strip()):
            return f"empty {name}"
        if not isinstance(text, str):
            return f"{name} is not a text"
        if len(text) > MAX_CHARACTERS:
            return f"{name} has more than {MAX_CHARACTERS:,} characters"
        if reason := not_unicode(text):
            return reason
    if columns["score"] is not None:
        try:
            if not float(value["score"]) >= min_score:
                return f"{columns['score']} below {min_score}"
        except (TypeError, ValueError, OverflowError):  # an integer may have 4,300 digits
            return f"{columns['score']} is not a number"
    if code_key(value["positive"]) in (code_key(value["query"]), code_key(value["negative"] or "")):
        return f"{columns['positive']} equals another text of the row"
    language, repository = language_named(value["language"]) or "", str(value["repository"] or "")
    negative = Snippet(language, value["negative"]) if value["negative"] else None
    example = RetrievalExample(value["query"], (Snippet(language, value["positive"]),), repository, negative)
    return not_unicode(repository) or example


def _triplets(progress: bool, **options: Any) -> SourceExamples:
    def fault(row: RetrievalExample) -> str | None:
        codes = [*row.snippets, *([row.negative] if row.negative else [])]
        faults = [*(_not_code(one.code, row.description) for one in codes), not_unicode(row.description)]
        if row.negative and code_key(row.negative.code) in {code_key(one.code) for one in row.snippets}:
            faults.append("hard negative is the code itself")
        return next(filter(None, faults), None)

    return open_triplets(fault=fault, **options).read("triplets", progress)


def _functions(progress: bool, **settings: Any) -> SourceExamples:
    reader = functions.open_corpus(settings)
    found, counts = functions.collect_functions(reader, progress=progress)
    dropped = Counter({reason: count for reason, count in counts.items() if reason.startswith("dropped")})
    return SourceExamples(described(found), dropped + reader.skipped, {})


def _parallel(
    progress: bool, *, source: Source, strict: bool = False, name: str = "slug", code: str = "code", **options: Any
) -> SourceExamples:
    def exercise(row: dict[str, Any]) -> Iterator[_Found]:
        slug, solutions = row.get(name), row.get(code)
        if not isinstance(solutions, Mapping) or not isinstance(slug, str):
            yield f"no text in {name}, or no mapping in {code}"
            return
        snippets: list[Snippet] = []
        for language, solution in solutions.items():
            if solution is None:  # in parquet, every row has every language
                continue
            known = language_named(language)
            if reason := _not_code(solution) if known in LANGUAGES else f"unsupported language {language}":
                yield reason, solution
            else:
                snippets.append(Snippet(known or "", solution))
        if reason := not_unicode(slug):
            yield reason
        elif len(snippets) > 1:
            yield RetrievalExample("", tuple(snippets), slug)
        else:
            yield "fewer than two solutions", slug

    rows = open_dataset_rows(source, [name, code], **options)
    return ExampleReader(rows, exercise, strict).read("parallel solutions", progress)


_SOURCES: dict[str, Callable[..., SourceExamples]] = {
    "pairs": _pairs,
    "triplets": _triplets,
    "functions": _functions,
    "parallel": _parallel,
}


def _not_code(code: Any, description: str = "") -> str | None:
    """Return why `code` can't be used as a snippet, or None if it can."""
    if not isinstance(code, str) or not code.strip():
        return "empty code"
    if description and description_key(code) == description_key(description):
        return "description in place of code"
    return "prose in place of code" if reads_as_prose(code) else not_unicode(code)


_LABELLED_SPLITS, _LABELLED_COLUMNS = ("train", "valid", "test"), ("first", "second", "label")


@dataclass(frozen=True, slots=True)
class LabelledPairs:
    """The labelled pairs of snippets in one split, such as `train`, of a dataset for clone detection."""

    codes: list[str]  # the snippets, each once
    pairs: np.ndarray  # int64 (pairs, 2), indices of `codes`
    labels: np.ndarray  # int64 (pairs,), 1 where both do the same, otherwise 0

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, count: int, seed: int) -> "LabelledPairs":
        """Return `count` pairs, drawn at random, in their original order; all pairs if there are at most `count`."""
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return LabelledPairs(self.codes, self.pairs[chosen], self.labels[chosen])


def read_labelled_pairs(settings: Mapping[str, Any]) -> dict[str, LabelledPairs]:
    """Read the labelled pairs in a recipe's `data`; return {split: pairs} for `train`, `valid` and, if given, `test`.

    `settings` is this `data`: one file for each split, with the columns `first` and `second` (snippets) and `label` (1
    if both do the same, otherwise 0). Or `settings` has the key `bigclonebench`, a folder with CodeXGLUE's files:
    `data.jsonl` has a function per line (`func`, `idx`), and `train.txt`, `valid.txt` and `test.txt` have two `idx` and
    a label per line.
    """
    names, paths = set(settings), all(isinstance(path, str | os.PathLike) and path for path in settings.values())
    if not paths or (names != {"bigclonebench"} and not {"train", "valid"} <= names <= set(_LABELLED_SPLITS)):
        given = ", ".join(f"{name}={path}" for name, path in settings.items())
        message = "`data` must have bigclonebench=FOLDER, or train=FILE, valid=FILE and, if there is one, test=FILE"
        raise UserError("data.pairs.settings", f"{message}; not {given}.")
    if "bigclonebench" not in names:
        files = [(split, settings[split]) for split in _LABELLED_SPLITS if split in names]
        return {split: _labelled_pairs(open_dataset_rows(file, _LABELLED_COLUMNS), file) for split, file in files}
    folder = user_path(settings["bigclonebench"])
    rows = [row for _, row in open_dataset_rows(folder / "data.jsonl", ["func", "idx"]) if isinstance(row, dict)]
    functions = {str(row.get("idx")): row.get("func") for row in rows}
    lists = {split: folder / f"{split}.txt" for split in _LABELLED_SPLITS}
    present = {split: path for split, path in lists.items() if split != "test" or path.is_file()}
    return {split: _labelled_pairs(_lines(path, functions), path) for split, path in present.items()}


def _lines(path: Path, functions: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) like `open_dataset_rows` for each line of a BigCloneBench file; `functions` is {idx: func}."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            parts = line.split()
            first, second, label = parts if len(parts) == 3 else ("", "", "")
            snippets = {"first": functions.get(first), "second": functions.get(second)}
            yield f"{path}, line {number}", snippets | {"label": {"0": 0, "1": 1}.get(label)}


def _labelled_pairs(rows: Rows, source: Source) -> LabelledPairs:
    places: dict[str, int] = {}
    table = []
    for place, row in rows:
        values: list[Any] = [row.get(name) if isinstance(row, dict) else None for name in _LABELLED_COLUMNS]
        *codes, label = values
        are_texts = all(isinstance(code, str) and code.strip() and not not_unicode(code) for code in codes)
        if label not in (0, 1) or not are_texts:
            message = f"{place} must have two snippets of valid Unicode text (in BigCloneBench: two ids of data.jsonl)."
            raise UserError("data.row", f"{message} The label must be 0 or 1.")
        table.append([*(places.setdefault(code, len(places)) for code in codes), int(label)])
    if not table:
        raise UserError("data.source.empty", f"{source} is empty: it must hold pairs of snippets.")
    columns = np.array(table, dtype=np.int64)
    return LabelledPairs(list(places), columns[:, :2], columns[:, 2])
