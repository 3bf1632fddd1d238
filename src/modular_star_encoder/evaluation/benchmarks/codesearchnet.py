"""Load CodeSearchNet (Husain et al. 2019) as tasks: with 999 distractors, or with all functions as candidates.

The files of the authors, of the Hub and of CodeXGLUE can be read. The data has two known flaws. First, Python code
contains the docstring that is the query: BM25 has an MRR × 100 of 97 with the docstring, and 57 to 59 without it. Many
published values for Python are measured with docstrings; this module keeps docstrings only if `leaky` is set. Second,
documentation is not a search query: developers write documentation next to the code, and both share words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import AliasChoices
from pydantic import Field as Constraint
from pygments.lexers import PythonLexer
from pygments.token import Comment, Punctuation, String
from pygments.token import Text as TextToken

from modular_star_encoder.data.functions import collect_functions, documentation_summary, without_docstring
from modular_star_encoder.data.sources.repositories import folder_repositories
from modular_star_encoder.evaluation.benchmarks import rows as files
from modular_star_encoder.evaluation.benchmarks.rows import FileRow, Filled, Tokens
from modular_star_encoder.evaluation.tasks import POOL, Judgements, RetrievalRow, Task, pairs_task, ranking_task
from modular_star_encoder.inference.encoders import Text

LANGUAGES = ("go", "java", "javascript", "php", "python", "ruby")

# Number of rows in each official test split, and of queries and candidates in CodeXGLUE's filtered version.
TEST_SIZES = {"go": 14_291, "java": 26_909, "javascript": 6_483, "php": 28_391, "python": 22_176, "ruby": 2_279}
QUERIES = {"go": 8_122, "java": 10_955, "javascript": 3_291, "php": 14_014, "python": 14_918, "ruby": 1_261}
CANDIDATES = {"go": 28_120, "java": 40_347, "javascript": 13_981, "php": 52_660, "python": 43_827, "ruby": 4_360}


class _Function(FileRow):
    language: str
    code: Filled = Constraint(validation_alias=AliasChoices("func_code_string", "code"))
    documentation: Filled = Constraint(validation_alias=AliasChoices("func_documentation_string", "docstring"))
    url: str = Constraint(validation_alias=AliasChoices("func_code_url", "url"))


class _Query(FileRow):
    url: str
    docstring_tokens: Tokens


class _Candidate(FileRow):
    url: str
    code_tokens: Tokens


def _languages(folder: Path, patterns: Sequence[str], languages: Sequence[str] = LANGUAGES) -> list[str]:
    """Return the languages with files in `folder`; if none, FileNotFoundError. `{0}` in a pattern is the language."""
    names = {language: [pattern.format(language) for pattern in patterns] for language in languages}
    files.require_files(folder, [pattern for of_language in names.values() for pattern in of_language])
    return [language for language, of_language in names.items() if files.find_files(folder, of_language)]


def load_with_candidates(folder: Path, *, leaky: bool = False, allow_subset: bool = False) -> Sequence[Task]:
    """Load a task for each language with a test file in `folder`; if `leaky`, only Python, and keep its docstrings."""
    name, tasks = f"codesearchnet-999{'-leaky' * leaky}", []
    for language in _languages(folder, language_patterns("test", "{0}"), ("python",) if leaky else LANGUAGES):
        paths = files.find_files(folder, language_patterns("test", language))
        rows = read_functions(paths, language, leaky=leaky)
        notes = files.check_size(paths[0], len(rows), TEST_SIZES[language], "functions", allow_subset=allow_subset)
        notes += ("docstrings are in the code",) if leaky else ()
        tasks.append(pairs_task(name, language, rows.values(), ids=list(rows), size=POOL, notes=notes))
    return tasks


def language_patterns(split: str, language: str) -> tuple[str, ...]:
    """Return glob patterns of a split's files as JSON lines, as Parquet (Hub), and in the authors' unpacked archive."""
    return (
        f"{language}_{split}.jsonl.gz",
        f"{language}_{split}.jsonl",
        f"{language}/{split}-*.parquet",
        f"{language}/final/jsonl/{split}/{language}_{split}_*.jsonl.gz",
        f"final/jsonl/{split}/{language}_{split}_*.jsonl.gz",
    )


def read_functions(paths: list[Path], language: str, *, leaky: bool = False) -> dict[str, RetrievalRow]:
    """Return {url: documented function} in the order of the files; if `leaky`, Python code keeps its docstrings."""
    functions: dict[str, RetrievalRow] = {}
    for path in paths:
        for number, row in enumerate(files.read_table(path, _Function), start=1):
            if row.language != language:
                files.refuse(path, number, f"a row of {language}", row.language)
            if row.url in functions:
                files.refuse(path, number, "a url that no earlier row has", row.url)
            code = strip_docstring(row.code) if language == "python" and not leaky else row.code
            functions[row.url] = RetrievalRow(query_of(row.documentation), code, language)
    return functions


def query_of(documentation: str) -> str:
    """Return the query for a function: the summary of its documentation, or all of it if there is no summary."""
    return documentation_summary(documentation) or documentation.strip()


def strip_docstring(code: str) -> str:
    """Return the code of a Python function without its docstring, even if the code does not parse."""
    if (stripped := without_docstring(code)) is not None:
        return stripped
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


def load_full_pool(folder: Path, *, allow_subset: bool = False) -> Sequence[Task]:
    """Load CodeXGLUE's filtered CodeSearchNet: one task per language, in which all functions are candidates."""
    tasks = []
    for language in _languages(folder, ["{0}/test.jsonl*"]):
        test, codebase = (files.require_files(folder / language, [f"{one}.jsonl*"])[0] for one in ("test", "codebase"))
        queries, candidates = files.read_jsonl(test, _Query), files.read_jsonl(codebase, _Candidate)
        notes = files.check_size(test, len(queries), QUERIES[language], "queries", allow_subset=allow_subset)
        notes += files.check_size(
            codebase, len(candidates), CANDIDATES[language], "candidates", allow_subset=allow_subset
        )
        urls = list(files.check_unique(test, [row.url for row in queries], "url"))
        places = files.check_unique(codebase, [row.url for row in candidates], "url")
        for number, url in enumerate(urls, start=1):
            if url not in places:
                files.refuse(test, number, f"a url that is in {codebase.name}", url)
        texts = [Text(" ".join(row.docstring_tokens)) for row in queries]
        codes = [Text(" ".join(row.code_tokens), language) for row in candidates]
        judgements = Judgements.one_each([places[url] for url in urls])
        options: dict[str, Any] = {"metrics": ("mrr@1000", "recall@1", "recall@10", "ndcg@10"), "notes": notes}
        tasks.append(ranking_task("codesearchnet-full", language, texts, codes, urls, judgements, **options))
    return tasks


def load_code_folder(folder: Path) -> Sequence[Task]:
    """Build a task from the documented functions in a folder of code; each query has up to 1000 random candidates."""
    functions, _ = collect_functions(folder_repositories(folder))
    if len(functions) < 2:
        files.refuse(folder, None, "2 or more documented functions that pass the filters", str(len(functions)))
    rows = [RetrievalRow(function.description, function.code, function.language) for function in functions]
    notes = (f"only {len(rows)} documented functions, so fewer than 999 distractors",) if len(rows) < POOL else ()
    return [pairs_task("folder", "all", rows, notes=notes)]
