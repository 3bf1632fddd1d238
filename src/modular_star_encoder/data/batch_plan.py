"""Which rows stand in which batch of fine-tuning: a function of (seed, step) alone.

Contrastive learning takes every other row of a batch for a wrong answer, so rows that say the same must not meet. Rows
that share a description or a code, directly or through others, form a *group*, and a batch takes at most one row of a
group. A hard negative must not say what another row of the batch says, either. Resuming needs no state but the step,
and each process takes its own slice of the batch.
"""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from modular_star_encoder.data.functions import code_key, description_key
from modular_star_encoder.data.pairs import RetrievalExample

TEXT_TO_CODE, CODE_TO_CODE = "text → code", "code → code"

# Streams of random numbers beside those of the two kinds of pairs.
_REPLACEMENTS, _NEGATIVES = 2, 3


class Draw(NamedTuple):
    """One place of a batch: which row of the data, as which kind of pair."""

    row: int
    kind: str


def same_content_groups(texts: Sequence[RetrievalExample]) -> np.ndarray:
    """Number the groups of rows that share a description or a code.

    Descriptions are compared by their letters and digits in lower case, code without regard to white space. A group is
    everything that is connected: if A shares a code with B and B its description with C, A and C are in one group.

    Returns:
        The group of each row, int64 (rows,), numbered from 0 in the order of their first rows.
    """
    parents = list(range(len(texts)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    first_with: dict[bytes, int] = {}
    for row, text in enumerate(texts):
        for key in [description_key(text.description), *(code_key(snippet.code) for snippet in text.snippets)]:
            if key:
                a, b = root(first_with.setdefault(_digest(key), row)), root(row)
                parents[max(a, b)] = min(a, b)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(root(row), len(numbers)) for row in range(len(texts))], dtype=np.int64)


def groups_of_negatives(texts: Sequence[RetrievalExample], groups: np.ndarray) -> np.ndarray | None:
    """The group, int64 (rows,), of the rows whose code is the hard negative of each row; -1 where it is no row's.

    `None` if there is a row without a negative.
    """
    if not texts or any(text.negative is None for text in texts):
        return None
    group_of = {
        _digest(code_key(snippet.code)): group
        for text, group in zip(texts, groups.tolist(), strict=True)
        for snippet in text.snippets
    }
    return np.array([group_of.get(_digest(code_key(text.negative.code)), -1) for text in texts], dtype=np.int64)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=12).digest()


class PairGroups:
    """The groups that give each kind of pairs, with their rows.

    Attributes:
        numbers: kind → the numbers of its groups, int64 (groups,); kinds without pairs are missing.
        rows: kind → the rows of each of these groups.
        of_rows: the group of each row, int64 (all rows,).
        negatives: the group that has the hard negative of each row; see `groups_of_negatives`.
    """

    def __init__(self, texts: Sequence[RetrievalExample]) -> None:
        """Group rows; those with a description give text → code pairs, those with two snippets code → code pairs."""
        rows: dict[str, dict[int, list[int]]] = {TEXT_TO_CODE: defaultdict(list), CODE_TO_CODE: defaultdict(list)}
        groups = same_content_groups(texts)
        self.of_rows, self.negatives = groups, groups_of_negatives(texts, groups)
        for row, (text, group) in enumerate(zip(texts, groups.tolist(), strict=True)):
            if text.description:
                rows[TEXT_TO_CODE][group].append(row)
            if len(text.snippets) > 1:
                rows[CODE_TO_CODE][group].append(row)
        present = [kind for kind in rows if rows[kind]]
        self.numbers = {kind: np.array(list(rows[kind]), dtype=np.int64) for kind in present}
        self.rows = {kind: list(rows[kind].values()) for kind in present}

    @property
    def counts(self) -> dict[str, int]:
        """kind → number of groups."""
        return {kind: len(numbers) for kind, numbers in self.numbers.items()}

    @property
    def largest_batch(self) -> int:
        """The most pairs that a batch can have, whatever is drawn first."""
        if len(self.numbers) < 2:
            return min(sum(self.counts.values()), self.most_beside_a_negative)
        # Each half may have as many as its kind has groups, and the second must find as many beside the first.
        code, text = self.numbers[CODE_TO_CODE], self.numbers[TEXT_TO_CODE]
        common = len(np.intersect1d(code, text))
        beside = max(min(len(code) // 2, common), len(code) - common)
        return 2 * min(len(text), len(code), beside, self.most_beside_a_negative // 2)

    @property
    def most_beside_a_negative(self) -> int:
        """The most groups that a batch can have, if there is always to be a hard negative outside them."""
        if self.negatives is None or (self.negatives < 0).any():
            return sys.maxsize
        return len(np.unique(self.negatives)) - 1


class BatchPlan:
    """The rows of every batch.

    Where the data gives both kinds of pairs, even places of a batch are text → code and odd ones code → code; otherwise
    all are of the one kind there is. The groups of a kind are taken in a random order, a new one in each epoch; what is
    left at the end of an epoch and fills no batch is left out. When it is a group's turn, another of its rows is taken
    in each epoch. A code → code pair whose group already stands in the batch with its description is replaced by
    another one, drawn at random; and so is a hard negative that says what a row of the batch says.
    """

    def __init__(self, groups: PairGroups, batch_size: int, seed: int) -> None:
        """Nothing is drawn yet.

        Args:
            groups: Who may meet whom.
            batch_size: Pairs of one batch, of all processes together; even, if there are both kinds.
            seed: Any integer from 0.

        Raises:
            ValueError: If the batch size is odd or below 2, or larger than what the groups allow.
        """
        self.batch_size, self.seed = batch_size, seed
        self._numbers, self._rows, self._counts = groups.numbers, groups.rows, groups.counts
        self._of_rows, self._negatives = groups.of_rows, groups.negatives
        self._kinds = tuple(groups.numbers)
        largest, beside = groups.largest_batch, groups.most_beside_a_negative
        if batch_size > largest or batch_size < 2 or batch_size % len(self._kinds):
            listed = " and ".join(f"{count} groups of {kind} pairs" for kind, count in self._counts.items())
            raise ValueError(
                f"A batch must have from 2 to {largest} pairs{', an even number' if len(self._kinds) > 1 else ''}, not "
                f"{batch_size}: there are {listed or 'no pairs'} without common texts"
                + (f", and hard negatives of {beside + 1} of them" if beside < batch_size else "")
                + "."
            )
        self._latest: tuple[int, list[Draw]] = (-1, [])
        self._latest_negatives: tuple[int, list[int]] = (-1, [])
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def batch(self, step: int) -> list[Draw]:
        """The rows of the batch with this number, counted from 0, in order."""
        if self._latest[0] != step:
            self._latest = step, self._make_batch(step)
        return self._latest[1]

    def negatives(self, step: int) -> list[int] | None:
        """The row whose hard negative stands at each place of the batch; `None` if rows have none."""
        if self._negatives is None:
            return None
        if self._latest_negatives[0] != step:
            self._latest_negatives = step, self._draw_negatives(step, self._negatives)
        return self._latest_negatives[1]

    def _draw_negatives(self, step: int, groups: np.ndarray) -> list[int]:
        rows = np.array([draw.row for draw in self.batch(step)])
        used = set(self._of_rows[rows].tolist())
        generator = np.random.default_rng((self.seed, _NEGATIVES, step))
        for place, row in enumerate(rows):
            # `PairGroups.largest_batch` sees to it that there is one.
            while int(groups[row]) in used:
                row = generator.integers(len(groups))
            rows[place] = row
        return rows.tolist()

    def _make_batch(self, step: int) -> list[Draw]:
        share = self.batch_size // len(self._kinds)
        chosen: dict[str, tuple[np.ndarray, int]] = {}
        for kind in self._kinds:
            steps_per_epoch = self._counts[kind] // share
            epoch, turn = divmod(step, steps_per_epoch)
            chosen[kind] = self._order(kind, epoch)[turn * share : (turn + 1) * share], epoch
        if len(self._kinds) > 1:
            places, epoch = chosen[CODE_TO_CODE]
            taken = self._numbers[TEXT_TO_CODE][chosen[TEXT_TO_CODE][0]]
            chosen[CODE_TO_CODE] = self._replace_taken(places, taken, step), epoch
        draws = [[self._draw(kind, place, epoch) for place in places] for kind, (places, epoch) in chosen.items()]
        return [draw for together in zip(*draws, strict=True) for draw in together]

    def _draw(self, kind: str, place: int, epoch: int) -> Draw:
        rows = self._rows[kind][place]
        return Draw(rows[epoch % len(rows)], kind)

    def _order(self, kind: str, epoch: int) -> np.ndarray:
        """The places of a kind's groups in the order of an epoch."""
        if self._orders.get(kind, (-1,))[0] != epoch:
            generator = np.random.default_rng((self.seed, self._kinds.index(kind), epoch))
            self._orders[kind] = epoch, generator.permutation(self._counts[kind])
        return self._orders[kind][1]

    def _replace_taken(self, places: np.ndarray, taken: np.ndarray, step: int) -> np.ndarray:
        """The same places of code → code groups, others in place of those whose group is taken."""
        numbers = self._numbers[CODE_TO_CODE]
        meets = np.flatnonzero(np.isin(numbers[places], taken))
        if not len(meets):
            return places
        used = set(taken.tolist()).union(numbers[places].tolist())
        generator, places = np.random.default_rng((self.seed, _REPLACEMENTS, step)), places.copy()
        for index in meets:
            # `PairGroups.largest_batch` sees to it that there is one.
            while int(numbers[place := generator.integers(len(numbers))]) in used:
                pass
            places[index] = place
            used.add(int(numbers[place]))
        return places
