"""Find near-duplicate texts: MinHash bands propose pairs, and the Jaccard similarity of each pair's shingles decides.

Distinct rows are numbered in the order of their ids, so that no result depends on the order of the input. A pair of
rows is stored as one uint64: the first row's number in the upper 32 bits, the second row's number in the lower 32 bits.
"""

import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from itertools import chain
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field as Constraint
from rensa import RMinHash
from tqdm.auto import tqdm

from modular_star_encoder.utils.settings import Count, Float, settings_class

SHINGLE_CHARACTERS = 5  # a shorter text is one shingle, a blank text has none
PERMUTATIONS = 256
_MISS_WEIGHTS = {"default": 0.5, "high": 0.95}
# Small enough that a batch's arrays stay in the processor's cache.
_TEXTS_PER_BATCH, _CHARACTERS_PER_BATCH = 128, 1 << 18
_SEED = 1
# Odd numbers without structure: initial values of SHA-512, made odd.
_MULTIPLIERS = np.array(
    [0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1, 0x510E527FADE682D1], np.uint64
)
_MIX, _HALF, _MIXING_SHIFT = np.uint64(0x9B05688C2B3E6C1F), np.uint64(32), np.uint64(29)
_FILLER = "\U0010ffff"  # pads short texts; Unicode never assigns this code point


class Banding(NamedTuple):
    """A split of a MinHash signature into `bands` bands of `rows` values; texts that agree in a band are compared."""

    bands: int
    rows: int

    def candidate_probability(self, jaccard: float | np.ndarray) -> float | np.ndarray:
        """Return the probability that texts of similarity `jaccard` are compared (Leskovec et al., MMDS, 3.4.2)."""
        return 1 - (1 - jaccard**self.rows) ** self.bands


@cache
def optimal_banding(threshold: float, miss_weight: float = 0.5) -> Banding:
    """Return the `Banding` that minimises w × missed pairs + (1 − w) × needless comparisons, with w = `miss_weight`."""
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
        threshold: smallest Jaccard similarity at which two texts are near-duplicates; the sets compared are their
            shingles (all substrings of 5 characters).
        recall: `"default"` weighs a missed pair as much as a needless comparison. At a threshold of 0.7, this gives
            25 bands of 10 hashes, so 94 % of the pairs of similarity 0.8 are compared, and half of the pairs of
            similarity 0.7. `"high"` weighs a missed pair nineteen times as much as a needless comparison. This gives
            36 bands of 7 hashes, so 95 % of the pairs of similarity 0.7 are compared.
        match: two rows are near-duplicates if their texts are near in at least one column (`"either"`) or in all
            columns (`"both"`).
        bucket_limit: in each band, a row is compared with at most this number of the rows that have the same hashes;
            rows of smaller ids come first. Each row needs memory for at most bands × `bucket_limit` pairs of 8 bytes.
        giant_cluster: largest number of different rows in a cluster that keeps only one row. A cluster is a group of
            rows linked by near pairs, directly or through other rows. A larger cluster may link unlike rows through
            boilerplate, so a row in it is dropped only if it is near a kept row of smaller id.
    """

    threshold: Annotated[Float, Constraint(gt=0, le=1)] = 0.7
    recall: Literal["default", "high"] = "default"
    match: Literal["either", "both"] = "either"
    bucket_limit: Count = 50
    giant_cluster: Count = 1000

    @property
    def banding(self) -> Banding:
        """The number of MinHash bands, and of hashes in a band, for `threshold` and `recall`."""
        return optimal_banding(self.threshold, _MISS_WEIGHTS[self.recall])


def hash_shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of all shingles, uint64, and bounds; text i has those from `bounds[i]` to `bounds[i + 1]`."""
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
    # Mix the bits, because the low bits of such sums are regular. Mixing is a bijection: it adds no collisions.
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
    """Return a struct per text: `text` in UTF-8; `digest`, a hash of two uint64 (0 for a blank text); and `keys`.

    `keys` has one uint64 per band: texts with the same key in a band are compared.
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
        keys ^= keys >> _MIXING_SHIFT
    return keys


KEPT, EQUAL, NEAR = "kept", "equal to another row", "near another row"
_KEPT, _EQUAL, _NEAR, _FIRST_SET = range(4)
_SHIFT, _LOW = np.uint64(32), np.uint64(2**32 - 1)
_BYTES_AT_A_TIME, _BYTES_OF_PAIR = 1 << 23, 1 << 10  # limit memory: a byte of text becomes up to 8 bytes of hashes


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Says which of n rows are kept, and why the others are dropped. A row's number is its position in the input."""

    kept: np.ndarray  # bool (n,)
    reasons: tuple[str, ...]  # the possible reasons; `reasons[reason[i]]` is the reason for row i
    reason: np.ndarray  # int64 (n,)
    clusters: np.ndarray  # int64 (n,): the row of smallest id in the cluster of row i; i itself if row i is alone
    # int64 (n,): the row most similar to row i, or the number of the near text in another set; −1 if row i is kept
    nearest: np.ndarray
    similarity: np.ndarray  # float64 (n,): the Jaccard similarity of row i and `nearest[i]`; 0 if row i is kept
    pairs: np.ndarray  # int64 (pairs, 2): near, but not equal, rows that are near no other set; smaller id first
    pair_similarities: np.ndarray  # float64 (pairs,): the Jaccard similarity of each of `pairs`
    # For each cluster of more than `giant_cluster` different rows: {`cluster`: its row of smallest id, `rows`: number
    # of its rows, `kept`: number of its rows that are kept}
    giant_clusters: tuple[dict[str, int], ...]
    compared: int  # number of pairs of rows that were compared; with `match="either"`, the sum over the columns
    largest_bucket: int  # largest number of distinct rows with the same key in a band
    rows_over_limit: int  # largest number of rows in a band that `bucket_limit` kept from some comparisons

    @property
    def counts(self) -> dict[str, int]:
        """{reason to keep or drop a row: number of rows}, for each of `reasons`."""
        return dict(zip(self.reasons, np.bincount(self.reason, minlength=len(self.reasons)).tolist(), strict=True))

    @property
    def cluster_sizes(self) -> np.ndarray:
        """The sizes of all clusters with two or more rows, largest first."""
        sizes = np.unique(self.clusters, return_counts=True)[1]
        return np.sort(sizes[sizes > 1])[::-1]


def find_near_duplicates(
    columns: Sequence[Sequence[pa.StructArray]],  # for each column, the `fingerprint` of all its parts
    settings: DuplicateSettings,
    *,
    order: np.ndarray | None = None,  # positions of the rows, sorted by id, int64 (n,); the smallest id is kept
    against: Mapping[str, Sequence[str | None]] | None = None,  # {name of a set: texts}; rows near one are dropped
    progress: bool = False,
) -> NearDuplicates:
    """Return which of n rows are near another row or near a text of `against`; a blank text is near no other text."""
    against = against or {}
    digests = [np.concatenate([_matrix(part, "digest") for part in parts]) for parts in columns]
    order = np.arange(len(digests[0])) if order is None else order
    distinct, numbers = _distinct_rows(np.concatenate(digests, axis=1), order)
    own = [_Column(parts, distinct) for parts in columns]
    other_texts = fingerprint(chain.from_iterable(against.values()), settings.banding)
    others = _Column([other_texts], np.arange(len(other_texts)))
    compare = partial(_near_pairs, threshold=settings.threshold, progress=progress)

    found = [_candidates(one, one, settings.bucket_limit) for one in own]
    candidates = [pairs for pairs, _, _ in found]
    if settings.match == "both":
        candidates = [np.unique(np.concatenate(candidates))]
        near = [compare(candidates[0], own, own)]
    else:
        near = [compare(pairs, [one], [one]) for pairs, one in zip(candidates, own, strict=True)]
    between = [_candidates(one, others, settings.bucket_limit)[0] for one in own]
    near_others = [compare(pairs, [one], [others]) for pairs, one in zip(between, own, strict=True)]
    return _decide(
        distinct,
        numbers,
        _merged(near),
        _merged(near_others),
        against,
        settings.giant_cluster,
        compared=sum(map(len, candidates)),
        largest_bucket=max(largest for _, largest, _ in found),
        rows_over_limit=max(over for _, _, over in found),
    )


def _matrix(part: pa.StructArray, name: str) -> np.ndarray:
    """Return the field `name` (`digest` or `keys`) of fingerprints as uint64 (texts, numbers per text)."""
    numbers = part.field(name)
    return numbers.flatten().to_numpy().reshape(len(part), numbers.type.list_size)


class _Column:
    """The texts and fingerprints of one column in m rows; `rows`, int64 (m,), are the rows' positions in the input."""

    def __init__(self, parts: Sequence[pa.StructArray], rows: np.ndarray) -> None:
        self._parts, self._rows = parts, rows
        self._texts = pa.chunked_array([part.field("text") for part in parts], pa.large_binary())
        self.bytes = pc.binary_length(self._texts).to_numpy()[rows]
        self.digests = np.concatenate([_matrix(part, "digest") for part in parts])[rows]
        self.not_blank = np.flatnonzero(self.digests.any(axis=1))

    def shingle_sets(self, numbers: np.ndarray) -> dict[int, np.ndarray]:
        """Return {number of a row: the hashes of the distinct shingles of its text} for the rows `numbers`."""
        wanted = np.unique(numbers)
        texts = (self._texts[row].as_py().decode("utf-8", "surrogatepass") for row in self._rows[wanted].tolist())
        return dict(zip(wanted.tolist(), shingle_sets(texts), strict=True))

    def keys(self) -> np.ndarray:
        """Return the band keys of the m rows, uint64 (bands, m)."""
        return np.concatenate([_matrix(part, "keys") for part in self._parts])[self._rows].T


def _distinct_rows(digests: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays: the first row in `order` of each set of equal rows, and the number of each row's set.

    Blank rows are never equal.
    """
    by_id = digests[order]
    blank = np.flatnonzero(~by_id.any(axis=1))
    by_id[blank, 0] = blank + 1  # so that no two blank rows are equal
    row_type = pa.binary(by_id.itemsize * by_id.shape[1])
    rows = pa.FixedSizeBinaryArray.from_buffers(row_type, len(by_id), [None, pa.py_buffer(by_id)])
    codes = rows.dictionary_encode().indices.to_numpy()  # numbers in the order in which rows first occur
    numbers = np.empty(len(order), np.int64)
    numbers[order] = codes
    return order[np.unique(codes, return_index=True)[1]], numbers


def _candidates(column: _Column, others: _Column, limit: int) -> tuple[np.ndarray, int, int]:
    """Return (pairs of rows with an equal key, size of the largest bucket, largest number of rows cut in one band).

    Each band gives a row one key; the row's bucket consists of the rows of `others` with this key. If `others` is
    `column`, a bucket has only the rows that come before the row, so that no pair occurs twice. A row is paired with
    the first `limit` rows of its bucket; if the bucket has more rows, the row counts as cut.
    """
    rows, other_rows, within = column.not_blank, others.not_blank, column is others
    pairs, largest, most_over = np.empty(0, np.uint64), 0, 0
    bands = column.keys()
    for keys, other_keys in zip(bands, bands if within else others.keys(), strict=True):
        in_order = other_rows[np.argsort(other_keys[other_rows], kind="stable")]
        rows = in_order if within else rows
        first = np.searchsorted(other_keys[in_order], keys[rows])  # where the bucket of each row begins
        end = np.arange(len(rows)) if within else np.searchsorted(other_keys[in_order], keys[rows], "right")
        counts = end - first
        found = [pairs]
        for leader in range(min(limit, int(counts.max(initial=0)))):
            paired = np.flatnonzero(counts > leader)
            left, right = rows[paired], in_order[first[paired] + leader]
            left, right = (right, left) if within else (left, right)
            found.append((left.astype(np.uint64) << _SHIFT) | right.astype(np.uint64))
        pairs = np.unique(np.concatenate(found))
        largest = max(largest, int(counts.max(initial=-1)) + 1)
        most_over = max(most_over, int(np.count_nonzero(counts > limit)))
    return pairs, largest, most_over


def _ends(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the first and of the second row of each pair, as two arrays int64 (pairs,)."""
    return (pairs >> _SHIFT).astype(np.int64), (pairs & _LOW).astype(np.int64)


def _near_pairs(
    pairs: np.ndarray, firsts: Sequence[_Column], seconds: Sequence[_Column], *, threshold: float, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs with a similarity >= `threshold` in all columns, and each pair's smallest similarity."""
    smallest = np.ones(len(pairs))
    for first, second in zip(firsts, seconds, strict=True):
        smallest = np.minimum(smallest, _similarities(pairs, first, second, progress))
        near = smallest >= threshold
        pairs, smallest = pairs[near], smallest[near]
    return pairs, smallest


def _similarities(pairs: np.ndarray, first: _Column, second: _Column, progress: bool) -> np.ndarray:
    """Return the Jaccard similarity of each pair, float64 (pairs,); 1 for equal texts, even if both are blank."""
    left, right = _ends(pairs)
    result = (first.digests[left] == second.digests[right]).all(axis=1).astype(np.float64)
    unequal = np.flatnonzero(result == 0)
    size = np.cumsum(first.bytes[left[unequal]] + second.bytes[right[unequal]] + _BYTES_OF_PAIR)
    chunks = np.split(unequal, np.flatnonzero(np.diff(size // _BYTES_AT_A_TIME)) + 1)
    for chunk in tqdm(chunks, desc="Comparing", disable=not progress):
        lefts, rights = left[chunk], right[chunk]
        left_sets = first.shingle_sets(np.concatenate((lefts, rights)) if first is second else lefts)
        right_sets = left_sets if first is second else second.shingle_sets(rights)
        numbers = zip(lefts.tolist(), rights.tolist(), strict=True)
        result[chunk] = [jaccard(left_sets[one], right_sets[other]) for one, other in numbers]
    return result


def _merged(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Join the (pairs, similarities) in `parts`, one per column; of a repeated pair, keep the largest similarity."""
    pairs, values = map(np.concatenate, zip(*parts, strict=True))
    sorting = np.lexsort((-values, pairs))
    pairs, first = np.unique(pairs[sorting], return_index=True)
    return pairs, values[sorting][first]


def _decide(
    distinct: np.ndarray,
    numbers: np.ndarray,
    near: tuple[np.ndarray, np.ndarray],
    near_others: tuple[np.ndarray, np.ndarray],
    against: Mapping[str, Sequence[str | None]],
    giant_cluster: int,
    **counts: int,
) -> NearDuplicates:
    """Return which rows are kept.

    Equal rows count as one distinct row. `near` has (pairs of distinct rows that are near, similarities); `near_others`
    has the same for pairs of a distinct row and a text of `against`.

    1. Rows near a text of `against` are dropped. They belong to no cluster.
    2. The other rows form clusters: rows linked by near pairs or equality, directly or through others, share a cluster.
    3. Each cluster keeps its row of smallest id. But in a cluster of more than `giant_cluster` distinct rows, the
       rows are visited in the order of their ids, and one is dropped only if it is equal or near to a row already kept.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(distinct)
    reason = np.full(count, _KEPT)
    found, texts = _ends(near_others[0])
    nearest, similarity = _most_similar(count, found, texts, near_others[1])
    starts = np.cumsum([0, *map(len, against.values())])
    set_of = np.searchsorted(starts, nearest[found], side="right") - 1
    reason[found] = _FIRST_SET + set_of
    nearest[found] -= starts[set_of]

    first, second = _ends(near[0])
    clean = (reason[first] == _KEPT) & (reason[second] == _KEPT)
    first, second, values = first[clean], second[clean], near[1][clean]
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    clusters = np.unique(labels, return_index=True)[1][labels]  # for each row, the row of smallest id in its cluster
    sizes = np.bincount(clusters, minlength=count)
    is_giant = sizes[clusters] > giant_cluster
    kept = (clusters == np.arange(count)) | is_giant
    # Pairs are in ascending order, so all pairs that could drop `one` come before those in which it drops others.
    inside = np.flatnonzero(is_giant[first])
    for one, other in zip(first[inside].tolist(), second[inside].tolist(), strict=True):
        if kept[one]:
            kept[other] = False
    dropped = ~kept
    both_ways = np.concatenate((first, second)), np.concatenate((second, first)), np.concatenate((values, values))
    most_similar, its_similarity = _most_similar(count, *both_ways)
    reason[dropped] = _NEAR
    nearest[dropped], similarity[dropped] = distinct[most_similar[dropped]], its_similarity[dropped]

    # Extend the result to all rows: a copy of a distinct row is dropped as equal, unless the row is near another set.
    copies = np.ones(len(numbers), bool)
    copies[distinct] = False
    copies &= reason[numbers] < _FIRST_SET
    reasons = np.where(copies, _EQUAL, reason[numbers])
    row_clusters = distinct[clusters][numbers]
    alone = np.flatnonzero(reasons >= _FIRST_SET)
    row_clusters[alone] = alone
    giants = []
    for row in distinct[sizes > giant_cluster].tolist():
        members = reasons[row_clusters == row]
        giants.append({"cluster": row, "rows": len(members), "kept": int((members == _KEPT).sum())})
    if giants:
        message = f"{len(giants)} clusters have more than {giant_cluster} different rows. In these clusters,"
        warnings.warn(f"{message} a row is dropped only if it is near a kept row.", stacklevel=2)
    return NearDuplicates(
        kept=reasons == _KEPT,
        reasons=(KEPT, EQUAL, NEAR, *(f"near a text of {name}" for name in against)),
        reason=reasons,
        clusters=row_clusters,
        nearest=np.where(copies, distinct[numbers], nearest[numbers]),
        similarity=np.where(copies, 1.0, similarity[numbers]),
        pairs=np.stack((distinct[first], distinct[second]), axis=1),
        pair_similarities=values,
        giant_clusters=tuple(giants),
        **counts,
    )


def _most_similar(
    count: int, nodes: np.ndarray, partners: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays of size `count`: the most similar partner of each row, and the similarity of the two.

    Of equally similar partners, the first one counts. A row without a partner gets −1 and similarity 0.
    """
    partner, similarity = np.full(count, -1), np.zeros(count)
    sorting = np.lexsort((-partners, values, nodes))  # of several assignments to one place, the last one applies
    partner[nodes[sorting]], similarity[nodes[sorting]] = partners[sorting], values[sorting]
    return partner, similarity
