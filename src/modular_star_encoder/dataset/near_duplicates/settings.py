"""What counts as a near-duplicate, and how thoroughly the pairs are looked for."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

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
