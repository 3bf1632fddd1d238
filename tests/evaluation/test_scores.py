import tracemalloc

import numpy as np
import pytest

from modular_star_encoder.evaluation import retrievers
from modular_star_encoder.evaluation.lexical import BM25, TfIdf
from modular_star_encoder.evaluation.metrics import query_values, rank_judged
from modular_star_encoder.evaluation.retrievers import CosineScores, ExitVariant, similarities
from modular_star_encoder.evaluation.tasks import Judgements
from modular_star_encoder.inference.encoders import Text
from tests.errors import raises
from tests.evaluation import brute_force


def embeddings(n, size=24, seed=0):
    return np.random.default_rng(seed).normal(size=(n, size)).astype(np.float32)


def judgements(queries, documents, per_query=3, seed=0):
    generator = np.random.default_rng(seed)
    return Judgements.of([generator.choice(documents, per_query, replace=False).tolist() for _ in range(queries)])


def small_blocks(monkeypatch, block, wide):
    monkeypatch.setattr(retrievers, "BLOCK", block)
    monkeypatch.setattr(retrievers, "HELD", wide * 24)  # components of an embedding


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("metric", ["mrr", "recall@5", "ndcg@10", "map@r"])
def test_ranks_are_those_of_a_brute_force_ranking(metric, tied):
    queries, documents = embeddings(30, 6), embeddings(80, 6, seed=1)
    if tied:
        documents = documents[np.arange(80) % 7]
    judged = judgements(30, 80)
    values = query_values(rank_judged(CosineScores(queries, documents), judged), metric)
    gains = np.zeros((30, 80))
    gains[judged.query, judged.document] = 1
    rows = zip(brute_force.cosines(queries, documents), gains, strict=True)
    expected = [brute_force.METRICS[metric](*row) for row in rows]
    assert values == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize(("block", "wide"), [(1, 10**6), (64, 10**6), (256, 40), (1, 8), (10**6, 60)])
def test_ranks_do_not_depend_on_the_size_of_a_block(monkeypatch, block, wide, exclude_self):
    documents = embeddings(90)
    documents[40:60] = documents[5]  # twenty that tie
    scores, judged = CosineScores(documents, documents), Judgements.one_each([(i + 1) % 90 for i in range(90)])
    whole = rank_judged(scores, judged, exclude_self=exclude_self)
    small_blocks(monkeypatch, block, wide)
    assert sum(1 for _ in scores.blocks()) > 1
    assert np.array_equal(rank_judged(scores, judged, exclude_self=exclude_self).rank, whole.rank)


def test_scores_do_not_depend_on_how_the_library_adds_up():
    """Similarities half-way between two float32 numbers, where the last bit of a sum decides."""
    generator = np.random.default_rng(0)
    halfway = 0.5 + (2 * np.arange(200) + 1) * 2.0**-25
    documents = np.zeros((200, 100))
    documents[:, 0], documents[:, 1] = halfway, np.sqrt(1 - halfway**2)
    queries = np.eye(3, 100)

    class Clumsy(np.ndarray):
        def __matmul__(self, other):
            return np.asarray(self) @ np.asarray(other) + generator.uniform(-1, 1, size=(3, 200)) * 1e-14

    expected = np.stack([[(query * document).sum() for document in documents] for query in queries]).astype(np.float32)
    for _ in range(3):
        assert np.array_equal(similarities(queries.view(Clumsy), documents), expected)


def test_scores_of_pairs_are_those_of_blocks_bit_for_bit():
    queries, documents = embeddings(20, 64), embeddings(30, 64, seed=1)
    texts = [[Text(f"read file{i % 7} {kind} alpha{i}") for i in range(n)] for kind, n in (("a", 20), ("b", 30))]
    first, second = (grid.ravel() for grid in np.meshgrid(np.arange(20), np.arange(30), indexing="ij"))
    lexical = [system.scores(*texts, ExitVariant()) for system in (BM25(), TfIdf())]
    for scores in (CosineScores(queries, documents), *lexical):
        whole = np.concatenate([block.scores for block in scores.blocks()])
        shuffle = np.random.default_rng(0).permutation(len(first))
        assert np.array_equal(scores.of_pairs(first[shuffle], second[shuffle]), whole.ravel()[shuffle])
        assert whole.dtype == np.float32
        assert whole.std() > 0


def test_a_text_is_not_a_candidate_of_itself():
    vectors = embeddings(40)
    alike = (np.arange(40) % 4 == np.arange(40)[:, None] % 4) & ~np.eye(40, dtype=bool)
    judged = Judgements(*np.nonzero(alike))
    values = query_values(rank_judged(CosineScores(vectors, vectors), judged, exclude_self=True), "map@r")
    others = [np.delete(row, i) for i, row in enumerate(brute_force.cosines(vectors, vectors))]
    gains = [np.delete(row, i) for i, row in enumerate(alike)]
    assert values == pytest.approx([brute_force.map_at_r(*row) for row in zip(others, gains, strict=True)])


def test_the_length_of_a_vector_does_not_matter_and_zeros_are_similar_to_nothing():
    queries, documents = embeddings(30), embeddings(30, seed=1)
    judged = Judgements.one_each(range(30))
    ranks = rank_judged(CosineScores(queries, documents), judged).rank
    scaled = documents * np.float32(2.0) ** np.arange(-15, 15)[:, None].astype(np.float32)
    assert np.array_equal(rank_judged(CosineScores(queries, scaled), judged).rank, ranks)
    assert (rank_judged(CosineScores(queries * 0, documents), judged).rank == 30).all()


@pytest.mark.parametrize("dimensions", [None, 5])
def test_similarities_are_rounded_from_the_exact_ones_of_embeddings_that_may_be_cut(dimensions):
    queries, documents = embeddings(60, 100), embeddings(60, 100, seed=1)
    (block,) = CosineScores(queries, documents, dimensions=dimensions).blocks()
    assert block.scores.tolist() == brute_force.cosines(queries[:, :dimensions], documents[:, :dimensions])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_an_error(value):
    queries, documents = embeddings(5), embeddings(5, seed=1)
    documents[3, 0] = value
    with raises("evaluation.scores.nan"):
        rank_judged(CosineScores(queries, documents), Judgements.one_each(range(5)))


def test_the_matrix_of_all_scores_is_never_in_memory():
    queries, documents = embeddings(6000, 4), embeddings(6000, 4, seed=1)
    tracemalloc.start()
    for block in CosineScores(queries, documents).blocks():
        del block
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.9 * 8 * 6000 * 6000
