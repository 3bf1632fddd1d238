"""Cutting a batch into mini-batches of texts of similar length."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """Some rows of one side of a batch, without the padding that they share.

    Args:
        side: the side's name.
        rows: (R,) places in the batch.
        starts: (R,) first column of each row.
        width: number of columns.
    """

    side: str
    rows: torch.Tensor
    starts: torch.Tensor
    width: int

    def cut(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The model's inputs for these rows: (B, T, …) tensors become (R, width, …), and (B, …) become (R, …)."""
        shape = inputs["input_ids"].shape[:2]
        columns = self.starts[:, None] + torch.arange(self.width, device=self.starts.device)

        def part(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.shape[:1] != shape[:1]:
                return value
            return value[self.rows[:, None], columns] if value.shape[:2] == shape else value[self.rows]

        return {name: part(value) for name, value in inputs.items()}

    def halves(self) -> tuple["MiniBatch", "MiniBatch"]:
        """Two mini-batches with these rows."""
        middle = len(self.rows) // 2
        first, second = (
            MiniBatch(self.side, self.rows[part], self.starts[part], self.width)
            for part in (slice(middle), slice(middle, None))
        )
        return first, second


def cut_mini_batches(sides: Mapping[str, Mapping[str, Any]], tokens: int) -> list[MiniBatch]:
    """Mini-batches of at most `tokens` tokens each, the padding that is left included; a longer text goes alone.

    Texts of a side are sorted by length, longest first, so that little padding is left and a mini-batch too large for
    the memory fails at once.

    Args:
        sides: name → `input_ids` (B, T) and `attention_mask` (B, T), with padding on either side.
        tokens: rows times columns of a mini-batch.

    Raises:
        ValueError: a side is packed into one row, or its mask is not (B, T).
    """
    mini_batches = []
    for side, inputs in sides.items():
        firsts, lengths = _spans(side, inputs)
        order = lengths.argsort(descending=True, stable=True)
        sorted_lengths = lengths[order].tolist()
        begin = 0
        while begin < len(order):
            width = sorted_lengths[begin]
            rows = order[begin : begin + max(1, tokens // width)]
            # A window that begins at the first token must end within the row.
            starts = firsts[rows].clamp(max=inputs["input_ids"].shape[1] - width)
            mini_batches.append(MiniBatch(side, rows, starts, width))
            begin += len(rows)
    return mini_batches


def split_further(mini_batches: list[MiniBatch], count: int) -> list[MiniBatch]:
    """The same rows in `count` mini-batches, those with the most rows being halved; `count` is at most that of rows."""
    mini_batches = list(mini_batches)
    while len(mini_batches) < count:
        place = max(range(len(mini_batches)), key=lambda index: len(mini_batches[index].rows))
        mini_batches[place : place + 1] = mini_batches[place].halves()
    return mini_batches


def _spans(side: str, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """First column (B,) of each row's real tokens, and the number (B,) of columns to the last one."""
    if "cu_seq_lens_q" in inputs:
        raise ValueError(f"{side!r} is packed into one row; mini_batch_tokens needs one row per text.")
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    if mask.shape != input_ids.shape:
        raise ValueError(f"{side!r} has an attention_mask of shape {tuple(mask.shape)}; it must be that of input_ids.")
    real = mask.bool()
    firsts = real.long().argmax(dim=1)
    lasts = real.shape[1] - 1 - real.flip(1).long().argmax(dim=1)
    return firsts, torch.where(real.any(dim=1), lasts - firsts + 1, 1)
