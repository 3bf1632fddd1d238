"""Datasets of fine-tuning rows as token ids: a query and code, each after its prompt, or two labelled snippets."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.pairs import LabelledPairs, RetrievalExample, Snippet
from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.data.splits import TEXT_TO_CODE, BatchPlan
from modular_star_encoder.data.tokenizer import ContentEncoder, adds_no_tokens, check_special_tokens, encode_content
from modular_star_encoder.utils.errors import UserError

_WORD = re.compile(r"\b[^\W\d]\w*")
_LETTERS = np.array(list(string.ascii_lowercase))


def rename_frequent_words(code: str, generator: np.random.Generator) -> str:
    """Return `code`, where a random name replaces each word of 3 or more characters that occurs 3 or more times."""
    counts = Counter(_WORD.findall(code))
    names = {word: word for word in counts}
    for word, count in counts.items():
        if count >= 3 and len(word) >= 3:
            while (name := "".join(generator.choice(_LETTERS, size=generator.integers(3, 9)))) in names:
                pass
            names[word], names[name] = name, name
    return _WORD.sub(lambda match: names[match[0]], code)


_Frame = tuple[list[int], list[int]]  # ids before and after the tokens of a text
_SNIPPETS, _NAMES = 10, 11  # numbers of random streams; `BatchPlan` has others


class RetrievalTexts(Dataset[dict[str, torch.Tensor]]):
    """A dataset of retrieval rows. Each text becomes token ids: `<sep>{instruction}<sep>{text}<cls>`, cut if too long.

    With `prompts=False`, a text becomes `<sep>{text}<cls>`. Item `i` is a dictionary with `query_ids`, the description
    of row `i`, and `document_ids`, the first snippet of code of row `i`: each int64 (T,) for T tokens.
    """

    def __init__(
        self,
        texts: Sequence[RetrievalExample],
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_text_tokens: int = 128,
        max_code_tokens: int = 512,
        prompts: bool = True,
        progress: bool = True,
    ) -> None:
        """Tokenize `texts`. Both token limits include the prompt and special tokens.

        `tokenizer` must add `<cls>` at the end of a text or, like the tokenizer of mose-code, add no tokens at all.
        """
        self.texts = texts
        self._limits = max_text_tokens, max_code_tokens
        self._encoder = ContentEncoder(tokenizer)
        snippets = [snippet for text in texts for snippet in text.snippets]
        present = any(text.negative for text in texts)
        self._negative_snippets = [text.negative or Snippet("", "") for text in texts] if present else []
        self._text_frame = _frame(tokenizer, text_prompt(instructions=prompts), max_text_tokens, "max_text_tokens")
        self._code_frames = {
            language: _frame(tokenizer, code_prompt(language, instructions=prompts), max_code_tokens, "max_code_tokens")
            for language in sorted({one.language for one in (*snippets, *self._negative_snippets)})
        }
        self._descriptions, self._codes, self._negatives = (
            encode_content(tokenizer, content, progress=progress and bool(content), description=name)
            for name, content in (
                ("Descriptions", [text.description for text in texts]),
                ("Code", [one.code for one in snippets]),
                ("Hard negatives", [one.code for one in self._negative_snippets]),
            )
        )
        self._first_code = np.cumsum([0, *(len(text.snippets) for text in texts)])

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]  # IndexError beyond the last row
        return {"query_ids": self.tokens(index, None), "document_ids": self.tokens(index, 0)}

    def tokens(self, row: int, number: int | None, renaming: np.random.Generator | None = None) -> torch.Tensor:
        """Return the token ids of one text of a row, after its prompt and cut to the limit of T tokens: int64 (T,).

        `number` selects the text: None the description, -1 the hard negative, 0 or more the snippet with this index.
        `renaming`, if given, draws new names for the frequent words of code (see `rename_frequent_words`).
        """
        if number is None:
            return _framed(self._descriptions[row], self._text_frame, self._limits[0])
        if number < 0:
            snippet, content = self._negative_snippets[row], self._negatives[row]
        else:
            snippet, content = self.texts[row].snippets[number], self._codes[int(self._first_code[row]) + number]
        if renaming is not None:
            (content,) = self._encoder([rename_frequent_words(snippet.code, renaming)])
        return _framed(content, self._code_frames[snippet.language], self._limits[1])

    def text(self, row: int, number: int | None) -> str:
        """Return the text, uncut and without prompt, for which `tokens(row, number)` returns token ids."""
        example = self.texts[row]
        if number is None:
            return example.description
        return example.negative.code if number < 0 and example.negative else example.snippets[number].code

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Return how often each token id occurs in descriptions and snippets, without prompts: int64 (vocab_size,)."""
        return self._descriptions.counts(vocab_size) + self._codes.counts(vocab_size)

    def mean_tokens(self) -> tuple[float, float]:
        """Return (mean length of descriptions, of snippets) in tokens, with the longest prompt and cut to the limit."""
        frames = (self._text_frame, max(self._code_frames.values(), key=lambda frame: len(frame[0])))
        means = []
        for rows, limit, (before, after) in zip((self._descriptions, self._codes), self._limits, frames, strict=True):
            lengths = np.diff(rows.bounds)
            framed = np.minimum(lengths[lengths > 0] + len(before) + len(after), limit)
            means.append(float(framed.mean()) if len(framed) else 0.0)
        return means[0], means[1]


class RetrievalBatches(Dataset[dict[str, torch.Tensor]]):
    """The items of `steps` batches, which `plan` chooses, one batch after another. The reader must not shuffle them.

    An item has `query_ids` and `document_ids`, int64 (T,) for T tokens: the description and first snippet of a row of
    `texts` or, in a code → code pair, two random snippets of the row. If all rows have a hard negative, an item also
    has `negative_ids`, the tokens of a hard negative.
    """

    def __init__(
        self, texts: RetrievalTexts, plan: BatchPlan, steps: int, *, identifier_rename_prob: float = 0.0
    ) -> None:
        """`identifier_rename_prob` is the probability that random names replace the frequent words of a snippet."""
        self.rows, self._plan, self._identifier_rename_prob = texts, plan, identifier_rename_prob
        self.batch_size, self.seed = plan.batch_size, plan.seed
        self._length = steps * plan.batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(self._length)[index]  # IndexError beyond the last row
        names = np.random.default_rng((self._plan.seed, _NAMES, index))
        found = {}
        for side, (row, number) in self._places(index).items():
            renames = number is not None and names.random() < self._identifier_rename_prob
            found[f"{side}_ids"] = self.rows.tokens(row, number, names if renames else None)
        return found

    def texts(self, index: int) -> dict[str, tuple[str, bool]]:
        """Return the unchanged texts of item `index`: {"query": (text, whether the text is code), "document": …}."""
        places = self._places(index).items()
        return {side: (self.rows.text(row, number), number is not None) for side, (row, number) in places}

    def _places(self, index: int) -> dict[str, tuple[int, int | None]]:
        """Return, for each text of item `index`, arguments of `RetrievalTexts.tokens`: {"query": (row, number), …}."""
        step, place = divmod(index, self.batch_size)
        row, kind, negative = self._plan.batch(step)[place]
        places: dict[str, tuple[int, int | None]] = {"query": (row, None), "document": (row, 0)}
        if kind != TEXT_TO_CODE:
            drawing = np.random.default_rng((self._plan.seed, _SNIPPETS, index))
            first, second = drawing.choice(len(self.rows.texts[row].snippets), size=2, replace=False).tolist()
            places = {"query": (row, first), "document": (row, second)}
        return places if negative is None else places | {"negative": (negative, -1)}


def _frame(tokenizer: PreTrainedTokenizerFast, prompt: str, max_tokens: int, argument: str) -> _Frame:
    """Return (ids of the tokens before a text, ids of those after it); UserError without room for it."""
    ids = tokenizer(prompt)["input_ids"]
    is_closed = ids[-1:] == [tokenizer.cls_token_id]
    if not is_closed and not adds_no_tokens(tokenizer):
        raise UserError("data.tokenizer.template", "The tokenizer must add its cls_token at the end of every text.")
    if max_tokens <= len(ids):
        message = f"{argument}={max_tokens} must be above {len(ids)}, the number of prompt and special tokens."
        raise UserError("data.retrieval.max_tokens", message)
    return (ids[:-1], ids[-1:]) if is_closed else (ids, [])


def _framed(content: np.ndarray, frame: _Frame, max_tokens: int) -> torch.Tensor:
    before, after = frame
    ids = np.concatenate([before, content[: max_tokens - len(before) - len(after)], after])
    return torch.from_numpy(ids.astype(np.int64))


class ClassificationRows(Dataset[dict[str, torch.Tensor]]):
    """A dataset of labelled pairs of snippets, for clone detection.

    An item has `input_ids`, int64 (T,) for T tokens: `<sep> first <sep> second <cls>`; and `labels`, an int64 scalar:
    1 if both snippets do the same, otherwise 0.
    """

    def __init__(
        self, pairs: LabelledPairs, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int, progress: bool = True
    ) -> None:
        """Tokenize each snippet of `pairs` once; a pair has at most `max_tokens` tokens, three of them special."""
        check_special_tokens(tokenizer, "sep", "cls")
        if max_tokens < 5:  # three special tokens, and one for each snippet
            message = f"max_tokens must be at least 5 (3 of them are special tokens), not {max_tokens}."
            raise UserError("data.pairs.max_tokens", message)
        self.pairs = pairs
        self._sep, self._cls, self._room = tokenizer.sep_token_id, tokenizer.cls_token_id, max_tokens - 3
        self._codes = encode_content(tokenizer, pairs.codes, progress=progress, description="Code")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first, second = (self._codes[int(place)] for place in self.pairs.pairs[index])
        half = self._room // 2
        first = first[: max(half, self._room - len(second))]
        second = second[: self._room - len(first)]
        ids = np.concatenate([[self._sep], first, [self._sep], second, [self._cls]])
        label = torch.tensor(int(self.pairs.labels[index]))
        return {"input_ids": torch.from_numpy(ids.astype(np.int64)), "labels": label}
