"""Checks the files of a tokenizer before they are loaded: loading hostile files can take any time and memory."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import read_json

MAX_TOKEN_ID = 2**24  # ids must be below it; tokenizers writes a line for every number up to the largest id
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MAX_BYTES, _MAX_SETTINGS_BYTES = 2**26, 2**22
_MAX_TEXT = 10_000  # characters of a pattern, or of another text in a step
_MAX_TOKEN, _MAX_PIECE = 2000, 256  # characters of a token; of a Unigram token, which is tried at each place of a text
_MAX_TOKENS, _MAX_SETTINGS = 2**23, 2**21  # characters of all tokens or merges; of all added tokens or settings
_MAX_ENTRIES = 2**21  # tokens of a vocabulary, and entries of a list of merges
_MAX_ADDED = 2**14  # added tokens
_MAX_SPECIAL = 1000  # special tokens: those named in the settings, and those that a post-processor adds to a text
_MAX_PARTS = 1000  # JSON objects that describe a step and the steps inside it
_MAX_GROWTH = 256  # how many times longer the steps may make a text
_MAX_WAYS, _RUN = 1e8, 1000  # ways in which a pattern may match a run of characters; length of the run
_MAX_PADDING = 2**17  # tokens
_MAX_PREFIX, _MAX_WORD = 100, 1000  # characters
# With these settings, transformers reads another file than tokenizer.json, or replaces a part of what it read there.
_FOREIGN = {"fast_tokenizer_files", "gguf_file", "init_inputs", "merges", "post_processor", "tokenizer_object", "vocab"}
_FOREIGN |= {"tokenizer_padding", "tokenizer_truncation", "_json_padding", "_json_truncation"}
# Matches one item of a regular expression: flags, the beginning or end of a group, `|`, a quantifier, or a character.
_ITEMS = re.compile(
    r"\(\?[a-z-]+\)|\((?:\?(?:[a-z-]*:|[=!>]|<[=!]|<\w+>))?(?![?*])|\)|\|"
    r"|(?:[*+?]|\{(?P<low>\d*)(?P<comma>,?)(?P<high>\d*)\})(?P<other>(?<=[*+?])\+)?\??"
    r"|\\[pPx]\{[^}]*\}|\\[^gk1-9]|\[\^?\]?(?:\\.|\[[^\]]*\]|[^\]\\])*\]|[^\\(\[]",
    re.DOTALL,
)
_BEGINNING = re.compile(r"\\[rntfv]")  # escapes of single characters that no flag changes


def check_tokenizer(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder or Hub repository has a tokenizer.json; UserError if a tokenizer file is unsafe."""
    folder, found = os.fspath(path), []
    if os.path.exists(folder) and not os.path.isdir(folder):  # the Hub's library would take it for a repository
        return False
    faults: dict[Any, str] = {}  # {file: what is wrong with it, or ""}
    for name in _FILES:
        file: Any = os.path.join(folder, name)
        if not os.path.isdir(folder):
            from transformers.utils import cached_file

            file = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
        if file is not None and os.path.lexists(file):
            found.append(name)
            try:
                most = _MAX_BYTES if name == _FILES[0] else _MAX_SETTINGS_BYTES
                content = read_json(file, most_bytes=most, finite=False)
                fault = _state_fault(content) if name == _FILES[0] else _settings_fault(content)
            except (TypeError, AttributeError, LookupError, OSError) as error:
                fault = f"it is damaged ({error})"
            except ValueError as error:
                fault = str(error)
            faults[file] = fault
    for file in chain.from_iterable(map(Path(folder).glob, ("*.jinja", "*/*.jinja"))):
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            faults[file] = f"it must be a regular file of at most {_MAX_BYTES:,} bytes"
    for file, fault in faults.items():
        if fault:
            raise UserError("checkpoint.tokenizer", f"{file} can't be used as a file of a tokenizer: {fault}.")
    return _FILES[0] in found


def _settings_fault(settings: dict[str, Any]) -> str:
    """Return what is wrong with the settings in a file such as tokenizer_config.json; "" if nothing is wrong."""
    if odd := _FOREIGN & settings.keys():
        return f"it has the setting {min(odd)}, which replaces tokenizer.json or a part of it; remove the setting"
    json.dumps(settings, ensure_ascii=False).encode()  # ValueError for half a surrogate pair, which no file can hold
    lists = {name: len(settings.get(name) or ()) for name in ("extra_special_tokens", "additional_special_tokens")}
    lists["added_tokens_decoder"] = len(settings.get("added_tokens_decoder") or ()) * _MAX_SPECIAL // _MAX_ADDED
    if max(lists.values()) > _MAX_SPECIAL or len(settings) > _MAX_ADDED:
        return f"it has more than {_MAX_SPECIAL:,} special tokens or more than {_MAX_ADDED:,} added tokens"
    values = _values({name: one for name, one in settings.items() if name != "chat_template"})
    return _size_fault((one for one in values if isinstance(one, str)), _MAX_TOKEN, _MAX_SETTINGS)


def _values(value: Any) -> Iterator[Any]:
    """Yield a JSON value and all values and keys inside it, without recursion, so that deep nesting does no harm."""
    waiting = [value]
    while waiting:
        yield (value := waiting.pop())
        waiting += chain(value, value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def _size_fault(tokens: Iterable[str], most: int, total: int) -> str:
    """Return a message if a token has over `most` characters, or all tokens together have over `total`; else ""."""
    sizes = [len(token) for token in tokens]
    is_wrong = max(sizes, default=0) > most or sum(sizes) > total
    return f"a token or setting has over {most:,} characters, or all of them over {total:,}" if is_wrong else ""


def _state_fault(state: dict[str, Any]) -> str:
    """Return what is wrong with the content of a tokenizer.json; "" if nothing is wrong."""
    model, added = state["model"], state.get("added_tokens") or []
    vocabulary, merges = model["vocab"], model.get("merges") or []
    if max(len(vocabulary), len(merges)) > _MAX_ENTRIES or len(added) > _MAX_ADDED:
        return f"it has more than {_MAX_ENTRIES:,} tokens or merges, or {_MAX_ADDED:,} added tokens"
    is_map = isinstance(vocabulary, dict)
    ids = [0, *(one["id"] for one in added), *(vocabulary.values() if is_map else range(len(vocabulary)))]
    if not all(type(one) is int for one in ids) or min(ids) < 0 or (largest := max(ids)) >= MAX_TOKEN_ID:
        return f"token ids must be from 0 to {MAX_TOKEN_ID - 1:,}"
    words = vocabulary if is_map else [one[0] for one in vocabulary]
    pairs = (" ".join(one) if isinstance(one, list) else one for one in merges)
    if fault := (
        _size_fault(words, _MAX_TOKEN if is_map else _MAX_PIECE, _MAX_TOKENS)
        or _size_fault(pairs, 2 * _MAX_TOKEN, _MAX_TOKENS)
        or _size_fault([one["content"] for one in added], _MAX_TOKEN, _MAX_SETTINGS)
    ):
        return fault
    unknown = model.get("unk_token" if is_map else "unk_id")
    if (unknown or "merges" not in model) and unknown not in (vocabulary if is_map else range(len(vocabulary))):
        return f"its token for unknown text, {unknown}, is not in its vocabulary"
    affixes = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    if max(map(len, affixes)) > _MAX_PREFIX or (model.get("max_input_chars_per_word") or 0) > _MAX_WORD:
        return f"it allows words of over {_MAX_WORD:,}, or a prefix or suffix of over {_MAX_PREFIX}, characters"
    padding, truncation = state.get("padding") or {}, state.get("truncation") or {}
    strategy = padding.get("strategy")
    lengths = (padding.get("pad_to_multiple_of") or 0, *(strategy.values() if isinstance(strategy, dict) else ()))
    if max(lengths) > _MAX_PADDING:
        return f"it pads texts to {max(lengths)} tokens; the limit is {_MAX_PADDING:,}"
    if truncation and not 0 <= truncation["stride"] < max(truncation["max_length"], 1):
        return f"its truncation has the stride {truncation['stride']}, which must be from 0 to max_length - 1"
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        parts = [one for one in _values(state.get(name)) if isinstance(one, dict)]
        if fault := _step_fault(parts, is_text=name != "post_processor"):
            return f"its {name} {fault}"
        for part in parts if name == "post_processor" else ():
            ends = [part[end][1] for end in ("sep", "cls") if isinstance(part.get(end), list)]
            if max(*part.get("ids", ()), *ends, 0, 0) > largest:
                return f"its post_processor adds a token id above {largest}, the largest id of a token"
    return ""


def _step_fault(parts: list[dict[str, Any]], is_text: bool) -> str:
    """Return what is wrong with a step of a tokenizer, such as its normalizer; "" if nothing is wrong.

    `parts` are the JSON objects that describe the step; `is_text` says whether the step changes texts.
    """
    growth, tokens = 1.0, 0
    if len(parts) > _MAX_PARTS:
        return f"has more than {_MAX_PARTS:,} parts"
    for part in parts:
        for key, value in part.items():
            is_long = isinstance(value, str) and len(value) > _MAX_TEXT and key != "precompiled_charsmap"
            if is_long or (isinstance(value, int) and not 0 <= value < MAX_TOKEN_ID) or (key, value) == ("length", 0):
                return f"has {key}={str(value)[:40]}, which is not allowed"
        if isinstance(pattern := part.get("Regex"), str) and (ways := _ways(pattern)) > _MAX_WAYS:
            return f"has the pattern {pattern[:200]}, which can match {_RUN:,} characters in {ways:.0e} ways"
        growth *= _growth(part) if is_text else 1
        for form in ("single", "pair") if "special_tokens" in part else ():
            names = [one["SpecialToken"]["id"] for one in part[form] if "SpecialToken" in one]
            tokens += sum(len(part["special_tokens"][name]["ids"]) for name in names)
            if len(part[form]) - len(names) > len(("A", "B")):
                return "inserts a text more than once"
    if growth > _MAX_GROWTH:
        return f"can make a text {growth:.0e} times longer; the limit is {_MAX_GROWTH}"
    return f"adds {tokens:,} tokens to a text; the limit is {_MAX_SPECIAL:,}" if tokens > _MAX_SPECIAL else ""


def _growth(part: dict[str, Any]) -> float:
    """Return the largest factor by which one step of a tokenizer, `part`, can make a text longer."""
    keys = {"add_prefix_space", "replacement", "handle_chinese_chars"}
    if part.get("type") in ("ByteLevel", "BertNormalizer") or keys & part.keys():
        return 3
    if part.get("type") == "Precompiled" or "precompiled_charsmap" in part:
        content = base64.b64decode(part["precompiled_charsmap"], validate=True)
        size = int.from_bytes(content[:4], "little")
        trie, texts = content[4 : 4 + size], content[4 + size :]
        if size % 4 or len(trie) < size or not _is_sound(np.frombuffer(trie, "<u4").astype(np.int64), texts):
            raise ValueError("its precompiled_charsmap is cut short or refers to places beyond its end")
        return max(1, *(len(text.decode(errors="replace")) for text in texts.split(b"\0")), 1)
    if "pattern" in part and "content" in part:
        pattern, new = part["pattern"], len(part["content"])
        old = len(pattern.get("String") or "") if isinstance(pattern, dict) else 0
        return max(1, new / old if old else 1 + new)  # a regular expression may match an empty text
    return 1 + len(part.get("prepend") or "")


def _is_sound(units: np.ndarray, texts: bytes) -> bool:
    """Return whether a darts-clone trie, `units`, and its references to `texts` are valid; else `tokenizers` panics."""
    texts.decode()
    nodes = np.flatnonzero((units < 2**31) | (np.arange(len(units)) == 0))  # the other units are places
    children = nodes ^ (units[nodes] >> 10 << (units[nodes] >> 6 & 8))
    if (children | 255).max(initial=255) >= len(units):
        return False
    places = units[children[units[nodes] & 256 > 0]] & 2**31 - 1
    begins = np.frombuffer(texts + b"\0", np.uint8) & 0xC0 != 0x80
    return bool(places.max(initial=0) < len(begins) and begins[places].all())


def _ways(pattern: str) -> float:
    """Return an upper bound of the number of ways in which a regular expression can match a run of `_RUN` characters.

    Numbers of ways are added for alternatives and multiplied for successive items. Alternatives that begin with
    different escapes, such as `\\r\\n|\\n`, count as one way. The result is infinity if the expression can't be read.
    """
    # For each open group, the ways of: its earlier alternatives; this alternative without its last item; the last item.
    groups, end = [(0.0, 1.0, 1.0)], 0
    firsts = [[""]]  # of each open group: the first items of its alternatives, and its quantifiers
    while item := _ITEMS.match(pattern, end):  # not `finditer`, which would search on after an item that it can't read
        text, end = item[0], item.end()
        total, before, last = groups[-1]
        if not firsts[-1][-1] and text not in ")|":
            firsts[-1][-1] = text
        if text[0] == "(" and text[-1] != ")":
            groups.append((0.0, 1.0, 1.0))
            firsts.append([""])
        elif text == ")" and len(groups) > 1:
            groups.pop()
            names, ways = firsts.pop(), total + before * last
            is_one = len({*filter(_BEGINNING.fullmatch, names)}) == len(names) == ways
            outer, ahead, previous = groups[-1]
            groups[-1] = (outer, ahead * previous, 1.0 if is_one else ways)
        elif text == "|":
            firsts[-1].append("")
            groups[-1] = (total + before * last, 1.0, 1.0)
        elif text[0] in "*+?" or item["low"] or item["high"]:
            firsts[-1].append(text)
            low, high = int(text[0] == "+"), 1 if text[0] == "?" else _RUN
            if item["low"] is not None:  # ten digits are enough to be above the limit
                low = int(item["low"][:10] or 0)
                high = int(item["high"][:10] or (_RUN if item["comma"] else low))
            if last > 1 and high * len(f"{last:.0f}") > 300:
                return float("inf")
            groups[-1] = (total, before, (abs(high - low) + 1) * last**high)
        else:
            groups[-1] = (total, before * last, 1.0)
    total, before, last = groups[0]
    return total + before * last if end == len(pattern) else float("inf")
