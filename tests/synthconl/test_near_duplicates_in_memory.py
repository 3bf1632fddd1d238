import random
import sys
import warnings
from itertools import combinations

import numpy as np
import pytest

from modular_star_encoder.synthconl import near_duplicates
from modular_star_encoder.synthconl.minhash import DuplicateSettings, fingerprint
from modular_star_encoder.synthconl.near_duplicates import Column, Search, find_near_duplicates
from tests.errors import raises
from tests.synthconl.near_duplicate_samples import (
    code,
    mutated,
    rows_with_near_duplicates,
    shingle_set,
    sliding_windows,
    true_jaccard,
)


@pytest.fixture(scope="module")
def texts():
    return rows_with_near_duplicates(500)


@pytest.fixture(scope="module")
def brute_force(texts):
    """All pairs of different texts at 0.7 or more, by the strings themselves."""
    sets = [shingle_set(text) for text in texts]
    number = {shingle: place for place, shingle in enumerate(sorted(set().union(*sets)))}
    holds = np.zeros((len(texts), len(number)), np.float32)
    for row, shingles in enumerate(sets):
        holds[row, [number[shingle] for shingle in shingles]] = 1
    common, sizes = (holds @ holds.T).astype(int), holds.sum(axis=1).astype(int)
    similarity = common / (sizes[:, None] + sizes - common)
    pairs = zip(*np.nonzero(np.triu(similarity >= 0.7, 1)), strict=True)
    return {(a, b): similarity[a, b] for a, b in pairs if texts[a] != texts[b]}


def found_pairs(result):
    return dict(zip(map(tuple, result.pairs.tolist()), result.pair_similarities.tolist(), strict=True))


def components(count, pairs):
    cluster = list(range(count))
    for first, second in sorted(pairs):
        smaller, larger = sorted((cluster[first], cluster[second]))
        cluster = [smaller if one == larger else one for one in cluster]
    return cluster


@pytest.mark.parametrize(("recall", "of_all", "of_nearer"), [("default", 0.85, 0.97), ("high", 0.97, 1)])
def test_what_is_found_agrees_with_brute_force(texts, brute_force, recall, of_all, of_nearer):
    result = find_near_duplicates({"code": texts}, settings=DuplicateSettings(recall=recall))
    found = found_pairs(result)
    assert len(brute_force) > 100
    assert found.items() <= brute_force.items()  # the similarities too, exactly
    near = [pair for pair, similarity in brute_force.items() if similarity >= 0.8]
    assert sum(pair in found for pair in near) >= of_nearer * len(near)
    assert len(found) >= of_all * len(brute_force)
    assert result.clusters.tolist() == components(len(texts), found)
    assert np.flatnonzero(result.kept).tolist() == sorted(set(result.clusters.tolist()))
    assert sum(result.counts.values()) == len(texts)
    assert result.counts["kept"] == result.kept.sum() < len(texts)


def test_candidates_below_the_threshold_are_compared_and_turned_down(texts):
    result = find_near_duplicates({"code": texts}, settings=DuplicateSettings(recall="high"))
    assert result.compared > len(result.pairs)
    assert result.pair_similarities.min() >= 0.7


def test_a_similarity_right_at_the_threshold_is_near():
    # Ten different shingles, of which the first text has seven.
    pair = "abcdefghijk", "abcdefghijklmn"
    column = Column([pair], [fingerprint(pair, DuplicateSettings().banding)], np.arange(2))
    for threshold, expected in ((0.7, [0.7]), (0.7000001, [])):
        search = Search([column], column, DuplicateSettings(threshold=threshold))
        assert search.compare("within", 0, np.array([1], "u8")).similarities.tolist() == expected


def test_every_row_dropped_is_told_with_the_row_nearest_to_it(texts):
    texts = [*texts, texts[0]]
    result = find_near_duplicates({"code": texts})
    best = np.zeros(len(texts))
    np.maximum.at(best, result.pairs, result.pair_similarities[:, None])
    assert (np.bincount(result.pairs.ravel()) > 1).sum() > 10  # rows that are near several
    for row in np.flatnonzero(~result.kept)[:-1]:
        nearest = result.nearest[row]
        assert result.clusters[row] == result.clusters[nearest]
        assert result.similarity[row] == true_jaccard(texts[row], texts[nearest]) == best[row] >= 0.7
    assert (result.nearest[-1], result.similarity[-1]) == (0, 1)
    assert set(result.nearest[result.kept]) == {-1}
    assert result.similarity[result.kept].max() == 0


@pytest.mark.parametrize("giant_cluster", [1000, 2])
@pytest.mark.filterwarnings("ignore:.*clusters have more")
def test_the_order_of_rows_does_not_matter_but_their_ids_do(texts, giant_cluster):
    texts = texts[:200] + sliding_windows(12)
    ids = [f"{number:04d}" for number in range(len(texts))]
    settings = DuplicateSettings(giant_cluster=giant_cluster, bucket_limit=3)
    told = []
    for seed in (None, 1, 2):
        order = list(range(len(texts)))
        if seed:
            random.Random(seed).shuffle(order)
        result = find_near_duplicates(
            {"code": [texts[one] for one in order]}, ids=[ids[one] for one in order], settings=settings
        )
        names = np.array([ids[one] for one in order])
        told.append(sorted(zip(names, result.kept, names[result.clusters], result.similarity, strict=True)))
    assert told[0] == told[1] == told[2]
    ids.reverse()
    reverse = find_near_duplicates({"code": texts}, ids=ids, settings=settings)
    assert reverse.kept.sum() > 0
    assert reverse.kept.tolist() != [kept for _, kept, *_ in told[0]]


def test_integer_ids_are_ordered_as_numbers():
    text = code(random.Random(0))
    assert find_near_duplicates({"code": [text, text]}, ids=[10, 9]).kept.tolist() == [False, True]
    assert find_near_duplicates({"code": [text, text]}, ids=["10", "9"]).kept.tolist() == [True, False]


def test_either_both_or_one_of_the_columns():
    rng = random.Random(3)
    first, second, third, fourth = (code(rng) for _ in range(4))
    near_first, near_second = mutated(first, 0.9, rng), mutated(second, 0.9, rng)
    columns = {
        "code": [first, near_first, third, first],
        "translation": [second, near_second, near_second, fourth],
    }

    def kept(match="either", names=("code", "translation")):
        chosen = {name: columns[name] for name in names}
        return find_near_duplicates(chosen, settings=DuplicateSettings(match=match)).kept.tolist()

    assert kept() == [True, False, False, False]
    assert kept("both") == [True, False, True, True]
    assert kept(names=("code",)) == [True, False, True, False]
    assert kept(names=("translation",)) == [True, False, False, True]


def test_rows_near_in_both_columns_are_one_pair_with_the_larger_similarity():
    rng = random.Random(9)
    texts = [code(rng), code(rng)]
    columns = {
        "code": [texts[0], mutated(texts[0], 0.85, rng)],
        "translation": [texts[1], mutated(texts[1], 0.95, rng)],
    }
    similarities = [true_jaccard(*column) for column in columns.values()]
    for match, expected in (("either", max(similarities)), ("both", min(similarities))):
        result = find_near_duplicates(columns, settings=DuplicateSettings(match=match))
        assert found_pairs(result) == {(0, 1): expected}
        assert len(result.pairs) == 1


@pytest.mark.parametrize(("name", "value"), [("_PAIRS_AT_A_TIME", 3), ("_CHARACTERS_AT_A_TIME", 700)])
def test_the_result_does_not_depend_on_how_many_pairs_are_compared_at_a_time(texts, monkeypatch, name, value):
    expected = find_near_duplicates({"code": texts})
    monkeypatch.setattr(near_duplicates, name, value)
    result = find_near_duplicates({"code": texts})
    np.testing.assert_array_equal(result.pairs, expected.pairs)
    np.testing.assert_array_equal(result.pair_similarities, expected.pair_similarities)


def test_a_blank_column_does_not_make_rows_near_but_does_not_keep_them_apart():
    rng = random.Random(4)
    first, other = code(rng), code(rng)
    near = mutated(first, 0.9, rng)
    columns = {"code": [first, other, near, " "], "translation": [None, None, "", "\n"]}
    assert find_near_duplicates(columns).kept.tolist() == [True, True, False, True]
    both = DuplicateSettings(match="both")
    assert find_near_duplicates(columns, settings=both).kept.tolist() == [True, True, False, True]
    columns["translation"][2] = other
    assert find_near_duplicates(columns, settings=both).kept.tolist() == [True, True, True, True]


def test_rows_blank_in_all_columns_are_kept():
    result = find_near_duplicates({"code": [None, "", "  ", None]})
    assert result.kept.all()
    assert result.counts["kept"] == 4


def test_short_texts_are_near_only_if_equal():
    result = find_near_duplicates({"code": ["x=1", "x=2", "x=1", "x", "x", "é=1", ""]})
    assert result.kept.tolist() == [True, True, False, True, False, True, True]
    assert result.counts["equal to another row"] == 2


def test_no_rows_are_no_near_duplicates():
    result = find_near_duplicates({"code": []}, against={"bench": ["x = 1"]})
    assert len(result.kept) == len(result.pairs) == sum(result.counts.values()) == 0


def test_shared_boilerplate_alone_makes_no_near_duplicates():
    rng = random.Random(5)
    boilerplate = code(rng, 10)
    texts = [boilerplate + "\n" + code(rng, 10) for _ in range(60)]
    similarity = [true_jaccard(*pair) for pair in combinations(texts, 2)]
    assert 0.3 < np.mean(similarity) < max(similarity) < 0.7
    result = find_near_duplicates({"code": texts}, settings=DuplicateSettings(recall="high"))
    assert result.compared > 20
    assert result.kept.all()


def test_rows_near_a_text_of_another_set_are_dropped_and_told_by_set():
    rng = random.Random(6)
    texts = [code(rng) for _ in range(5)]
    equal, near, unlike = texts[1], mutated(texts[2], 0.85, rng), code(rng)
    columns = {"code": [*texts, texts[1]], "translation": [code(rng) for _ in range(6)]}
    columns["translation"][4] = near
    columns["translation"][5] = columns["translation"][1]  # a copy of row 1
    against = {"first": [unlike, equal], "second": ["", unlike, near], "third": []}
    result = find_near_duplicates(columns, against=against)
    assert result.kept.tolist() == [True, False, False, True, False, False]
    reasons = [result.reasons[one] for one in result.reason]
    assert [reasons[row] for row in (1, 2, 4, 5)] == [
        f"near a text of {one}" for one in ("first", "second", "second", "first")
    ]
    assert result.nearest[[1, 2, 4, 5]].tolist() == [1, 2, 2, 1]
    assert result.similarity[[1, 4]].tolist() == [1, 1]
    assert result.similarity[2] == true_jaccard(texts[2], near)
    assert result.counts["near a text of third"] == 0


@pytest.mark.parametrize("match", ["either", "both"])
def test_one_column_near_another_set_is_enough(match):
    rng = random.Random(7)
    text = code(rng)
    columns = {"code": [code(rng)], "translation": [text]}
    result = find_near_duplicates(columns, against={"bench": [text]}, settings=DuplicateSettings(match=match))
    assert not result.kept.any()


def test_a_row_near_another_set_holds_no_cluster_together():
    windows = sliding_windows(3, lines=15, step=1)
    assert true_jaccard(windows[0], windows[2]) < 0.8 < true_jaccard(*windows[:2])
    settings = DuplicateSettings(threshold=0.8, recall="high")
    assert find_near_duplicates({"code": windows}, settings=settings).kept.tolist() == [True, False, False]
    result = find_near_duplicates({"code": windows}, against={"bench": [windows[1]]}, settings=settings)
    assert result.counts["near a text of bench"] == 3  # the outer ones are near it themselves
    middle = mutated(windows[1], 0.86, random.Random(0))
    assert true_jaccard(middle, windows[0]) < 0.8
    result = find_near_duplicates({"code": windows}, against={"bench": [middle]}, settings=settings)
    assert result.kept.tolist() == [True, False, True]


def test_a_giant_cluster_is_not_swallowed_and_is_told():
    windows = sliding_windows(60, step=2)
    assert true_jaccard(windows[0], windows[59]) < 0.2
    whole = find_near_duplicates({"code": windows})
    assert whole.kept.sum() == 1  # by chains alone
    assert whole.giant_clusters == ()
    with pytest.warns(UserWarning, match="1 clusters have more than 59 different rows"):
        result = find_near_duplicates({"code": windows}, settings=DuplicateSettings(giant_cluster=59))
    assert result.kept.sum() > 10
    (giant,) = result.giant_clusters
    assert (giant.cluster, giant.rows, giant.kept) == (0, 60, result.kept.sum())
    near = {frozenset(pair) for pair in result.pairs.tolist()}
    kept = set(np.flatnonzero(result.kept).tolist())
    for row in set(range(60)) - kept:
        assert any(frozenset((row, one)) in near for one in kept)
    assert not any(frozenset(pair) in near for pair in combinations(kept, 2))


def test_many_copies_of_one_row_are_no_giant_cluster():
    text = code(random.Random(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = find_near_duplicates({"code": [text] * 50}, settings=DuplicateSettings(giant_cluster=5))
    assert result.kept.tolist() == [True] + [False] * 49
    assert result.compared == 0
    assert result.cluster_sizes.tolist() == [50]


def test_the_work_stays_linear_where_many_rows_share_a_band():
    rng = random.Random(8)
    text = code(rng, 30)
    texts = [mutated(text, 0.97, rng) for _ in range(300)]
    everything = find_near_duplicates({"code": texts})
    limited = find_near_duplicates({"code": texts}, settings=DuplicateSettings(bucket_limit=4))
    assert everything.compared > 10_000
    assert limited.compared <= 25 * 4 * 300 < 2 * everything.compared
    assert limited.compared < everything.compared
    assert limited.largest_bucket > 100
    assert limited.rows_over_limit > 100
    assert limited.kept.sum() == everything.kept.sum() == 1


def test_bad_input_is_refused():
    with raises("synthconl.near_duplicates.columns"):
        find_near_duplicates({})
    with raises("synthconl.near_duplicates.columns", "code 2, translation 1, ids 2"):
        find_near_duplicates({"code": ["a", "b"], "translation": ["a"]}, ids=[1, 2])
    with raises("synthconl.near_duplicates.ids"):
        find_near_duplicates({"code": ["a", "b"]}, ids=["x", "x"])


def test_without_rensa_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ImportError, match=r"modular-star-encoder\[dataset\]"):
        find_near_duplicates({"code": ["x = 1"]})
