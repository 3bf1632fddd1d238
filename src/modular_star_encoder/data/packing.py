"""Rows of in-context pairs → one flat row without padding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast


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
