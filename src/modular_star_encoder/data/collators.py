"""Rows of tokens → batches: padded for pre-training, retrieval and clone detection, or packed one after another."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.tokenizer import check_special_tokens
from modular_star_encoder.utils.errors import UserError

IGNORED_LABEL = -100

Row = Mapping[str, torch.Tensor]


def pad_rows(rows: Sequence[torch.Tensor], value: int, side: str, multiple_of: int = 1) -> torch.Tensor:
    """Pad rows, each (tokens,), with `value` on `side`: int64 (rows, longest row rounded up to `multiple_of`)."""
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
    """Pad rows to `input_ids` and `attention_mask`, both int64 of shape (rows, length)."""
    mask = pad_rows([torch.ones_like(row) for row in rows], 0, side, multiple_of)
    return {"input_ids": pad_rows(rows, pad_token_id, side, multiple_of), "attention_mask": mask}


class _Padding:
    """Pads on the tokenizer's side, to a multiple of `pad_to_multiple_of` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pad_to_multiple_of: int = 1) -> None:
        check_special_tokens(tokenizer, "pad")
        self._pad_token_id: int = tokenizer.pad_token_id
        self._side: str = tokenizer.padding_side
        self._multiple_of = pad_to_multiple_of

    def _inputs(self, rows: Sequence[Row], name: str = "input_ids") -> dict[str, torch.Tensor]:
        return pad_inputs([row[name] for row in rows], self._pad_token_id, self._side, self._multiple_of)


class PaddingCollator(_Padding):
    """Pads rows of `InContextPairs` on the tokenizer's side.

    Returns, for B rows of at most T tokens, int64 tensors: `input_ids`, `attention_mask` and `labels` (−100 on padding)
    of shape (B, T), and `icc_labels` of shape (B,).
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        labels = pad_rows([row["labels"] for row in rows], IGNORED_LABEL, self._side, self._multiple_of)
        return self._inputs(rows) | {"labels": labels, "icc_labels": torch.stack([row["icc_label"] for row in rows])}


class RetrievalCollator(_Padding):
    """Pads rows of `RetrievalTexts` and `RetrievalBatches` on the tokenizer's side.

    Returns `{"query": {...}, "document": {...}}`, each with `input_ids` and `attention_mask`, int64 of shape (B, T); T
    is the length of the longest query or document. With hard negatives, `negative` is a third entry. Rows that also
    hold `text_ids`, an unpaired text, give the entry `text`, with as many texts as such rows. Where rows hold
    `{side}_teacher`, float32 (D,), the entry of the side has `teacher`, (B, D).
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, dict[str, torch.Tensor]]:
        batch = {}
        for side in ("query", "document", "negative", "text"):
            if own := [row for row in rows if f"{side}_ids" in row]:
                batch[side] = self._inputs(own, f"{side}_ids")
                if f"{side}_teacher" in own[0]:
                    batch[side]["teacher"] = torch.stack([row[f"{side}_teacher"] for row in own])
        return batch


class ClassificationCollator(_Padding):
    """Pads rows of `ClassificationRows`: `input_ids` and `attention_mask`, int64 (B, T), and `labels`, int64 (B,)."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return self._inputs(rows) | {"labels": torch.stack([row["labels"] for row in rows])}


class PackingCollator:
    """Packs rows of `InContextPairs` one after another; replaces `PaddingCollator`.

    Returns, for P rows of N tokens in total, the inputs of `ModularStarEncoderForPreTraining` for any attention
    backend:

    - `input_ids`, `position_ids` (from 0 in every row) and `labels`, int64 (1, N);
    - `cu_seq_lens_q`, `cu_seq_lens_k`: the same tensor, the rows' bounds, int32 (P + 1,);
    - `max_length_q`, `max_length_k`: the tokens of the longest row, as integers: flash attention wants them on the CPU;
    - `icc_labels`, int64 (P,).

    Every row ends with `<cls>`. Losses equal the losses of the padded batch. The batch cannot be sliced along its first
    dimension: train without accelerate's `split_batches` and `dispatch_batches`, and on one device per process.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int | None = None) -> None:
        """`max_tokens`: largest N, to bound the memory of a step; batch size × tokens per row is always enough."""
        check_special_tokens(tokenizer, "cls")
        if max_tokens is not None and max_tokens < 1:
            raise UserError("data.packing.max_tokens", f"max_tokens must be at least 1, not {max_tokens}.")
        self._cls: int = tokenizer.cls_token_id
        self._max_tokens = max_tokens

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Pack the rows."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        total, longest = int(bounds[-1]), int(lengths.max())
        if self._max_tokens is not None and total > self._max_tokens:
            message = f"{len(rows)} rows have {total} tokens, above max_tokens={self._max_tokens}; use smaller batches."
            raise UserError("data.packing.too_long", message)
        input_ids = torch.cat([row["input_ids"] for row in rows])
        if (input_ids[bounds[1:] - 1] != self._cls).any():
            raise UserError("data.packing.unfinished", "Every row must end with <cls>, as rows of InContextPairs do.")
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
