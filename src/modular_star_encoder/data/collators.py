"""Collators that make a batch of rows of token ids: they pad the rows, or pack them one after another unpadded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.tokenizer import check_special_tokens
from modular_star_encoder.utils.errors import UserError

IGNORED_LABEL = -100

Row = Mapping[str, torch.Tensor]


def _check_columns(rows: Sequence[Row], names: Sequence[str]) -> None:
    for row in rows or [{}]:
        read = {*names, *(name for name in ("negative_ids", "text_ids") if name in row)}
        wrong = sorted(name for name in read if not isinstance(row.get(name), torch.Tensor))
        wrong += sorted(name for name in read - {*wrong, "labels"} if row[name].is_floating_point())
        if wrong:
            kinds = [f"{name} ({getattr(value, 'dtype', type(value).__name__)})" for name, value in row.items()]
            found = ", ".join(kinds) or "nothing"
            message = f"Each row must have tensors of integers named {' and '.join(wrong)}. This row has {found}."
            advice = "Rename columns, or use the datasets InContextPairs, RetrievalTexts, RetrievalBatches or"
            raise UserError("data.collator.columns", f"{message} {advice} ClassificationRows.")


class _Padding:
    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        check_special_tokens(tokenizer, "pad")
        self.tokenizer = tokenizer  # `Trainer` saves it with the model
        self._pad_token_id: int = tokenizer.pad_token_id
        self._side: str = tokenizer.padding_side

    def _padded(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        """Pad R rows with `value`, on the tokenizer's `padding_side`, to T, the longest length; return int64 (R, T)."""
        return pad_sequence([row.long() for row in rows], True, value, self._side)

    def _inputs(self, rows: Sequence[Row], name: str = "input_ids") -> dict[str, torch.Tensor]:
        ids = [row[name] for row in rows]
        mask = self._padded([torch.ones_like(one) for one in ids], 0)
        return {"input_ids": self._padded(ids, self._pad_token_id), "attention_mask": mask}


class PaddingCollator(_Padding):
    """Pads B rows of `InContextPairs` to the length of the longest row, T tokens.

    Returns int64 tensors: `input_ids`, `attention_mask` and `labels` of shape (B, T), and `icc_labels` of shape (B,).
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        _check_columns(rows, ("input_ids", "labels", "icc_label"))
        labels = self._padded([row["labels"] for row in rows], IGNORED_LABEL)
        return self._inputs(rows) | {"labels": labels, "icc_labels": torch.stack([row["icc_label"] for row in rows])}


class RetrievalCollator(_Padding):
    """Pads rows of `RetrievalTexts` or `RetrievalBatches`, on the tokenizer's `padding_side`, and returns a batch.

    A batch is a dictionary with the keys `query` and `document` and, if rows have such texts, `negative` (hard
    negatives) and `text` (texts without a partner). Each value is a dictionary for B texts of up to T tokens:
    `input_ids` and `attention_mask`, int64 (B, T), and, if rows have them, `teacher`: a teacher model's vectors (B, D).
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, dict[str, torch.Tensor]]:
        _check_columns(rows, ("query_ids", "document_ids"))
        batch = {}
        for side in ("query", "document", "negative", "text"):
            if own := [row for row in rows if f"{side}_ids" in row]:
                batch[side] = self._inputs(own, f"{side}_ids")
                if f"{side}_teacher" in own[0]:
                    batch[side]["teacher"] = torch.stack([row[f"{side}_teacher"] for row in own])
        return batch


class ClassificationCollator(_Padding):
    """Pads B `ClassificationRows` to T tokens. Returns int64 `input_ids`, `attention_mask` (B, T) and `labels` (B,)."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        _check_columns(rows, ("input_ids", "labels"))
        return self._inputs(rows) | {"labels": torch.stack([row["labels"] for row in rows])}


class PackingCollator:
    """Packs rows of `InContextPairs` one after another, without padding; the losses are the same as with padding.

    Returns inputs of `ModularStarEncoderForPreTraining` for P rows of N tokens in total: `input_ids`, `position_ids`
    (from 0 in each row) and `labels`, int64 (1, N); `icc_labels`, int64 (P,); `cu_seq_lens_q` and `cu_seq_lens_k`, at
    which the rows begin and end, int32 (P + 1,); `max_length_q` and `max_length_k`, the longest row's length, an int.
    Do not set accelerate's `split_batches` or `dispatch_batches`, because this batch can't be divided among processes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        check_special_tokens(tokenizer, "cls")
        self.tokenizer = tokenizer  # `Trainer` saves it with the model
        self._cls: int = tokenizer.cls_token_id

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        _check_columns(rows, ("input_ids", "labels", "icc_label"))
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        total, longest = int(bounds[-1]), int(lengths.max())
        input_ids = torch.cat([row["input_ids"] for row in rows])
        if (input_ids[bounds[1:] - 1] != self._cls).any():
            raise UserError("data.packing.unfinished", "Rows to pack must end with <cls>: use rows of InContextPairs.")
        batch = {
            "input_ids": input_ids[None],
            "position_ids": (torch.arange(total) - bounds[:-1].repeat_interleave(lengths))[None],
            "labels": torch.cat([row["labels"] for row in rows])[None],
            "icc_labels": torch.stack([row["icc_label"] for row in rows]),
        }
        # Flash attention expects the length on the CPU, so it is an int.
        marks = {"cu_seq_lens": bounds.to(torch.int32), "max_length": longest}
        return batch | {f"{name}_{side}": value for name, value in marks.items() for side in "qk"}
