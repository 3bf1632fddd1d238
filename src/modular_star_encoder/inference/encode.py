"""Embed texts at several exits in one pass of the model."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from modular_star_encoder.data.prompts import ANY_CODE_INSTRUCTION, CODE_INSTRUCTION, SEP_TOKEN, TEXT_INSTRUCTION
from modular_star_encoder.data.sources.dataset_rows import not_unicode
from modular_star_encoder.data.tokenizer import ContentEncoder
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.modeling.configuration_modular_star_encoder import as_int
from modular_star_encoder.utils.errors import UserError

MAX_PADDING = 0.2  # with a larger share of padding in a batch, it is faster on a CPU to skip the padding
_tokenizing = threading.Lock()  # a tokenizer stores the truncation of the current call, so threads take turns
_counting = threading.Lock()
# Model → number of calls in progress, and the model's training mode before the first of them.
_in_use: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
_INSTRUCTIONS = (TEXT_INSTRUCTION, ANY_CODE_INSTRUCTION, CODE_INSTRUCTION.format(language="LANGUAGE"))
_PUBLISHED_PROMPT = re.compile(f"(?:{'|'.join(_INSTRUCTIONS)}){SEP_TOKEN}".replace("LANGUAGE", r"[^<\n]+"))


def encode_exits(
    model: ModularStarEncoderForRetrieval,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    exit_layers: Sequence[int] | None = None,
    prompt: str = "",
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
) -> dict[int, np.ndarray]:
    """Embed N texts at several exits in one pass, which runs each layer up to the deepest exit once.

    Batches hold texts of similar length; the embeddings are in the order of `texts`. On a CPU, padding that is
    more than a fifth of a batch is skipped. Equal texts are encoded once, so their embeddings are equal bit for bit.

    Args:
        model: a `ModularStarEncoderForRetrieval`, on any device. It runs in evaluation mode, then its mode is restored.
        tokenizer: the model's tokenizer.
        texts: N texts, without prompts.
        exit_layers: exits of the model; all if None.
        prompt: string to put before every text; `data.prompts` makes the published prompts.
        max_length: maximum number of tokens of a text, special tokens included; longer texts are cut. If None, the
            `max_position_embeddings` of the model.
        tokens_per_batch: maximum number of tokens in a batch, padding included; a longer text is a batch of its own.
            If None, 2,048 on a CPU, whose caches hold that many, and 8,192 elsewhere.
        progress: show progress bars.
        dtype: compute under autocast in this dtype; if None, in the dtype of the model.

    Returns:
        {exit_layer: embeddings (N, D) float32, L2-normalised}, ascending by exit; D is `config.projection_size`.

    Raises:
        UserError: an argument has a wrong type or is below 1, `texts` is a single string, or a text can't be encoded
            in UTF-8 (it has lone surrogates).
        ValueError: the model lacks an exit (the message lists its exits), or the tokenizer has no padding token.

    Example:
        >>> embeddings = encode_exits(model, tokenizer, ["def f(): pass"], exit_layers=[4, 9])  # doctest: +SKIP
        >>> embeddings[4].shape  # doctest: +SKIP
        (1, 1024)
    """
    _check("model", model, isinstance(model, nn.Module), "a ModularStarEncoderForRetrieval")
    _check("exit_layers", exit_layers, isinstance(exit_layers, Collection | None), "a list of exits or None")
    _check("max_length", max_length, max_length is None or _is_count(max_length), "a whole number above 0 or None")
    config, device = model.config, next(model.parameters()).device
    exits = config.resolve_exits(exit_layers=config.exit_layers if exit_layers is None else exit_layers)
    skips_padding = device.type == "cpu" and config.pooling != "legacy"

    def encode_batch(batch: Mapping[str, torch.Tensor]) -> np.ndarray:
        inputs: dict[str, Any] = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        if skips_padding:
            inputs["unpad_inputs"] = float(batch["attention_mask"].float().mean()) < 1 - MAX_PADDING
        return model(**inputs, exit_layers=exits).exit_embeddings.float().cpu().numpy()

    max_length = config.max_position_embeddings if max_length is None else max_length
    if tokens_per_batch is None:
        tokens_per_batch = 2048 if device.type == "cpu" else 8192
    options: dict[str, Any] = {"prompt": prompt, "tokens_per_batch": tokens_per_batch, "progress": progress}
    autocast = nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
    with _inference(model), autocast:
        shape = (len(exits), config.projection_size)
        embeddings = encode_batches(tokenizer, texts, encode_batch, shape, max_length=max_length, **options)
    return dict(zip(exits, embeddings, strict=True))


def encode_batches(
    tokenizer: Any,
    texts: Sequence[str],
    encode_batch: Callable[[Mapping[str, torch.Tensor]], np.ndarray],
    shape: tuple[int, int],
    *,
    max_length: int,
    prompt: str = "",
    tokens_per_batch: int = 2048,
    progress: bool = True,
) -> np.ndarray:
    """Return the embeddings (E, N, D) float32 of N texts at E exits, in the order of the texts; D is their size.

    `encode_batch` gets the `input_ids` and `attention_mask`, int64 (B, T), of B texts of similar length with up to T
    tokens, and returns their embeddings (E, B, D) float32. `shape` is (E, D).
    """
    is_list = isinstance(texts, Iterable) and not isinstance(texts, str | bytes | Mapping | Set)
    _check("texts", texts, is_list, "a list of strings")
    for text in (texts := list(texts)):
        _check("texts", text, isinstance(text, str), "a list of strings")
    _check("tokenizer", tokenizer, callable(tokenizer), "the model's tokenizer")
    _check("prompt", prompt, isinstance(prompt, str), "a string")
    _check("tokens_per_batch", tokens_per_batch, _is_count(tokens_per_batch), "a whole number above 0")
    unique = {text: position for position, text in enumerate(dict.fromkeys(texts))}
    if broken := [text for text in unique if not_unicode(text)]:
        message = f"Remove the {not_unicode(broken[0])} from {len(broken)} of the texts, such as {broken[0][:40]!a}."
        raise UserError("encode.texts.not_unicode", message)
    with _tokenizing:
        token_ids = tokenize(tokenizer, list(unique), max_length, progress, prompt)
    embeddings = np.empty((shape[0], len(unique), shape[1]), dtype=np.float32)
    with tqdm(total=len(unique), desc="encoding", unit="text", disable=not progress, leave=False) as bar:
        for rows in length_batches([len(ids) for ids in token_ids], tokens_per_batch):
            batch = tokenizer.pad({"input_ids": [token_ids[row] for row in rows]}, return_tensors="pt")
            embeddings[:, rows] = encode_batch(batch)
            bar.update(len(rows))
    return embeddings[:, [unique[text] for text in texts]]


def _is_count(value: Any) -> bool:
    return type(number := as_int(value)) is int and number > 0


def _check(name: str, value: Any, is_right: bool, what: str) -> None:
    if not is_right:
        raise UserError(f"encode.{name}", f"{name} must be {what}, not {value!r:.40}.")


def tokenize(
    tokenizer: Any, texts: Sequence[str], max_length: int, progress: bool, prompt: str = ""
) -> list[list[int]]:
    """Return up to `max_length` token ids of each text: `prompt`, text, and special tokens that the tokenizer adds.

    As in training, special tokens in a text, such as `<mask>`, are read as ordinary text, except in `prompt` or in a
    published prompt at the start of the text. If the tokenizer adds no special tokens, its setting
    `split_special_tokens` decides instead.
    """
    token_ids: list[list[int]] = []
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    chunk = 1024  # enough texts for the tokenizer's threads, and few enough to update the progress bar often
    starts = range(0, len(texts), chunk)
    for start in tqdm(starts, desc="tokenizing", unit="chunk", disable=not progress, leave=False):
        batch = [prompt + text for text in texts[start : start + chunk]]
        token_ids.extend(tokenizer(batch, truncation=True, max_length=max_length)["input_ids"])
    frame, encoder = tokenizer("")["input_ids"], None
    for row, text in enumerate(texts) if frame else ():
        published = None if prompt else _PUBLISHED_PROMPT.match(text)
        begin, content = (published[0], text[published.end() :]) if published else (prompt, text)
        if any(token in content for token in special):
            encoder = encoder or ContentEncoder(tokenizer)
            before = tokenizer(begin, truncation=True, max_length=max_length)["input_ids"]
            after = before[len(before) - (frame[-1] == tokenizer.cls_token_id) :]
            ids = encoder([content])[0].tolist()[: max_length - len(before)]
            token_ids[row] = [*before[: len(before) - len(after)], *ids, *after]
    # A tokenizer cuts no text to fewer tokens than it adds.
    return [ids[:max_length] for ids in token_ids]


def length_batches(lengths: list[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield the indices of the texts in each batch, longest texts first, so that a lack of memory shows at once."""
    rows, start = sorted(range(len(lengths)), key=lambda row: -lengths[row]), 0
    while start < len(rows):
        size = max(1, tokens_per_batch // max(1, lengths[rows[start]]))
        yield rows[start : start + size]
        start += size


@contextmanager
def _inference(model: ModularStarEncoderForRetrieval) -> Iterator[None]:
    """Context manager: run `model` in evaluation and inference mode; the last thread that leaves restores its mode."""
    with _counting:
        state = _in_use.setdefault(model, [0, model.training])
        state[0] += 1
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        with _counting:
            state[0] -= 1
            if not state[0]:
                del _in_use[model]
                model.train(state[1])


def bf16_is_faster(device: str | None = None) -> bool:
    """Return whether `device` (by default the GPU, if any) multiplies bfloat16 matrices without emulation."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(words)
