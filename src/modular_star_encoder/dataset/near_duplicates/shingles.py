"""Sets of character 5-grams as 64-bit hashes, and their Jaccard similarity.

A text of fewer than five characters is one shingle, the whole text; a blank text has none and resembles nothing.
Characters are Unicode code points.

Two different shingles have the same hash with a probability of about 2^-64; two texts of a million shingles each would
count one too many in common once in some ten million pairs.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from modular_star_encoder.dataset.near_duplicates.settings import SHINGLE_CHARACTERS

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
