"""Rows of CodeSearchNet (Husain et al. 2019) as its authors, the Hub and CodeXGLUE write them.

Known flaws. Python's `code` holds the docstring that is the query: with it even BM25 reaches 97 MRR, without it 57 to
59. Published figures for Python are often of that kind; we strip docstrings unless `leaky` is asked for. Documentation
is not a search query: queries are what authors wrote beside the code, and share its words.
"""

from __future__ import annotations

import csv
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pygments.lexers import PythonLexer
from pygments.token import Comment, Punctuation, String

from modular_star_encoder.data.languages.function_finder import find_functions
from modular_star_encoder.data.languages.parsing import UnparsableSourceError
from modular_star_encoder.data.sources.codesearchnet import documentation_summary
from modular_star_encoder.evaluation.benchmarks.rows import (
    Fields,
    check_rows,
    check_size,
    check_unique,
    find_files,
    read_json,
    read_jsonl,
    read_lines,
    read_table,
    refuse,
    require_files,
)
from modular_star_encoder.evaluation.exits import RetrievalRow, pairs_task
from modular_star_encoder.evaluation.tasks import Judgements, Pool, RetrievalTask, full_pool
from modular_star_encoder.inference.encoders import Text
from modular_star_encoder.utils.files import write_json

LANGUAGES = ("go", "java", "javascript", "php", "python", "ruby")

TEST_SIZES = {"go": 14_291, "java": 26_909, "javascript": 6_483, "php": 28_391, "python": 22_176, "ruby": 2_279}
"""Rows of the official test splits."""

HUB_FIELDS: Fields = {
    "language": str,
    "func_code_string": str,
    "func_documentation_string": str,
    "func_code_url": str,
}
ORIGINAL_FIELDS: Fields = {"language": str, "code": str, "docstring": str, "url": str}


def language_patterns(split: str, language: str) -> tuple[str, ...]:
    """Where the files of a split may lie: plain JSON lines, the Hub's Parquet, the authors' archive unpacked."""
    return (
        f"{language}_{split}.jsonl.gz",
        f"{language}_{split}.jsonl",
        f"{language}/{split}-*.parquet",
        f"{language}/final/jsonl/{split}/{language}_{split}_*.jsonl.gz",
        f"final/jsonl/{split}/{language}_{split}_*.jsonl.gz",
    )


def read_functions(paths: list[Path], language: str, *, leaky: bool = False) -> dict[str, RetrievalRow]:
    """{url: documented function} of the files of one language, in order.

    Args:
        leaky: leave the docstring in Python code, as most published figures have it.

    Raises:
        ValueError: a row of another language, without documentation or code, or whose url an earlier one has.
    """
    functions: dict[str, RetrievalRow] = {}
    for path in paths:
        for number, (url, code, documentation) in enumerate(_read(path, language), start=1):
            if not code.strip() or not documentation.strip():
                refuse(path, number, "code and documentation", "an empty one")
            if url in functions:
                refuse(path, number, "a url that no earlier row has", url)
            if language == "python" and not leaky:
                code = strip_docstring(code)
            functions[url] = RetrievalRow(query_of(documentation), code, language)
    return functions


def query_of(documentation: str) -> str:
    """The query of a documentation string: its summary, or all of it where it begins with a tag."""
    return documentation_summary(documentation) or documentation.strip()


def strip_docstring(code: str) -> str:
    """A Python function without its docstring; what doesn't parse is cut by its tokens."""
    try:
        found = find_functions(textwrap.dedent(code).strip("\n"), "python")
    except UnparsableSourceError:
        found = []
    return found[0].code if found and found[0].line == 1 else _without_first_string(code)


def joined_tokens(path: Path, number: int, row: dict[str, Any], *names: str) -> str:
    """The tokens of the first of these fields that a row has, joined by spaces.

    Raises:
        ValueError: none is there, or it isn't a list of strings.
    """
    for name in names:
        if name in row:
            tokens = row[name]
            if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens) and tokens:
                return " ".join(tokens)
            refuse(path, number, f"a list of strings as {name!r}")
    refuse(path, number, f"the field {' or '.join(repr(name) for name in names)}")


def _read(path: Path, language: str) -> Iterator[tuple[str, str, str]]:
    """(url, code, documentation) of each row, by whichever names the file uses."""
    rows = read_table(path, {"language": str})
    fields = HUB_FIELDS if "func_code_string" in rows[0] else ORIGINAL_FIELDS
    for number, row in enumerate(check_rows(path, rows, fields), start=1):
        if row["language"] != language:
            refuse(path, number, f"a row of {language}", row["language"])
        _, code, documentation, url = (row[name] for name in fields)
        yield url, code, documentation


def _without_first_string(code: str) -> str:
    """The code without the string that its body begins with."""
    depth, in_body, passed, pieces = 0, False, False, []
    for kind, text in PythonLexer(stripnl=False, ensurenl=False).get_tokens(code):
        if in_body and not passed and not (kind in TextToken or kind in Comment):
            if kind in String:  # one string is several tokens
                continue
            passed = True
        pieces.append(text)
        if kind in Punctuation:
            depth += sum(text.count(bracket) for bracket in "([{") - sum(text.count(bracket) for bracket in ")]}")
            in_body = in_body or (text.endswith(":") and depth == 0)
    return "".join(pieces)


POOL = 1000


def load_distractors(
    folder: Path,
    *,
    leaky: bool = False,
    candidates: Path | None = None,
    allow_subset: bool = False,
    seed: int = 0,
) -> list[RetrievalTask]:
    """One task for each language whose test file is there.

    Args:
        folder: holds `{language}_test.jsonl.gz`, or the languages' folders of the Hub or of the authors' archives.
        leaky: only Python, with its docstrings in the code, to compare with published figures.
        candidates: folder of the lists that `write_candidates` wrote; rows that they don't name are left out.
        allow_subset: take files with fewer rows than the official split.
        seed: of the shuffle, without lists.

    Raises:
        ValueError: a damaged or partial file, or a list that names a function which isn't there.
        FileNotFoundError: no test file of any language, or no list for one.
    """
    languages = ("python",) if leaky else LANGUAGES
    require_files(folder, [pattern for language in languages for pattern in language_patterns("test", language)])
    tasks = []
    for language in languages:
        if not (paths := find_files(folder, language_patterns("test", language))):
            continue
        rows = read_functions(paths, language, leaky=leaky)
        name = "codesearchnet-999-leaky" if leaky else "codesearchnet-999"
        notes: tuple[str, ...] = ("docstrings are in the code",) if leaky else ()
        if candidates is None:
            size = TEST_SIZES[language]
            notes += check_size(paths[0], len(rows), size, "functions", allow_subset=allow_subset)
        if len(rows) < 2:
            refuse(paths[0], None, "at least two functions", str(len(rows)))
        task = pairs_task(name, language, list(rows.values()), ids=list(rows), size=POOL, seed=seed, notes=notes)
        if candidates is not None:
            task = replace(task, pools=_read_candidates(candidates / f"{language}.json", list(rows)))
        tasks.append(task)
    return tasks


def write_candidates(task: RetrievalTask, folder: Path) -> Path:
    """Write who is ranked against whom, as ids, to `folder/{language}.json`, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}.json"
    pools = [[task.query_ids[row] for row in pool.queries] for pool in task.pools]
    write_json(path, {"benchmark": task.benchmark, "task": task.name, "pools": pools})
    return path


def _read_candidates(path: Path, urls: Sequence[str]) -> tuple[Pool, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no list of candidates {path}.")
    data: Any = read_json(path)
    (data,) = check_rows(path, [data], {"pools": list})
    places = {url: place for place, url in enumerate(urls)}
    pools = []
    for number, pool in enumerate(data["pools"], start=1):
        if not isinstance(pool, list) or len(pool) < 2 or len(set(pool)) < len(pool):
            refuse(path, None, f"at least two different urls in pool {number}")
        if missing := [url for url in pool if url not in places]:
            refuse(path, None, f"urls of functions that the data holds in pool {number}", missing[0])
        rows = np.array([places[url] for url in pool])
        pools.append(Pool(rows, rows))
    return tuple(pools) or refuse(path, None, "at least one pool")


QUERIES = {"go": 8_122, "java": 10_955, "javascript": 3_291, "php": 14_014, "python": 14_918, "ruby": 1_261}
CANDIDATES = {"go": 28_120, "java": 40_347, "javascript": 13_981, "php": 52_660, "python": 43_827, "ruby": 4_360}


def load_full_pool(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """One task for each language whose folder is there.

    Raises:
        ValueError: a damaged or partial file, a url that comes twice, or a query whose code is no candidate.
        FileNotFoundError: no language, or one without its codebase.
    """
    require_files(folder, [f"{language}/test.jsonl*" for language in LANGUAGES])
    present = [language for language in LANGUAGES if find_files(folder, [f"{language}/test.jsonl*"])]
    return [_load_language_full(folder / language, language, allow_subset) for language in present]


def _load_language_full(folder: Path, language: str, allow_subset: bool) -> RetrievalTask:
    (test, *_), (codebase, *_) = (require_files(folder, [f"{name}.jsonl*"]) for name in ("test", "codebase"))
    queries = read_jsonl(test, {"url": str, "docstring_tokens": list})
    candidates = read_jsonl(codebase, {"url": str, "code_tokens": list})
    notes = check_size(test, len(queries), QUERIES[language], "queries", allow_subset=allow_subset)
    notes += check_size(codebase, len(candidates), CANDIDATES[language], "candidates", allow_subset=allow_subset)
    check_unique(test, [row["url"] for row in queries], "url")
    places = check_unique(codebase, [row["url"] for row in candidates], "url")
    relevant = []
    for number, row in enumerate(queries, start=1):
        if row["url"] not in places:
            refuse(test, number, f"a url that {codebase.name} holds", row["url"])
        relevant.append(places[row["url"]])
    return RetrievalTask(
        benchmark="codesearchnet-full",
        name=language,
        queries=[Text(joined_tokens(test, n, row, "docstring_tokens")) for n, row in enumerate(queries, start=1)],
        documents=[
            Text(joined_tokens(codebase, n, row, "code_tokens"), language) for n, row in enumerate(candidates, start=1)
        ],
        query_ids=[row["url"] for row in queries],
        judgements=Judgements.one_each(relevant),
        pools=full_pool(len(queries), len(candidates)),
        metrics=("mrr@1000", "recall@1", "recall@10", "ndcg@10"),
        notes=notes,
    )


ANNOTATIONS = "annotationStore.csv"
ANNOTATION_ROWS = 4_006
COLUMNS = ("Language", "Query", "GitHubUrl", "Relevance")
CODE_FIELDS = ("function", "code", "func_code_string")

Grades = dict[str, dict[str, list[float]]]
"""{query: {url: the annotators' grades}}"""


def load_human(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """One task for each language whose functions are there.

    Args:
        folder: holds `annotationStore.csv` (also under `resources/`) and a folder of JSON lines for each language.

    Raises:
        ValueError: a damaged or partial file, or an annotated function that isn't there.
        FileNotFoundError: no annotations, or no functions.
    """
    (annotations, *_) = require_files(folder, (ANNOTATIONS, f"resources/{ANNOTATIONS}"))
    grades, rows = _read_grades(annotations)
    if rows != ANNOTATION_ROWS and not allow_subset:
        refuse(annotations, None, f"{ANNOTATION_ROWS:,} annotations", f"{rows:,}")
    patterns = [f"{language}/**/*.jsonl*" for language in LANGUAGES]
    require_files(folder, patterns)
    tasks = []
    for language in LANGUAGES:
        if files := sorted(folder.glob(f"{language}/**/*.jsonl*")):
            if language not in grades:
                refuse(annotations, None, f"annotations of {language}")
            tasks.append(_task(annotations, language, grades[language], _read_functions(files), allow_subset))
    return tasks


def _task(path: Path, language: str, grades: Grades, functions: dict[str, str], allow_subset: bool) -> RetrievalTask:
    places = {url: place for place, url in enumerate(functions)}
    annotated = {url for judged in grades.values() for url in judged}
    missing = sorted(annotated - set(functions))
    if missing and not allow_subset:
        refuse(path, None, f"the annotated functions of {language}", f"{len(missing)} missing, such as {missing[0]}")
    gains = [
        {places[url]: sum(given) / len(given) for url, given in judged.items() if url in places}
        for judged in grades.values()
    ]
    return RetrievalTask(
        benchmark="codesearchnet-human",
        name=language,
        queries=[Text(query) for query in grades],
        documents=[Text(code, language) for code in functions.values()],
        query_ids=list(grades),
        judgements=Judgements.of(gains),
        pools=full_pool(len(grades), len(functions)),
        metrics=("ndcg-judged@300", "ndcg-full@300"),
        notes=(f"{len(missing)} of {len(annotated)} annotated functions are missing",) if missing else (),
    )


def _read_grades(path: Path) -> tuple[dict[str, Grades], int]:
    """{language: grades} in lower case, and the number of annotations."""
    grades: dict[str, Grades] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    reader = csv.DictReader(line + "\n" for _, line in read_lines(path))
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        refuse(path, 1, f"the columns {', '.join(COLUMNS)}", f"no {missing[0]}")
    count = 0
    for row in reader:
        count += 1
        grade, url = row["Relevance"] or "", row["GitHubUrl"] or ""
        if grade not in {"0", "1", "2", "3"} or not url or not row["Query"] or not row["Language"]:
            refuse(path, reader.line_num, "a language, a query, a url and a relevance from 0 to 3", repr(grade))
        grades[row["Language"].lower()][row["Query"].lower()][url].append(float(grade))
    return grades, count


def _read_functions(paths: list[Path]) -> dict[str, str]:
    """{url: code}; of the same function in several files, the first."""
    functions: dict[str, str] = {}
    for path in paths:
        for number, row in enumerate(read_jsonl(path, {}), start=1):
            url = row.get("url", row.get("func_code_url"))
            code = next((row[name] for name in CODE_FIELDS if name in row), None)
            if not isinstance(url, str) or not isinstance(code, str) or not code.strip():
                refuse(path, number, "a url and the code of a function as 'function' or 'code'")
            functions.setdefault(url, code)
    return functions


SIZE = 1000


def load_mteb(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """One task for each language whose folders are there.

    Raises:
        ValueError: a damaged or partial file, or a judgement about a query or document that isn't there.
        FileNotFoundError: no language, or one that lacks a folder.
    """
    require_files(folder, [pattern for language in LANGUAGES for pattern in _patterns(language, "corpus")])
    present = [language for language in LANGUAGES if find_files(folder, _patterns(language, "corpus"))]
    return [_load_language_mteb(folder, language, allow_subset) for language in present]


def _patterns(language: str, part: str) -> tuple[str, ...]:
    return (f"{language}-{part}/test-*.parquet", f"{language}-{part}/*.jsonl", f"{language}-{part}/*.jsonl.gz")


def _load_language_mteb(folder: Path, language: str, allow_subset: bool) -> RetrievalTask:
    corpus_path, corpus = _read_mteb(folder, language, "corpus", {"text": str})
    query_path, queries = _read_mteb(folder, language, "queries", {"text": str})
    judged_path, judged = _read_mteb(
        folder, language, "qrels", {"query-id": str, "corpus-id": str, "score": (int, float)}
    )
    documents = check_unique(corpus_path, [_id(corpus_path, n, row) for n, row in enumerate(corpus, 1)], "id")
    asked = check_unique(query_path, [_id(query_path, n, row) for n, row in enumerate(queries, 1)], "id")
    notes = check_size(corpus_path, len(corpus), SIZE, "documents", allow_subset=allow_subset)
    notes += check_size(query_path, len(queries), SIZE, "queries", allow_subset=allow_subset)
    gains: list[dict[int, float]] = [{} for _ in queries]
    for number, row in enumerate(judged, start=1):
        if row["query-id"] not in asked or row["corpus-id"] not in documents:
            refuse(judged_path, number, "ids of a query and a document", f"{row['query-id']} and {row['corpus-id']}")
        gains[asked[row["query-id"]]][documents[row["corpus-id"]]] = float(row["score"])
    for query, place in asked.items():
        if not any(gain > 0 for gain in gains[place].values()):
            refuse(judged_path, None, f"a relevant document for query {query}")
    return RetrievalTask(
        benchmark="codesearchnet-mteb",
        name=language,
        queries=[Text(row["text"]) for row in queries],
        documents=[Text(row["text"], language) for row in corpus],
        query_ids=list(asked),
        judgements=Judgements.of(gains),
        pools=full_pool(len(queries), len(corpus)),
        metrics=("ndcg@10", "mrr", "recall@1", "recall@10"),
        notes=notes,
    )


def _read_mteb(folder: Path, language: str, part: str, fields: Fields) -> tuple[Path, list[dict[str, Any]]]:
    paths = require_files(folder, _patterns(language, part))
    return paths[0], [row for path in paths for row in read_table(path, fields)]


def _id(path: Path, number: int, row: dict[str, Any]) -> str:
    name = row.get("_id", row.get("id"))
    if not isinstance(name, str):
        refuse(path, number, "a string as 'id' or '_id'")
    return name
