import tracemalloc

import numpy as np
import pytest

from modular_star_encoder.data.in_context import InContextPairs
from modular_star_encoder.evaluation import lexical, retrievers
from modular_star_encoder.evaluation.lexical import BM25, TfIdf, identifier_overlap
from modular_star_encoder.evaluation.metrics import query_values, rank_judged
from modular_star_encoder.evaluation.retrievers import CosineScores, EmbeddingCache, ExitVariant, similarities
from modular_star_encoder.evaluation.tasks import Judgements
from modular_star_encoder.inference.encoders import Text
from tests.data.samples import corpus_of
from tests.errors import raises
from tests.evaluation import brute_force
from tests.processes import start_process


def embeddings(n, size=24, seed=0):
    return np.random.default_rng(seed).normal(size=(n, size)).astype(np.float32)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize(("block", "wide"), [(1, 10**6), (64, 10**6), (256, 40), (1, 8), (10**6, 60)])
def test_ranks_do_not_depend_on_the_size_of_a_block(monkeypatch, block, wide, exclude_self):
    documents = embeddings(90)
    documents[40:60] = documents[5]  # twenty that tie
    scores, judged = CosineScores(documents, documents), Judgements.one_each([(i + 1) % 90 for i in range(90)])
    whole = rank_judged(scores, judged, exclude_self=exclude_self)
    monkeypatch.setattr(retrievers, "BLOCK", block)
    monkeypatch.setattr(retrievers, "HELD", wide * 24)  # components of an embedding
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


@pytest.mark.parametrize("dimensions", [None, 5])
def test_similarities_are_rounded_from_the_exact_ones_of_embeddings_that_may_be_cut(dimensions):
    queries, documents = embeddings(60, 100), embeddings(60, 100, seed=1)
    documents *= np.float32(2.0) ** np.arange(-30, 30, dtype=np.float32)[:, None]
    (block,) = CosineScores(queries, documents, dimensions=dimensions).blocks()
    assert block.scores.tolist() == brute_force.cosines(queries[:, :dimensions], documents[:, :dimensions])
    zeros = rank_judged(CosineScores(queries * 0, documents), Judgements.one_each(range(60)))
    assert (zeros.rank == 60).all()  # similar to nothing


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


TEXTS = [("", "alpha"), ("", "beta"), ("query: ", "alpha"), ("", "query: alpha")]


@pytest.mark.parametrize(("on_disk", "dtype"), [(False, "float32"), (True, "float32"), (True, "float16")])
def test_what_was_added_comes_back_in_any_order_and_from_several_shards(tmp_path, on_disk, dtype):
    cache, values = EmbeddingCache(tmp_path if on_disk else None, dtype), embeddings(len(TEXTS), 8).astype(dtype)
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
        assert all(isinstance(shard, np.memmap) and shard.dtype == dtype for shard in again.shards)
    assert cache.missing("m/exit-9", TEXTS) == TEXTS


def test_the_texts_of_a_damaged_shard_or_a_pickle_are_embedded_again_into_the_same_file(tmp_path):
    cache = EmbeddingCache(tmp_path)
    cache.add("m", TEXTS[:1], embeddings(1, 8))
    cache.add("m", TEXTS[1:], embeddings(3, 8))
    path = next(path for path in tmp_path.glob("m/*.npy") if len(np.load(path)) == 3)
    whole = path.read_bytes()
    damages = [b"", whole[:100], whole[:-1], b"\x80\x04N."]
    for other in (np.array([{"a": 1}], dtype=object), np.ones((4, 8), dtype=np.float32)):
        np.save(path, other, allow_pickle=True)
        damages.append(path.read_bytes())
    for damage in damages:
        path.write_bytes(damage)
        again = EmbeddingCache(tmp_path)
        assert again.missing("m", TEXTS) == TEXTS[1:]
        again.add("m", TEXTS[1:], embeddings(3, 8))
        assert path.read_bytes() == whole


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


@pytest.mark.slow
def test_processes_that_write_the_same_at_once_leave_a_whole_cache(tmp_path):
    workers = [start_process(_fill, tmp_path) for _ in range(4)]
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    texts = [("", f"text {i}") for i in range(60)]
    assert EmbeddingCache(tmp_path).rows("m", texts)[:].ravel().tolist() == list(range(60))
    assert not list(tmp_path.rglob("*.tmp"))


def bm25_scores(*texts):
    scores = BM25().scores(*([Text(text) for text in side] for side in texts), ExitVariant())
    return np.concatenate([block.scores for block in scores.blocks()])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("parseHTTPHeader", "parse http header"),
        ("parse_http_header(line)", "parse http header line"),
        ("HTTPServer2", "http server 2"),
        ("utf8Decode URLs", "utf 8 decode ur ls"),
        ("Größe und Länge", "größe und länge"),
        ("+ - {}", ""),
    ],
)
def test_identifiers_are_split_at_case_underscores_and_digits(text, tokens):
    assert lexical.identifier_tokens(text) == tokens.split()


def test_scores_are_lucenes_bm25_and_zero_without_words():
    # idf = ln(1 + (N - n + ½) / (n + ½)), times tf / (tf + k1 (1 - b + b · length / mean length)): worked out by hand
    documents = ["read file", "read read socket stream", "close"]
    mean_length = 7 / 3
    idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    expected = [idf * tf / (tf + 1.2 * (0.25 + 0.75 * length / mean_length)) for tf, length in ((1, 2), (2, 4), (0, 1))]
    assert bm25_scores(["read"], documents)[0] == pytest.approx(expected, rel=1e-5)
    assert np.array_equal(bm25_scores(["read read"], documents), bm25_scores(["read"], documents))
    assert bm25_scores(["", "unknown"], ["read file", ""]).tolist() == [[0, 0], [0, 0]]
    assert bm25_scores(["read"], ["", "{}"]).tolist() == [[0, 0]]


def test_overlap_is_jaccard_of_identifiers():
    assert identifier_overlap("parse(tree)", "tree.parse") == 1
    assert identifier_overlap("parse tree", "parse file") == pytest.approx(1 / 3)
    assert identifier_overlap("a + b == 12", "x") == identifier_overlap("_private1", "_private2") == 0


def pairs(tokenizer, same_words, seed):
    """Repositories whose functions share words of their own, or share nothing."""
    texts = {
        f"repository {r}": [
            " ".join(f"word{chr(97 + (r if same_words else 7 * f + r) % 26)}{i} = {i}" for i in range(6))
            for f in range(6)
        ]
        for r in range(4)
    }
    return InContextPairs(corpus_of(texts, tokenizer), tokenizer, length=200, max_tokens=128, seed=seed)


def test_repositories_with_words_of_their_own_are_distinguished_and_others_are_not(tokenizer):
    clear, blind = (
        lexical.identifier_overlap_accuracy(*(pairs(tokenizer, same_words, seed) for seed in (0, 1)), tokenizer)
        for same_words in (True, False)
    )
    assert clear["accuracy"] > 0.95
    assert 0 <= clear["threshold"] < 1
    assert blind["accuracy"] < 0.7
