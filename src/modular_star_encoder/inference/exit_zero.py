"""Embed texts at exit 0, the weighted mean of token embeddings, with numpy instead of torch.

Exit 0 of `ModularStarEncoderForRetrieval` runs no layer. If its projection head is linear, the order of projection
and mean does not matter, so the token embeddings can be projected beforehand, into one table (V, D).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

_NEEDED: dict[str, Any] = {"projection_head": "linear", "projection_order": "pool_then_project", "pooling": "mean"}
_NEEDED |= {"embedding_normalization": "l2", "exit_norm": "none", "token_weights": True}
_TEXTS_PER_BATCH = 512


class ExitZero:
    """Embeds texts at exit 0 of a checkpoint in a local folder.

    `table` (V, D) float32 holds for each token of the vocabulary its projected embedding times its weight.

    Example:
        >>> ExitZero("hub_configs/mose-code").encode(["parse a header"]).shape
        (1, 384)
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the checkpoint; raise ValueError or OSError if files are missing or damaged, or exit 0 needs torch."""
        from safetensors import safe_open
        from tokenizers import Tokenizer

        folder = Path(folder)
        if not has_exit_zero(read_config(folder)):
            raise ValueError(f"{folder} has no exit 0, or its exit 0 needs torch.")
        with safe_open(folder / "model.safetensors", "np") as tensors:

            def read(name: str) -> np.ndarray:
                return tensors.get_tensor(name).astype(np.float32)

            head = "projection_heads.0.dense."
            table = read("model.embed_tokens.weight") @ read(f"{head}weight").T + read(f"{head}bias")
            self._weights = np.maximum(read("model.token_weights.weight")[:, 0], 0)
        self.table = table * self._weights[:, None]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.tokenizer.encode_special_tokens = settings.get("split_special_tokens", False)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(read_config(folder)["max_position_embeddings"])

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings (N, D) float32 of N texts, of length 1; zeros for a text without tokens."""
        embeddings = np.zeros((len(texts), self.table.shape[1]), dtype=np.float32)
        for start in range(0, len(texts), _TEXTS_PER_BATCH):
            batch = self.tokenizer.encode_batch_fast(list(texts[start : start + _TEXTS_PER_BATCH]))
            for place, encoding in enumerate(batch, start):
                if encoding.ids:
                    total = self._weights[encoding.ids].sum() or 1.0
                    embeddings[place] = self.table[encoding.ids].sum(axis=0) / total
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        return embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint's config.json without checks; {} if the file is missing or unreadable."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def has_exit_zero(config: dict[str, Any]) -> bool:
    """Return whether `ExitZero` supports a checkpoint with this configuration."""
    return 0 in config.get("exit_layers", ()) and all(config.get(key) == value for key, value in _NEEDED.items())


def shipped_checkpoint(name: str) -> str:
    """Return the folder of the checkpoint `name` if this package contains it (`mose-code`), else `name` itself."""
    folder = Path(str(files("modular_star_encoder.hub_configs"))) / name
    is_shipped = "/" not in name and not Path(name).exists() and (folder / "model.safetensors").is_file()
    return str(folder) if is_shipped else name
