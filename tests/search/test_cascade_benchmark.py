"""The arithmetic of benchmarks/cascade.py, on random embeddings."""

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZE = 60


@pytest.fixture
def cascade(monkeypatch):
    """The module; afterwards it and the modules of its folder leave `sys.modules`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    import cascade

    yield cascade
    for name in {"cascade", "cascade_figure", "report"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def language(cascade):
    generator = np.random.default_rng(0)

    def near(centres):
        vectors = centres + 0.6 * generator.normal(size=(SIZE, 8))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    documents = {exit_layer: near(np.zeros((SIZE, 8))) for exit_layer in (1, 4)}
    queries = {exit_layer: near(values) for exit_layer, values in documents.items()}
    flops = {exit_layer: exit_layer * 1e9 * np.arange(1, SIZE + 1) for exit_layer in (1, 4)}
    return cascade.Language("python", queries, documents, flops, flops, np.arange(SIZE) % 2 == 0)


def test_a_cascade_over_all_documents_is_the_deep_exit_alone_and_costs_their_embedding(cascade, language):
    always, _, _ = cascade.cascaded(language, 1, 4, SIZE)
    np.testing.assert_allclose(always.reciprocal_ranks, cascade.alone(language, 4).reciprocal_ranks)
    question = 4 * (1 + np.flatnonzero(language.held_out))
    documents = np.arange(1, SIZE + 1).sum()
    np.testing.assert_allclose(always.query_gflop, question + 4 * documents)


def test_the_margin_is_fitted_on_other_queries_than_it_is_measured_on(cascade, language):
    _, before, margin = cascade.cascaded(language, 1, 4, 10)
    assert margin.queries == SIZE // 2
    asked = np.flatnonzero(language.held_out)
    language.queries[1][asked] = language.queries[1][asked][::-1].copy()
    _, after, same = cascade.cascaded(language, 1, 4, 10)
    assert same == margin
    assert (after.reciprocal_ranks != before.reciprocal_ranks).any()
