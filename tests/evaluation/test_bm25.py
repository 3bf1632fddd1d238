import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from modular_star_encoder.evaluation.bm25 import bm25_scorer, bm25_scores, identifier_tokens
from modular_star_encoder.evaluation.codesearchnet import codesearchnet_row
from modular_star_encoder.evaluation.distractors import evaluate_scorer

DATA = os.environ.get("MOSE_DATA")


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


def test_a_repeated_term_of_a_query_counts_once():
    documents = ["read file", "close socket"]
    assert np.array_equal(bm25_scores(["read read close"], documents), bm25_scores(["close read"], documents))


def test_queries_and_documents_without_words_score_zero():
    assert bm25_scores(["", "unknown"], ["read file", ""]).tolist() == [[0, 0], [0, 0]]
    assert bm25_scores(["read"], ["", "{}"]).tolist() == [[0, 0]]


def test_the_scorer_sees_only_its_batch():
    queries, documents = ["read file", "close", "send"], ["readFile()", "close(socket)", "read close send"]
    rows = np.array([2, 0])
    batch = [[queries[row] for row in rows], [documents[row] for row in rows]]
    assert np.array_equal(bm25_scorer(queries, documents)(rows), bm25_scores(*batch))


@pytest.mark.skipif(not DATA, reason="MOSE_DATA is not set to a folder with codesearchnet/*_test.jsonl.gz")
@pytest.mark.parametrize(("language", "mrr"), [("ruby", 50.6), ("javascript", 48.3), ("go", 74.0)])
def test_bm25_reaches_its_known_figures_on_codesearchnet(language, mrr):
    with gzip.open(Path(DATA, "codesearchnet", f"{language}_test.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [codesearchnet_row(json.loads(line)) for line in file]
    scorer = bm25_scorer([row.description for row in rows], [row.code for row in rows])
    scores = evaluate_scorer(scorer, len(rows), progress=False)
    assert scores.distractors == 999
    assert 100 * scores.mrr == pytest.approx(mrr, abs=1)
