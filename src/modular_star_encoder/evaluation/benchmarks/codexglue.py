"""Load CodeXGLUE's retrieval and clone benchmarks (github.com/microsoft/CodeXGLUE), CoSQA and Exercism.

AdvTest's functions have normalised names; builtins, attributes and strings keep their words. A function may occur
twice. Exercism (github.com/exercism, MIT) has exercises solved in many languages, as JSON lines with `slug`,
`description` and `code` ({language: solution}). A query has only 71 to 146 candidates, and solutions share the names
that the exercise prescribes; the benchmarks called "names masked" remove this hint.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AliasChoices
from pydantic import Field as Constraint
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Name, String

from modular_star_encoder.evaluation.benchmarks import rows as files
from modular_star_encoder.evaluation.benchmarks.rows import FileRow, Filled, Tokens
from modular_star_encoder.evaluation.tasks import Judgements, PairTask, RetrievalTask, ranking_task
from modular_star_encoder.inference.encoders import Text
from modular_star_encoder.utils.errors import UserError

ADVTEST_ROWS = 19_210
COSQA_QUERIES, COSQA_CODES = 500, 6_267
TRANSLATION_LINES = 1_000
POJ_PROGRAMS = 24 * 500
BIGCLONEBENCH_PAIRS = 415_416

PROMPT_NAMES = {"cpp": "c++", "csharp": "c#"}  # {Exercism's name of a language: its name in prompts}, if they differ
DESCRIPTION = "text"

_WORD = re.compile(r"[^\W\d]\w*")
_KEPT = (Name.Builtin, Name.Entity, Name.Tag)
_DIRECTIVES = re.compile(
    r"define|undef|include|ifn?def|if|elif|else|endif|pragma|once|error|warning|line|defined|import|(end)?region"
    r"|nullable|enable|disable|restore|php"
)
_OWN_OBJECT = ("this", "self")  # PHP's lexer does not distinguish $this from other variables


class _AdvTestRow(FileRow):
    idx: int | str
    docstring_tokens: Tokens
    function_tokens: Tokens = Constraint(validation_alias=AliasChoices("function_tokens", "code_tokens"))


class _WebQuery(FileRow):
    idx: str
    doc: str
    retrieval_idx: int


class _Program(FileRow):
    label: str = Constraint(pattern=r"^(8[1-9]|9\d|10[0-4])$")  # the problem: 81 to 104 in the test split
    index: str
    code: str


class _JavaFunction(FileRow):
    func: str
    idx: str | int


class _Exercise(FileRow):
    slug: str
    description: str
    code: dict[str, Filled]


def load_advtest(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """Load AdvTest: one task to find functions by documentation. The authors' preprocess.py makes test.jsonl."""
    (path, *_) = files.require_files(folder, ("test.jsonl", "test.jsonl.gz"))
    rows = files.read_jsonl(path, _AdvTestRow)
    ids = files.check_unique(path, [row.idx for row in rows], "idx")
    notes = files.check_size(path, len(rows), ADVTEST_ROWS, "rows", allow_subset=allow_subset)
    queries = [Text(" ".join(row.docstring_tokens)) for row in rows]
    documents = [Text(" ".join(row.function_tokens), "python") for row in rows]
    return [ranking_task("advtest", "test", queries, documents, [str(name) for name in ids], notes=notes)]


def load_cosqa(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """Load CoSQA: one task to find Python functions that answer a query from web search."""
    base, test = (
        files.require_files(folder, [name])[0] for name in ("code_idx_map.txt", "cosqa-retrieval-test-500.json")
    )
    codes = files.read_json(base, Annotated[dict[str, int], Constraint(min_length=1)])
    places = files.check_unique(base, list(codes.values()), "index")
    rows = files.read_json(test, Annotated[list[_WebQuery], Constraint(min_length=1)])
    notes = files.check_size(base, len(codes), COSQA_CODES, "codes", allow_subset=allow_subset)
    notes += files.check_size(test, len(rows), COSQA_QUERIES, "queries", allow_subset=allow_subset)
    for number, row in enumerate(rows, start=1):
        if row.retrieval_idx not in places:
            files.refuse(test, number, f"a retrieval_idx that is in {base.name}", str(row.retrieval_idx))
    queries, documents = [Text(row.doc) for row in rows], [Text(code, "python") for code in codes]
    judgements = Judgements.one_each([places[row.retrieval_idx] for row in rows])
    return [ranking_task("cosqa", "test", queries, documents, [row.idx for row in rows], judgements, notes=notes)]


def load_translation(folder: Path, *, masked: bool = False, allow_subset: bool = False) -> list[RetrievalTask]:
    """Load two tasks: find the C# version of a Java method, and vice versa. `masked` hides names in the code."""
    (first, *_), (second, *_) = (
        files.require_files(folder, [f"test.java-cs.txt.{ending}"]) for ending in ("java", "cs")
    )
    texts = {name: _read_translation(path, name, masked) for name, path in (("java", first), ("c#", second))}
    size = len(texts["java"])
    notes = files.check_size(first, size, TRANSLATION_LINES, "lines", allow_subset=allow_subset)
    if size != len(texts["c#"]):
        files.refuse(second, None, f"{size:,} lines, as in {first.name}", f"{len(texts['c#']):,}")
    name, ids = "translation-masked" if masked else "translation", [f"line {number}" for number in range(1, size + 1)]
    return [
        ranking_task(name, f"{source} → {target}", texts[source], texts[target], ids, notes=notes)
        for source, target in (("java", "c#"), ("c#", "java"))
    ]


def _read_translation(path: Path, language: str, masked: bool) -> list[Text]:
    texts = []
    for number, line in files.read_lines(path):
        if not line.strip():
            files.refuse(path, number, "a function", "an empty line")
        texts.append(_code(line, language, masked))
    return texts or files.refuse(path, 1, "a function", "an empty file")


def _code(code: str, language: str, masked: bool) -> Text:
    return Text(mask_names(code, language) if masked else code, language)


def load_poj104(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """Load POJ-104: one task to find, for each program, the other programs that solve the same problem."""
    (path,) = files.require_files(folder, ("test.jsonl",))
    rows = files.read_jsonl(path, _Program)
    names, labels = (
        list(files.check_unique(path, [row.index for row in rows], "index")),
        [int(row.label) for row in rows],
    )
    notes = files.check_size(path, len(labels), POJ_PROGRAMS, "programs", allow_subset=allow_subset)
    is_relevant = np.equal.outer(labels, labels)  # every other program for the same problem
    np.fill_diagonal(is_relevant, False)
    judgements = Judgements(*np.nonzero(is_relevant))
    texts = [Text(row.code, "c++") for row in rows]
    options: dict[str, Any] = {"metrics": ("map@r", "mrr", "recall@10"), "exclude_self": True, "notes": notes}
    return [ranking_task("poj104", "test", texts, texts, names, judgements, **options)]


def load_bigclonebench(folder: Path, *, allow_subset: bool = False) -> list[PairTask]:
    """Load BigCloneBench: one task to decide which pairs of Java functions are clones."""
    functions, valid, test = (
        files.require_files(folder, [name])[0] for name in ("data.jsonl", "valid.txt", "test.txt")
    )
    rows = files.read_jsonl(functions, _JavaFunction)
    places = files.check_unique(functions, [str(row.idx) for row in rows], "idx")
    valid_pairs, valid_labels, notes = _read_bigclonebench(valid, places, allow_subset)
    pairs, labels, more_notes = _read_bigclonebench(test, places, allow_subset)
    texts = [Text(row.func, "java") for row in rows]
    notes = ("threshold chosen on the validation pairs", *notes, *more_notes)
    return [PairTask("bigclonebench", "test", texts, valid_pairs, valid_labels, pairs, labels, notes=notes)]


def _read_bigclonebench(
    path: Path, places: dict[str, int], allow_subset: bool
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return (P pairs of row numbers, P labels, notes on missing pairs); a repeated pair keeps only its last label."""
    labels, number = dict[tuple[int, int], int](), 0
    for number, line in files.read_lines(path):
        parts = line.split()
        if len(parts) != 3 or parts[2] not in ("0", "1"):
            files.refuse(path, number, "two ids and a label 0 or 1", repr(line[:40]))
        if missing := [name for name in parts[:2] if name not in places]:
            files.refuse(path, number, "ids that are in data.jsonl", missing[0])
        labels[places[parts[0]], places[parts[1]]] = int(parts[2])
    notes = files.check_size(path, number, BIGCLONEBENCH_PAIRS, "pairs", allow_subset=allow_subset)
    return np.array(list(labels)), np.array(list(labels.values())), notes


def load_exercism(folder: Path, *, from_code: bool = False, masked: bool = False) -> list[RetrievalTask]:
    """Load Exercism: for each language, a task to find the solution of an exercise by its description.

    With `from_code`, the query is the solution in another language. Exercises that lack one of the two are left out.
    """
    (path, *_) = files.require_files(folder, ("exercises.jsonl.gz", "exercises.jsonl"))
    exercises = _read_exercism(path, masked)
    languages = sorted({language for texts in exercises.values() for language in texts} - {DESCRIPTION})
    sources = languages if from_code else [DESCRIPTION]
    benchmark = f"exercism-{'code' if from_code else 'text'}{'-masked' if masked else ''}"
    tasks = []
    for source, target in [(source, target) for target in languages for source in sources if source != target]:
        shared = [slug for slug, texts in exercises.items() if source in texts and target in texts]
        if len(shared) > 1:
            queries, documents = ([exercises[slug][side] for slug in shared] for side in (source, target))
            name = f"{source} → {target}"
            tasks.append(ranking_task(benchmark, name, queries, documents, shared, column=f"→ {target}"))
    return tasks or files.refuse(path, None, "two or more exercises with a query and an answer in the same languages")


def _read_exercism(path: Path, masked: bool) -> dict[str, dict[str, Text]]:
    """Read {slug of an exercise: {language or `DESCRIPTION`: text}}; if `masked`, `_code` masks the code's names."""
    rows = files.read_jsonl(path, _Exercise)
    files.check_unique(path, [row.slug for row in rows], "slug")
    exercises: dict[str, dict[str, Text]] = {}
    for row in rows:
        texts = {name: _code(code, PROMPT_NAMES.get(name, name), masked) for name, code in row.code.items()}
        exercises[row.slug] = {DESCRIPTION: Text(row.description)} | texts
    return exercises


@lru_cache(maxsize=1 << 14)
def mask_names(code: str, language: str) -> str:
    """Return `code` with its names replaced by `name1`, `name2`, …, without comments, docstrings and blank lines."""
    names: dict[str, str] = {}

    def placeholder(match: re.Match[str]) -> str:
        return match[0] if match[0] in _OWN_OBJECT else names.setdefault(match[0], f"name{len(names) + 1}")

    pieces = []
    for kind, text in _lexer(language).get_tokens(code):
        if kind in Comment.PreprocFile and not text.startswith("<"):
            pieces.append(_WORD.sub(placeholder, text))
        elif kind in Comment.Preproc:
            pieces.append(_WORD.sub(lambda m: m[0] if _DIRECTIVES.fullmatch(m[0]) else placeholder(m), text))
        elif kind in Comment.PreprocFile or (kind not in Comment and kind not in String.Doc):
            is_name = kind in String.Symbol or (kind in Name and not any(kind in kept for kept in _KEPT))
            pieces.append(_WORD.sub(placeholder, text) if is_name else text)
    lines = [line.rstrip() for line in "".join(pieces).split("\n")]
    return "\n".join(line for line in lines if line)


@lru_cache
def _lexer(language: str) -> Lexer:
    options = {"startinline": True} if language == "php" else {}
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False, **options)
    except ValueError:
        raise UserError("benchmark.masking.language", f"Pygments has no lexer for {language!r}: use another.") from None
