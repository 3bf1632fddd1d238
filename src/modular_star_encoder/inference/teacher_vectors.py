"""Compute and store a teacher's vectors of many texts, and make the vectors that a student learns from them.

A chunk of rows (hash of a text, its vector) is one `.npy` file, memory-mapped. It appears whole or not at all, so a job
that is killed continues with the missing texts; a damaged chunk is removed and computed again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.inference.encoders import Encoder
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import staged_file, write_json

TEXTS_PER_CHUNK = 4096


class TeacherVectors:
    """The stored vectors of texts from one teacher with one prompt; each vector is found by the hash of its text."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that `compute_teacher_vectors` wrote, and remove its damaged files."""
        self.folder = folder
        self._cut: int | None = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["max_characters"]
        self._chunks: list[np.ndarray] = []
        for path in sorted(folder.glob("chunk-*.npy")):
            try:
                self._chunks.append(np.load(path, mmap_mode="r", allow_pickle=False))
            except (ValueError, EOFError):
                path.unlink()
        hashes = np.concatenate([np.empty(0, np.uint64), *(chunk["hash"] for chunk in self._chunks)])
        order = np.argsort(hashes, kind="stable")
        # The last entry stands for all hashes above the largest: they have no row.
        self._hashes, self._places = np.append(hashes[order], np.uint64(2**64 - 1)), np.append(order, -1)
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def __reduce__(self) -> tuple[type["TeacherVectors"], tuple[Path]]:
        return type(self), (self.folder,)  # a copy for another process maps the files again

    def places(self, texts: Iterable[str]) -> np.ndarray:
        """Return the row number of each text's stored vector, int64 (N,); -1 for a text without a vector."""
        hashes = text_hashes(text[: self._cut] for text in texts)
        found = np.searchsorted(self._hashes, hashes)
        return np.where(self._hashes[found] == hashes, self._places[found], -1)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Return the vectors at these row numbers, float32 (N, D), of length 1 up to the rounding of float16."""
        chunks = np.searchsorted(self._starts, places, side="right") - 1
        pairs = zip(chunks.tolist(), (places - self._starts[chunks]).tolist(), strict=True)
        return np.array([self._chunks[chunk]["vector"][row] for chunk, row in pairs], dtype=np.float32)

    def vector(self, text: str) -> np.ndarray:
        """Return the vector of a text, float32 (D,); raise KeyError if it is not stored."""
        if (places := self.places([text]))[0] < 0:
            raise KeyError(f"{self.folder} holds no vector of the text {text[:40]!r}.")
        return self.rows(places)[0]

    def mean(self, texts: Sequence[str]) -> np.ndarray:
        """Return the mean vector of `texts` without repetitions, float32 (D,); `mean-{hash of texts}.npy` keeps it."""
        hashes, places = np.unique(text_hashes(text[: self._cut] for text in texts)), np.unique(self.places(texts))
        path = self.folder / f"mean-{hashlib.sha256(hashes.tobytes()).hexdigest()[:16]}.npy"
        if not path.is_file():
            parts = np.array_split(places, len(places) // TEXTS_PER_CHUNK + 1)
            total = sum(self.rows(part).sum(axis=0, dtype=np.float64) for part in parts)
            _write(path, (total / len(places)).astype(np.float32))
        return np.load(path, allow_pickle=False)


def compute_teacher_vectors(
    teacher: Encoder,
    texts: Iterable[str],
    cache: str | os.PathLike[str] | None = None,
    *,
    prompt: str = "",
    max_characters: int | None = None,
    progress: bool = True,
) -> TeacherVectors:
    """Embed the texts whose vectors the cache lacks, and return the stored vectors.

    The folder in the cache is named by a hash of the teacher's checksum (weights, tokenizer and configuration; for an
    endpoint, its model and URL), its exit (the deepest), the prompt and the maximum length, so that vectors of other
    settings are never mixed in. One process at a time may compute the same texts.

    Args:
        texts: texts without `prompt`; each is cut at `max_characters`, and by the teacher at its own length.
        cache: a folder; by default `modular-star-encoder/teacher-vectors` in `XDG_CACHE_HOME` or `~/.cache`.

    Raises UserError if a vector is not finite (`teacher.not_finite`).

    Example:
        >>> teacher = load_encoder("BAAI/bge-small-en-v1.5")  # doctest: +SKIP
        >>> compute_teacher_vectors(teacher, ["read a file"]).vector("read a file").shape  # doctest: +SKIP
        (384,)
    """
    root = Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "modular-star-encoder/teacher-vectors"))
    exit_layer = teacher.exit_layers[-1]
    key = {"checksum": teacher.checksum, "exit_layer": exit_layer, "prompt": prompt, "max_characters": max_characters}
    folder = root.expanduser() / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", {"teacher": teacher.name, **key})
    different = list(dict.fromkeys(text[:max_characters] for text in texts))
    missing = [different[place] for place in np.flatnonzero(TeacherVectors(folder).places(different) < 0)]
    starts = range(0, len(missing), TEXTS_PER_CHUNK)
    for start in tqdm(starts, f"{teacher.name}, vectors", unit=f" × {TEXTS_PER_CHUNK} texts", disable=not progress):
        chunk = missing[start : start + TEXTS_PER_CHUNK]
        vectors = teacher.encode([(prompt, text) for text in chunk], [exit_layer], progress=False)[exit_layer]
        if not np.isfinite(vectors).all():
            message = f"{teacher.name} gave a vector with NaN or infinity: check its weights, or load it in float32."
            raise UserError("teacher.not_finite", message)
        rows = np.empty(len(chunk), [("hash", "<u8"), ("vector", "<f2", vectors.shape[1:])])
        rows["hash"], rows["vector"] = text_hashes(chunk), _unit(vectors)
        _write(folder / f"chunk-{hashlib.sha256(rows['hash'].tobytes()).hexdigest()[:16]}.npy", rows)
    return TeacherVectors(folder)


class TeacherTargets:
    """The vectors that a student learns: a teacher's vectors of queries and documents, minus their mean if it is given.

    With `means` ({kind: (D,)}), the mean of its kind is subtracted from each vector, which is then normalised again.
    What all texts of a kind share does not tell them apart (bge-small on held-out pairs: MRR 75.8 raw, 81.5 centred).
    """

    def __init__(self, vectors: Mapping[str, TeacherVectors], means: Mapping[str, np.ndarray] | None = None) -> None:
        self._vectors, self.means = vectors, means or {}

    def of(self, text: str, kind: str | None = None) -> np.ndarray:
        """Return a text's vector (D,) float32, minus the mean of `kind` (None: the nearest), scaled to length 1."""
        vector = self._vectors[kind or "document"].vector(text)
        nearest = kind or min(self.means, key=lambda one: float(np.linalg.norm(vector - self.means[one])), default="")
        return _unit(vector - self.means.get(nearest, 0))


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """Return a hash of each text, uint64 (N,)."""
    digests = (hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def _write(path: Path, array: np.ndarray) -> None:
    with staged_file(path, resumable=True) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
