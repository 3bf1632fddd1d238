"""Ranking metrics and F1 for Hugging Face's `evaluate` library, computed by the same code as in `mose evaluate`.

ndcg = evaluate.load(evaluate_metric.__file__, "ndcg")  # or RetrievalMetric("ndcg"); needs no network
ndcg.compute(predictions=[[0.9, 0.3, 0.5]], references=[[1, 0, 0]], k=10)  # {"ndcg@10": 1.0}
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import datasets
import evaluate
import numpy as np

from modular_star_encoder.evaluation.metrics import f1, outcomes, query_values, rank_judged
from modular_star_encoder.evaluation.retrievers import RowScores
from modular_star_encoder.evaluation.tasks import Judgements
from modular_star_encoder.utils.errors import UserError

NAMES = ("mrr", "recall", "ndcg", "map_at_r", "f1")

_DESCRIPTION = "Retrieval metrics and F1 of class 1. If scores are equal, irrelevant candidates are ranked first."
_INPUTS = """
Args:
    predictions: one list per query with the scores of its candidates, float32. For f1: one decision, 0 or 1, per pair.
    references: one list per query with 1 for a relevant candidate and 0 for any other. For f1: one label per pair.
    k: recall, ndcg and mrr look only at the first k candidates; by default 10 for recall and ndcg, all for mrr.
Returns:
    {name of the metric: its mean over the queries, a fraction between 0 and 1}.
"""


class RetrievalMetric(evaluate.Metric):
    """A metric for Hugging Face's `evaluate`: mrr, recall, ndcg, map_at_r or f1, such as `RetrievalMetric("ndcg")`."""

    def _info(self) -> evaluate.MetricInfo:
        if (name := self.config_name) not in NAMES:
            raise UserError("evaluation.metric.unknown", f"Unknown metric {name!r}. Available: {', '.join(NAMES)}.")
        score, label = datasets.Value("float32"), datasets.Value("int64")
        kinds = {"predictions": datasets.Sequence(score), "references": datasets.Sequence(label)}
        if name == "f1":
            kinds = dict.fromkeys(kinds, datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(kinds)
        )

    def _compute(self, predictions: Any, references: Any, k: int | None = None) -> dict[str, float]:
        if self.config_name == "f1":
            return {"f1": float(f1(np.bincount(outcomes(np.array(predictions), np.array(references)), minlength=4)))}
        name = {"mrr": "mrr" if k is None else f"mrr@{k}", "map_at_r": "map@r"}.get(self.config_name)
        name = name or f"{self.config_name}@{10 if k is None else k}"
        return {name: float(np.nanmean(query_values(_rank(predictions, references), name)))}


def _rank(scores: Sequence[Sequence[float]], relevant: Sequence[Sequence[int]]) -> Any:
    lengths = [len(one) for one in scores]
    if lengths != [len(one) for one in relevant] or not set(chain.from_iterable(relevant)) <= {0, 1}:
        raise UserError("evaluation.references", "Each score needs a reference: 1 if the document is relevant, else 0.")
    padded = np.full((len(scores), max(lengths)), -np.inf, dtype=np.float32)
    for row, one in zip(padded, scores, strict=True):
        row[: len(one)] = one
    return rank_judged(
        RowScores(padded.shape, lambda start, end: padded[start:end]),
        Judgements.of([np.flatnonzero(one).tolist() for one in relevant]),
    )
