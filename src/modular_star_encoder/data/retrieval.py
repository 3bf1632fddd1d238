"""Rows of contrastive fine-tuning: a description and its code, each framed by its prompt."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.documented_function import DocumentedFunction
from modular_star_encoder.data.padding import pad_inputs
from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.data.tokenizer import encode_content


class RetrievalPairs(Dataset[dict[str, torch.Tensor]]):
    """(description, code) rows, tokenized once.

    Row `i` holds `query_ids` and `document_ids`, int64 of shape (T,): `<sep>{instruction}<sep>{text}<cls>`, or
    `<sep>{text}<cls>` without prompts. Only the text is truncated, never its frame. Special tokens that are written in
    a description or in code are ordinary characters there.

    A row whose description or code equals that of an earlier row is dropped: in one batch the two would be negatives
    of each other. `splits.drop_near_identical_descriptions` also finds those that are almost equal.

    Attributes:
        functions: The functions behind the rows.
        dropped: Number of rows dropped, by reason.
    """

    def __init__(
        self,
        functions: Sequence[DocumentedFunction],
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_query_tokens: int = 128,
        max_document_tokens: int = 512,
        prompts: bool = True,
        progress: bool = True,
    ) -> None:
        """Drop duplicates and tokenize.

        Args:
            functions: The rows, in order.
            tokenizer: A fast tokenizer whose template ends with `<cls>`, such as `train_tokenizer` makes.
            max_query_tokens: Largest number of tokens of `query_ids`, prompt and special tokens included.
            max_document_tokens: The same for `document_ids`.
            prompts: Whether texts carry the published prompts.
            progress: Whether to show progress bars.

        Raises:
            ValueError: If there is no function, the tokenizer adds no `<cls>` at the end, or a limit leaves no room
                for text beside its prompt.
        """
        if not functions:
            raise ValueError("RetrievalPairs needs at least one documented function.")
        self.functions, self.dropped = _without_duplicates(functions)
        languages = {function.language for function in self.functions}
        self._query_frame = _frame(tokenizer, text_prompt() if prompts else "", max_query_tokens, "max_query_tokens")
        self._document_frames = {
            language: _frame(
                tokenizer, code_prompt(language) if prompts else "", max_document_tokens, "max_document_tokens"
            )
            for language in languages
        }
        self._max_query_tokens, self._max_document_tokens = max_query_tokens, max_document_tokens
        self._queries = encode_content(
            tokenizer, [function.description for function in self.functions], progress=progress, description="Queries"
        )
        self._documents = encode_content(
            tokenizer, [function.code for function in self.functions], progress=progress, description="Documents"
        )

    def __len__(self) -> int:
        return len(self.functions)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        query, document = self._queries[index], self._documents[index]
        document_frame = self._document_frames[self.functions[index].language]
        return {
            "query_ids": _framed(query, self._query_frame, self._max_query_tokens),
            "document_ids": _framed(document, document_frame, self._max_document_tokens),
        }


class RetrievalCollator:
    """Pads rows of `RetrievalPairs` on the tokenizer's side.

    Returns `{"query": {...}, "document": {...}}`, each with `input_ids` and `attention_mask`, int64 of shape (B, T); T
    is that of the longest query or document. Row `i` of the one belongs to row `i` of the other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pad_to_multiple_of: int = 1) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer must define pad_token.")
        self._pad_token_id: int = tokenizer.pad_token_id
        self._side: str = tokenizer.padding_side
        self._multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        return {
            side: pad_inputs([row[f"{side}_ids"] for row in rows], self._pad_token_id, self._side, self._multiple_of)
            for side in ("query", "document")
        }


def _without_duplicates(functions: Sequence[DocumentedFunction]) -> tuple[list[DocumentedFunction], Counter[str]]:
    descriptions: set[str] = set()
    codes: set[str] = set()
    dropped: Counter[str] = Counter()
    kept = []
    for function in functions:
        if function.description in descriptions:
            dropped["same description as an earlier row"] += 1
        elif function.code in codes:
            dropped["same code as an earlier row"] += 1
        else:
            descriptions.add(function.description)
            codes.add(function.code)
            kept.append(function)
    return kept, dropped


def _frame(tokenizer: PreTrainedTokenizerFast, prompt: str, max_tokens: int, argument: str) -> tuple[list[int], int]:
    """Return (the ids before a text, the id after it), as the tokenizer's template puts them around prompt + text."""
    ids = tokenizer(prompt)["input_ids"]
    if not ids or ids[-1] != tokenizer.cls_token_id:
        raise ValueError("The tokenizer's template must end with its cls_token; train_tokenizer makes one that does.")
    if max_tokens <= len(ids):
        raise ValueError(f"{argument} must be above {len(ids)}, the length of the prompt and special tokens alone.")
    return ids[:-1], ids[-1]


def _framed(content: np.ndarray, frame: tuple[list[int], int], max_tokens: int) -> torch.Tensor:
    before, after = frame
    content = content[: max_tokens - len(before) - 1]
    return torch.from_numpy(np.concatenate([before, content, [after]]).astype(np.int64))
