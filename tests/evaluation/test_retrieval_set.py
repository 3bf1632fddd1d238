"""Ranks and metrics against a literal reading of their definitions."""

import math

import numpy as np
import pytest

from modular_star_encoder.evaluation.exits import RetrievalSet, mean_metrics, relevant_ranks
from tests.evaluation.samples import reciprocal_ranks_among_distractors

PAIRS = [(f"text {i}", f"code {i}", "python") for i in range(12)]


def literal_metrics(scores, relevant, k):
    """Sort so that wrong documents come first among equals, then read off the definitions."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place in relevant))
    hits = [rank for rank, place in enumerate(order, start=1) if place in relevant]
    gain = sum(1 / math.log2(rank + 1) for rank in hits if rank <= 10)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(10, len(relevant)) + 1))
    return 1 / hits[0], gain / ideal, sum(rank <= k for rank in hits) / len(hits)


@pytest.mark.parametrize("levels", [3, 10_000], ids=["many ties", "few ties"])
def test_metrics_agree_with_a_literal_scorer(levels):
    generator = np.random.default_rng(0)
    expected, ranks = [], []
    for _ in range(200):
        scores = generator.integers(levels, size=30).astype(np.float32)
        relevant = generator.choice(30, size=generator.integers(1, 13), replace=False)
        expected.append(literal_metrics(scores.tolist(), set(relevant.tolist()), 5))
        ranks.append(relevant_ranks(scores, relevant))
    found = mean_metrics(ranks, (5,))
    assert list(found) == ["mrr", "ndcg_at_10", "recall_at_5"]
    np.testing.assert_allclose(list(found.values()), np.mean(expected, axis=0), rtol=0, atol=1e-9)


def test_pairs_among_distractors_score_as_in_the_codesearchnet_protocol():
    generator = np.random.default_rng(0)
    queries, documents = generator.normal(size=(2, 12, 4)).astype(np.float32)
    documents[3:7] = documents[3]
    expected = reciprocal_ranks_among_distractors(queries, documents, size=5, seed=3)
    found = RetrievalSet.from_pairs(PAIRS).score(queries, documents, distractors=4, seed=3, recall_at=(1, 10))
    assert found["mrr"] == pytest.approx(expected.mean(), abs=1e-12)
    assert (found["recall_at_1"], found["recall_at_10"]) == (np.mean(expected == 1), 1)


def test_the_full_pool_is_the_same_in_chunks(monkeypatch):
    generator = np.random.default_rng(0)
    queries, documents = generator.normal(size=(2, 12, 4)).astype(np.float32)
    retrieval_set = RetrievalSet.from_pairs(PAIRS)
    whole = retrieval_set.score(queries, documents, distractors=None, seed=0, recall_at=(1,))
    monkeypatch.setattr("modular_star_encoder.evaluation.exits.SCORES_PER_CHUNK", 30)
    assert retrieval_set.score(queries, documents, distractors=None, seed=0, recall_at=(1,)) == whole
    assert 0 < whole["mrr"] < 1


def test_queries_without_an_answer_are_left_out_and_spare_documents_stay_in_the_pool():
    retrieval_set = RetrievalSet.from_mappings(
        {"q1": "one", "q2": "two"}, {"a": "A", "b": "B", "c": "C"}, {"q1": {"c", "a"}}, "ruby"
    )
    assert (retrieval_set.queries, retrieval_set.documents) == (("one",), ("A", "B", "C"))
    assert [places.tolist() for places in retrieval_set.relevant] == [[0, 2]]
    assert retrieval_set.languages == ("ruby",) * 3
    assert not retrieval_set.is_paired
    assert RetrievalSet.from_pairs(PAIRS).is_paired


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RetrievalSet.from_pairs(PAIRS[:1]), "at least two pairs, not 1"),
        (lambda: RetrievalSet.from_mappings({"q": ""}, {"a": "", "b": ""}, {"q": ["x"]}), "such as 'x'"),
        (lambda: RetrievalSet.from_mappings({"q": ""}, {"a": "", "b": ""}, {}), "not 0 and 2"),
        (lambda: RetrievalSet.from_mappings({"q": ""}, {"a": ""}, {"q": ["a"]}), "not 1 and 1"),
    ],
)
def test_what_cannot_be_ranked_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_embeddings_that_are_nan_are_refused():
    embeddings = np.full((12, 4), np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="hold NaN"):
        RetrievalSet.from_pairs(PAIRS).score(embeddings, embeddings, distractors=None, seed=0, recall_at=(1,))
