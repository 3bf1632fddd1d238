"""Load CodeSearchNet (Husain et al. 2019) as tasks, by four protocols; the first also serves for a folder of code.

Files of the authors, the Hub, CodeXGLUE and MTEB are read. The data has two known flaws. First, Python's `code` holds
the docstring that is the query: BM25 reaches 97 MRR with the docstring, and 57 to 59 without it. Published values for
Python often include it; this module strips docstrings unless `leaky`. Second, documentation is not a search query:
developers write it next to the code, and it shares words with the code.
"""

from __future__ import annotations

import csv
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pygments.lexers import PythonLexer
from pygments.token import Comment, Punctuation, String
from pygments.token import Text as TextToken

from modular_star_encoder.data.functions import collect_functions, documentation_summary
from modular_star_encoder.data.languages.function_finder import find_functions
from modular_star_encoder.data.languages.parsing import UnparsableSourceError
from modular_star_encoder.data.sources.repositories import folder_repositories
from modular_star_encoder.evaluation.benchmarks.rows import (
    Fields,
    check_rows,
    check_size,
    check_unique,
    find_files,
    joined_tokens,
    read_json,
    read_jsonl,
    read_lines,
    read_table,
    refuse,
    require_files,
)
from modular_star_encoder.evaluation.tasks import (
    POOL,
    Judgements,
    Pool,
    RetrievalRow,
    RetrievalTask,
    pairs_task,
    ranking_task,
)
from modular_star_encoder.inference.encoders import Text
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import write_json

LANGUAGES = ("go", "java", "javascript", "php", "python", "ruby")

# Number of rows of each official test split; of queries and of candidates in CodeXGLUE's filtered version.
TEST_SIZES = {"go": 14_291, "java": 26_909, "javascript": 6_483, "php": 28_391, "python": 22_176, "ruby": 2_279}
QUERIES = {"go": 8_122, "java": 10_955, "javascript": 3_291, "php": 14_014, "python": 14_918, "ruby": 1_261}
CANDIDATES = {"go": 28_120, "java": 40_347, "javascript": 13_981, "php": 52_660, "python": 43_827, "ruby": 4_360}
MTEB_SIZE = 1000  # number of queries, and of documents, of each language
ANNOTATIONS, ANNOTATION_ROWS = "annotationStore.csv", 4_006

Grades = dict[str, dict[str, list[float]]]  # {query: {url of a function: relevance grades of the annotators}}


def _languages(folder: Path, patterns: Sequence[str], languages: Sequence[str] = LANGUAGES) -> list[str]:
    """Return the languages that have files in `folder`, at least one; `{0}` in a pattern stands for the language."""
    files = {language: [pattern.format(language) for pattern in patterns] for language in languages}
    require_files(folder, [pattern for of_language in files.values() for pattern in of_language])
    return [language for language, of_language in files.items() if find_files(folder, of_language)]


def load_with_candidates(
    folder: Path, *, leaky: bool = False, candidates: Path | None = None, allow_subset: bool = False
) -> list[RetrievalTask]:
    """Load a CodeSearchNet task for each language with a test file; each query has 1000 random candidates.

    Args:
        folder: contains `{language}_test.jsonl.gz`, or a folder per language from the Hub or the authors' archives.
        leaky: load only Python, with the docstrings in the code, to compare with published values.
        candidates: folder that `write_candidates` wrote: reuse its candidates, and leave out rows without any.
        allow_subset: accept files with fewer rows than the official split.
    """
    name, tasks = "codesearchnet-999-leaky" if leaky else "codesearchnet-999", []
    for language in _languages(folder, language_patterns("test", "{0}"), ("python",) if leaky else LANGUAGES):
        paths = find_files(folder, language_patterns("test", language))
        rows = read_functions(paths, language, leaky=leaky)
        notes: tuple[str, ...] = ("docstrings are in the code",) if leaky else ()
        if candidates is None:
            notes += check_size(paths[0], len(rows), TEST_SIZES[language], "functions", allow_subset=allow_subset)
        task = pairs_task(name, language, rows.values(), ids=list(rows), size=POOL, notes=notes)
        if candidates is not None:
            task = replace(task, pools=_read_candidates(candidates / f"{language}.json", list(rows)))
        tasks.append(task)
    return tasks


def language_patterns(split: str, language: str) -> tuple[str, ...]:
    """Return patterns for the files of a split: JSON lines, the Hub's Parquet, or the authors' unpacked archive."""
    return (
        f"{language}_{split}.jsonl.gz",
        f"{language}_{split}.jsonl",
        f"{language}/{split}-*.parquet",
        f"{language}/final/jsonl/{split}/{language}_{split}_*.jsonl.gz",
        f"final/jsonl/{split}/{language}_{split}_*.jsonl.gz",
    )


def read_functions(paths: list[Path], language: str, *, leaky: bool = False) -> dict[str, RetrievalRow]:
    """Read the documented functions of one language: {url: function}, in the order of the files.

    `leaky` leaves the docstring in Python code, as most published evaluations do.
    """
    functions: dict[str, RetrievalRow] = {}
    for path in paths:
        rows = read_table(path, {"language": str})
        fields = ("func_code_string", "func_documentation_string", "func_code_url")
        if "func_code_string" not in rows[0]:
            fields = ("code", "docstring", "url")
        for number, row in enumerate(check_rows(path, rows, dict.fromkeys(fields, str)), start=1):
            code, documentation, url = (row[name] for name in fields)
            if row["language"] != language:
                refuse(path, number, f"a row of {language}", row["language"])
            if not code.strip() or not documentation.strip():
                refuse(path, number, "code and documentation", "an empty field")
            if url in functions:
                refuse(path, number, "a url that no earlier row has", url)
            if language == "python" and not leaky:
                code = strip_docstring(code)
            functions[url] = RetrievalRow(query_of(documentation), code, language)
    return functions


def query_of(documentation: str) -> str:
    """Return the query for a function: the summary of its documentation, or all of it if there is no summary."""
    return documentation_summary(documentation) or documentation.strip()


def strip_docstring(code: str) -> str:
    """Remove the docstring from the code of a Python function, even from code that does not parse."""
    try:
        found = find_functions(textwrap.dedent(code).strip("\n"), "python")
    except UnparsableSourceError:
        found = []
    if found and found[0].line == 1:
        return found[0].code
    depth, in_body, passed, pieces = 0, False, False, []
    for kind, text in PythonLexer(stripnl=False, ensurenl=False).get_tokens(code):
        if in_body and not passed and not (kind in TextToken or kind in Comment):
            if kind in String:  # the lexer splits one string into several tokens
                continue
            passed = True
        pieces.append(text)
        if kind in Punctuation:
            depth += sum(text.count(bracket) for bracket in "([{") - sum(text.count(bracket) for bracket in ")]}")
            in_body = in_body or (text.endswith(":") and depth == 0)
    return "".join(pieces)


def write_candidates(task: RetrievalTask, folder: Path) -> None:
    """Write lists of query ids to `{task name}.json`, one per pool: the queries in a list share their candidates."""
    folder.mkdir(parents=True, exist_ok=True)
    pools = [[task.query_ids[row] for row in pool.queries] for pool in task.pools]
    write_json(folder / f"{task.name}.json", {"benchmark": task.benchmark, "task": task.name, "pools": pools})


def _read_candidates(path: Path, urls: Sequence[str]) -> tuple[Pool, ...]:
    """Read the pools of candidates in a file that `write_candidates` wrote, as row numbers in `urls`."""
    (data,) = check_rows(path, [read_json(path)], {"pools": list})
    places = {url: place for place, url in enumerate(urls)}
    pools = []
    for number, pool in enumerate(data["pools"], start=1):
        if not isinstance(pool, list) or len(pool) < 2 or len(set(pool)) < len(pool):
            refuse(path, None, f"two or more urls, all different, in pool {number}")
        if missing := [url for url in pool if url not in places]:
            refuse(path, None, f"only urls of loaded functions in pool {number}", missing[0])
        rows = np.array([places[url] for url in pool])
        pools.append(Pool(rows, rows))
    return tuple(pools) or refuse(path, None, "at least one pool")


def load_full_pool(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """Load CodeXGLUE's filtered CodeSearchNet: one task per language; candidates are all functions of the language."""
    tasks = []
    for language in _languages(folder, ["{0}/test.jsonl*"]):
        test, codebase = (require_files(folder / language, [f"{one}.jsonl*"])[0] for one in ("test", "codebase"))
        queries = read_jsonl(test, {"url": str, "docstring_tokens": list})
        candidates = read_jsonl(codebase, {"url": str, "code_tokens": list})
        notes = check_size(test, len(queries), QUERIES[language], "queries", allow_subset=allow_subset)
        notes += check_size(codebase, len(candidates), CANDIDATES[language], "candidates", allow_subset=allow_subset)
        urls = list(check_unique(test, [row["url"] for row in queries], "url"))
        places = check_unique(codebase, [row["url"] for row in candidates], "url")
        for number, url in enumerate(urls, start=1):
            if url not in places:
                refuse(test, number, f"a url that is in {codebase.name}", url)
        texts = [Text(text) for text in joined_tokens(test, queries, "docstring_tokens")]
        codes = [Text(text, language) for text in joined_tokens(codebase, candidates, "code_tokens")]
        judgements = Judgements.one_each([places[url] for url in urls])
        options: dict[str, Any] = {"metrics": ("mrr@1000", "recall@1", "recall@10", "ndcg@10"), "notes": notes}
        tasks.append(ranking_task("codesearchnet-full", language, texts, codes, urls, judgements, **options))
    return tasks


def load_human(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """Load CodeSearchNet's queries with human judgements: one task for each language with functions in the folder.

    The folder holds `annotationStore.csv` (or has it in `resources/`), and for each language a folder of JSON lines.
    """
    (annotations, *_) = require_files(folder, (ANNOTATIONS, f"resources/{ANNOTATIONS}"))
    grades, count = _read_grades(annotations)
    if count != ANNOTATION_ROWS and not allow_subset:
        refuse(annotations, None, f"{ANNOTATION_ROWS:,} annotations", f"{count:,}")
    tasks = []
    for language in _languages(folder, ["{0}/**/*.jsonl*"]):
        if language not in grades:
            refuse(annotations, None, f"annotations of {language} code")
        functions = _read_code(sorted(folder.glob(f"{language}/**/*.jsonl*")))
        places = {url: place for place, url in enumerate(functions)}
        annotated = {url for judged in grades[language].values() for url in judged}
        missing = sorted(annotated - set(functions))
        if missing and not allow_subset:
            expected = f"the annotated functions of {language}"
            refuse(annotations, None, expected, f"{len(missing)} missing, such as {missing[0]}")
        gains = [
            {places[url]: sum(given) / len(given) for url, given in judged.items() if url in places}
            for judged in grades[language].values()
        ]
        queries = [Text(query) for query in grades[language]]
        codes = [Text(code, language) for code in functions.values()]
        notes = (f"{len(missing)} of {len(annotated)} annotated functions are missing",) if missing else ()
        options: dict[str, Any] = {"metrics": ("ndcg-judged@300", "ndcg-full@300"), "notes": notes}
        ids, judgements = list(grades[language]), Judgements.of(gains)
        tasks.append(ranking_task("codesearchnet-human", language, queries, codes, ids, judgements, **options))
    return tasks


def _read_grades(path: Path) -> tuple[dict[str, Grades], int]:
    """Read and count human judgements; return ({language: grades}, count), with languages and queries in lower case."""
    grades: dict[str, Grades] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    reader = csv.DictReader(line + "\n" for _, line in read_lines(path))
    columns = ("Language", "Query", "GitHubUrl", "Relevance")
    if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        refuse(path, 1, f"the columns {', '.join(columns)}", f"no {missing[0]}")
    count = 0
    for row in reader:
        count += 1
        grade, url = row["Relevance"] or "", row["GitHubUrl"] or ""
        if grade not in {"0", "1", "2", "3"} or not url or not row["Query"] or not row["Language"]:
            refuse(path, reader.line_num, "a language, a query, a url and a relevance from 0 to 3", repr(grade))
        grades[row["Language"].lower()][row["Query"].lower()][url].append(float(grade))
    return grades, count


def _read_code(paths: list[Path]) -> dict[str, str]:
    """Read the functions of JSON lines files: {url: code}; of rows with the same url, the first is kept."""
    functions: dict[str, str] = {}
    for path in paths:
        for number, row in enumerate(read_jsonl(path, {}), start=1):
            url = row.get("url", row.get("func_code_url"))
            code = next((row[name] for name in ("function", "code", "func_code_string") if name in row), None)
            if not isinstance(url, str) or not isinstance(code, str) or not code.strip():
                refuse(path, number, "a url and the code of a function in the field 'function' or 'code'")
            functions.setdefault(url, code)
    return functions


def load_mteb(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """Load MTEB's samples of CodeSearchNet: for each language in the folder, a task of 1000 queries and documents."""
    tasks = []
    for language in _languages(folder, _mteb_patterns("{0}", "corpus")):
        documents, document_ids, notes = _read_mteb(folder, language, "corpus", "documents", allow_subset)
        queries, query_ids, more_notes = _read_mteb(folder, language, "queries", "queries", allow_subset)
        paths = require_files(folder, _mteb_patterns(language, "qrels"))
        fields: Fields = {"query-id": str, "corpus-id": str, "score": (int, float)}
        gains: list[dict[int, float]] = [{} for _ in queries]
        for number, row in enumerate((row for path in paths for row in read_table(path, fields)), start=1):
            query, document = row["query-id"], row["corpus-id"]
            if query not in query_ids or document not in document_ids:
                refuse(paths[0], number, "ids of known texts", f"{query} and {document}")
            gains[query_ids[query]][document_ids[document]] = float(row["score"])
        for query, place in query_ids.items():
            if not any(gain > 0 for gain in gains[place].values()):
                refuse(paths[0], None, f"a relevant document for the query {query}")
        asked, codes = [Text(text) for text in queries], [Text(text, language) for text in documents]
        options: dict[str, Any] = {"metrics": ("ndcg@10", "mrr", "recall@1", "recall@10"), "notes": notes + more_notes}
        ids, judgements = list(query_ids), Judgements.of(gains)
        tasks.append(ranking_task("codesearchnet-mteb", language, asked, codes, ids, judgements, **options))
    return tasks


def _mteb_patterns(language: str, part: str) -> tuple[str, ...]:
    return (f"{language}-{part}/test-*.parquet", f"{language}-{part}/*.jsonl", f"{language}-{part}/*.jsonl.gz")


def _read_mteb(
    folder: Path, language: str, part: str, what: str, allow_subset: bool
) -> tuple[list[str], dict[str, int], tuple[str, ...]]:
    """Read queries or documents: return the texts, {id: index of its text}, and a note if some are missing."""
    paths = require_files(folder, _mteb_patterns(language, part))
    rows = [row for path in paths for row in read_table(path, {"text": str})]
    ids = [row.get("_id", row.get("id")) for row in rows]
    for number, name in enumerate(ids, start=1):
        if not isinstance(name, str):
            refuse(paths[0], number, "a string as 'id' or '_id'")
    notes = check_size(paths[0], len(rows), MTEB_SIZE, what, allow_subset=allow_subset)
    return [row["text"] for row in rows], check_unique(paths[0], ids, "id"), notes


def load_code_folder(folder: Path) -> list[RetrievalTask]:
    """Build a task from the documented functions in a folder of code; each query has up to 1000 random candidates."""
    functions, _ = collect_functions(folder_repositories(folder))
    if len(functions) < 2:
        message = f"{folder} holds {len(functions)} documented functions that pass the filters; a task needs 2 or more."
        raise UserError("benchmark.folder.too_few", message)
    rows = [RetrievalRow(function.description, function.code, function.language) for function in functions]
    notes = (f"only {len(rows)} documented functions, so fewer than 999 distractors",) if len(rows) < POOL else ()
    return [pairs_task("folder", "all", rows, notes=notes)]
