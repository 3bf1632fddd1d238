"""Rows of token ids of different lengths → one padded tensor."""

from collections.abc import Sequence

import torch


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
