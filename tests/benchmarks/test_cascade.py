import numpy as np
import pytest

from benchmarks.margins import fit_threshold, threshold_curve
from tests.errors import raises

SIZE = 60


@pytest.fixture
def cascade(script):
    return script("cascade")


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


@pytest.fixture
def queries():
    """Margins with ties; the deep exit helps where the margin is small, and harms a little where it is large."""
    generator = np.random.default_rng(0)
    margins = generator.integers(0, 40, 300) / 100
    shallow = generator.random(300)
    deep = np.clip(shallow + 0.5 * (0.2 - margins), 0, 1)
    return margins, shallow, deep


def quality(margins, shallow, deep, threshold):
    return np.where(margins < threshold, deep, shallow).mean()


def test_the_curve_is_what_each_threshold_gives(queries):
    margins, shallow, deep = queries
    thresholds, shares, qualities = threshold_curve(*queries)
    for threshold, share, value in zip(thresholds, shares, qualities, strict=True):
        assert share == pytest.approx((margins < threshold).mean())
        assert value == pytest.approx(quality(margins, shallow, deep, threshold))
    assert (shares[0], shares[-1]) == (0, 1)
    assert qualities[[0, -1]] == pytest.approx([shallow.mean(), deep.mean()])


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.05])
def test_the_fitted_margin_has_the_fewest_deep_passes_that_keep_the_quality(queries, tolerance):
    margins, shallow, deep = queries
    fitted = fit_threshold(*queries, tolerance=tolerance)
    assert fitted.quality == pytest.approx(quality(margins, shallow, deep, fitted.margin))
    assert fitted.quality >= deep.mean() - tolerance - 1e-9
    fewer = [t for t in np.linspace(0, 1, 1001) if (margins < t).mean() < fitted.share]
    assert all(quality(margins, shallow, deep, t) < deep.mean() - tolerance for t in fewer)
    assert fitted.queries == 300


def test_a_deep_exit_runs_never_if_it_does_not_help_and_always_if_it_always_helps():
    fitted = fit_threshold([0.1, 0.2], [1.0, 1.0], [0.5, 1.0])
    assert (fitted.margin, fitted.share, fitted.quality) == (0.0, 0.0, 1.0)
    assert fit_threshold([0.1, 0.2], [0.0, 0.0], [1.0, 1.0], tolerance=0.0).share == 1


def test_bad_input_is_refused():
    with raises("search.margin.values"):
        fit_threshold([], [], [])
    with raises("search.margin.values"):
        threshold_curve([0.1], [1.0], [])
    with raises("search.margin.tolerance", -1):
        fit_threshold([0.1], [1.0], [1.0], tolerance=-1)
