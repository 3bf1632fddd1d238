import numpy as np


def test_the_margin_is_fitted_on_other_queries_than_it_is_measured_on(script):
    cascade, generator, size = script("cascade"), np.random.default_rng(0), 60

    def near(centres):
        vectors = centres + 0.6 * generator.normal(size=(size, 8))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    documents = {exit_layer: near(np.zeros((size, 8))) for exit_layer in (1, 4)}
    queries = {exit_layer: near(values) for exit_layer, values in documents.items()}
    flops = {exit_layer: exit_layer * 1e9 * np.arange(1, size + 1) for exit_layer in (1, 4)}
    language = cascade.Language("python", queries, documents, flops, flops, np.arange(size) % 2 == 0)
    _, before, margin = cascade.cascaded(language, 1, 4, 10)
    assert margin.queries == size // 2
    asked = np.flatnonzero(language.held_out)
    queries[1][asked] = queries[1][asked][::-1].copy()
    _, after, same = cascade.cascaded(language, 1, 4, 10)
    assert same == margin
    assert (after.reciprocal_ranks != before.reciprocal_ranks).any()
