"""Compute ranking metrics and F1 as metrics of Hugging Face's `evaluate`, by the same code as `mose evaluate`.

ndcg = evaluate.load(evaluate_metric.__file__, "ndcg")  # needs no network; or RetrievalMetric("ndcg")
ndcg.compute(predictions=[[0.9, 0.3, 0.5]], references=[[1, 0, 0]], k=10)  # {"ndcg@10": 1.0}
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from modular_star_encoder.evaluation.metrics import f1, outcomes, query_values, rank_scores
from modular_star_encoder.utils.errors import UserError

NAMES = ("mrr", "recall", "ndcg", "map_at_r", "f1")

_DESCRIPTION = "Retrieval metrics that rank the less relevant of candidates with equal scores first; F1 of class 1."
_INPUTS = """
Args:
    predictions: one list per query with the scores of its candidates, float32; for f1 one decision, 0 or 1, per pair.
    references: one list per query with the gains of its candidates, 0 if irrelevant; for f1 one label per pair.
    k: recall, ndcg and mrr look at the first k candidates only; by default 10 for recall and ndcg, all for mrr.
Returns:
    {name of the metric: its mean over the queries, a fraction between 0 and 1}.
"""


class RetrievalMetric(evaluate.Metric):
    """A metric for Hugging Face's `evaluate`, chosen by a name in `NAMES`: `RetrievalMetric("ndcg")`."""

    def _info(self) -> evaluate.MetricInfo:
        if (name := self.config_name) not in NAMES:
            raise UserError("evaluation.metric.unknown", f"Unknown metric {name!r}. Available: {', '.join(NAMES)}.")
        score, gain = datasets.Value("float32"), datasets.Value("float64")
        kinds = {"predictions": datasets.Sequence(score), "references": datasets.Sequence(gain)}
        if name == "f1":
            kinds = dict.fromkeys(kinds, datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(kinds)
        )

    def _compute(self, predictions: Any, references: Any, k: int | None = None) -> dict[str, float]:
        if self.config_name == "f1":
            return {"f1": float(f1(np.bincount(outcomes(predictions, references), minlength=4)))}
        name = {"mrr": "mrr" if k is None else f"mrr@{k}", "map_at_r": "map@r"}.get(self.config_name)
        name = name or f"{self.config_name}@{10 if k is None else k}"
        return {name: float(np.nanmean(query_values(rank_scores(predictions, references), name)))}
