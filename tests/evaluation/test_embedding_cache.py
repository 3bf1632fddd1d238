import multiprocessing

import numpy as np
import pytest

from modular_star_encoder.evaluation.retrievers import EmbeddingCache
from tests.errors import raises

TEXTS = [("", "alpha"), ("", "beta"), ("query: ", "alpha"), ("", "query: alpha")]


def embeddings(texts, size=8):
    return np.random.default_rng(len(texts)).normal(size=(len(texts), size)).astype(np.float32)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_added_comes_back_in_any_order_and_from_several_shards(tmp_path, on_disk):
    cache, values = EmbeddingCache(tmp_path if on_disk else None), embeddings(TEXTS)
    cache.add("m/full", TEXTS[:2], values[:2])
    assert cache.missing("m/full", TEXTS) == TEXTS[2:]
    cache.add("m/full", TEXTS[2:], values[2:])
    assert cache.missing("m/full", TEXTS) == []
    rows = cache.rows("m/full", [TEXTS[i] for i in (3, 0, 3, 1)])
    assert len(rows) == 4
    assert np.array_equal(rows[:], values[[3, 0, 3, 1]])
    assert np.array_equal(rows[np.array([2, 1])], values[[3, 0]])
    assert np.array_equal(rows[1:3], values[[0, 3]])
    if on_disk:  # another process finds them, mapped and not read
        again = EmbeddingCache(tmp_path).rows("m/full", TEXTS)
        assert np.array_equal(again[:], values)
        assert all(isinstance(shard, np.memmap) for shard in again.shards)
    assert cache.missing("m/exit-9", TEXTS) == TEXTS


def test_damaged_shards_and_pickles_are_an_error_by_name(tmp_path):
    EmbeddingCache(tmp_path).add("m", TEXTS, embeddings(TEXTS))
    (path,) = tmp_path.glob("m/*.npy")
    damages = [b"", path.read_bytes()[:100], path.read_bytes()[:-1], b"\x80\x04N."]
    for other in (np.array([{"a": 1}], dtype=object), np.ones((4, 8), dtype=np.float32)):
        np.save(path, other, allow_pickle=True)
        damages.append(path.read_bytes())
    for damage in damages:
        path.write_bytes(damage)
        with raises("evaluation.cache.damaged", path):
            EmbeddingCache(tmp_path).missing("m", TEXTS)


def test_wrong_embeddings_are_an_error_and_not_stored(tmp_path):
    cache = EmbeddingCache(tmp_path)
    cache.add("m", [("", "first")], np.ones((1, 8)))
    for values in (np.ones((3, 8)), np.ones(4), np.ones((4, 5))):
        with raises("evaluation.embeddings.shape"):
            cache.add("m", TEXTS, values)
    with raises("evaluation.embeddings.not_finite"):
        cache.add("m", TEXTS, np.full((4, 8), np.nan))
    assert EmbeddingCache(tmp_path).missing("m", TEXTS) == TEXTS


def _fill(folder):
    cache = EmbeddingCache(folder)
    for start in range(0, 60, 5):
        texts = [("", f"text {i}") for i in range(start, start + 5)]
        cache.add("m", texts, np.array([[i] for i in range(start, start + 5)]))


def test_processes_that_write_the_same_at_once_leave_a_whole_cache(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as workers:
        workers.map(_fill, [tmp_path] * 4, chunksize=1)
    texts = [("", f"text {i}") for i in range(60)]
    assert EmbeddingCache(tmp_path).rows("m", texts)[:].ravel().tolist() == list(range(60))
    assert not list(tmp_path.rglob("*.tmp"))
