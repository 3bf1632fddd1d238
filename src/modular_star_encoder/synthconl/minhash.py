"""Settings that define near-duplicates, and MinHash fingerprints of texts."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field as Constraint
from rensa import RMinHash

from modular_star_encoder.utils.settings import Count, Float, settings_class

SHINGLE_CHARACTERS = 5
PERMUTATIONS = 256
_MISS_WEIGHTS = {"default": 0.5, "high": 0.95}
# Small enough that a batch's arrays stay in the processor's cache.
_TEXTS_PER_BATCH, _CHARACTERS_PER_BATCH = 128, 1 << 18
_SEED = 1
# Odd numbers without structure: initial values of SHA-512, made odd.
_MULTIPLIERS = tuple(
    np.uint64(value)
    for value in (0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1, 0x510E527FADE682D1)
)
_MIX, _HALF, _SHIFT = np.uint64(0x9B05688C2B3E6C1F), np.uint64(32), np.uint64(29)
_FILLER = "\U0010ffff"  # Unicode never assigns it


@dataclass(frozen=True, slots=True)
class Banding:
    """A split of a MinHash signature into `bands` bands of `rows` values; texts with an equal band are compared."""

    bands: int
    rows: int

    def candidate_probability(self, jaccard: float | np.ndarray) -> float | np.ndarray:
        """Return the probability that two texts of this similarity are compared: 1 − (1 − jaccard^rows)^bands.

        Source: Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4.2.
        """
        return 1 - (1 - jaccard**self.rows) ** self.bands


@cache
def optimal_banding(threshold: float, miss_weight: float = 0.5) -> Banding:
    """Return the banding with the smallest error at `threshold`, for pairs with similarities spread evenly from 0 to 1.

    The error is (1 − `miss_weight`) × (share of pairs that are below the threshold and compared) + `miss_weight` ×
    (share of pairs that reach it and are not compared), as in datasketch's `MinHashLSH` ("LSH Ensemble", VLDB 2016).
    """
    similarity = (np.arange(1000) + 0.5) / 1000

    def error(banding: Banding) -> float:
        compared = banding.candidate_probability(similarity)
        missed = np.where(similarity >= threshold, 1 - compared, 0)
        in_vain = np.where(similarity < threshold, compared, 0)
        return float(miss_weight * missed.sum() + (1 - miss_weight) * in_vain.sum())

    sizes = ((bands, rows) for rows in range(1, PERMUTATIONS + 1) for bands in range(1, PERMUTATIONS // rows + 1))
    return min((Banding(*one) for one in sizes), key=error)


@settings_class
class DuplicateSettings:
    """Settings that define which rows are near-duplicates.

    Args:
        threshold: smallest Jaccard similarity at which two texts are near-duplicates; the sets compared are those of
            the texts' shingles, all substrings of 5 characters.
        recall: `"default"` weighs a missed pair as much as a needless comparison. At a threshold of 0.7, this gives 25
            bands of 10 hashes: 94 % of the pairs of similarity 0.8 are compared, and half of those of similarity 0.7.
            `"high"` weighs a missed pair nineteen times as much: 36 bands of 7 hashes compare 95 % of the pairs of
            similarity 0.7, and many more pairs below it.
        match: two rows are near-duplicates if the texts in one column are (`"either"`), or in all columns (`"both"`).
        bucket_limit: in each band, a row is compared with at most this many of the rows with the same hashes, smallest
            ids first. So there are at most bands × `bucket_limit` pairs of eight bytes per row; ordinary corpora have
            less than one pair per row.
        giant_cluster: a cluster is a group of rows linked by near pairs, directly or through other rows. With at most
            this many different rows, it keeps one row. A larger one can join unlike rows, because boilerplate links
            them; it drops a row only if it is near a kept row of smaller id.
    """

    threshold: Annotated[Float, Constraint(gt=0, le=1)] = 0.7
    recall: Literal["default", "high"] = "default"
    match: Literal["either", "both"] = "either"
    bucket_limit: Count = 50
    giant_cluster: Count = 1000

    @property
    def banding(self) -> Banding:
        """The banding for `threshold` and `recall`; see `optimal_banding`."""
        return optimal_banding(self.threshold, _MISS_WEIGHTS[self.recall])


def hash_shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash the shingles of each text; repeated shingles are kept.

    A shingle is a substring of `SHINGLE_CHARACTERS` code points. A shorter text is one shingle; a blank text has none.

    Returns:
        `hashes`, uint64 (number of shingles in all texts,), and `bounds`, int64 (number of texts + 1,): the hashes of
        text i are `hashes[bounds[i]:bounds[i + 1]]`.
    """
    size = SHINGLE_CHARACTERS
    padded = [text.ljust(size, _FILLER) if text.strip() else "" for text in texts]
    lengths = np.array([len(text) for text in padded], np.int64)
    bounds = np.concatenate(([0], np.cumsum(np.maximum(lengths - size + 1, 0))))
    if not bounds[-1]:
        return np.empty(0, np.uint64), bounds
    characters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    windows = len(characters) - size + 1
    hashes = characters[:windows] * _MULTIPLIERS[0]
    for offset in range(1, size):
        hashes += characters[offset : offset + windows] * _MULTIPLIERS[offset]
    # A sum of products is regular in its low bits; mixing is a bijection, so it creates no collisions.
    hashes ^= hashes >> _HALF
    hashes *= _MIX
    hashes ^= hashes >> _HALF
    inside_one_text = np.ones(len(characters), bool)
    ends = np.cumsum(lengths)
    for offset in range(1, size):
        inside_one_text[ends - offset] = False
    return hashes[inside_one_text[:windows]], bounds


def shingle_sets(texts: Iterable[str]) -> list[np.ndarray]:
    """Return one array per text: the hashes of its distinct shingles, ascending, uint64 (distinct shingles,)."""
    sets: list[np.ndarray] = []
    for batch in _batches(texts):
        hashes, bounds = hash_shingles(batch)
        sets += map(np.unique, np.split(hashes, bounds[1:-1]))
    return sets


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Jaccard similarity of two arrays from `shingle_sets`; 0 if either is empty."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / max(len(first) + len(second) - common, 1)


def _batches(texts: Iterable[str | None]) -> Iterator[list[str]]:
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


def fingerprint(texts: Iterable[str | None], banding: Banding) -> pa.StructArray:
    """Return one element per text, in the order of the texts; None is treated as a blank text.

    Each element has the fields

    - `text`: the text in UTF-8, which may contain lone surrogates;
    - `digest`: two uint64, the same for equal texts and zero for blank texts;
    - `keys`: a uint64 per band; two texts with the same key in a band are compared. Meaningless for blank texts.
    """
    contents: list[bytes] = []
    digests = bytearray()
    keys = [np.empty((0, banding.bands), np.uint64)]
    for batch in _batches(texts):
        for text in batch:
            contents.append(text.encode("utf-8", "surrogatepass"))
            digests += blake2b(contents[-1], digest_size=16).digest() if text.strip() else bytes(16)
        keys.append(_band_keys(batch, banding))
    fields = {
        "text": pa.array(contents, pa.large_binary()),
        "digest": pa.FixedSizeListArray.from_arrays(np.frombuffer(digests, np.uint64), 2),
        "keys": pa.FixedSizeListArray.from_arrays(np.concatenate(keys).ravel(), banding.bands),
    }
    return pa.StructArray.from_arrays(list(fields.values()), list(fields))


def _band_keys(batch: list[str], banding: Banding) -> np.ndarray:
    """Return one hash per text and band, uint64 (texts, bands)."""
    hashes, bounds = hash_shingles(batch)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, bounds.astype(np.uint64), PERMUTATIONS, _SEED)
    # `array` reads a list of integers in half the time that numpy takes.
    rows = b"".join(array("I", row).tobytes() for row in matrix.to_rows())
    signatures = np.frombuffer(rows, np.uint32).reshape(len(batch), PERMUTATIONS)
    values = signatures[:, : banding.bands * banding.rows].reshape(-1, banding.bands, banding.rows)
    keys = np.zeros(values.shape[:2], np.uint64)
    for row in range(banding.rows):
        keys = (keys ^ values[:, :, row]) * _MIX
        keys ^= keys >> _SHIFT
    return keys
