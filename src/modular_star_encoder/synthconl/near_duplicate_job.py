"""Drop near-duplicate rows of parquet files; a repeated call continues an interrupted call.

A call writes a file of fingerprints for each source file to the folder `WORK`, then the files of kept rows, and last
the report. A file appears only when it is complete. Repeated calls read the same fingerprints and keep the same rows.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from hashlib import blake2b, file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from modular_star_encoder.synthconl import near_duplicates
from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings, find_near_duplicates, fingerprint
from modular_star_encoder.synthconl.row_files import Shard, check_columns, find_shards, read_ids, read_texts, write_kept
from modular_star_encoder.utils import files
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import folder_lock, read_json, read_record, staged_file, write_json

WORK, REPORT, DROPPED = ".near-duplicate-job", "report.json", "dropped.jsonl"
_LARGEST_CLUSTERS = 20


def drop_near_duplicates(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    columns: Sequence[str],
    id_column: str | None = None,  # of near-duplicates, the row with the smallest id, or else the first, is kept
    against: Mapping[str, Iterable[str | None]] | None = None,  # see `find_near_duplicates`
    settings: DuplicateSettings | None = None,
    share: tuple[int, int] | None = None,  # (i, n): only fingerprint the files i, i + n, i + 2n, …, and return {}
    progress: bool = True,
) -> dict[str, Any]:
    """Copy parquet files from `source` to `out` without near-duplicate rows; return the content of `report.json`.

    Repeat an interrupted call to continue it. `dropped.jsonl` in `out` gets a line for each dropped row with `id`,
    `reason`, `cluster` (the smallest id in the row's cluster), `nearest` (the most similar row's id, or the number of
    the similar text in a set of `against`) and `similarity`. A call needs a few hundred bytes of memory per row and
    column.
    """
    source, out, settings = Path(source).absolute(), Path(out).absolute(), settings or DuplicateSettings()
    shards = find_shards(source)
    if isinstance(columns, str) or not columns or len(set(columns)) < len(columns):
        message = f"`columns` must be a list of different column names, not {columns!r}."
        raise UserError("synthconl.near_duplicates.columns", message)
    if reserved := [one.path for one in shards if one.name.split("/")[0] in (REPORT, DROPPED)]:
        message = f"Rename {reserved[0]}: its copy would replace {REPORT} or {DROPPED} in the output folder."
        raise UserError("synthconl.near_duplicates.name", message)
    check_columns(shards, columns, id_column)
    other_sets = {name: list(texts) for name, texts in (against or {}).items()}
    job = {
        "files": [shard.identity() for shard in shards],
        "columns": list(columns),
        "id_column": id_column,
        "against": {name: {"texts": len(texts), "digest": _digest(texts)} for name, texts in other_sets.items()},
        "settings": {one.name: getattr(settings, one.name) for one in fields(DuplicateSettings)},
        "versions": {"rensa": version("rensa")},
    }
    work = out / WORK
    _is_begun(source, out, job)
    if not (out / REPORT).exists():
        ids, order = read_ids(shards, id_column)
        with folder_lock(out):
            if not _is_begun(source, out, job):  # perhaps another process has begun or finished meanwhile
                work.mkdir(parents=True, exist_ok=True)
                write_json(work / "job.json", job)
            if share is None and not (out / REPORT).exists():
                parts = _fingerprinted(shards, columns, work, settings, progress)
                result = find_near_duplicates(parts, settings, order=order, against=other_sets, progress=progress)
                start = 0
                for shard in tqdm(shards, desc="Writing", unit=" files", disable=not progress):
                    target, kept = out / shard.name, result.kept[start : start + shard.rows]
                    record = work / f"{_digest([shard.name])}.json"
                    if _found(target, out, int(kept.sum()), partial(_read_output, record)) is None:
                        write_kept(shard, target, kept)
                        write_json(record, _checksum(target), resumable=True)
                    start += shard.rows
                with staged_file(out / DROPPED, resumable=True) as temporary, temporary.open("wb") as output:
                    output.writelines(_dropped_lines(result, ids))
                write_json(out / REPORT, _report(result, ids) | {"job": job}, resumable=True)
    if share is None:
        shutil.rmtree(work, ignore_errors=True)
        return read_json(out / REPORT)
    if not (out / REPORT).exists():
        _fingerprinted(shards[share[0] :: share[1]], columns, work, settings, progress)
    return {}


def _is_begun(source: Path, out: Path, job: dict[str, Any]) -> bool:
    """Return whether an earlier call began this job in `out`; UserError if `out` can't be used for this job."""
    begun = next((path for path in (out / REPORT, out / WORK / "job.json") if path.exists()), None)
    used = out.is_file() or (out.is_dir() and any(one.name not in (WORK, files.LOCK) for one in out.iterdir()))
    real = tuple(Path(os.path.realpath(path)) for path in (source, out))  # a link may lead into the other folder
    overlap = any(one.is_relative_to(other) or other.is_relative_to(one) for one, other in ((source, out), real))
    work, key, fault = out / WORK, "", ""
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        key, fault = "damaged", f"has a file or link named {WORK}, not a folder; remove {out} and start again"
    elif (used and not begun) or overlap:
        key, fault = "out", f"must be new or empty, and neither in the folder {source} nor above it, not even by a link"
    elif begun:
        kinds: dict[str, Any] = {"counts": dict[str, int], "job": dict} if begun.name == REPORT else {}
        remedy = f"Remove the folder {out} and start again"
        content = read_record(begun, "synthconl.near_duplicates.damaged", remedy, **kinds)
        before = content["job"] if kinds else content
        if changed := [name for name in job if before.get(name) != job[name]]:
            changes = f"other values of {', '.join(changed)}. Use another folder, or remove this folder to start again"
            key, fault = "other_job", f"has the files of an earlier job with {changes}"
    if key:
        raise UserError(f"synthconl.near_duplicates.{key}", f"The output folder {out} {fault}.")
    return begun is not None


def _found(path: Path, out: Path, rows: int, read: Callable[[Path], Any]) -> Any:
    """Return `read(path)`, or None if there is no file; UserError if it is damaged or its row count is not `rows`."""
    try:
        if files.leads_outside(path, out) or (path.exists() and not path.is_file()):
            raise ValueError("it is a link out of the folder or not a regular file")
        found = read(path) if path.exists() else None
        if found is not None and found.num_rows != rows:
            raise ValueError(f"it has {found.num_rows} rows, not {rows}")
        return found
    except (OSError, ValueError) as error:
        fault = str(error) or type(error).__name__
        message = f"{path} has changed since this job wrote it ({fault}); remove the folder {out} and start again."
        raise UserError("synthconl.near_duplicates.damaged", message) from error


def _read_output(record: Path, path: Path) -> pq.FileMetaData:
    """Return the metadata of a file of rows; ValueError if its checksum is not the one stored in `record`."""
    if record.exists() and read_json(record) != _checksum(path):
        raise ValueError("its checksum is wrong")
    return pq.read_metadata(path)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _digest(texts: Iterable[str | None]) -> str:
    contents = [(text or "").encode("utf-8", "surrogatepass") for text in texts]
    return blake2b(b"".join(len(one).to_bytes(8, "little") + one for one in contents), digest_size=16).hexdigest()


def _fingerprinted(
    shards: Sequence[Shard], columns: Sequence[str], work: Path, settings: DuplicateSettings, progress: bool
) -> list[list[pa.StructArray]]:
    """Write missing files of fingerprints (Arrow IPC, then a SHA-256); return the fingerprints, a list per column."""
    empty = fingerprint([], settings.banding)
    schema = pa.schema([(name, empty.type) for name in columns])
    tables = []
    with tqdm(desc="Fingerprinting", total=sum(one.rows for one in shards), unit=" rows", disable=not progress) as bar:
        for shard in shards:
            target = work / f"{_digest([shard.name])}.arrow"
            if (table := _found(target, work.parent, shard.rows, _read_fingerprints)) is None:
                with staged_file(target, resumable=True) as temporary, temporary.open("wb+") as file:
                    with pa.ipc.new_file(file, schema) as writer:
                        for texts in read_texts(shard, columns):
                            prints = [fingerprint(column, settings.banding) for column in texts]
                            writer.write_batch(pa.record_batch(prints, schema))
                    file.seek(0)
                    file.write(file_digest(file, "sha256").digest())
                table = _read_fingerprints(target)
            bar.update(shard.rows)
            tables.append(table)
    return [[empty, *pa.concat_tables(tables)[name].chunks] for name in columns]


def _read_fingerprints(path: Path) -> pa.Table:
    """Return the fingerprints in a file, memory-mapped; ValueError if the file is damaged."""
    content = pa.memory_map(str(path)).read_buffer()
    if sha256(content[:-32]).digest() != content[-32:].to_pybytes():
        raise ValueError("its checksum is wrong")
    return pa.ipc.open_file(content[:-32]).read_all()


def _report(result: near_duplicates.NearDuplicates, ids: pa.ChunkedArray) -> dict[str, Any]:
    sizes = result.cluster_sizes
    return {
        "rows": len(result.kept),
        "counts": result.counts,
        "clusters": len(sizes),
        "largest_clusters": sizes[:_LARGEST_CLUSTERS].tolist(),
        "giant_clusters": [one | {"cluster": ids[one["cluster"]].as_py()} for one in result.giant_clusters],
        "pairs_compared": result.compared,
        "near_pairs": len(result.pairs),
        "largest_bucket": result.largest_bucket,
        "rows_over_limit": result.rows_over_limit,
    }


def _dropped_lines(result: near_duplicates.NearDuplicates, ids: pa.ChunkedArray) -> Iterator[bytes]:
    names = ids.to_pylist()
    for row in np.flatnonzero(~result.kept).tolist():
        reason, nearest = result.reasons[result.reason[row]], int(result.nearest[row])
        line = {
            "id": names[row],
            "cluster": names[result.clusters[row]],
            "nearest": names[nearest] if reason in (near_duplicates.EQUAL, near_duplicates.NEAR) else nearest,
            "reason": reason,
            "similarity": float(result.similarity[row]),
        }
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"
