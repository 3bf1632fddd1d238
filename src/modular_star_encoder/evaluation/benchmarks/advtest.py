"""AdvTest (CodeXGLUE NL-code-search-Adv): Python code whose names are normalised, query → code, MRR.

Protocol: queries are documentation, candidates all code of the test split, tokens joined by spaces; rank = 1 + number
of other candidates that score at least as much.

Source: Lu et al. 2021, github.com/microsoft/CodeXGLUE, Text-Code/NL-code-search-Adv: `test.jsonl` of its preprocess.py
(CodeSearchNet's fields, `function_tokens`, `idx`). Flaws: the same function may stand there twice; builtins, attributes
and strings keep their words.
"""

from __future__ import annotations

from pathlib import Path

from modular_star_encoder.evaluation.benchmarks.codesearchnet import joined_tokens
from modular_star_encoder.evaluation.benchmarks.rows import check_size, check_unique, read_jsonl, require_files
from modular_star_encoder.evaluation.tasks import Judgements, RetrievalTask, Text, full_pool

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
