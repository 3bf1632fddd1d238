import random
from itertools import combinations

import numpy as np
import pytest

from modular_star_encoder.synthconl import near_duplicates
from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings, find_near_duplicates, fingerprint
from tests.synthconl.samples import code, mutated, rows_with_near_duplicates, shingle_set, sliding_windows, true_jaccard


def similarity(first, second):
    return near_duplicates.jaccard(*near_duplicates.shingle_sets([first, second]))


def find(*columns, against=None, ids=None, **settings):
    settings = DuplicateSettings(**settings)
    order = None if ids is None else np.argsort(ids)
    parts = [[fingerprint(column, settings.banding)] for column in columns]
    return find_near_duplicates(parts, settings, order=order, against=against)


def test_the_default_is_25_bands_of_10_and_high_recall_more_bands():
    default, high = DuplicateSettings().banding, DuplicateSettings(recall="high").banding
    assert (default, high) == (near_duplicates.Banding(25, 10), near_duplicates.Banding(36, 7))
    assert [round(default.candidate_probability(s), 3) for s in (0.5, 0.7, 0.8)] == [0.024, 0.511, 0.942]
    assert round(high.candidate_probability(0.7), 2) == 0.95
    rows = [near_duplicates.optimal_banding(threshold).rows for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("naïve café = 1\r\n", "naive café = 1\r\n"),
        ("x = '🦀🦀🦀🦀🦀'", "x = '🦀🦀🦀🦀'"),
        ("lone \ud800 surrogate", "lone \udfff surrogate"),
        ("return x\x00\x00", "return x"),
    ],
)
def test_characters_are_code_points(first, second):
    assert similarity(first, second) == true_jaccard(first, second) < 1 == similarity(first, first)


def test_a_short_text_is_its_own_shingle_and_a_blank_one_has_none():
    assert similarity("x=1", "x=1") == 1
    # Not by a common prefix, whatever fills it up.
    assert {similarity("x=1", other) for other in ("x=2", "x=10", "x=123", "x=1  ", "x=1\0\0")} == {0}
    sets = near_duplicates.shingle_sets(["x", "x=12", "x=123", "x=1234", "", " \n\t"])
    assert list(map(len, sets)) == [1, 1, 1, 2, 0, 0]
    assert similarity("", "") == similarity(" ", " ") == similarity("", "x = 1") == 0


@pytest.fixture(scope="module")
def texts():
    return rows_with_near_duplicates(500)


@pytest.fixture(scope="module")
def brute_force(texts):
    """{pair: similarity} of all pairs of different texts with a similarity of at least 0.7, from sets of strings."""
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
def test_what_is_found_agrees_with_brute_force(texts, brute_force, recall, of_all, of_nearer, monkeypatch):
    if recall == "default":  # few pairs at a time
        monkeypatch.setattr(near_duplicates, "_BYTES_AT_A_TIME", 3000)
    result = find(texts, recall=recall)
    found = found_pairs(result)
    assert len(brute_force) > 100
    assert found.items() <= brute_force.items()  # the similarities too, exactly
    assert result.compared > len(found)  # candidates below the threshold are compared and turned down
    near = [pair for pair, similarity in brute_force.items() if similarity >= 0.8]
    assert sum(pair in found for pair in near) >= of_nearer * len(near)
    assert len(found) >= of_all * len(brute_force)
    assert result.clusters.tolist() == components(len(texts), found)
    best = np.zeros(len(texts))
    np.maximum.at(best, result.pairs, result.pair_similarities[:, None])
    for row in np.flatnonzero(~result.kept):
        nearest = result.nearest[row]
        assert result.similarity[row] == true_jaccard(texts[row], texts[nearest]) == best[row]
    assert (set(result.nearest[result.kept]), set(result.similarity[result.kept])) == ({-1}, {0})
    assert np.flatnonzero(result.kept).tolist() == sorted(set(result.clusters.tolist()))
    assert sum(result.counts.values()) == len(texts)
    assert result.counts["kept"] == result.kept.sum() < len(texts)


def test_a_similarity_right_at_the_threshold_is_near():
    # Ten different shingles, of which the first text has seven.
    pair = "abcdefghijk", "abcdefghijklmn"
    columns = [near_duplicates._Column([fingerprint(pair, DuplicateSettings().banding)], np.arange(2))]
    for threshold, expected in ((0.7, [0.7]), (0.7000001, [])):
        options = {"threshold": threshold, "progress": False}
        _, similarities = near_duplicates._near_pairs(np.array([1], "u8"), columns, columns, **options)
        assert similarities.tolist() == expected


@pytest.mark.parametrize("giant_cluster", [1000, 2])
@pytest.mark.filterwarnings("ignore:.*clusters have more")
def test_the_order_of_rows_does_not_matter_but_their_ids_do(texts, giant_cluster):
    texts = texts[:200] + sliding_windows(12)
    ids = [f"{number:04d}" for number in range(len(texts))]
    settings = {"giant_cluster": giant_cluster, "bucket_limit": 3}
    results = []
    for seed in (None, 1, 2):
        order = list(range(len(texts)))
        if seed:
            random.Random(seed).shuffle(order)
        names = np.array([ids[one] for one in order])
        result = find([texts[one] for one in order], ids=names.tolist(), **settings)
        results.append(sorted(zip(names, result.kept, names[result.clusters], result.similarity, strict=True)))
    assert results[0] == results[1] == results[2]
    reverse = find(texts, ids=ids[::-1], **settings)
    assert reverse.kept.sum() > 0
    assert reverse.kept.tolist() != [kept for _, kept, *_ in results[0]]


def test_either_both_or_one_of_the_columns():
    rng = random.Random(3)
    first, second, third, fourth = (code(rng) for _ in range(4))
    near_first, near_second = mutated(first, 0.9, rng), mutated(second, 0.9, rng)
    codes, translations = [first, near_first, third, first], [second, near_second, near_second, fourth]
    assert find(codes, translations).kept.tolist() == [True, False, False, False]
    assert find(codes, translations, match="both").kept.tolist() == [True, False, True, True]
    assert find(codes).kept.tolist() == [True, False, True, False]
    similarities = [true_jaccard(*column[:2]) for column in (codes, translations)]
    for match, expected in (("either", max(similarities)), ("both", min(similarities))):
        assert found_pairs(find(codes[:2], translations[:2], match=match)) == {(0, 1): expected}


def test_a_blank_column_does_not_make_rows_near_but_does_not_keep_them_apart():
    rng = random.Random(4)
    first, other = code(rng), code(rng)
    codes, translations = [first, other, mutated(first, 0.9, rng), " "], [None, None, "", "\n"]
    assert find(codes, translations).kept.tolist() == [True, True, False, True]
    assert find(codes, translations, match="both").kept.tolist() == [True, True, False, True]
    translations[2] = other
    assert find(codes, translations, match="both").kept.all()


def test_blank_rows_are_kept_short_ones_are_near_only_if_equal_and_no_rows_are_no_near_duplicates():
    assert find([None, "", "  ", None]).counts["kept"] == 4
    result = find(["x=1", "x=2", "x=1", "x", "x", "é=1", ""])
    assert result.kept.tolist() == [True, True, False, True, False, True, True]
    assert result.counts["equal to another row"] == 2
    result = find([], against={"bench": ["x = 1"]})
    assert len(result.kept) == len(result.pairs) == sum(result.counts.values()) == 0


def test_rows_near_a_text_of_another_set_are_dropped_and_counted_by_set():
    rng = random.Random(6)
    texts = [code(rng) for _ in range(5)]
    equal, near, unlike = texts[1], mutated(texts[2], 0.85, rng), code(rng)
    translations = [code(rng) for _ in range(6)]
    translations[4], translations[5] = near, translations[1]  # row 5 is a copy of row 1
    against = {"first": [unlike, equal], "second": ["", unlike, near], "third": []}
    result = find([*texts, texts[1]], translations, against=against)
    assert result.kept.tolist() == [True, False, False, True, False, False]
    rows, sets = [1, 2, 4, 5], ("first", "second", "second", "first")
    assert [result.reasons[result.reason[row]] for row in rows] == [f"near a text of {one}" for one in sets]
    assert result.nearest[rows].tolist() == [1, 2, 2, 1]
    assert result.similarity[[1, 4]].tolist() == [1, 1]
    assert result.similarity[2] == true_jaccard(texts[2], near)
    assert result.counts["near a text of third"] == 0
    for match in ("either", "both"):  # one column is enough
        assert not find([code(rng)], [equal], against={"bench": [equal]}, match=match).kept.any()


def test_a_row_near_another_set_holds_no_cluster_together():
    windows = sliding_windows(3, lines=15, step=1)
    assert true_jaccard(windows[0], windows[2]) < 0.8 < true_jaccard(*windows[:2])
    settings = {"threshold": 0.8, "recall": "high"}
    assert find(windows, **settings).kept.tolist() == [True, False, False]
    result = find(windows, against={"bench": [windows[1]]}, **settings)
    assert result.counts["near a text of bench"] == 3  # the outer ones are near it themselves
    middle = mutated(windows[1], 0.86, random.Random(0))
    assert true_jaccard(middle, windows[0]) < 0.8
    assert find(windows, against={"bench": [middle]}, **settings).kept.tolist() == [True, False, True]


def test_a_giant_cluster_is_not_swallowed_and_is_reported():
    windows = sliding_windows(60, step=2)
    assert true_jaccard(windows[0], windows[59]) < 0.2
    whole = find([*windows, *windows[:1] * 50], giant_cluster=60)
    assert whole.kept.sum() == 1  # by chains alone, and copies do not count
    assert whole.giant_clusters == ()
    with pytest.warns(UserWarning, match="1 clusters have more than 59 different rows"):
        result = find(windows, giant_cluster=59)
    assert result.kept.sum() > 10
    (giant,) = result.giant_clusters
    assert giant == {"cluster": 0, "rows": 60, "kept": result.kept.sum()}
    near = {frozenset(pair) for pair in result.pairs.tolist()}
    kept = set(np.flatnonzero(result.kept).tolist())
    for row in set(range(60)) - kept:
        assert any(frozenset((row, one)) in near for one in kept)
    assert not any(frozenset(pair) in near for pair in combinations(kept, 2))


def test_the_work_stays_linear_where_many_rows_share_a_band():
    rng = random.Random(8)
    text = code(rng, 30)
    texts = [mutated(text, 0.97, rng) for _ in range(100)]
    everything, limited = find(texts), find(texts, bucket_limit=1)
    assert limited.compared <= 25 * 100 < everything.compared
    assert min(limited.largest_bucket, limited.rows_over_limit) > 40
    assert limited.kept.sum() == everything.kept.sum() == 1
