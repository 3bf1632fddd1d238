"""Draws rows for pre-training by in-context classification: two snippets, and whether they are from one repository.

The task is that of the MoSE paper (arXiv 2503.03008).

Two snippets of one repository have the same language more often than snippets of two repositories, and their lengths
are more similar. So a model could guess the label from languages and lengths. The steps below make languages, lengths
and each single snippet *independent of the label*. The *room* is the limit of tokens for both snippets together.

1. **A cell** is the languages (l₁, l₂) of two texts and their lengths in tokens (t₁, t₂), each at most the room. To get
   a cell, draw a repository C with a probability in proportion to the square root of its number of texts, a compromise
   between seeing every text and every repository equally often; then draw two different texts of C, in random order.
   So two languages occur together in cells as often as they do in repositories.
2. **Two repositories** A ≠ B are drawn, with the same weights as C. Each must have two different texts for this cell:
   one in language l₁ with t₁ tokens or more, one in language l₂ with t₂ tokens or more. If no such repositories are
   found, texts of any length in these languages are enough. If that fails too, another cell is drawn.
3. **Two different texts of each repository** are drawn: (a₁, a₂) of A and (b₁, b₂) of B. For i = 1 and 2, aᵢ and bᵢ are
   in language lᵢ, and their lengths differ from tᵢ by at most a tenth. If fewer than 4 texts of a repository qualify,
   its 4 nearest in length are used. If tᵢ is the whole room, all texts of tᵢ or more tokens qualify.
4. **Windows**, parts of texts, are what a row holds. Each begins at a random token of its text. The first window has
   n₁ = min(|a₁|, |b₁|) tokens, the second n₂ = min(|a₂|, |b₂|), where |a| is the number of tokens of a. If n₁ + n₂
   exceeds the room, each window gets half of the room, plus the part of the other half that the other does not need.
5. **The label** is drawn by a fair coin: the row holds windows of a₁ and a₂ for the label "same repository", of a₁ and
   b₂ for "different repositories".

The label is drawn last, so (l₁, l₂, n₁, n₂) has the same distribution for both labels. A and B are exchangeable, even
if the cell and the lengths are known. So a₂ and b₂ have the same distribution, and the second snippet alone does not
reveal the label. The first snippet, a window of a₁ for both labels, does not reveal it either.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.collators import IGNORED_LABEL
from modular_star_encoder.data.token_store import TokenCorpus
from modular_star_encoder.data.tokenizer import ContentEncoder, check_special_tokens, special_token_ids
from modular_star_encoder.utils.errors import UserError

MIN_SNIPPET_TOKENS = 16
MIN_ROW_TOKENS = 3 + 2 * MIN_SNIPPET_TOKENS

_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1  # of the masked tokens, as in BERT; the others stay as they are


class InContextPairs(Dataset[dict[str, torch.Tensor]]):
    """A map-style dataset of `length` rows: two partly masked snippets, and whether both are from one repository.

    Row `i` depends only on the arguments and `i`, so every worker, process and resumed run makes the same row:

    - `input_ids`, int64 (T,): T ≤ `max_tokens` token ids of `<sep> first <sep> second <cls>`, partly masked;
    - `labels`, int64 (T,): the original token ids at the masked positions (at least one), −100 elsewhere;
    - `icc_label`, int64 scalar: 1 if both snippets are from one repository, otherwise 0; both are equally probable.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        tokenizer: PreTrainedTokenizerFast,
        *,
        length: int,
        max_tokens: int,
        mlm_probability: float = 0.15,
        seed: int,
    ) -> None:
        """`mlm_probability`: share of tokens to mask. UserError if `corpus` is too small or from another tokenizer."""
        check_special_tokens(tokenizer)
        if max_tokens < MIN_ROW_TOKENS:
            message = f"max_tokens must be at least {MIN_ROW_TOKENS} (3 of them are special), not {max_tokens}."
            raise UserError("data.in_context.arguments", message)
        if corpus.tokenizer_checksum != ContentEncoder(tokenizer).checksum:
            message = "`corpus` was tokenized by another tokenizer: pass that tokenizer."
            raise UserError("data.in_context.other_tokenizer", message)
        self.length, self.max_tokens, self.mlm_probability, self.seed = length, max_tokens, mlm_probability, seed
        self._sep, self._cls, self._mask = tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id
        self._vocab_size = len(tokenizer)
        self._ordinary_ids = np.setdiff1d(np.arange(len(tokenizer)), special_token_ids(tokenizer))
        # Do not keep the corpus itself: a worker process that gets this dataset would get the corpus's columns too.
        self._rows, self._row_numbers = corpus.rows, corpus.row_numbers
        self._sampler = PairSampler(corpus, room=max_tokens - 3)
        self.repositories = tuple(corpus.repository_names[i] for i in self._sampler.repositories)
        self.dropped_texts = self._sampler.dropped_texts

    def token_counts(self) -> torch.Tensor:
        """Return how often each token id occurs in the corpus, int64 (vocabulary size,)."""
        return torch.from_numpy(self._rows.counts(self._vocab_size, self._row_numbers))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, range(self.length)[index]))  # IndexError beyond the last row
        first, second, same = self._sampler.draw(rng)
        ids = np.empty(first.length + second.length + 3, dtype=np.int64)
        middle = 1 + first.length
        ids[[0, middle, -1]] = self._sep, self._sep, self._cls
        ids[1:middle] = self._rows[first.row][first.start : first.start + first.length]
        ids[middle + 1 : -1] = self._rows[second.row][second.start : second.start + second.length]
        labels = torch.from_numpy(self._mask_some(rng, ids, middle))
        return {"input_ids": torch.from_numpy(ids), "labels": labels, "icc_label": torch.tensor(int(same))}

    def _mask_some(self, rng: np.random.Generator, ids: np.ndarray, middle: int) -> np.ndarray:
        """Mask some of T `ids` in place, not the special tokens (first, `middle`, last); return labels, int64 (T,)."""
        drawn = rng.random(len(ids), dtype=np.float32)
        drawn[[0, middle, -1]] = 1
        chosen = np.flatnonzero(drawn < self.mlm_probability)
        if not len(chosen):
            place = rng.integers(1, len(ids) - 2)
            chosen = np.array([place + (place >= middle)])
        labels = np.full(len(ids), IGNORED_LABEL)
        labels[chosen] = ids[chosen]
        fate = rng.random(len(chosen))
        ids[chosen[fate < _MASK_SHARE]] = self._mask
        randomised = chosen[(fate >= _MASK_SHARE) & (fate < _MASK_SHARE + _RANDOM_SHARE)]
        ids[randomised] = self._ordinary_ids[rng.integers(len(self._ordinary_ids), size=len(randomised))]
        return labels


_BAND = 1.1
_MIN_CANDIDATES = 4
_MAX_PROPOSALS = 64
_MAX_CELLS = 10_000


class Window(NamedTuple):
    """A part of a text: `length` tokens of row number `row` of the corpus, beginning with token number `start`."""

    row: int
    start: int
    length: int


class WindowPair(NamedTuple):
    """Two snippets, windows of different texts, and whether both texts are from one repository."""

    first: Window
    second: Window
    same_repository: bool


class _Proposals(NamedTuple):  # the repositories with texts in one language, in descending order of their longest text
    groups: np.ndarray
    negative_longest: np.ndarray
    cumulative_weights: np.ndarray


_Cell = tuple[tuple[int, int], tuple[int, int]]  # (language, length in tokens) of each of two texts


class PairSampler:
    """Draws pairs of snippets, as the docstring of this module describes.

    The sampler does not use texts of fewer than 16 tokens, the only text of a repository, and texts in a language of
    only one repository; `dropped_texts` is the number of these texts. `repositories` has the indices of the used
    repositories in `corpus.repository_names`.
    """

    def __init__(self, corpus: TokenCorpus, room: int) -> None:
        """`room` is the largest number of tokens that the two snippets of a pair may have together."""
        self.room = room
        numbers = corpus.row_numbers
        lengths = corpus.rows.bounds[numbers + 1] - corpus.rows.bounds[numbers]
        repository, language = corpus.repository_of[numbers], corpus.language_of[numbers]
        used = _usable(repository, language, lengths)
        languages = max(len(corpus.language_names), 1)
        groups, texts = np.unique(repository[used].astype(np.int64) * languages + language[used], return_counts=True)
        qualified = np.bincount(groups[texts >= 2] % languages, minlength=1).max()
        if qualified < 2:
            message = "Training and held-out repositories must each include two that have, in the same language, 2"
            message += f" texts of {MIN_SNIPPET_TOKENS} tokens or more. In the set that begins with"
            message += f" {', '.join(corpus.repositories[:4])}, only {qualified} of"
            message += f" {len(np.unique(repository))} repositories qualify."
            raise UserError("data.in_context.too_few_repositories", f"{message} Add repositories in the same language.")
        self.dropped_texts = len(numbers) - len(used)
        order = used[np.lexsort((lengths[used], language[used], repository[used]))]
        self._rows = numbers[order]
        self._lengths = np.minimum(lengths[order], np.iinfo(np.int32).max).astype(np.int32)
        self.repositories, repository = np.unique(repository[order], return_inverse=True)
        language = language[order]
        # A group: the texts of one repository and one language, the shortest first.
        new = (np.diff(repository) != 0) | (np.diff(language) != 0)
        self._group_bounds = np.concatenate([[0], np.flatnonzero(new) + 1, [len(order)]])
        starts, ends = self._group_bounds[:-1], self._group_bounds[1:]
        self._group_repository, self._group_language = repository[starts], language[starts]
        self._languages = languages
        self._group_keys = self._group_repository.astype(np.int64) * languages + self._group_language
        self._longest = self._lengths[ends - 1]
        self._second_longest = np.where(ends - starts > 1, self._lengths[np.maximum(ends - 2, 0)], 0)
        self._repository_bounds = np.searchsorted(repository, np.arange(len(self.repositories) + 1))
        weights = np.sqrt(np.diff(self._repository_bounds))
        self._cumulative_weights = np.cumsum(weights)
        self._proposals: dict[int, _Proposals] = {}
        for one in np.unique(language).tolist():
            groups = np.flatnonzero(self._group_language == one)
            groups = groups[np.argsort(-self._longest[groups], kind="stable")]
            cumulative = np.cumsum(weights[self._group_repository[groups]])
            self._proposals[one] = _Proposals(groups, -self._longest[groups], cumulative)

    def draw(self, rng: np.random.Generator) -> WindowPair:
        """Return a random pair; RuntimeError if 10,000 tries find no two repositories for it."""
        for _ in range(_MAX_CELLS):
            cell = self._draw_cell(rng)
            any_length = (cell[0][0], 0), (cell[1][0], 0)
            if found := self._draw_repositories(rng, cell) or self._draw_repositories(rng, any_length):
                break
        else:
            raise RuntimeError("Too few repositories share a language: leave out the languages of only one repository.")
        first, partner = self._draw_texts(rng, found[0], cell)
        first_alternative, stranger = self._draw_texts(rng, found[1], cell)
        longest_first = int(min(self._lengths[first], self._lengths[first_alternative]))
        longest_second = int(min(self._lengths[partner], self._lengths[stranger]))
        first_length = min(longest_first, self.room - min(longest_second, self.room // 2))
        second_length = min(longest_second, self.room - first_length)
        same = rng.random() < 0.5
        second = partner if same else stranger
        return WindowPair(self._window(rng, first, first_length), self._window(rng, second, second_length), same)

    def _draw_cell(self, rng: np.random.Generator) -> _Cell:
        repository = _weighted(rng, self._cumulative_weights)
        start, end = self._repository_bounds[repository : repository + 2].tolist()
        first, second = rng.integers(start, end), rng.integers(start, end - 1)
        texts = np.array([first, second + (second >= first)])
        languages = self._group_language[np.searchsorted(self._group_bounds, texts, side="right") - 1].tolist()
        lengths = np.minimum(self._lengths[texts], self.room).tolist()
        return (languages[0], lengths[0]), (languages[1], lengths[1])

    def _draw_repositories(self, rng: np.random.Generator, cell: _Cell) -> tuple[int, int] | None:
        """Return two random repositories with texts in the languages and lengths of `cell`; None if 64 draws fail."""
        # Of the cell's two (language, length), draw by the one that fewer repositories have; then look up the other.
        same = cell[0][0] == cell[1][0]  # then draw by the longer one, even if as many repositories have the other
        sides = sorted(cell, key=lambda side: (self._count(*side), -side[1] * same))
        (proposing, length), (other, other_length) = sides
        if (proposed := self._count(proposing, length)) < 2:
            return None
        table = self._proposals[proposing]
        cumulative = table.cumulative_weights[:proposed]
        found: list[int] = []
        for _ in range(_MAX_PROPOSALS):
            group = int(table.groups[_weighted(rng, cumulative)])
            repository = int(self._group_repository[group])
            if same:
                fits = self._second_longest[group] >= max(other_length, 1)
            else:
                other_group = self._group(repository, other)
                fits = other_group is not None and self._longest[other_group] >= other_length
            if fits:
                found.append(repository)
            if len(found) == 2:
                if found[0] != found[1]:
                    return found[0], found[1]
                found = []  # draw both again: keeping the first would give A and B different distributions
        return None

    def _count(self, language: int, length: int) -> int:
        """Return the number of repositories that have a text in `language` with at least `length` tokens."""
        return int(np.searchsorted(self._proposals[language].negative_longest, -length, side="right"))

    def _group(self, repository: int, language: int) -> int | None:
        key = repository * self._languages + language
        group = int(np.searchsorted(self._group_keys, key))
        return group if group < len(self._group_keys) and self._group_keys[group] == key else None

    def _draw_texts(self, rng: np.random.Generator, repository: int, cell: _Cell) -> tuple[int, int]:
        first, second = (self._candidates(repository, *side) for side in cell)
        while True:
            texts = int(rng.integers(*first)), int(rng.integers(*second))
            if texts[0] != texts[1]:
                return texts

    def _candidates(self, repository: int, language: int, length: int) -> tuple[int, int]:
        """Return (start, end): the indices of a repository's texts in `language` that have about `length` tokens."""
        group = self._group(repository, language)
        assert group is not None, "a repository is drawn only if it has texts of the language"
        start, end = self._group_bounds[group : group + 2].tolist()
        lengths = self._lengths[start:end]
        full = length == self.room
        low, nearest = np.searchsorted(lengths, (length if full else length / _BAND, length)).tolist()
        high = end - start if full else int(np.searchsorted(lengths, length * _BAND, side="right"))
        if high - low < _MIN_CANDIDATES:
            low = max(min(low, nearest - _MIN_CANDIDATES // 2, end - start - _MIN_CANDIDATES), 0)
            high = max(high, min(low + _MIN_CANDIDATES, end - start))
        return start + low, start + high

    def _window(self, rng: np.random.Generator, text: int, length: int) -> Window:
        start = int(rng.integers(int(self._lengths[text]) - length + 1))
        return Window(int(self._rows[text]), start, length)


def _weighted(rng: np.random.Generator, cumulative: np.ndarray) -> int:
    # Rounding may make the product equal to the last cumulative weight, which would give an index beyond the end.
    place = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return min(place, len(cumulative) - 1)


def _usable(repository: np.ndarray, language: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the sorted indices of the texts that `PairSampler` uses; each argument has one value for each text."""
    places = np.flatnonzero(lengths >= MIN_SNIPPET_TOKENS)
    languages = int(language.max(initial=0)) + 1
    while True:
        texts = np.bincount(repository[places])
        kept = places[texts[repository[places]] >= 2]
        groups = np.unique(repository[kept].astype(np.int64) * languages + language[kept])
        spread = np.bincount(groups % languages, minlength=languages)
        kept = kept[spread[language[kept]] >= 2]
        if len(kept) == len(places):
            return places
        places = kept
