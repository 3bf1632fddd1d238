"""CoSQA: 500 queries of a search engine against 6,267 Python functions; MRR.

Protocol: every function of the code base is a candidate, matched by `retrieval_idx`. CoIR's and MTEB's CosQA is another
set (500 × 20,604, NDCG@10).

Source: Huang et al. 2021, github.com/Jun-jie-Huang/CoCLR, data/search: `code_idx_map.txt` (JSON, code → index) and
`cosqa-retrieval-test-500.json`. Flaws: one function counts as right although others answer the query too; code holds
its docstring, which isn't the query.
"""

from __future__ import annotations

from pathlib import Path

from modular_star_encoder.evaluation.benchmarks.rows import (
    check_rows,
    check_size,
    check_unique,
    read_json,
    refuse,
    require_files,
)
from modular_star_encoder.evaluation.tasks import Judgements, RetrievalTask, Text, full_pool

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
