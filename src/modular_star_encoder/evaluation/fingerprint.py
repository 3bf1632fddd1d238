"""A short name for exactly these weights, so that figures of one checkpoint aren't taken for another's."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from huggingface_hub import hf_hub_download

DECISIVE_FILES = ("config.json", "tokenizer.json", "model*.safetensors")


def checkpoint_fingerprint(checkpoint: str | os.PathLike) -> str:
    """What tells these weights from others.

    Returns:
        Of a folder the first 16 hexadecimal digits of a SHA-256 of its configuration, tokenizer and weights (reads them
        all, about a second per GB); of a repository of the Hub the commit that is loaded.

    Raises:
        OSError: the Hub has no such repository, or can't be reached.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        # The Hub's cache keeps each commit in a folder of its name.
        return Path(hf_hub_download(os.fspath(checkpoint), "config.json")).parent.name
    digest = hashlib.sha256()
    for path in sorted({path for pattern in DECISIVE_FILES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
