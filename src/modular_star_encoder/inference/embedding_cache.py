"""Embeddings by model, exit, prompt and text, so that a second benchmark over the same texts costs nothing.

A *space* (model and exit) is a folder of shards: `NAME.npy` with embeddings and `NAME.keys.npy` with the hashes of
their texts. Shards never change. The keys are written last and both by renaming, so that a reader sees whole shards
only and any number of processes may write: two that embed the same texts cost time and no harm.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

Prompted = tuple[str, str]
"""A prompt and the text that it goes before."""


class EmbeddingCache:
    """Embeddings on disk, mapped into memory when they are read.

    Args:
        folder: where spaces are; None keeps them in memory.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._spaces: dict[str, _Space] = {}

    def missing(self, space: str, texts: Iterable[Prompted]) -> list[Prompted]:
        """Those of the texts without an embedding in `space`, in order."""
        places = self._space(space).places
        return [text for text in texts if _key(text) not in places]

    def add(self, space: str, texts: Sequence[Prompted], embeddings: np.ndarray) -> None:
        """Keep embeddings (N, F) float32 of N texts.

        Raises:
            ValueError: an embedding holds NaN or infinite components, or there aren't N of them.
            OSError: the folder can't be written to.
        """
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(texts):
            raise ValueError(f"{len(texts)} texts need embeddings (N, F), not an array of shape {embeddings.shape}.")
        if not np.isfinite(embeddings).all():
            raise ValueError("An embedding holds NaN or infinite components; nothing of it was kept.")
        self._space(space).add([_key(text) for text in texts], embeddings)

    def rows(self, space: str, texts: Sequence[Prompted]) -> CachedRows:
        """The embeddings of texts that were added, read when they are asked for.

        Raises:
            KeyError: a text that was never added.
        """
        found = self._space(space)
        return CachedRows(found.shards, np.array([found.places[_key(text)] for text in texts]).reshape(-1, 2))

    def _space(self, name: str) -> _Space:
        if name not in self._spaces:
            self._spaces[name] = _Space(None if self.folder is None else self.folder / name)
        return self._spaces[name]


class CachedRows:
    """Embeddings (N, F) float32 that lie in several shards."""

    def __init__(self, shards: Sequence[np.ndarray], places: np.ndarray) -> None:
        self._shards, self._places = shards, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        shard, row = self._places[rows].T
        embeddings = np.empty((len(row), self._shards[0].shape[1]), dtype=np.float32)
        for number in np.unique(shard):
            chosen = shard == number
            embeddings[chosen] = self._shards[number][row[chosen]]
        return embeddings


class _Space:
    """The shards of one folder, and in which of them each text is."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.shards: list[np.ndarray] = []
        self.places: dict[bytes, tuple[int, int]] = {}
        if folder is not None and folder.is_dir():
            for keys in sorted(folder.glob("*.keys.npy")):
                self._open(keys)

    def add(self, keys: list[bytes], embeddings: np.ndarray) -> None:
        if self.shards and embeddings.shape[1] != self.shards[0].shape[1]:
            size = self.shards[0].shape[1]
            raise ValueError(f"The embeddings have {embeddings.shape[1]} components, earlier ones have {size}.")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(b"".join(keys)).hexdigest()[:32]
            target = self.folder / f"{name}.npy"
            _write(target, embeddings)
            _write(self.folder / f"{name}.keys.npy", np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32))
            embeddings = np.load(target, mmap_mode="r", allow_pickle=False)
        self._append(keys, embeddings)

    def _open(self, path: Path) -> None:
        try:
            keys = np.load(path, allow_pickle=False)
            shard = np.load(path.with_name(path.name.removesuffix(".keys.npy") + ".npy"), "r", allow_pickle=False)
            if keys.dtype != np.uint8 or keys.shape != (len(shard), 32) or shard.dtype != np.float32:
                raise ValueError("keys and embeddings don't fit together")
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} of the embedding cache is damaged ({error}): remove it.") from None
        self._append([row.tobytes() for row in keys], shard)

    def _append(self, keys: list[bytes], embeddings: np.ndarray) -> None:
        number = len(self.shards)
        self.shards.append(embeddings)
        for row, key in enumerate(keys):
            self.places.setdefault(key, (number, row))


def _key(text: Prompted) -> bytes:
    prompt, content = text
    # The length of the prompt keeps ("a", "bc") and ("ab", "c") apart.
    return hashlib.sha256(f"{len(prompt)}:{prompt}{content}".encode(errors="surrogatepass")).digest()


def _write(path: Path, array: np.ndarray) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
