"""AdvTest (CodeXGLUE NL-code-search-Adv): Python code whose names are normalised, query → code, MRR.

Protocol: queries are documentation, candidates all code of the test split, tokens joined by spaces; rank = 1 + number
of other candidates that score at least as much.

Source: Lu et al. 2021, github.com/microsoft/CodeXGLUE, Text-Code/NL-code-search-Adv: `test.jsonl` of its preprocess.py
(CodeSearchNet's fields, `function_tokens`, `idx`). Flaws: the same function may stand there twice; builtins, attributes
and strings keep their words.
"""

from __future__ import annotations

from pathlib import Path

from modular_star_encoder.data.functions import collect_functions
from modular_star_encoder.data.sources.repositories import folder_repositories
from modular_star_encoder.evaluation.benchmarks.codesearchnet import joined_tokens
from modular_star_encoder.evaluation.benchmarks.rows import (
    check_rows,
    check_size,
    check_unique,
    read_json,
    read_jsonl,
    refuse,
    require_files,
)
from modular_star_encoder.evaluation.exits import RetrievalRow, pairs_task
from modular_star_encoder.evaluation.tasks import Judgements, RetrievalTask, full_pool
from modular_star_encoder.inference.encoders import Text

SIZE = 19_210


def load_advtest(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """The one task.

    Raises:
        ValueError: a damaged or partial file, or an idx that comes twice.
        FileNotFoundError: there is no `test.jsonl`.
    """
    (path, *_) = require_files(folder, ("test.jsonl", "test.jsonl.gz"))
    rows = read_jsonl(path, {"idx": (int, str), "url": str, "docstring_tokens": list})
    check_unique(path, [row["idx"] for row in rows], "idx")
    notes = check_size(path, len(rows), SIZE, "rows", allow_subset=allow_subset)
    codes = [joined_tokens(path, n, row, "function_tokens", "code_tokens") for n, row in enumerate(rows, start=1)]
    return [
        RetrievalTask(
            benchmark="advtest",
            name="test",
            queries=[Text(joined_tokens(path, n, row, "docstring_tokens")) for n, row in enumerate(rows, start=1)],
            documents=[Text(code, "python") for code in codes],
            query_ids=[str(row["idx"]) for row in rows],
            judgements=Judgements.one_each(range(len(rows))),
            pools=full_pool(len(rows), len(rows)),
            notes=notes,
        )
    ]


QUERIES = 500
CODES = 6_267


def load_cosqa(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """The one task.

    Raises:
        ValueError: a damaged or partial file, or a query whose code isn't in the code base.
        FileNotFoundError: one of the two files is missing.
    """
    (base, *_), (test, *_) = (
        require_files(folder, [name]) for name in ("code_idx_map.txt", "cosqa-retrieval-test-500.json")
    )
    codes = read_json(base)
    if not isinstance(codes, dict) or not codes or not all(isinstance(number, int) for number in codes.values()):
        refuse(base, 1, "an object from code to whole numbers")
    places = check_unique(base, list(codes.values()), "index")
    rows = check_rows(test, read_json(test), {"idx": str, "doc": str, "retrieval_idx": int})
    notes = check_size(base, len(codes), CODES, "codes", allow_subset=allow_subset)
    notes += check_size(test, len(rows), QUERIES, "queries", allow_subset=allow_subset)
    for number, row in enumerate(rows, start=1):
        if row["retrieval_idx"] not in places:
            refuse(test, number, f"a retrieval_idx that {base.name} holds", str(row["retrieval_idx"]))
    return [
        RetrievalTask(
            benchmark="cosqa",
            name="test",
            queries=[Text(row["doc"]) for row in rows],
            documents=[Text(code, "python") for code in codes],
            query_ids=[row["idx"] for row in rows],
            judgements=Judgements.one_each([places[row["retrieval_idx"]] for row in rows]),
            pools=full_pool(len(rows), len(codes)),
            notes=notes,
        )
    ]


POOL = 1000


def read_code_folder(folder: str | Path) -> list[RetrievalRow]:
    """The pairs of a folder.

    Raises:
        ValueError: there is no such folder, or fewer than two documented functions in it.
    """
    functions = collect_functions(folder_repositories(folder)).functions
    if len(functions) < 2:
        raise ValueError(
            f"{folder} holds {len(functions)} documented functions that pass the filters: too few to rank."
        )
    return [RetrievalRow(function.description, function.code, function.language) for function in functions]


def load_code_folder(folder: Path, *, seed: int = 0) -> list[RetrievalTask]:
    """The one task."""
    rows = read_code_folder(folder)
    notes = (f"only {len(rows)} documented functions, so fewer than 999 distractors",) if len(rows) < POOL else ()
    return [pairs_task("folder", "all", rows, size=POOL, seed=seed, notes=notes)]
