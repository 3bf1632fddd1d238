"""Settings that define near-duplicates, and MinHash fingerprints of texts, in memory and on disk."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field as Constraint

from modular_star_encoder.utils.errors import naming_extra
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
_FILES = ("text", "bounds", "digests", "keys")


@dataclass(frozen=True, slots=True)
class Banding:
    """Groups a MinHash signature into `bands` bands of `rows` values; texts with an equal band are compared."""

    bands: int
    rows: int

    def candidate_probability(self, jaccard: float | np.ndarray) -> float | np.ndarray:
        """Return the probability that texts of this Jaccard similarity are compared: 1 − (1 − jaccard^rows)^bands.

        Source: Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4.2.
        """
        return 1 - (1 - jaccard**self.rows) ** self.bands


@cache
def optimal_banding(threshold: float, miss_weight: float = 0.5) -> Banding:
    """Return the banding with the smallest error at `threshold`, for pairs with similarities spread evenly from 0 to 1.

    The error is the share of pairs below the threshold that are compared, times 1 − `miss_weight`, plus the share of
    pairs above it that are missed, times `miss_weight`, as in datasketch's `MinHashLSH` ("LSH Ensemble", VLDB 2016).
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
        threshold: smallest Jaccard similarity of the sets of shingles at which two texts are near-duplicates.
        recall: `"default"` weighs a missed pair as much as a needless comparison: 25 bands of 10 hashes at a threshold
            of 0.7, which compare 94 % of the pairs of similarity 0.8 and half of the pairs at the threshold. `"high"`
            weighs a missed pair nineteen times as much: 36 bands of 7 hashes, which compare 95 % of the pairs at the
            threshold, and many more pairs below it.
        match: rows with several columns are near-duplicates if one column is near (`"either"`), or all are (`"both"`).
        bucket_limit: a row is compared with at most this many rows that share a band with it, smallest ids first. So
            the work is linear in the number of rows: at worst bands × `bucket_limit` pairs of eight bytes for each row.
            Ordinary corpora have less than one pair for each row.
        giant_cluster: a cluster of at most this many different rows keeps one row. Similarity is not transitive: chains
            of near-duplicates join unlike rows, and boilerplate can chain a whole corpus. In a larger cluster, a row
            is kept unless it is near a kept row of smaller id.
    """

    threshold: Annotated[Float, Constraint(gt=0, le=1)] = 0.7
    recall: Literal["default", "high"] = "default"
    match: Literal["either", "both"] = "either"
    bucket_limit: Count = 50
    giant_cluster: Count = 1000

    @property
    def banding(self) -> Banding:
        """The banding that `threshold` and `recall` ask for."""
        return optimal_banding(self.threshold, _MISS_WEIGHTS[self.recall])


def hash_shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash the shingles of `texts`, one text after the other; repeated shingles are kept.

    A shingle is `SHINGLE_CHARACTERS` code points; a shorter text is one shingle, a blank text has none.

    Returns:
        `hashes`, uint64 (shingles,), and `bounds`, int64 (texts + 1,): the hashes of text i are
        `hashes[bounds[i]:bounds[i + 1]]`.
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
    """Return for each text the hashes of its distinct shingles, ascending, uint64 (distinct shingles,)."""
    sets = []
    for batch in _batches(texts):
        hashes, bounds = hash_shingles(batch)
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            one = np.sort(hashes[start:end])
            sets.append(one[np.concatenate(([True], one[1:] != one[:-1]))] if len(one) else one)
    return sets


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Jaccard similarity of two sets from `shingle_sets`; 0 if one of them is empty."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / max(len(first) + len(second) - common, 1)


def _batches(texts: Iterable[str | None]) -> Iterator[list[str]]:
    """Yield batches of up to `_TEXTS_PER_BATCH` texts, `_CHARACTERS_PER_BATCH` characters; a longer text is alone."""
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


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """The MinHash fingerprints of n texts, in the order of the texts."""

    digests: np.ndarray  # uint64 (n, 2): equal for equal texts, and zero for blank ones
    lengths: np.ndarray  # int64 (n,): characters; an upper bound where the text is stored as UTF-8
    keys: np.ndarray  # uint64 (n, bands): texts that share a key are compared; meaningless for blank texts


def fingerprint(texts: Iterable[str | None], banding: Banding) -> Fingerprints:
    """Return the fingerprints of `texts`; None is treated as a blank text."""
    empty = np.empty((0, 2), np.uint64), np.empty(0, np.int64), np.empty((0, banding.bands), np.uint64)
    parts = [empty, *(_fingerprint(batch, banding) for batch in _batches(texts))]
    return Fingerprints(*map(np.concatenate, zip(*parts, strict=True)))


def _fingerprint(batch: list[str], banding: Banding) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    contents = [text.encode("utf-8", "surrogatepass") if text.strip() else b"" for text in batch]
    digests = b"".join(hashlib.blake2b(one, digest_size=16).digest() if one else bytes(16) for one in contents)
    hashes, bounds = hash_shingles(batch)
    matrix = minhash_class().digest_matrix_from_flat_token_hashes(hashes, bounds.astype(np.uint64), PERMUTATIONS, _SEED)
    # `array` reads a list of integers in half the time that numpy takes.
    rows = b"".join(array("I", row).tobytes() for row in matrix.to_rows())
    signatures = np.frombuffer(rows, np.uint32).reshape(len(batch), PERMUTATIONS)
    values = signatures[:, : banding.bands * banding.rows].reshape(-1, banding.bands, banding.rows)
    keys = np.zeros(values.shape[:2], np.uint64)
    for row in range(banding.rows):
        keys = (keys ^ values[:, :, row]) * _MIX
        keys ^= keys >> _SHIFT
    return np.frombuffer(digests, "<u8").reshape(-1, 2), np.array([len(text) for text in batch], np.int64), keys


def minhash_class() -> Any:
    """Return rensa's class `RMinHash`; if rensa is missing, an ImportError names the extra to install."""
    with naming_extra():
        from rensa import RMinHash
    return RMinHash


def store_fingerprints(
    folder: Path, batches: Iterable[Sequence[Sequence[str | None]]], columns: int, banding: Banding
) -> None:
    """Write texts and their fingerprints to a folder, as flat little-endian arrays; `StoredColumn` reads them.

    `batches` gives, for some rows at a time, the texts of each column.
    """
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        outputs = [
            {name: stack.enter_context((folder / f"{column}.{name}").open("wb")) for name in _FILES}
            for column in range(columns)
        ]
        ends = np.zeros(columns, "<i8")
        for files in outputs:
            files["bounds"].write(bytes(8))
        for batch in batches:
            for column, (files, texts) in enumerate(zip(outputs, batch, strict=True)):
                prints = fingerprint(texts, banding)
                content = [(text or "").encode("utf-8", "surrogatepass") for text in texts]
                bounds = ends[column] + np.cumsum([len(one) for one in content], dtype="<i8")
                ends[column] = bounds[-1] if len(bounds) else ends[column]
                files["text"].writelines(content)
                for name, values in (("bounds", bounds), ("digests", prints.digests), ("keys", prints.keys)):
                    files[name].write(values.astype(values.dtype.newbyteorder("<")).tobytes())


class StoredColumn:
    """One memory-mapped column that `store_fingerprints` wrote: `self[row]` is a text, `prints` the fingerprints."""

    def __init__(self, folder: Path, column: int, banding: Banding) -> None:
        def mapped(name: str, dtype: str) -> np.ndarray:
            path = folder / f"{column}.{name}"
            # An empty file can't be mapped. Slices of a plain view cost less than slices of `np.memmap`.
            return np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.empty(0, dtype)

        self._text, self._bounds = mapped("text", "u1"), mapped("bounds", "<i8")
        digests, keys = mapped("digests", "<u8").reshape(-1, 2), mapped("keys", "<u8").reshape(-1, banding.bands)
        self.prints = Fingerprints(digests, np.diff(self._bounds), keys)

    def __len__(self) -> int:
        return len(self.prints.digests)

    def __getitem__(self, row: int) -> str:
        start, stop = self._bounds[row : row + 2]
        return self._text[start:stop].tobytes().decode("utf-8", "surrogatepass")
