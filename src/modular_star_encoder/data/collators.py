"""Collators that pad rows of token ids to a batch, or pack the rows one after another without padding."""

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
            message = f"Each row needs tensors of integers named {' and '.join(wrong)}. The row has {found}."
            advice = "Rename columns, or use InContextPairs, RetrievalTexts, RetrievalBatches or ClassificationRows."
            raise UserError("data.collator.columns", f"{message} {advice}")


class _Padding:
    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        check_special_tokens(tokenizer, "pad")
        self.tokenizer = tokenizer  # `Trainer` saves it with the model
        self._pad_token_id: int = tokenizer.pad_token_id
        self._side: str = tokenizer.padding_side

    def _padded(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        """Return R rows as one tensor, padded with `value` on the tokenizer's `padding_side`: int64 (R, T)."""
        return pad_sequence([row.long() for row in rows], True, value, self._side)

    def _inputs(self, rows: Sequence[Row], name: str = "input_ids") -> dict[str, torch.Tensor]:
        ids = [row[name] for row in rows]
        mask = self._padded([torch.ones_like(one) for one in ids], 0)
        return {"input_ids": self._padded(ids, self._pad_token_id), "attention_mask": mask}


class PaddingCollator(_Padding):
    """Pads `InContextPairs` rows; returns int64 `input_ids`, `attention_mask`, `labels` (B, T), `icc_labels` (B,)."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        _check_columns(rows, ("input_ids", "labels", "icc_label"))
        labels = self._padded([row["labels"] for row in rows], IGNORED_LABEL)
        return self._inputs(rows) | {"labels": labels, "icc_labels": torch.stack([row["icc_label"] for row in rows])}


class RetrievalCollator(_Padding):
    """Pads rows of `RetrievalTexts` or `RetrievalBatches` into a batch, on the tokenizer's `padding_side`.

    Returns, for each of `query`, `document`, `negative` and `text` (unpaired texts) that rows have, a mapping with
    `input_ids` and `attention_mask`, int64 (B, T), and `teacher`, the teacher's vectors (B, D), if rows have them.
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
    """Pads B rows of `ClassificationRows`. Returns int64 `input_ids`, `attention_mask`, (B, T), and `labels`, (B,)."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        _check_columns(rows, ("input_ids", "labels"))
        return self._inputs(rows) | {"labels": torch.stack([row["labels"] for row in rows])}


class PackingCollator:
    """Packs rows of `InContextPairs` one after another, without padding; the losses are the same as with padding.

    Returns inputs of `ModularStarEncoderForPreTraining` for P rows of N tokens in total: `input_ids`, `position_ids`
    (from 0 in every row) and `labels`, int64 (1, N); `icc_labels`, int64 (P,); `cu_seq_lens_q` and `cu_seq_lens_k`, the
    bounds of the rows, int32 (P + 1,); `max_length_q` and `max_length_k`, the length of the longest row, an int. The
    batch can't be divided: train without accelerate's `split_batches` and `dispatch_batches`.
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
            raise UserError("data.packing.unfinished", "A row to pack must end with <cls>: use rows of InContextPairs.")
        batch = {
            "input_ids": input_ids[None],
            "position_ids": (torch.arange(total) - bounds[:-1].repeat_interleave(lengths))[None],
            "labels": torch.cat([row["labels"] for row in rows])[None],
            "icc_labels": torch.stack([row["icc_label"] for row in rows]),
        }
        # Flash attention expects the length on the CPU, so it is an int.
        marks = {"cu_seq_lens": bounds.to(torch.int32), "max_length": longest}
        return batch | {f"{name}_{side}": value for name, value in marks.items() for side in "qk"}
