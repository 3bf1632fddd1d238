"""Store an index in a folder: segments, which are files with rows, and `index.json`, a list of the segments.

A segment is a safetensors file that never changes. A search maps it into memory and reads only the parts that it needs.
Every change ends with an atomic replacement of `index.json`. If the process is killed before, the old index stays.
"""

import errno
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property, partial, wraps
from hashlib import blake2b
from itertools import chain
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from modular_star_encoder.search.pieces import Memo, Snippet
from modular_star_encoder.search.vector_store import INDEX_FOLDER, MEMORY, REBUILD, Filter, Found, Row, Stamps
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import (
    MAX_JSON_BYTES,
    check_types,
    folder_lock,
    parse_json,
    read_json,
    user_path,
    write_text,
)

MANIFEST = "index.json"
APPROXIMATE_ROWS = 10_000  # a search of more rows compares the signs of all vectors, and only the best exactly
_BEST_BY_SIGNS = 4000
MOST_ROWS = 65_536  # in a segment: row numbers have 16 bits, and a merge holds one new segment in memory
LARGE_SEGMENT = 50_000  # a segment of at least this many rows is merged only if over a third of them are deleted
_SMALL_SEGMENTS = 32  # an update merges the segments below `LARGE_SEGMENT` if it finds this number of them
_K1, _B = 1.2, 0.75
_NO_INDEX: dict[str, Any] = {"settings": None, "segments": {}}
_STAMPS = "stamps.json"
# Also half-written files.
_OWN_FILE = re.compile(rf"\.?(rows-.*|\.gitignore|\.lock|{_STAMPS}|{MANIFEST})(\.\d+(\.\w+)?\.tmp)?")

_OTHER_DAMAGE = (zlib.error, RecursionError, MemoryError)
_SEGMENT_NAME = re.compile(r"rows-[0-9a-f]{32}")
# Type and number of dimensions of each array of a segment; the last three kinds have an exit's number in their names.
_KINDS = {"rows": ("u1", 1), "row_starts": ("i8", 1), "file_of_row": ("u4", 1), "lengths": ("u4", 1)}
_KINDS |= {"words": ("u8", 1), "word_starts": ("u4", 1), "word_rows": ("u2", 1), "word_counts": ("u1", 1)}
_KINDS |= {"vectors": ("i1", 2), "scales": ("f4", 1), "signs": ("u8", 2)}
_LARGEST_ROW = 1 << 25  # bytes of a decompressed row; even a file of 5 MB in one piece is smaller

_Arrays = dict[str, np.ndarray]
_values = attrgetter(*(one.name for one in fields(Snippet)))
_ROWS_PER_BLOCK = 1024  # number of vectors compared at once: as float32, they fit into the processor's cache


def _reading(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method that reads an index: UserError if a file is damaged, FileNotFoundError if a file is missing."""

    @wraps(method)
    def reported(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, *_OTHER_DAMAGE) as error:
            is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if is_full or isinstance(error, FileNotFoundError | UserError):
                raise
            message = f"The index {self.location} can't be read ({error}). If it is damaged, rebuild it: {REBUILD}."
            raise UserError("search.index.unreadable", message) from error

    return reported


class LocalStore:
    """A `VectorStore` in the folder `location`, or in the memory of this process if `location` is None."""

    def __init__(self, location: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if location is None else Path(os.path.realpath(user_path(location)))
        self.location = MEMORY if location is None else os.fspath(location)
        self._manifest = _NO_INDEX
        self._version: tuple[int, int] | None = None
        self._segments: dict[str, _Segment] = {}
        self._is_snapshot = self._is_new = False
        self._stamps: Stamps = {}
        fault = advice = ""
        if self.folder is not None and self.folder.is_dir():
            names = set(os.listdir(self.folder))
            if MANIFEST not in names and not all(map(_OWN_FILE.fullmatch, names)):
                fault = "it contains other files. Name a new folder, an empty folder or an index"
                advice = f'. To search code in {location}, do not use --index: mose search "QUESTION" {location}'
        elif location is not None and os.path.lexists(user_path(location)):  # a file, or a link to nothing
            fault = "it is not a folder. Name a folder"
        if fault:
            raise UserError("search.index.foreign", f"{location} is not an index: {fault}{advice}.")

    @contextmanager
    def locked(self, seconds: float = 3.0) -> Iterator[None]:
        if self.folder is None:
            yield
            return
        with folder_lock(self.folder, seconds):
            try:
                yield
            except BaseException:
                # A new index without rows, perhaps because the disk is full, is removed.
                if self._is_new and self._is_in_place() and not self._read()["segments"]:
                    for name in (MANIFEST, ".gitignore"):
                        (self.folder / name).unlink(missing_ok=True)
                    self._remove_other_segments(())
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        self.count()  # maps every segment now, because a merge in another process may delete segments
        self._is_snapshot = True
        try:
            yield
        finally:
            self._is_snapshot = False

    @_reading
    def settings(self) -> dict[str, Any] | None:
        return self._read()["settings"]

    def create(self, settings: Mapping[str, Any]) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_in_place()
            if self.folder.name == INDEX_FOLDER:  # an index in another folder may be meant to be committed
                write_text(self.folder / ".gitignore", "*\n")  # a link there is replaced, not followed
            (self.folder / _STAMPS).unlink(missing_ok=True)  # they tell what the old settings leave out
        self._is_new, self._stamps = True, {}
        self._write({"settings": dict(settings), "segments": {}})

    @_reading
    def files(self) -> dict[str, str | None]:
        living = (one for segment in self._alive() for one in segment.files if one["id"] not in segment.dead)
        return {one["id"]: one["hash"] for one in living}

    def stamps(self) -> Stamps:
        try:
            stamps = dict(read_json(self.folder / _STAMPS)) if self.folder is not None else self._stamps
        except (OSError, ValueError, TypeError):
            return {}
        return {file: one for file, one in stamps.items() if isinstance(one, list) and len(one) == 2}

    def keep_stamps(self, stamps: Stamps) -> None:
        self._stamps = stamps
        if self.folder is not None:
            self._check_in_place()
            write_text(self.folder / _STAMPS, json.dumps(stamps))

    @_reading
    def replace_files(self, known: Collection[str], rows: Sequence[Row]) -> None:
        manifest = self._read()
        segments = {
            name: sorted({*dead, *known} & self._segment(name).ids) for name, dead in manifest["segments"].items()
        }
        for start in range(0, len(rows), MOST_ROWS):
            part = rows[start : start + MOST_ROWS]
            segments[self._add(*_of_rows(part))] = []
        self._write({**manifest, "segments": segments})
        if sum(self._segment(name).size < LARGE_SEGMENT for name in segments) >= _SMALL_SEGMENTS:
            self.finish()

    @_reading
    def finish(self) -> None:
        """Merge segments that are small or have over a third of their rows deleted; remove the merged files."""
        manifest = self._read()
        segments = dict(manifest["segments"])
        groups: list[list[_Segment]] = [[]]
        for one in self._alive():
            if one.size < LARGE_SEGMENT or one.alive.mean() < 2 / 3:
                if sum(int(other.alive.sum()) for other in [*groups[-1], one]) > MOST_ROWS:
                    groups.append([])
                groups[-1].append(one)
        groups = [group for group in groups if len(group) > 1 or any(one.dead for one in group)]
        for group in groups:
            for one in group:
                del segments[one.name]
            if any(one.alive.any() for one in group):
                segments[self._add(*_merged(group))] = []
        if groups:
            self._write({**manifest, "segments": segments})

    @_reading
    def nearest(self, vector: np.ndarray, exit_layer: int, limit: int, where: Filter) -> list[Found]:
        unit = (vector / (np.linalg.norm(vector) or 1)).astype(np.float32)
        chosen = [(one, np.flatnonzero(one.chosen(where))) for one in self._alive()]
        if limit <= _BEST_BY_SIGNS and sum(len(places) for _, places in chosen) > APPROXIMATE_ROWS:
            chosen = _best_by_signs(chosen, unit, exit_layer)
        return _best([(one, places, one.similarities(unit, exit_layer, places)) for one, places in chosen], limit)

    @_reading
    def lexical(self, words: Sequence[str], limit: int, where: Filter) -> list[Found]:
        if not words:
            return []
        segments = list(self._alive())
        rows = sum(one.size for one in segments)
        average = sum(one.words for one in segments) / max(rows, 1) or 1.0
        scores = [np.zeros(one.size) for one in segments]
        for word in words:
            postings = [one.postings(word) for one in segments]
            found = sum(len(places) for places, _ in postings)
            idf = np.log(1 + (rows - found + 0.5) / (found + 0.5))
            for one, (places, counts), total in zip(segments, postings, scores, strict=True):
                norms = _K1 * (1 - _B + _B / average * one["lengths"][places])
                total[places] += idf * (_K1 + 1) * counts / (counts + norms)
        scored = []
        for one, total in zip(segments, scores, strict=True):
            places = np.flatnonzero((total > 0) & one.chosen(where))
            scored.append((one, places, total[places]))
        return _best(scored, limit)

    @_reading
    def vectors(self, found: Sequence[Found], exit_layer: int) -> np.ndarray:
        rows: list[Any] = [one.row_id for one in found]
        segments = {segment for segment, _ in rows}
        width = max((one[f"vectors_{exit_layer}"].shape[1] for one in segments), default=0)
        result = np.zeros((len(rows), width), dtype=np.float32)
        for segment in segments:
            numbers = [number for number, (one, _) in enumerate(rows) if one is segment]
            places = [rows[number][1] for number in numbers]
            values, scales = segment[f"vectors_{exit_layer}"][places], segment[f"scales_{exit_layer}"][places]
            result[numbers] = values * scales[:, None]
        return result

    @_reading
    def count(self) -> int:
        return sum(int(one.alive.sum()) for one in self._alive())

    def _alive(self) -> Iterator["_Segment"]:
        """Yield the segments that `index.json` lists; in each, the rows of deleted files are marked."""
        while True:
            listed = self._read()["segments"]
            try:
                segments = [(self._segment(name), dead) for name, dead in listed.items()]
                break
            except FileNotFoundError:  # another process has merged the segment since the manifest was read
                self._version = None
                if self._read()["segments"] == listed:
                    raise
        for segment, dead in segments:
            segment.mark(dead)
            yield segment

    def _read(self) -> dict[str, Any]:
        """Return the content of `index.json`; `_NO_INDEX` if there is no index."""
        if self.folder is None or self._is_snapshot:
            return self._manifest
        path = self.folder / MANIFEST
        if not path.exists():
            self._manifest, self._version = _NO_INDEX, None
            return _NO_INDEX
        status = path.stat()
        if self._version != (status.st_mtime_ns, status.st_ino):
            manifest = read_json(path)
            if not all(map(_SEGMENT_NAME.fullmatch, manifest["segments"])):
                raise ValueError(f"{MANIFEST} names segments that can't be files of this folder")
            self._manifest = {"settings": dict(manifest["settings"]), "segments": dict(manifest["segments"])}
            self._version = (status.st_mtime_ns, status.st_ino)
        return self._manifest

    def _write(self, manifest: dict[str, Any]) -> None:
        self._segments = {name: one for name, one in self._segments.items() if name in manifest["segments"]}
        if self.folder is None:
            self._manifest = manifest
            return
        self._check_in_place(manifest)
        write_text(self.folder / MANIFEST, json.dumps(manifest))  # as ASCII: a folder's name need not be Unicode
        self._remove_other_segments(manifest["segments"])
        self._version = None

    def _is_in_place(self) -> bool:
        return self.folder is None or (self.folder.is_dir() and os.path.realpath(self.folder) == str(self.folder))

    def _check_in_place(self, manifest: Mapping[str, Any] | None = None) -> None:
        """Raise UserError if the folder is gone or replaced, perhaps by a link, or if `manifest` has no settings."""
        if not self._is_in_place() or (manifest is not None and manifest["settings"] is None):
            message = f"The index {self.location} was removed or replaced while it was written. Run the command again."
            raise UserError("search.index.replaced", message)

    def _remove_other_segments(self, names: Collection[str]) -> None:
        for path in self.folder.glob("rows-*") if self.folder is not None else ():
            if path.stem not in names and _SEGMENT_NAME.fullmatch(path.stem):
                path.unlink(missing_ok=True)

    def _add(self, arrays: _Arrays, files: list[dict[str, Any]]) -> str:
        """Write a new segment and return its name, which the caller must add to `index.json`."""
        name = f"rows-{uuid4().hex}"
        if self.folder is None:
            self._segments[name] = _Segment(name, arrays, files)
        else:
            from safetensors.numpy import save_file

            self._check_in_place()
            path = self.folder / f"{name}.safetensors"
            save_file(arrays, path.with_suffix(".tmp"), metadata={"files": json.dumps(files)})
            # safetensors writes files that only their owner can read; they get the permissions of the folder.
            path.with_suffix(".tmp").chmod(self.folder.stat().st_mode & 0o666)
            os.replace(path.with_suffix(".tmp"), path)
        return name

    def _segment(self, name: str) -> "_Segment":
        if name not in self._segments and self.folder is not None:
            self._segments[name] = _Segment(name, *_mapped(self.folder / f"{name}.safetensors"), location=self.location)
        return self._segments[name]


class _Segment:
    """N rows of an index, numbered from 0 to N - 1, stored as arrays in one file, which is mapped into memory."""

    def __init__(self, name: str, arrays: _Arrays, files: list[dict[str, Any]], location: str = MEMORY) -> None:
        self.name, self.files, self.dead, self.location = name, files, frozenset[str](), location
        self.size = len(arrays["lengths"])
        self.ids = {one["id"] for one in files}
        self._arrays = arrays
        self.alive = np.ones(self.size, dtype=bool)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def mark(self, dead: Sequence[str]) -> None:
        """Mark the rows of all files with the ids `dead` as deleted. These files are deleted or have newer rows."""
        if self.dead != frozenset(dead):
            self.dead = frozenset(dead)
            self.alive = self._of_files([one["id"] not in self.dead for one in self.files])

    def chosen(self, where: Filter) -> np.ndarray:
        """Return a boolean mask (N,): True for each row that the filter accepts and that is not deleted."""
        if where == Filter():
            return self.alive
        fitting = [where.fits_file(one["id"], one["path"], one["language"]) for one in self.files]
        return self.alive & self._of_files(fitting)

    def _of_files(self, values: Sequence[bool]) -> np.ndarray:
        return np.array(values, dtype=bool)[self["file_of_row"]]

    def similarities(self, unit: np.ndarray, exit_layer: int, places: np.ndarray) -> np.ndarray:
        """Return cosine similarities (P,) float32 of a unit vector (D,) and P rows, whose numbers are `places`."""
        vectors, result = self[f"vectors_{exit_layer}"], np.empty(len(places), dtype=np.float32)
        are_all = len(places) == self.size
        for start in range(0, len(places), _ROWS_PER_BLOCK):
            block = slice(start, start + _ROWS_PER_BLOCK)
            result[block] = vectors[block if are_all else places[block]].astype(np.float32) @ unit
        return result * self[f"scales_{exit_layer}"][places]

    def postings(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers (P,) of the P rows that contain `word`, and its count (P,) in each row, at most 255."""
        wanted = _word_key(word)
        place = int(np.searchsorted(self["words"], wanted))
        if place == len(self["words"]) or self["words"][place] != wanted:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8)
        first, last = self["word_starts"][place : place + 2]
        return self["word_rows"][first:last], self["word_counts"][first:last]

    @_reading
    def snippet(self, place: int) -> Snippet:
        first, last = self["row_starts"][place : place + 2]
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(self["rows"][first:last].tobytes(), _LARGEST_ROW)
        if not unpacking.eof:
            raise ValueError(f"row {place} is incomplete or has more than {_LARGEST_ROW:,} bytes")
        values = parse_json(content.decode(), finite=False)
        values[-1] = tuple(values[-1])  # `defines`, a list in JSON
        snippet = Snippet(*values)
        check_types(snippet)
        return snippet

    @cached_property
    def words(self) -> int:
        """Total number of words in all rows of this segment."""
        return int(self["lengths"].sum(dtype=np.int64))

    @cached_property
    def exits(self) -> list[int]:
        return [int(name.removeprefix("vectors_")) for name in self._arrays if name.startswith("vectors_")]


_Places = list[tuple[_Segment, np.ndarray]]  # segments, each with the numbers of some of its rows


def _best_by_signs(chosen: _Places, unit: np.ndarray, exit_layer: int) -> _Places:
    """Return the `_BEST_BY_SIGNS` rows of `chosen` (more if tied) whose vectors share most signs with `unit` (D,)."""
    signs = _signs(unit[None])
    distances = [
        np.bitwise_count(one[f"signs_{exit_layer}"] ^ signs).sum(axis=0, dtype=np.uint16)[places]
        for one, places in chosen
    ]
    counts = sum(np.bincount(one, minlength=len(unit) + 1) for one in distances)
    most = np.searchsorted(np.cumsum(counts), _BEST_BY_SIGNS)
    return [(one, places[values <= most]) for (one, places), values in zip(chosen, distances, strict=True)]


def _signs(vectors: np.ndarray) -> np.ndarray:
    """Pack the signs of vectors (N, D) into a uint64 array (D / 64, N); the bit of a positive component is 1."""
    packed = np.packbits(vectors > 0, axis=1)
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
    return np.ascontiguousarray(packed.view(np.uint64).T)


def _best(scored: Sequence[tuple[_Segment, np.ndarray, np.ndarray]], limit: int) -> list[Found]:
    """Return the `limit` best rows, sorted by score, path and line; `scored` has (segment, row numbers, scores)."""
    found = []
    for segment, places, scores in scored:
        best = np.argpartition(-scores, limit)[:limit] if limit < len(scores) else np.arange(len(scores))
        files = segment["file_of_row"][places[best]].tolist()
        for score, file, place in zip(scores[best].tolist(), files, places[best].tolist(), strict=True):
            found.append((-score, segment.files[file]["path"], place, segment))
    found.sort(key=itemgetter(0, 1, 2))  # the rows of a file are in the order of its lines
    return [
        Found((segment, place), path, -score, partial(segment.snippet, place))
        for score, path, place, segment in found[:limit]
    ]


def _of_rows(rows: Sequence[Row]) -> tuple[_Arrays, list[dict[str, Any]]]:
    """Return the arrays of a segment of `rows`, and a dictionary with id, hash, path and language for each file."""
    arrays: _Arrays = {}
    for exit_layer in rows[0].vectors:
        vectors = np.stack([row.vectors[exit_layer] for row in rows]).astype(np.float32)
        scales = np.maximum(np.abs(vectors).max(axis=1), np.finfo(np.float32).tiny) / 127
        arrays[f"vectors_{exit_layer}"] = np.round(vectors / scales[:, None]).astype(np.int8)
        arrays[f"scales_{exit_layer}"] = scales.astype(np.float32)
        arrays[f"signs_{exit_layer}"] = _signs(arrays[f"vectors_{exit_layer}"])
    blobs = [zlib.compress(json.dumps(_values(row.snippet)).encode(), 6) for row in rows]
    arrays["rows"] = np.frombuffer(b"".join(blobs), dtype=np.uint8)
    arrays["row_starts"] = np.cumsum([0, *map(len, blobs)], dtype=np.int64)
    files = dict.fromkeys((row.file_id, row.file_hash, row.snippet.path, row.snippet.language) for row in rows)
    numbers = {key: number for number, (key, *_) in enumerate(files)}
    arrays["file_of_row"] = np.array([numbers[row.file_id] for row in rows], dtype=np.uint32)
    words = [row.words.split() for row in rows]
    arrays["lengths"] = np.array([len(one) for one in words], dtype=np.uint32)
    key = np.fromiter(map(_word_keys.__getitem__, chain.from_iterable(words)), dtype=np.uint64)
    place = np.repeat(np.arange(len(rows)), arrays["lengths"])
    order = np.argsort(key, kind="stable")
    key, place = key[order], place[order]
    first = np.flatnonzero(np.append([True], (np.diff(key) != 0) | (np.diff(place) != 0))[: len(key)])
    counts = np.minimum(np.diff(np.append(first, len(key))), 255)
    arrays |= _postings(key[first], place[first], counts)
    return arrays, [dict(zip(("id", "hash", "path", "language"), file, strict=True)) for file in files]


def _postings(key: np.ndarray, row: np.ndarray, count: np.ndarray) -> _Arrays:
    """Return arrays for `_Segment.postings`: row `row[i]` has the word with the hash `key[i]` `count[i]` times."""
    words, starts = np.unique(key, return_index=True)
    word_starts = np.append(starts, len(key)).astype(np.uint32)
    rows, counts = row.astype(np.uint16), count.astype(np.uint8)
    return {"words": words, "word_starts": word_starts, "word_rows": rows, "word_counts": counts}


def _merged(segments: Sequence[_Segment]) -> tuple[_Arrays, list[dict[str, Any]]]:
    """Merge segments: return the arrays and files of a new segment with all rows that are not deleted."""
    arrays: _Arrays = {}
    exits = segments[0].exits
    for name in ("lengths", *(f"{kind}_{exit_layer}" for exit_layer in exits for kind in ("vectors", "scales"))):
        arrays[name] = np.concatenate([one[name][one.alive] for one in segments])
    for exit_layer in exits:
        arrays[f"signs_{exit_layer}"] = _signs(arrays[f"vectors_{exit_layer}"])
    files: list[dict[str, Any]] = []
    blobs, sizes, numbers, keys, rows, counts = [], [np.zeros(1, np.int64)], [], [], [], []
    first = 0
    for one in segments:
        places, row_sizes = np.flatnonzero(one.alive), np.diff(one["row_starts"])
        blobs.append(one["rows"][np.repeat(one.alive, row_sizes)])
        sizes.append(row_sizes[places])
        new_file = np.cumsum([len(files), *(file["id"] not in one.dead for file in one.files)])
        numbers.append(new_file[one["file_of_row"][places]])
        files += [file for file in one.files if file["id"] not in one.dead]
        new_row = np.full(one.size, -1, dtype=np.int64)
        new_row[places] = np.arange(first, first + len(places))
        moved = new_row[one["word_rows"]]
        stays = moved >= 0
        keys.append(np.repeat(one["words"], np.diff(one["word_starts"]))[stays])
        rows.append(moved[stays])
        counts.append(one["word_counts"][stays])
        first += len(places)
    arrays |= {"rows": np.concatenate(blobs), "row_starts": np.concatenate(sizes).cumsum(dtype=np.int64)}
    arrays["file_of_row"] = np.concatenate(numbers).astype(np.uint32)
    key, row, count = np.concatenate(keys), np.concatenate(rows), np.concatenate(counts)
    order = np.argsort(key, kind="stable")  # the rows of each word ascend already
    arrays |= _postings(key[order], row[order], count[order])
    return arrays, files


def _mapped(path: Path) -> tuple[_Arrays, list[dict[str, Any]]]:
    """Map a segment into memory; return ({name: array}, its files). OSError, ValueError or KeyError if damaged."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a file")
    content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    start = 8 + int(content[:8].view("<u8")[0])
    if start > min(len(content), MAX_JSON_BYTES):
        raise ValueError(f"the header of {path.name} is incomplete or has more than {MAX_JSON_BYTES:,} bytes")
    header = parse_json(content[8:start].tobytes().decode())
    files = parse_json(header.pop("__metadata__")["files"])
    arrays = {}
    for name, one in header.items():
        first, last = one["data_offsets"]
        kind = f"{one['dtype'][0].lower()}{int(one['dtype'][1:]) // 8}"  # such as f4 for F32
        if _KINDS.get(re.sub(r"s_\d+$", "s", name)) != (kind, len(one["shape"])):
            raise ValueError(f"the array {name!r} of {path.name} has an unknown name or a wrong type")
        arrays[name] = content[start + first : start + last].view(kind).reshape(one["shape"])
    _check_sizes(arrays)
    return arrays, files


def _check_sizes(arrays: _Arrays) -> None:
    """Raise ValueError or KeyError if an array of a segment is missing or has a wrong size or wrong offsets."""
    rows, words = len(arrays["lengths"]), len(arrays["words"])
    shapes: dict[str, tuple[int, ...]] = {"file_of_row": (rows,), "row_starts": (rows + 1,)}
    shapes |= {"word_starts": (words + 1,), "word_counts": arrays["word_rows"].shape}
    for name in (one for one in arrays if one.startswith("vectors_")):
        exit_layer, width = name.removeprefix("vectors_"), arrays[name].shape[1] or 1
        shapes |= {name: (rows, width), f"scales_{exit_layer}": (rows,), f"signs_{exit_layer}": (-(-width // 64), rows)}
    wrong = [name for name, shape in shapes.items() if arrays[name].shape != shape]
    for offsets, divided in (("row_starts", "rows"), ("word_starts", "word_rows")):
        starts = arrays[offsets]  # read by `np.repeat`, which would fill memory
        if not wrong and (starts[0] or starts[-1] != len(arrays[divided]) or (starts[1:] < starts[:-1]).any()):
            wrong = [offsets]
    if wrong or not 0 < rows <= MOST_ROWS:
        raise ValueError(f"the array {wrong[0] if wrong else 'lengths'} has a wrong size or wrong offsets")


def _word_key(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


_word_keys = Memo(_word_key)
