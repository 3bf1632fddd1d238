"""Rows of in-context pre-training: two snippets, are they from the same repository? Some tokens are masked.

Source: the MoSE paper (arXiv 2503.03008): label 1 means "same repository". 15 % masked, 80/10/10, as in BERT. How the
two snippets are drawn, and why nothing but their relation tells the label, is told in `pair_sampler.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.pair_sampler import MIN_SNIPPET_TOKENS, PairSampler
from modular_star_encoder.data.token_store import TokenCorpus, corpus_of_texts
from modular_star_encoder.data.tokenizer import ContentEncoder, special_token_ids


def pad_rows(rows: Sequence[torch.Tensor], value: int, side: str, multiple_of: int = 1) -> torch.Tensor:
    """Return the rows as an int64 tensor of shape (rows, length of the longest, rounded up), filled with `value`.

    Args:
        rows: Tensors of shape (tokens,), at least one.
        value: What fills the rest.
        side: `"left"` or `"right"`: where the filling goes.
        multiple_of: The length is rounded up to a multiple of this number.
    """
    longest = max(len(row) for row in rows)
    length = -(-longest // multiple_of) * multiple_of
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for target, row in zip(padded, rows, strict=True):
        span = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        target[span] = row
    return padded


def pad_inputs(
    rows: Sequence[torch.Tensor], pad_token_id: int, side: str, multiple_of: int = 1
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, both int64 of shape (rows, length)."""
    return {
        "input_ids": pad_rows(rows, pad_token_id, side, multiple_of),
        "attention_mask": pad_rows([torch.ones_like(row) for row in rows], 0, side, multiple_of),
    }


IGNORED_LABEL = -100
MIN_ROW_TOKENS = 3 + 2 * MIN_SNIPPET_TOKENS

_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1


class InContextPairs(Dataset[dict[str, torch.Tensor]]):
    """Endless pairs of snippets, as a map-style dataset of a chosen length.

    Row `i` depends on `seed` and `i` only, so that any worker, process or resumed run makes the same one. It holds

    - `input_ids`, int64 (T,): `<sep> first <sep> second <cls>`, partly masked, T ≤ `max_tokens`;
    - `labels`, int64 (T,): the original ids of the masked positions (one at least), −100 elsewhere;
    - `icc_label`, int64 scalar: 1 if both snippets are from one repository, otherwise 0, with equal chances.

    A snippet is a window of one text; the two are always of different texts. See `pair_sampler.py` for the law.

    Attributes:
        repositories: Names of the repositories in use: those with two texts of at least 16 tokens, in languages that
            occur in two repositories.
        dropped_texts: Number of texts left out: shorter than that, or without such company.
    """

    def __init__(
        self,
        texts: TokenCorpus | Mapping[str, Sequence[str]],
        tokenizer: PreTrainedTokenizerFast,
        *,
        length: int,
        max_tokens: int,
        mlm_probability: float = 0.15,
        seed: int,
        progress: bool = True,
    ) -> None:
        """Take tokenized texts, or tokenize texts once, into memory.

        Args:
            texts: A corpus (a `TokenStore`, a part of it, or one in memory), or the texts (files, functions) of each
                repository, all of one language.
            tokenizer: A fast tokenizer with `<sep>`, `<cls>` and `<mask>`; for a corpus, the one that made it.
            length: Number of rows.
            max_tokens: Largest number of tokens of a row, special tokens included; at least 35.
            mlm_probability: Share of the text tokens to predict.
            seed: Any integer from 0.
            progress: Whether to show a progress bar while tokenizing.

        Raises:
            ValueError: If an argument is out of range, the tokenizer lacks one of these tokens or did not make the
                corpus, or fewer than two repositories have two texts of one language and at least 16 tokens.
        """
        if length < 1 or seed < 0 or not 0 < mlm_probability < 1:
            raise ValueError("length must be at least 1, seed at least 0, and mlm_probability between 0 and 1.")
        if max_tokens < MIN_ROW_TOKENS:
            raise ValueError(
                f"max_tokens must be at least {MIN_ROW_TOKENS}: 3 special tokens and two snippets of "
                f"{MIN_SNIPPET_TOKENS}; not {max_tokens}."
            )
        check_special_tokens(tokenizer)
        corpus = texts if isinstance(texts, TokenCorpus) else corpus_of_texts(texts, tokenizer, progress=progress)
        if corpus.tokenizer_checksum != ContentEncoder(tokenizer).checksum:
            raise ValueError("The corpus was made with another tokenizer; pass the one that made it.")
        self.length, self.max_tokens, self.mlm_probability, self.seed = length, max_tokens, mlm_probability, seed
        self._sep, self._cls, self._mask = tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id
        self._vocab_size = len(tokenizer)
        self._ordinary_ids = np.setdiff1d(np.arange(len(tokenizer)), special_token_ids(tokenizer))
        # Not the corpus itself: worker processes that are sent this dataset would be sent its columns too.
        self._rows, self._row_numbers = corpus.rows, corpus.row_numbers
        self._sampler = PairSampler(corpus, room=max_tokens - 3)
        self.repositories = tuple(corpus.repository_names[i] for i in self._sampler.repositories)
        self.dropped_texts = self._sampler.dropped_texts

    def token_counts(self) -> torch.Tensor:
        """How often each token occurs in the corpus, int64 (vocabulary size,)."""
        return torch.from_numpy(self._rows.counts(self._vocab_size, self._row_numbers))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")
        rng = np.random.default_rng((self.seed, index))
        first, second, same = self._sampler.draw(rng)
        ids = np.empty(first.length + second.length + 3, dtype=np.int64)
        middle = 1 + first.length
        ids[[0, middle, -1]] = self._sep, self._sep, self._cls
        ids[1:middle] = self._rows[first.row][first.start : first.start + first.length]
        ids[middle + 1 : -1] = self._rows[second.row][second.start : second.start + second.length]
        labels = self._mask_some(rng, ids, middle)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "icc_label": torch.tensor(int(same)),
        }

    def _mask_some(self, rng: np.random.Generator, ids: np.ndarray, middle: int) -> np.ndarray:
        """Mask `ids` in place, never at the special tokens (first, `middle`, last), and return the labels."""
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


def check_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer that rows can't be framed and masked with.

    Raises:
        ValueError: If it lacks `<sep>`, `<cls>` or `<mask>`.
    """
    if None in (tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id):
        raise ValueError("The tokenizer must define sep_token, cls_token and mask_token.")


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


class PackingCollator:
    """Lays rows of `InContextPairs` one after the other; drop-in for `PaddingCollator`.

    Returns, for P rows of N tokens together, what `ModularStarEncoderForPreTraining` takes on every attention backend:

    - `input_ids`, `position_ids` (from 0 in every row) and `labels`, int64 (1, N);
    - `cu_seq_lens_q`, `cu_seq_lens_k`: the one tensor of the rows' bounds, int32 (P + 1,);
    - `max_length_q`, `max_length_k`: the number of tokens of the longest row, plain integers, since flash attention
      wants them on the CPU;
    - `icc_labels`, int64 (P,).

    Losses are those of the padded batch. Such a batch cannot be sliced or concatenated along its first dimension: train
    without accelerate's `split_batches` and `dispatch_batches`, and on one device per process.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int | None = None) -> None:
        """Set the limit.

        Args:
            tokenizer: That of the rows, which must end with its `<cls>`: an unfinished row would change unnoticed what
                the classifier of its neighbours is read from.
            max_tokens: Largest N, to bound the memory of a step. Batch size × tokens per row keeps it for certain.

        Raises:
            ValueError: If the tokenizer lacks `<cls>` or `max_tokens` is below 1.
        """
        if tokenizer.cls_token_id is None:
            raise ValueError("The tokenizer must define cls_token.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}.")
        self._cls: int = tokenizer.cls_token_id
        self._max_tokens = max_tokens

    def __call__(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        """Pack the rows.

        Raises:
            ValueError: If they have more than `max_tokens` tokens together, or one does not end with `<cls>`.
        """
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        total, longest = int(bounds[-1]), int(lengths.max())
        if self._max_tokens is not None and total > self._max_tokens:
            raise ValueError(
                f"{len(rows)} rows have {total} tokens together, above max_tokens={self._max_tokens}; "
                "use smaller batches or a larger limit."
            )
        input_ids = torch.cat([row["input_ids"] for row in rows])
        if (input_ids[bounds[1:] - 1] != self._cls).any():
            raise ValueError("Every row must end with <cls>, as those of InContextPairs do.")
        marks = bounds.to(torch.int32)
        return {
            "input_ids": input_ids[None],
            "position_ids": (torch.arange(total) - bounds[:-1].repeat_interleave(lengths))[None],
            "labels": torch.cat([row["labels"] for row in rows])[None],
            "cu_seq_lens_q": marks,
            "cu_seq_lens_k": marks,
            "max_length_q": longest,
            "max_length_k": longest,
            "icc_labels": torch.stack([row["icc_label"] for row in rows]),
        }
