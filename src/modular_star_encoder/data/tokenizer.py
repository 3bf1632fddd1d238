"""Trains and loads byte-level BPE tokenizers with StarCoder2's pre-tokenizer and the special tokens of `prompts.py`.

A tokenizer reads `<sep>` in a text as a special token. Use `encode_content`, which does not, for code and users' texts.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.prompts import CLS_TOKEN, MASK_TOKEN, PAD_TOKEN, SEP_TOKEN, SPECIAL_TOKENS
from modular_star_encoder.data.tokenizer_files import check_tokenizer
from modular_star_encoder.utils.errors import UserError, is_panic

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
TEXTS_PER_BATCH = 256
_OURS = {"sep_token": SEP_TOKEN, "cls_token": CLS_TOKEN, "mask_token": MASK_TOKEN}
_TOKENS_PER_COUNT = 2**22


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, max_length: int = 2048, progress: bool = True
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on `texts` that pads on the left and truncates to `max_length` tokens.

    The tokenizer encodes one text as `<sep> text <cls>`, and two as `<sep> a <sep> b <cls>`. Few texts may give fewer
    than `vocab_size` tokens, so build the model for `len(tokenizer)` tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE or max_length < 4:
        message = f"vocab_size must be at least {MIN_VOCAB_SIZE} (bytes and special tokens), and max_length at least 4."
        raise UserError("data.tokenizer.sizes", f"{message} Given: vocab_size={vocab_size}, max_length={max_length}.")
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    texts = iter(texts)
    if (first := next(texts, None)) is None:
        raise UserError("data.tokenizer.no_text", "A tokenizer needs at least one text to train on; `texts` is empty.")
    tokenizer.train_from_iterator(chain([first], texts), trainer)
    tokenizer.post_processor = _template(tokenizer)
    settings: dict[str, Any] = {"model_max_length": max_length, "padding_side": "left", "truncation_side": "right"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings, **_OURS, pad_token=PAD_TOKEN)


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder or Hub repository from its `tokenizer.json`; UserError if a file is unsafe."""
    if not check_tokenizer(path):  # else transformers would look for files of other kinds
        raise UserError("checkpoint.tokenizer", f"{path} has no tokenizer.json: name a checkpoint that has this file.")
    try:
        # Not `AutoTokenizer`: StarCoder2's descendants name GPT-2's class, which doesn't split numbers into digits.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        tokenizer("a")  # a setting of a wrong type may cause an error only when it is used
    except BaseException as error:  # for a damaged file, tokenizers raises no narrower class
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        message = f"The tokenizer of {path} is damaged ({' '.join(str(error).split())}): download or save it again."
        raise UserError("checkpoint.tokenizer", message) from error
    check_padding(tokenizer, path)
    return tokenizer


def check_padding(tokenizer: Any, path: str | os.PathLike) -> None:
    """Raise UserError (`checkpoint.tokenizer`) if the token for padding is not in the vocabulary of `tokenizer`."""
    if (token := getattr(tokenizer, "pad_token", None)) is not None and tokenizer.pad_token_id is None:
        message = f"The pad_token {token!r} of {path} is not in the vocabulary."
        advice = "Set pad_token, in tokenizer_config.json, to a token of the vocabulary."
        raise UserError("checkpoint.tokenizer", f"{message} {advice}")


def with_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer that encodes a text as `<sep> text <cls>`; that of the published models adds no tokens."""
    check_special_tokens(tokenizer, "sep", "cls")
    theirs = {role: getattr(tokenizer, role) for role in _OURS if getattr(tokenizer, role) is not None}
    framed = [tokenizer.sep_token_id, tokenizer.cls_token_id]
    if theirs.items() <= _OURS.items() and tokenizer("")["input_ids"] == framed:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    spellings = {theirs[role]: _OURS[role] for role in theirs}
    known = {*(vocabulary := state["model"]["vocab"]), *(entry["content"] for entry in state["added_tokens"])}
    if taken := [name for old, name in spellings.items() if old != name and name in known]:
        message = f"A special token must get the name {taken[0]}, but another token has this name: rename that token."
        raise UserError("data.tokenizer.spelling", message)
    for entry in state["added_tokens"]:
        entry["content"] = spellings.get(entry["content"], entry["content"])
    state["model"]["vocab"] = {spellings.get(token, token): index for token, index in vocabulary.items()}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = _template(backend)
    names = ("padding_side", "truncation_side", "model_max_length", "pad_token")
    kept: dict[str, Any] = {name: getattr(tokenizer, name) for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{role: _OURS[role] for role in theirs}, **kept)


def adds_no_tokens(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a tokenizer has `<sep>` and `<cls>` but adds no tokens to a text, like that of mose-code.

    The tokenizer of the published models adds no tokens either, but its special tokens have other names, and users
    write them into their texts themselves.
    """
    return (tokenizer.sep_token, tokenizer.cls_token) == (SEP_TOKEN, CLS_TOKEN) and not tokenizer("")["input_ids"]


def _template(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    single, pair = f"{SEP_TOKEN} $A {CLS_TOKEN}", f"{SEP_TOKEN} $A {SEP_TOKEN} $B {CLS_TOKEN}"
    tokens = [(token, tokenizer.token_to_id(token)) for token in (SEP_TOKEN, CLS_TOKEN)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def token_spellings(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return, for each token, its letters and digits in lower case, or a unique text if it is special or has none."""
    spellings, special = [], set(tokenizer.all_special_ids)
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        text = "" if index in special else str(tokenizer.decode([index]))
        spellings.append("".join(filter(str.isalnum, text.lower())) or f"<{index}> {token}")
    return spellings


class TokenRows:
    """Rows of token ids in one array: row `i` is `flat[bounds[i] : bounds[i + 1]]`; `bounds` is int64 (rows + 1,)."""

    def __init__(self, flat: np.ndarray, bounds: np.ndarray) -> None:
        self._flat, self.bounds = flat, bounds

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]  # IndexError beyond the last row
        return self._flat[self.bounds[index] : self.bounds[index + 1]]

    def counts(self, vocab_size: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Return how often each token occurs in all rows, or in `rows` (sorted row numbers): int64 (vocab_size,)."""
        rows = np.arange(len(self)) if rows is None else rows
        counts = np.zeros(vocab_size, np.int64)
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else ():
            start, end = int(self.bounds[run[0]]), int(self.bounds[run[-1] + 1])
            # Count in parts, because `bincount` makes wide copies and the rows may be a file larger than memory.
            for part in range(start, end, _TOKENS_PER_COUNT):
                counts += np.bincount(self._flat[part : min(part + _TOKENS_PER_COUNT, end)], minlength=vocab_size)
        return counts


class ContentEncoder:
    """Encodes texts without template, truncation and special tokens; `checksum` is a hash of what decides the ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        description = json.loads(self._backend.to_str())
        decisive = {name: description[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        self.checksum = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return one array of token ids for each text, of type `dtype` and shape (tokens of the text,)."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]


def encode_content(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, progress: bool = True, description: str = "Tokenizing"
) -> TokenRows:
    """Return the token ids of `texts`, encoded by `ContentEncoder`: one row per text."""
    encoder = ContentEncoder(tokenizer)
    parts: list[np.ndarray] = []
    starts = range(0, len(texts), TEXTS_PER_BATCH)
    for start in tqdm(starts, desc=description, unit_scale=TEXTS_PER_BATCH, unit=" texts", disable=not progress):
        parts += encoder(texts[start : start + TEXTS_PER_BATCH])
    flat = np.concatenate(parts) if parts else np.empty(0, encoder.dtype)
    return TokenRows(flat, np.cumsum([0, *map(len, parts)], dtype=np.int64))


def check_special_tokens(tokenizer: PreTrainedTokenizerFast, *roles: str) -> None:
    """Raise UserError if a tokenizer lacks a special token for one of `roles`, by default `sep`, `cls` and `mask`."""
    names = [f"{role}_token" for role in roles or ("sep", "cls", "mask")]
    if missing := [name for name in names if getattr(tokenizer, f"{name}_id") is None]:
        raise UserError("data.tokenizer.token_missing", f"The tokenizer has no {', no '.join(missing)}: add these.")


def special_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the sorted ids of all special tokens: those with a role such as `sep`, and those only marked special."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(marked.union(tokenizer.all_special_ids))
