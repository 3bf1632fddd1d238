import numpy as np
import pytest

from modular_star_encoder.evaluation.distractors import (
    cosine_scores,
    distractor_batches,
    evaluate_scorer,
    evaluate_with_distractors,
)


def random_embeddings(n, size=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, size)).astype(np.float32)


def test_batches_are_disjoint_full_and_drop_the_rest():
    batches = distractor_batches(2500)
    assert [len(batch) for batch in batches] == [1000, 1000]
    assert len(set(np.concatenate(batches))) == 2000


def test_batches_are_codesearchnets_shuffle_and_follow_the_seed():
    np.random.seed(0)
    order = np.arange(1500)
    np.random.shuffle(order)
    assert np.array_equal(distractor_batches(1500)[0], order[:1000])
    assert not np.array_equal(distractor_batches(1500, seed=1)[0], order[:1000])


def test_few_rows_make_one_batch_and_the_scores_say_how_many_distractors_there_were():
    assert sorted(distractor_batches(30)[0]) == list(range(30))
    embeddings = random_embeddings(30)
    scores = evaluate_with_distractors(embeddings, embeddings, progress=False)
    assert (scores.queries, scores.distractors) == (30, 29)


@pytest.mark.parametrize(("n", "size"), [(0, 1000), (1, 1000), (5, 1)])
def test_a_ranking_without_distractors_is_refused(n, size):
    with pytest.raises(ValueError, match="at least 2"):
        distractor_batches(n, size)


def test_equal_embeddings_are_found_and_foreign_ones_are_not():
    embeddings = random_embeddings(300, size=64)
    found = evaluate_with_distractors(embeddings, embeddings, size=100, progress=False)
    assert (found.mrr, found.recall_at_1, found.interval) == (1, 1, (1, 1))
    assert (found.queries, found.distractors) == (300, 99)
    chance = evaluate_with_distractors(embeddings, random_embeddings(300, size=64, seed=1), size=100, progress=False)
    assert chance.mrr < 0.15
    assert chance.interval[0] < chance.mrr < chance.interval[1]


def test_the_length_of_an_embedding_does_not_matter():
    queries, documents = random_embeddings(50), random_embeddings(50, seed=1)
    scaled = documents * np.linspace(0.1, 9, 50, dtype=np.float32)[:, None]
    assert evaluate_with_distractors(queries, documents, progress=False) == evaluate_with_distractors(
        queries, scaled, progress=False
    )


def test_collapsed_embeddings_get_the_worst_figure():
    collapsed = np.repeat(random_embeddings(1, size=97), 333, axis=0)
    scores = evaluate_with_distractors(random_embeddings(333, size=97, seed=1), collapsed, progress=False)
    assert scores.mrr == pytest.approx(1 / 333)
    zeros = np.zeros_like(collapsed)
    assert evaluate_with_distractors(zeros, zeros, progress=False).mrr == pytest.approx(1 / 333)


def test_cosine_scores_do_not_depend_on_the_chunk():
    queries, documents = random_embeddings(70, size=1024), random_embeddings(90, size=1024, seed=1)
    whole = cosine_scores(queries, documents)
    assert whole.dtype == np.float32
    assert np.array_equal(np.concatenate([cosine_scores(queries[i : i + 1], documents) for i in range(70)]), whole)


def test_nan_embeddings_are_refused():
    embeddings = random_embeddings(5)
    embeddings[3, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        evaluate_with_distractors(embeddings, embeddings, progress=False)


def test_embeddings_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 8\) and \(6, 8\)"):
        evaluate_with_distractors(random_embeddings(5), random_embeddings(6), progress=False)


def test_any_scoring_function_can_be_ranked():
    def next_one_scores_higher(rows):  # the relevant candidate always comes second
        return 2.0 * np.eye(len(rows)) + 3.0 * np.roll(np.eye(len(rows)), 1, axis=1)

    scores = evaluate_scorer(next_one_scores_higher, 40, size=10, progress=False)
    assert (scores.mrr, scores.recall_at_1, scores.recall_at_10) == (0.5, 0, 1)
