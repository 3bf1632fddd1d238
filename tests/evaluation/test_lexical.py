"""BM25, its words, and in-context classification by identifiers alone."""

import numpy as np
import pytest

from modular_star_encoder.data.in_context import InContextPairs
from modular_star_encoder.evaluation.lexical import (
    BM25,
    identifier_overlap,
    identifier_overlap_accuracy,
    identifier_tokens,
)
from modular_star_encoder.evaluation.retrievers import ExitVariant
from modular_star_encoder.inference.encoders import Text
from tests.data.samples import corpus_of


def bm25_scores(queries, documents):
    queries, documents = ([Text(text) for text in texts] for texts in (queries, documents))
    return np.concatenate([block.scores for block in BM25().scores(queries, documents, ExitVariant()).blocks()])


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
    assert identifier_tokens(text) == tokens.split()


def test_scores_are_lucenes_bm25():
    # idf = ln(1 + (N - n + ½) / (n + ½)), times tf / (tf + k1 (1 - b + b · length / mean length)): worked out by hand
    documents = ["read file", "read read socket stream", "close"]
    mean_length = 7 / 3
    idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    expected = [idf * tf / (tf + 1.2 * (0.25 + 0.75 * length / mean_length)) for tf, length in ((1, 2), (2, 4), (0, 1))]
    assert bm25_scores(["read"], documents)[0] == pytest.approx(expected, rel=1e-5)
    assert np.array_equal(bm25_scores(["read read"], documents), bm25_scores(["read"], documents))


def test_queries_and_documents_without_words_score_zero():
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
    clear = identifier_overlap_accuracy(pairs(tokenizer, True, 0), pairs(tokenizer, True, 1), tokenizer)
    assert clear["accuracy"] > 0.95
    assert 0 <= clear["threshold"] < 1
    blind = identifier_overlap_accuracy(pairs(tokenizer, False, 0), pairs(tokenizer, False, 1), tokenizer)
    assert blind["accuracy"] < 0.7
