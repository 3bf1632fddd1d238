"""MTEB's CodeSearchNetRetrieval: 1000 queries against 1000 functions of each language, NDCG@10.

Protocol: the sample that MTEB publishes, exact search by cosine, main figure NDCG@10 (`mrr` is its `mrr_at_1000`:
full). The query is the *whole* documentation, which repeats the names of parameters; the documentation was cut out of
the code where it stands there literally, so little leaks.

Source: huggingface.co/datasets/mteb/CodeSearchNetRetrieval (Enevoldsen et al. 2025): folders `{language}-corpus`,
`{language}-queries` and `{language}-qrels` with Parquet files or JSON lines. To enter MTEB's leaderboard run mteb
itself; this reads the same files into the same tables as the other protocols.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modular_star_encoder.evaluation.benchmarks.codesearchnet import LANGUAGES
from modular_star_encoder.evaluation.benchmarks.rows import (
    Fields,
    check_size,
    check_unique,
    find_files,
    read_table,
    refuse,
    require_files,
)
from modular_star_encoder.evaluation.tasks import Judgements, RetrievalTask, Text, full_pool

SIZE = 1000


def load_mteb(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """One task for each language whose folders are there.

    Raises:
        ValueError: a damaged or partial file, or a judgement about a query or document that isn't there.
        FileNotFoundError: no language, or one that lacks a folder.
    """
    require_files(folder, [pattern for language in LANGUAGES for pattern in _patterns(language, "corpus")])
    present = [language for language in LANGUAGES if find_files(folder, _patterns(language, "corpus"))]
    return [_load_language(folder, language, allow_subset) for language in present]


def _patterns(language: str, part: str) -> tuple[str, ...]:
    return (f"{language}-{part}/test-*.parquet", f"{language}-{part}/*.jsonl", f"{language}-{part}/*.jsonl.gz")


def _load_language(folder: Path, language: str, allow_subset: bool) -> RetrievalTask:
    corpus_path, corpus = _read(folder, language, "corpus", {"text": str})
    query_path, queries = _read(folder, language, "queries", {"text": str})
    judged_path, judged = _read(folder, language, "qrels", {"query-id": str, "corpus-id": str, "score": (int, float)})
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


def _read(folder: Path, language: str, part: str, fields: Fields) -> tuple[Path, list[dict[str, Any]]]:
    paths = require_files(folder, _patterns(language, part))
    return paths[0], [row for path in paths for row in read_table(path, fields)]


def _id(path: Path, number: int, row: dict[str, Any]) -> str:
    name = row.get("_id", row.get("id"))
    if not isinstance(name, str):
        refuse(path, number, "a string as 'id' or '_id'")
    return name
