"""Pairs of snippets with a label, for clone detection: do the two do the same?

Source of the format: github.com/microsoft/CodeXGLUE, Code-Code/Clone-detection-BigCloneBench: `data.jsonl` holds
functions (`func`, `idx`), and `train.txt`, `valid.txt` and `test.txt` two ids and a label 0 or 1 a line.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.sources.dataset_rows import not_unicode, open_dataset_rows
from modular_star_encoder.data.tokenizer import check_special_tokens, encode_content
from modular_star_encoder.utils.errors import UserError

SPLITS = ("train", "valid", "test")
_SPECIAL_TOKENS = 3


@dataclass(frozen=True, slots=True)
class LabelledPairs:
    """Pairs of one split.

    Attributes:
        codes: The snippets, each once.
        pairs: int64 (pairs, 2), places in `codes`.
        labels: int64 (pairs,), 1 where both do the same, otherwise 0.
    """

    codes: list[str]
    pairs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, count: int, seed: int) -> "LabelledPairs":
        """At most `count` of the pairs, drawn at random, in their order."""
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return LabelledPairs(self.codes, self.pairs[chosen], self.labels[chosen])


def read_labelled_pairs(settings: Mapping[str, Any]) -> dict[str, LabelledPairs]:
    """Read the splits in a recipe's `data`.

    Args:
        settings: `bigclonebench`, the folder of the four files; or `train`, `valid` and optionally `test`, each a JSON
            Lines or parquet file with the columns `first`, `second` (snippets) and `label` (0 or 1).

    Returns:
        The pairs of `train`, `valid` and, if there is one, `test`.

    Raises:
        UserError: `data.pairs.settings` if the settings are others; `data.source.*` if a file can't be read, or has no
            pair; `data.row` if a row is not a labelled pair.
    """
    for name, source in settings.items():
        if not isinstance(source, str | os.PathLike) or not os.fspath(source):
            raise UserError("data.pairs.settings", f"data.{name} must be the name of a file or folder, not {source!r}.")
    if set(settings) == {"bigclonebench"}:
        return _bigclonebench(Path(settings["bigclonebench"]).expanduser())
    if not {"train", "valid"} <= set(settings) <= set(SPLITS):
        raise UserError(
            "data.pairs.settings",
            "data must name bigclonebench, a folder, or the files train, valid and (optionally) test; not "
            f"{', '.join(map(str, settings))}.",
        )
    return {split: _pairs_of_rows(settings[split]) for split in SPLITS if split in settings}


class ClassificationRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of clone detection, `<sep> first <sep> second <cls>`, as in the paper (arXiv 2503.03008, version 2).

    Row `i` holds `input_ids`, int64 (T,), T ≤ `max_tokens`, and `labels`, an int64 scalar. Where both snippets do not
    fit, each gets half of the room, or the part of it that the other leaves. Special tokens that are written in code
    are ordinary characters.
    """

    def __init__(
        self, pairs: LabelledPairs, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int, progress: bool = True
    ) -> None:
        """Tokenize each snippet once.

        Raises:
            UserError: `data.tokenizer.token_missing` if the tokenizer lacks `<sep>` or `<cls>`; `data.pairs.max_tokens`
                if `max_tokens` leaves no room for two snippets.
        """
        check_special_tokens(tokenizer, "sep", "cls")
        if max_tokens < _SPECIAL_TOKENS + 2:
            raise UserError(
                "data.pairs.max_tokens", f"max_tokens must be at least {_SPECIAL_TOKENS + 2}, not {max_tokens}."
            )
        self.pairs = pairs
        self._sep, self._cls, self._room = tokenizer.sep_token_id, tokenizer.cls_token_id, max_tokens - _SPECIAL_TOKENS
        self._codes = encode_content(tokenizer, pairs.codes, progress=progress, description="Code")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first, second = (self._codes[int(place)] for place in self.pairs.pairs[index])
        half = self._room // 2
        first = first[: max(half, self._room - len(second))]
        second = second[: self._room - len(first)]
        ids = np.concatenate([[self._sep], first, [self._sep], second, [self._cls]])
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "labels": torch.tensor(int(self.pairs.labels[index])),
        }


def _bigclonebench(folder: Path) -> dict[str, LabelledPairs]:
    places: dict[str, int] = {}
    codes: list[str] = []
    for where, row in open_dataset_rows(folder / "data.jsonl", ["func", "idx"]):
        if not isinstance(row, dict) or not _is_code(row.get("func")) or "idx" not in row:
            raise UserError("data.row", f"{where} must have func, in whole characters, and idx.")
        places[str(row["idx"])] = len(codes)
        codes.append(row["func"])
    splits = {}
    for split in SPLITS:
        path = folder / f"{split}.txt"
        if path.is_file():
            splits[split] = _pairs_of_lines(path, codes, places)
    if not {"train", "valid"} <= set(splits):
        raise UserError("data.source.no_files", f"{folder} must hold train.txt and valid.txt besides data.jsonl.")
    return splits


def _pairs_of_lines(path: Path, codes: list[str], places: Mapping[str, int]) -> LabelledPairs:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            parts = line.split()
            if len(parts) != 3 or parts[2] not in ("0", "1") or not (parts[0] in places and parts[1] in places):
                message = f"{path}, line {number}, must have two ids of data.jsonl and a label 0 or 1."
                raise UserError("data.row", message)
            rows.append((places[parts[0]], places[parts[1]], int(parts[2])))
    return _pairs(codes, rows, path)


def _pairs_of_rows(source: str | os.PathLike[str]) -> LabelledPairs:
    places: dict[str, int] = {}
    rows = []
    for where, row in open_dataset_rows(source, ["first", "second", "label"]):
        values = row if isinstance(row, dict) else {}
        first, second, label = values.get("first"), values.get("second"), values.get("label")
        if not (_is_code(first) and _is_code(second)) or label not in (0, 1):
            message = f"{where} must have code as first and second, in whole characters, and a label 0 or 1."
            raise UserError("data.row", message)
        a, b = (places.setdefault(str(text), len(places)) for text in (first, second))
        rows.append((a, b, int(label)))
    return _pairs(list(places), rows, source)


def _is_code(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip()) and not_unicode(text) is None


def _pairs(codes: list[str], rows: list[tuple[int, int, int]], source: str | os.PathLike[str]) -> LabelledPairs:
    if not rows:
        raise UserError("data.source.empty", f"{source} holds no pair.")
    table = np.array(rows, dtype=np.int64)
    return LabelledPairs(codes, table[:, :2], table[:, 2])
