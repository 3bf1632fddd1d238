"""Rows of one's own as a retrieval task of mteb (extra `mteb`); nothing is fetched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from modular_star_encoder.evaluation.retrieval_set import RetrievalSet

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


def pairs_task(rows: Iterable[tuple[str, str, str]], name: str) -> AbsTask:
    """A task in which descriptions ask for code, for `run_mteb`.

    Args:
        rows: (description, code, language). Of several with the same description or the same code only the first is
            kept: the others would be wrong answers to it.
        name: of the task, and so of its result files.

    Raises:
        ImportError: mteb is not installed.
        ValueError: fewer than two rows are left.
    """
    try:
        from datasets import Dataset
        from mteb.abstasks import AbsTaskRetrieval
        from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
        from mteb.abstasks.task_metadata import TaskMetadata
    except ImportError as error:
        raise ImportError("mteb is not installed: pip install 'modular-star-encoder[mteb]'.") from error

    kept = RetrievalSet.from_pairs(_without_repetitions(rows))
    digest = hashlib.sha256(json.dumps([kept.queries, kept.documents]).encode()).hexdigest()

    class PairsTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description="Descriptions of code and the code that they describe.",
            dataset={"path": f"local/{name}", "revision": digest[:16]},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="mrr_at_1000",
            modalities=["text"],
        )

        def load_data(self, **_: Any) -> None:
            documents = enumerate(kept.documents)
            data = RetrievalSplitData(
                queries=Dataset.from_list([{"id": f"q{row}", "text": text} for row, text in enumerate(kept.queries)]),
                corpus=Dataset.from_list([{"id": f"d{row}", "text": text, "title": ""} for row, text in documents]),
                relevant_docs={f"q{row}": {f"d{row}": 1} for row in range(len(kept.queries))},
                top_ranked=None,
            )
            self.dataset, self.data_loaded = {"default": {"test": data}}, True

    return PairsTask()


def _without_repetitions(rows: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    seen: tuple[set[str], set[str]] = (set(), set())
    kept = []
    for row in rows:
        if row[0] not in seen[0] and row[1] not in seen[1]:
            kept.append(row)
            seen[0].add(row[0])
            seen[1].add(row[1])
    return kept
