from collections import Counter

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from modular_star_encoder.data.in_context import InContextPairs, PairSampler
from modular_star_encoder.data.token_store import TokenCorpus
from modular_star_encoder.data.tokenizer import ContentEncoder, TokenRows

pytestmark = pytest.mark.slow  # thousands of draws

LANGUAGES = 3
REPOSITORIES = 40
HALF = 10_000


def corpus(lengths, repositories, languages, tokens=0, fingerprint=""):
    """Texts of given lengths; all tokens of a text are its one entry of `tokens`."""
    tokens = np.repeat(np.zeros(len(lengths), int) + tokens, lengths).astype(np.uint16)
    rows = TokenRows(tokens, np.concatenate([[0], np.cumsum(lengths)]))
    names = tuple(f"repo{i}" for i in range(max(repositories) + 1))
    repositories, languages = np.array(repositories, np.int32), np.array(languages, np.int32)
    return TokenCorpus(rows, np.arange(len(lengths)), names, repositories, tuple("abc"), languages, fingerprint)


@pytest.fixture(scope="module")
def telling(tokenizer):
    """Repositories of very different sizes, each with a main language and a usual length: shortcuts everywhere.

    The id of every token tells the repository and the language of its text.
    """
    rng = np.random.default_rng(0)
    sizes = rng.choice([4, 8, 20, 100], size=REPOSITORIES)
    repository = np.repeat(np.arange(REPOSITORIES), sizes)
    main = rng.integers(LANGUAGES, size=REPOSITORIES)[repository]
    language = np.where(rng.random(len(repository)) < 0.8, main, rng.integers(LANGUAGES, size=len(repository)))
    usual = rng.normal(3.7, 0.7, size=REPOSITORIES)[repository] + 0.3 * language
    lengths = np.exp(rng.normal(usual, 0.5)).astype(int) + 10
    tokens = 4 + repository * LANGUAGES + language
    return corpus(lengths, repository, language, tokens, ContentEncoder(tokenizer).checksum)


@pytest.fixture(scope="module")
def drawn(tokenizer, telling):
    """(20,000, 7): both lengths, both languages, both repositories and the label, read from the rows themselves."""
    pairs = InContextPairs(telling, tokenizer, length=2 * HALF, max_tokens=131, seed=0)
    table = []
    for i in range(len(pairs)):
        row = pairs[i]
        ids, labels = row["input_ids"].numpy(), row["labels"].numpy()
        ids = np.where(labels >= 0, labels, ids)
        middle = int(np.flatnonzero(ids == 1)[1])
        origins = [divmod(int(ids[place]) - 4, LANGUAGES) for place in (1, middle + 1)]
        (first, first_language), (second, second_language) = origins
        label = int(row["icc_label"])
        table.append((middle - 1, len(ids) - middle - 2, first_language, second_language, first, second, label))
    return np.array(table)


def features(table):
    """Lengths (each, together, apart, in joint bins) and languages, crossed with each other."""
    lengths = table[:, :2].astype(float)
    total, apart = lengths.sum(axis=1), np.abs(lengths[:, 0] - lengths[:, 1])
    plain = np.stack([*lengths.T, total, apart, *np.log(lengths).T, lengths[:, 0] * lengths[:, 1]], axis=1)
    plain = (plain - plain.mean(axis=0)) / (plain.std(axis=0) + 1e-9)
    languages = np.eye(LANGUAGES**2)[table[:, 2] * LANGUAGES + table[:, 3]]
    edges = np.quantile(lengths, [0.2, 0.4, 0.6, 0.8])
    bins = np.eye(25)[np.searchsorted(edges, lengths[:, 0]) * 5 + np.searchsorted(edges, lengths[:, 1])]
    return np.concatenate([plain, languages, bins, *(plain * column[:, None] for column in languages.T)], axis=1)


def accuracy_of_logistic_regression(table):
    """Accuracy on the second half of the rows, after training on the first."""
    inputs, label = features(table), table[:, -1]
    half = len(table) // 2
    return LogisticRegression(max_iter=1000).fit(inputs[:half], label[:half]).score(inputs[half:], label[half:])


def test_lengths_and_languages_do_not_tell_the_label_unless_pairs_are_drawn_carelessly(drawn):
    assert accuracy_of_logistic_regression(drawn) <= 0.52
    # Careless: a text of any length and language is the second of a pair from two repositories.
    careless, different = drawn.copy(), np.flatnonzero(drawn[:, 6] == 0)
    second = [1, 3, 5]
    careless[np.ix_(different, second)] = drawn[np.ix_(np.random.default_rng(1).permutation(different), second)]
    assert accuracy_of_logistic_regression(careless) > 0.62


def test_labels_are_true_and_equally_likely_and_languages_mixed_as_within_repositories(drawn):
    assert 0.49 < drawn[:, -1].mean() < 0.51
    assert ((drawn[:, 4] == drawn[:, 5]) == drawn[:, 6]).all()
    same_language = drawn[:, 2] == drawn[:, 3]
    assert 0.55 < same_language.mean() < 0.9
    assert abs(same_language[drawn[:, 6] == 1].mean() - same_language[drawn[:, 6] == 0].mean()) < 0.03


@pytest.mark.parametrize("position", [4, 5])
def test_one_snippets_repository_does_not_tell_the_label(drawn, position):
    counts = [np.bincount(drawn[drawn[:, 6] == label][:, position], minlength=REPOSITORIES) for label in (0, 1)]
    shares = np.array([one / one.sum() for one in counts])
    noise = np.sqrt(shares.mean(axis=0) * 2 / HALF) + 1e-9
    assert (np.abs(shares[0] - shares[1]) / noise).max() < 4
    assert shares.max() > 3 / REPOSITORIES


def test_every_usable_text_is_drawn_and_no_other(telling):
    sampler = PairSampler(telling, room=128)
    seen = Counter()
    for i in range(25_000):
        pair = sampler.draw(np.random.default_rng((3, i)))
        assert pair.first.row != pair.second.row
        for snippet in pair[:2]:
            seen[snippet.row] += 1
            assert snippet.start + snippet.length <= len(telling.rows[snippet.row])
    lengths = np.diff(telling.rows.bounds)
    usable = set(np.flatnonzero(lengths >= 16).tolist())
    assert set(seen) <= usable
    assert sampler.dropped_texts == len(telling) - len(usable)
    assert len(seen) > 0.99 * len(usable)


def test_a_language_of_one_repository_is_left_out():
    lengths, repositories = [40] * 8, [0, 0, 0, 1, 1, 2, 2, 2]
    sampler = PairSampler(corpus(lengths, repositories, [0, 0, 1, 0, 0, 2, 2, 2]), room=64)
    assert sampler.repositories.tolist() == [0, 1]
    assert sampler.dropped_texts == 4


@pytest.mark.parametrize(
    ("lengths", "room", "expected"),
    [
        ([20, 100, 30, 31], 300, {(20, 30), (20, 31), (30, 20), (31, 20)}),  # no two repositories have equal lengths
        ([20, 500] * 8, 100, {(20, 20), (20, 80), (80, 20), (50, 50)}),  # a short snippet leaves room to the other
    ],
)
def test_pairs_of_any_lengths_are_found_and_fill_the_room(lengths, room, expected):
    half = len(lengths) // 2
    sampler = PairSampler(corpus(lengths, [0] * half + [1] * half, [0] * len(lengths)), room=room)
    pairs = [sampler.draw(np.random.default_rng((0, i))) for i in range(200)]
    assert {(pair.first.length, pair.second.length) for pair in pairs} == expected
    assert len({pair.same_repository for pair in pairs}) == 2


def test_rows_of_texts_of_630_tokens_have_about_1120_and_one_in_seven_is_full():
    rng = np.random.default_rng(0)
    repositories = np.repeat(np.arange(400), 50)
    lengths = np.clip(np.exp(rng.normal(6.075, 1.0, size=20_000)), 16, 2048).astype(int)
    assert 625 < lengths.mean() < 635
    sampler = PairSampler(corpus(lengths, repositories, np.zeros(20_000, int)), room=2045)
    pairs = [sampler.draw(np.random.default_rng((0, i))) for i in range(5000)]
    tokens = np.array([pair.first.length + pair.second.length + 3 for pair in pairs])
    assert tokens.max() == 2048
    assert 1090 < tokens.mean() < 1150
    assert 0.13 < np.mean(tokens == 2048) < 0.16
