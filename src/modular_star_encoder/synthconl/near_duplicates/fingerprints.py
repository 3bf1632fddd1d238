"""What counts as a near-duplicate, and how thoroughly the pairs are looked for."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

SHINGLE_CHARACTERS = 5
PERMUTATIONS = 256

_MISS_WEIGHTS = {"default": 0.5, "high": 0.95}


@dataclass(frozen=True, slots=True)
class Banding:
    """How the values of a MinHash signature are grouped: `bands` groups of `rows` values.

    Two texts are compared when all values of one band are equal.
    """

    bands: int
    rows: int

    def candidate_probability(self, jaccard: float | np.ndarray) -> float | np.ndarray:
        """The probability that texts of this Jaccard similarity are compared: 1 − (1 − jaccard^rows)^bands.

        Source: Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4.2.
        """
        return 1 - (1 - jaccard**self.rows) ** self.bands


@cache
def optimal_banding(threshold: float, miss_weight: float = 0.5, permutations: int = PERMUTATIONS) -> Banding:
    """The banding that errs least at `threshold`, over texts of all similarities from 0 to 1.

    Minimised is the weighted sum of two areas under the curve of `Banding.candidate_probability`: pairs compared below
    the threshold, weighted 1 − `miss_weight`, and pairs missed above it, weighted `miss_weight`.

    Source: the rule of datasketch's `MinHashLSH`, after Zhu et al., "LSH Ensemble", VLDB 2016.
    """
    similarity = (np.arange(1000) + 0.5) / 1000

    def error(banding: Banding) -> float:
        compared = banding.candidate_probability(similarity)
        missed = np.where(similarity >= threshold, 1 - compared, 0)
        in_vain = np.where(similarity < threshold, compared, 0)
        return float(miss_weight * missed.sum() + (1 - miss_weight) * in_vain.sum())

    return min(
        (Banding(bands, rows) for rows in range(1, permutations + 1) for bands in range(1, permutations // rows + 1)),
        key=error,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateSettings:
    """What counts as a near-duplicate.

    Attributes:
        threshold: Smallest Jaccard similarity of the sets of shingles at which two texts are near-duplicates.
        recall: `"default"` is the banding with the least error, 25 bands of 10 at a threshold of 0.7: it compares 94 %
            of the pairs of similarity 0.8 and half of those right at the threshold. `"high"` weighs misses nineteen
            times as much, 36 bands of 7: it compares 95 % at the threshold, and several times as many pairs in vain.
        match: Of several columns, whether `"either"` makes two rows near-duplicates, or `"both"` (all) must be near.
        bucket_limit: Rows that share a band are compared with the so many smallest ids among them, so that the work is
            linear in the number of rows, however many share a band: at the worst bands × `bucket_limit` pairs a row, of
            eight bytes each while they are listed. In ordinary corpora there is less than one pair a row.
        giant_cluster: A cluster of more than so many different rows is not reduced to one of them. Similarity is not
            transitive: by chains of near-duplicates, unlike rows come into one cluster, and boilerplate can chain a
            whole corpus. In such a cluster, rows are kept in order of their ids unless near one kept before.
    """

    threshold: float = 0.7
    recall: Literal["default", "high"] = "default"
    match: Literal["either", "both"] = "either"
    bucket_limit: int = 50
    giant_cluster: int = 1000

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: A value is out of its range.
        """
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, not {self.threshold}.")
        for name, choices in (("recall", tuple(_MISS_WEIGHTS)), ("match", ("either", "both"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {getattr(self, name)!r}.")
        for name in ("bucket_limit", "giant_cluster"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def banding(self) -> Banding:
        """The banding that `threshold` and `recall` ask for."""
        return optimal_banding(self.threshold, _MISS_WEIGHTS[self.recall])


# Odd numbers without structure: initial values of SHA-512, made odd.
_MULTIPLIERS = tuple(
    np.uint64(value)
    for value in (0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1, 0x510E527FADE682D1)
)
_MIX, _HALF = np.uint64(0x9B05688C2B3E6C1F), np.uint64(32)
# Few enough that their arrays stay in the processor's cache.
_TEXTS_PER_BATCH, _CHARACTERS_PER_BATCH = 128, 1 << 18
_FILLER = "\U0010ffff"  # no character, and never to become one


def hash_shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash the shingles of `texts`, one after the other and with repetitions.

    Returns:
        The hashes, uint64 (shingles,), and bounds, int64 (texts + 1,): those of text i are from bounds[i] to
        bounds[i + 1].
    """
    size = SHINGLE_CHARACTERS
    padded = [text if len(text) >= size else text and text.ljust(size, _FILLER) for text in map(_unless_blank, texts)]
    lengths = np.array([len(text) for text in padded], np.int64)
    bounds = np.concatenate(([0], np.cumsum(np.maximum(lengths - size + 1, 0))))
    if not bounds[-1]:
        return np.empty(0, np.uint64), bounds
    characters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    windows = len(characters) - size + 1
    hashes = characters[:windows] * _MULTIPLIERS[0]
    for offset in range(1, size):
        hashes += characters[offset : offset + windows] * _MULTIPLIERS[offset]
    # A sum of products is regular in its low bits; mixing, which is a bijection, makes no two hashes equal.
    hashes ^= hashes >> _HALF
    hashes *= _MIX
    hashes ^= hashes >> _HALF
    inside_one_text = np.ones(len(characters), bool)
    ends = np.cumsum(lengths)
    for offset in range(1, size):
        inside_one_text[ends - offset] = False
    return hashes[inside_one_text[:windows]], bounds


def shingle_sets(texts: Iterable[str]) -> list[np.ndarray]:
    """The hashes of each text's shingles without repetition, ascending: uint64 (distinct shingles,)."""
    sets = []
    for batch in batches(texts):
        hashes, bounds = hash_shingles(batch)
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            one = np.sort(hashes[start:end])
            sets.append(one[np.concatenate(([True], one[1:] != one[:-1]))] if len(one) else one)
    return sets


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two results of `shingle_sets`; 0 if one of them is empty."""
    if not len(first) or not len(second):
        return 0.0
    both = np.concatenate((first, second))
    both.sort()
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    return common / (len(both) - common)


def batches(texts: Iterable[str | None]) -> Iterator[list[str]]:
    """Yield `texts` in batches that are bounded by their number and, but for a single longer text, their characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        text = text or ""
        if batch and (len(batch) == _TEXTS_PER_BATCH or characters + len(text) > _CHARACTERS_PER_BATCH):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


def is_blank(text: str | None) -> bool:
    """Whether there is nothing to compare: no text, or white space alone."""
    return not text or text.isspace()


def _unless_blank(text: str) -> str:
    return "" if is_blank(text) else text


_SEED = 1
_MULTIPLIER, _SHIFT = np.uint64(0x9B05688C2B3E6C1F), np.uint64(29)


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """Of n texts, in order.

    Attributes:
        digests: uint64 (n, 2): equal for equal texts, and zero for blank ones.
        lengths: int64 (n,): characters.
        keys: uint64 (n, bands): texts that share one are to be compared; meaningless for blank texts.
    """

    digests: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray


def fingerprint(texts: Iterable[str | None], banding: Banding) -> Fingerprints:
    """Fingerprint `texts`; None counts as blank.

    Raises:
        ImportError: rensa isn't installed.
    """
    parts = [_fingerprint(batch, banding) for batch in batches(texts)]
    if not parts:
        return Fingerprints(np.empty((0, 2), np.uint64), np.empty(0, np.int64), np.empty((0, banding.bands), np.uint64))
    return Fingerprints(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("digests", "lengths", "keys"))
    )


def digest(text: str) -> bytes:
    """16 bytes that are equal for equal texts, and zero for blank ones."""
    if is_blank(text):
        return bytes(16)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _fingerprint(batch: list[str], banding: Banding) -> Fingerprints:
    digests = np.frombuffer(b"".join(map(digest, batch)), "<u8").reshape(-1, 2)
    lengths = np.array([len(text) for text in batch], np.int64)
    return Fingerprints(digests, lengths, _band_keys(_signatures(batch), banding))


def _signatures(batch: list[str]) -> np.ndarray:
    hashes, bounds = hash_shingles(batch)
    matrix = minhash_class().digest_matrix_from_flat_token_hashes(hashes, bounds.astype(np.uint64), PERMUTATIONS, _SEED)
    # By way of `array`, which reads a list of integers in half the time that numpy takes.
    rows = b"".join(array("I", row).tobytes() for row in matrix.to_rows())
    return np.frombuffer(rows, np.uint32).reshape(len(batch), PERMUTATIONS)


def _band_keys(signatures: np.ndarray, banding: Banding) -> np.ndarray:
    values = signatures[:, : banding.bands * banding.rows].reshape(-1, banding.bands, banding.rows)
    keys = np.zeros(values.shape[:2], np.uint64)
    for row in range(banding.rows):
        keys = (keys ^ values[:, :, row]) * _MULTIPLIER
        keys ^= keys >> _SHIFT
    return keys


def minhash_class() -> Any:
    """rensa's `RMinHash`.

    Raises:
        ImportError: rensa isn't installed.
    """
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise ImportError("Near-duplicates need rensa: pip install 'modular-star-encoder[dataset]'.") from error
    return RMinHash
