import random

import numpy as np
import pytest

from modular_star_encoder.synthconl.minhash import (
    Banding,
    DuplicateSettings,
    hash_shingles,
    jaccard,
    optimal_banding,
    shingle_sets,
)
from tests.errors import raises
from tests.synthconl.near_duplicate_samples import code, mutated, shingle_set, true_jaccard


def similarity(first, second):
    return jaccard(*shingle_sets([first, second]))


def test_the_default_is_25_bands_of_10_and_high_recall_more_bands():
    default, high = DuplicateSettings().banding, DuplicateSettings(recall="high").banding
    assert (default, high) == (Banding(25, 10), Banding(36, 7))
    assert [round(default.candidate_probability(s), 3) for s in (0.5, 0.7, 0.8)] == [0.024, 0.511, 0.942]
    assert round(high.candidate_probability(0.7), 2) == 0.95


def test_the_banding_follows_the_threshold():
    rows = [optimal_banding(threshold).rows for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]


@pytest.mark.parametrize(
    "values", [{"threshold": 0}, {"threshold": 1.1}, {"recall": "low"}, {"match": "any"}, {"giant_cluster": 0}]
)
def test_settings_out_of_range_are_refused(values):
    (name,) = values
    with raises("settings.value", name, *values.values()):
        DuplicateSettings(**values)


def test_similarity_is_that_of_the_sets_of_strings():
    rng = random.Random(1)
    for number in range(60):
        first = code(rng, rng.randint(1, 30))
        second = mutated(first, rng.uniform(0.1, 1), rng) if number % 3 else code(rng)
        assert similarity(first, second) == true_jaccard(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("naïve café = 1\r\n", "naive café = 1\r\n"),
        ("x = '🦀🦀🦀🦀🦀'", "x = '🦀🦀🦀🦀'"),
        ("a\tb\tc\td", "a b c d"),
        ("\u00e9 = 1234", "e\u0301 = 1234"),
        ("lone \ud800 surrogate", "lone \udfff surrogate"),
        ("return x\x00\x00", "return x"),
    ],
)
def test_characters_are_code_points(first, second):
    assert similarity(first, second) == true_jaccard(first, second)
    assert similarity(first, second) < 1
    assert similarity(first, first) == 1


def test_a_text_shorter_than_a_shingle_is_its_own_shingle():
    assert similarity("x=1", "x=1") == 1
    assert similarity("x=1", "x=2") == 0
    assert similarity("x=1", "x=10") == 0  # by no common prefix
    assert similarity("x=1", "x=123") == 0
    assert similarity("x=1", "x=1  ") == similarity("x=1", "x=1\0\0") == 0  # whatever fills it up
    assert [len(one) for one in shingle_sets(["x", "x=12", "x=123", "x=1234"])] == [1, 1, 1, 2]


def test_a_blank_text_has_no_shingle_and_resembles_nothing():
    assert [len(one) for one in shingle_sets(["", " \n\t", "x"])] == [0, 0, 1]
    assert similarity("", "") == similarity(" ", " ") == similarity("", "x = 1") == 0


def test_no_shingle_reaches_into_the_next_text():
    texts = ["abc", "", "defgh", "ij", "klmnopq", " "]
    hashes, bounds = hash_shingles(texts)
    assert np.diff(bounds).tolist() == [1, 0, 1, 1, 3, 0]
    alone = [hash_shingles([text])[0] for text in texts]
    np.testing.assert_array_equal(hashes, np.concatenate(alone))


def test_different_shingles_have_different_hashes():
    rng = random.Random(2)
    shingles = set(map(chr, range(1000))).union(*(shingle_set(code(rng, 30)) for _ in range(300)))
    shingles = sorted(shingle for shingle in shingles if shingle.strip())
    assert len(shingles) > 20_000
    assert len(np.unique(hash_shingles(shingles)[0])) == len(shingles)
