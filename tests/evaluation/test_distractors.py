import numpy as np
import pytest

from modular_star_encoder.evaluation.scores import CosineScores, cosine_scores
from modular_star_encoder.evaluation.tasks import distractor_batches
from tests.evaluation.test_scores import embeddings


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


def test_few_rows_make_one_batch():
    assert sorted(distractor_batches(30)[0]) == list(range(30))


@pytest.mark.parametrize(("n", "size"), [(0, 1000), (1, 1000), (5, 1)])
def test_a_ranking_without_distractors_is_refused(n, size):
    with pytest.raises(ValueError, match="at least 2"):
        distractor_batches(n, size)


def test_cosine_scores_are_those_of_the_harness_and_do_not_depend_on_the_chunk():
    queries, documents = embeddings(70, 1024), embeddings(90, 1024, seed=1)
    whole = cosine_scores(queries, documents)
    assert whole.dtype == np.float32
    assert np.array_equal(np.concatenate([cosine_scores(queries[i : i + 1], documents) for i in range(70)]), whole)
    assert np.array_equal(next(CosineScores(queries, documents).blocks()).scores, whole)
