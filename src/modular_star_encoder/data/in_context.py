"""Rows of in-context pre-training: two snippets, are they from the same repository? Some tokens are masked.

A pair is drawn so that nothing but the relation of the two snippets tells the label. First two different repositories
A and B; the first snippet is from A; the second from A too (label 1) or from B (label 0), with equal chances. Since A
and B are drawn by the same symmetric law, each snippet *alone* has the same distribution under both labels.

Source: the MoSE paper (arXiv 2503.03008): label 1 means "same repository". 15 % masked, 80/10/10, as in BERT.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.padding import pad_inputs, pad_rows
from modular_star_encoder.data.tokenizer import TokenRows, encode_content

MIN_SNIPPET_TOKENS = 16
IGNORED_LABEL = -100

_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1


class InContextPairs(Dataset[dict[str, torch.Tensor]]):
    """Endless pairs of snippets, as a map-style dataset of a chosen length.

    Row `i` depends on `seed` and `i` only, so that any worker, process or resumed run makes the same one. It holds

    - `input_ids`, int64 (T,): `<sep> first <sep> second <cls>`, partly masked, T ≤ `max_tokens`;
    - `labels`, int64 (T,): the original ids of the masked positions (one at least), −100 elsewhere;
    - `icc_label`, int64 scalar: 1 if both snippets are from one repository, otherwise 0.

    A snippet is a random window of one text; the two are always of different texts. Each may take half of the room,
    and what one leaves is the other's. Repositories are drawn in proportion to the square root of their number of
    texts, a compromise between every text and every repository being seen equally often.

    Attributes:
        repositories: Names of the repositories in use: those with two texts of at least 16 tokens.
        dropped_texts: Number of texts left out, as shorter than that or alone in their repository.
    """

    def __init__(
        self,
        texts_by_repository: Mapping[str, Sequence[str]],
        tokenizer: PreTrainedTokenizerFast,
        *,
        length: int,
        max_tokens: int,
        mask_probability: float = 0.15,
        seed: int,
        progress: bool = True,
    ) -> None:
        """Tokenize all texts once, into one flat array.

        Args:
            texts_by_repository: The texts (files, functions) of each repository.
            tokenizer: A fast tokenizer with `<sep>`, `<cls>` and `<mask>`.
            length: Number of rows.
            max_tokens: Largest number of tokens of a row, special tokens included; at least 35.
            mask_probability: Share of the text tokens to predict.
            seed: Any integer from 0.
            progress: Whether to show a progress bar while tokenizing.

        Raises:
            ValueError: If an argument is out of range, the tokenizer lacks one of these tokens, or fewer than two
                repositories have two texts of at least 16 tokens.
        """
        if length < 1 or seed < 0 or not 0 < mask_probability < 1:
            raise ValueError("length must be at least 1, seed at least 0, and mask_probability between 0 and 1.")
        if max_tokens < 3 + 2 * MIN_SNIPPET_TOKENS:
            raise ValueError(
                f"max_tokens must be at least {3 + 2 * MIN_SNIPPET_TOKENS}: 3 special tokens and two snippets of "
                f"{MIN_SNIPPET_TOKENS}; not {max_tokens}."
            )
        if None in (tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id):
            raise ValueError("The tokenizer must define sep_token, cls_token and mask_token.")
        self.length, self.max_tokens, self.mask_probability, self.seed = length, max_tokens, mask_probability, seed
        self._sep, self._cls, self._mask = tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id
        self._vocab_size = len(tokenizer)
        self._ordinary_ids = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        names = sorted(texts_by_repository)
        texts = [text for name in names for text in texts_by_repository[name]]
        self._rows: TokenRows = encode_content(tokenizer, texts, progress=progress)
        self.repositories, self._members = self._usable(names, [len(texts_by_repository[name]) for name in names])
        self.dropped_texts = len(texts) - sum(map(len, self._members))
        weights = np.sqrt([len(members) for members in self._members])
        self._cumulative = np.cumsum(weights / weights.sum())

    def _usable(self, names: Sequence[str], counts: Sequence[int]) -> tuple[tuple[str, ...], list[np.ndarray]]:
        """Return the usable repositories' names and, for each, the indices of its rows."""
        long_enough = np.array([len(row) >= MIN_SNIPPET_TOKENS for row in self._rows], dtype=bool)
        starts = np.cumsum([0, *counts])
        members = [a + np.flatnonzero(long_enough[a:b]) for a, b in pairwise(starts)]
        usable = [(name, rows) for name, rows in zip(names, members, strict=True) if len(rows) >= 2]
        if len(usable) < 2:
            raise ValueError(
                f"Pairs need at least two repositories, each with two texts of {MIN_SNIPPET_TOKENS} tokens or more; "
                f"{len(usable)} of {len(names)} qualify."
            )
        return tuple(name for name, _ in usable), [rows for _, rows in usable]

    def token_counts(self) -> torch.Tensor:
        """How often each token occurs in the corpus, int64 (vocabulary size,)."""
        return torch.from_numpy(self._rows.counts(self._vocab_size))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")
        rng = np.random.default_rng((self.seed, index))
        first, second, same = self._draw_texts(rng)
        first, second = _windows(rng, first, second, room=self.max_tokens - 3)
        ids = np.concatenate([[self._sep], first, [self._sep], second, [self._cls]]).astype(np.int64)
        is_text = np.ones(len(ids), dtype=bool)
        is_text[[0, 1 + len(first), -1]] = False
        inputs, labels = self._masked(rng, ids, is_text)
        return {
            "input_ids": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "icc_label": torch.tensor(int(same)),
        }

    def _draw_texts(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, bool]:
        a, b = self._draw_repository(rng), self._draw_repository(rng)
        while a == b:  # both anew: rejecting only b would give the two different distributions
            a, b = self._draw_repository(rng), self._draw_repository(rng)
        same = bool(rng.integers(2))
        if same:
            first, second = rng.choice(self._members[a], size=2, replace=False)
        else:
            first, second = rng.choice(self._members[a]), rng.choice(self._members[b])
        return self._rows[int(first)], self._rows[int(second)], same

    def _draw_repository(self, rng: np.random.Generator) -> int:
        # The last cumulative weight may be just below 1 by rounding.
        return min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self._members) - 1)

    def _masked(self, rng: np.random.Generator, ids: np.ndarray, is_text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = is_text & (rng.random(len(ids)) < self.mask_probability)
        if not chosen.any():
            chosen[rng.choice(np.flatnonzero(is_text))] = True
        labels = np.where(chosen, ids, IGNORED_LABEL)
        fate = rng.random(len(ids))
        random_ids = rng.choice(self._ordinary_ids, size=len(ids))
        inputs = np.where(chosen & (fate < _MASK_SHARE), self._mask, ids)
        randomised = chosen & (fate >= _MASK_SHARE) & (fate < _MASK_SHARE + _RANDOM_SHARE)
        return np.where(randomised, random_ids, inputs), labels


def _windows(
    rng: np.random.Generator, first: np.ndarray, second: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a random window of each, together at most `room` tokens."""
    half = room // 2
    first_length = min(len(first), room - min(len(second), half))
    second_length = min(len(second), room - first_length)
    return _window(rng, first, first_length), _window(rng, second, second_length)


def _window(rng: np.random.Generator, row: np.ndarray, length: int) -> np.ndarray:
    start = rng.integers(len(row) - length + 1)
    return row[start : start + length]


class PaddingCollator:
    """Pads rows of `InContextPairs` on the tokenizer's side.

    Returns, for B rows of at most T tokens, int64 tensors: `input_ids`, `attention_mask` and `labels` (−100 on padding)
    of shape (B, T), and `icc_labels` of shape (B,).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pad_to_multiple_of: int = 1) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer must define pad_token.")
        self._pad_token_id: int = tokenizer.pad_token_id
        self._side: str = tokenizer.padding_side
        self._multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        inputs = pad_inputs([row["input_ids"] for row in rows], self._pad_token_id, self._side, self._multiple_of)
        labels = pad_rows([row["labels"] for row in rows], IGNORED_LABEL, self._side, self._multiple_of)
        return inputs | {"labels": labels, "icc_labels": torch.stack([row["icc_label"] for row in rows])}
