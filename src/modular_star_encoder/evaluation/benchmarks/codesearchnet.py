"""Rows of CodeSearchNet (Husain et al. 2019) as its authors, the Hub and CodeXGLUE write them.

Known flaws. Python's `code` holds the docstring that is the query: with it even BM25 reaches 97 MRR, without it 57 to
59. Published figures for Python are often of that kind; we strip docstrings unless `leaky` is asked for. Documentation
is not a search query: queries are what authors wrote beside the code, and share its words.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pygments.lexers import PythonLexer
from pygments.token import Comment, Punctuation, String, Text

from modular_star_encoder.data.codesearchnet import documentation_summary
from modular_star_encoder.data.function_finder import find_functions
from modular_star_encoder.data.grammars import UnparsableSourceError
from modular_star_encoder.evaluation.benchmarks.rows import Fields, check_rows, read_table, refuse
from modular_star_encoder.evaluation.exits import RetrievalRow

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
        if in_body and not passed and not (kind in Text or kind in Comment):
            if kind in String:  # one string is several tokens
                continue
            passed = True
        pieces.append(text)
        if kind in Punctuation:
            depth += sum(text.count(bracket) for bracket in "([{") - sum(text.count(bracket) for bracket in ")]}")
            in_body = in_body or (text.endswith(":") and depth == 0)
    return "".join(pieces)
