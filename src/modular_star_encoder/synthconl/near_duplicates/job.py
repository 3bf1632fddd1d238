"""Near-deduplication of parquet files as tasks, each of which can be done anew at any time, in any process.

The tasks, in order; those of one kind may run at the same time, also on several machines that share a file system:

    fingerprint(shard)      for each shard: its texts and fingerprints
    propose()               once: different rows and candidate pairs
    compare(part, parts)    for each part of the candidate pairs: their true similarity
    decide(parts)           once: clusters, and what is kept
    write(shard)            for each shard: the rows that are kept
    finish()                once: what was dropped and why; the work folder goes

What a task makes appears by renaming, and a task whose result is there does nothing. So after any interruption the
same tasks go on from there, and no row is lost or doubled.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from modular_star_encoder.synthconl.near_duplicates.candidates import NearPairs, Search, SearchColumn
from modular_star_encoder.synthconl.near_duplicates.clusters import (
    EQUAL,
    KEPT,
    NEAR,
    DistinctRows,
    NearDuplicates,
    decide,
    distinct_rows,
)
from modular_star_encoder.synthconl.near_duplicates.fingerprints import DuplicateSettings, minhash_class
from modular_star_encoder.synthconl.near_duplicates.storage import (
    ColumnFiles,
    Shard,
    check_columns,
    find_shards,
    id_order,
    read_array,
    read_ids,
    read_json,
    read_texts,
    stored_column,
    whole,
    write_array,
    write_json,
    write_kept,
    write_texts,
)

_LARGEST_CLUSTERS, _ROWS_AT_A_TIME = 20, 8192


@dataclass(frozen=True, slots=True)
class DuplicateReport:
    """Figures of a finished job, in rows; the columns of `dropped.jsonl` are told by `write_dropped`.

    Attributes:
        rows: All rows.
        counts: What became of them: those kept, and those dropped, by reason.
        clusters: The number of clusters of at least two rows.
        largest_clusters: Their sizes, largest first, twenty at the most.
        giant_clusters: `"cluster"` (an id), `"rows"` and `"kept"` of those too large to be reduced to one row.
        pairs_compared: Candidate pairs whose true similarity was computed.
        near_pairs: Those at or above the threshold.
        largest_bucket: The most different rows that share a band.
        rows_over_limit: The most rows, over the bands, that were compared with a part of their bucket only.
    """

    rows: int
    counts: dict[str, int]
    clusters: int
    largest_clusters: list[int]
    giant_clusters: list[dict[str, Any]]
    pairs_compared: int
    near_pairs: int
    largest_bucket: int
    rows_over_limit: int

    @property
    def kept(self) -> int:
        """The number of rows kept."""
        return self.counts[KEPT]

    @classmethod
    def of(cls, result: NearDuplicates, ids: pa.ChunkedArray) -> "DuplicateReport":
        """The report of a result; `ids` are those of all rows."""
        sizes = result.cluster_sizes
        return cls(
            rows=len(result.kept),
            counts=result.counts,
            clusters=len(sizes),
            largest_clusters=sizes[:_LARGEST_CLUSTERS].tolist(),
            giant_clusters=[
                {"cluster": ids[one.cluster].as_py(), "rows": one.rows, "kept": one.kept}
                for one in result.giant_clusters
            ],
            pairs_compared=result.compared,
            near_pairs=len(result.pairs),
            largest_bucket=result.largest_bucket,
            rows_over_limit=result.rows_over_limit,
        )

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> "DuplicateReport":
        """The report that a JSON file holds, beside other things."""
        return cls(**{name: written[name] for name in cls.__dataclass_fields__})


def write_dropped(
    path: Path, ids: pa.ChunkedArray, reasons: tuple[str, ...], figures: Mapping[str, np.ndarray]
) -> None:
    """Write a JSON line for each dropped row, in the order of rows.

    Its keys: `id`, `reason`, `cluster` (the smallest id in it), `nearest` (the id of the most similar row, or the
    0-based number of the text of the set that it is near) and `similarity`.
    """
    dropped = np.flatnonzero(~figures["kept"])
    among_rows = np.isin(np.array(reasons), (EQUAL, NEAR))
    with path.open("w", encoding="utf-8") as output:
        for start in range(0, len(dropped), _ROWS_AT_A_TIME):
            rows = dropped[start : start + _ROWS_AT_A_TIME]
            reason, nearest = figures["reason"][rows], figures["nearest"][rows].copy()
            is_row = among_rows[reason]
            shown = ids.take(pa.array(np.where(is_row, nearest, 0))).to_pylist()
            columns = (
                ids.take(pa.array(rows)).to_pylist(),
                [reasons[one] for one in reason.tolist()],
                ids.take(pa.array(figures["clusters"][rows])).to_pylist(),
                [name if row else number for name, row, number in zip(shown, is_row, nearest.tolist(), strict=True)],
                figures["similarity"][rows].tolist(),
            )
            for values in zip(*columns, strict=True):
                line = dict(zip(("id", "reason", "cluster", "nearest", "similarity"), values, strict=True))
                output.write(json.dumps(line, ensure_ascii=False) + "\n")


WORK, REPORT, DROPPED = ".near-duplicates", "report.json", "dropped.jsonl"
_ROW_FIGURES = ("kept", "reason", "clusters", "nearest", "similarity")


def _ignore(rows: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class DuplicateJob:
    """A job that `preparation.prepare_job` made; see the module."""

    out: Path
    shards: tuple[Shard, ...]
    columns: tuple[str, ...]
    id_column: str | None
    settings: DuplicateSettings
    other_sets: dict[str, int]

    @property
    def work(self) -> Path:
        """The folder of what is needed until the job is finished."""
        return self.out / WORK

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.out / REPORT).exists()

    def fingerprint(self, shard: int, advance: Callable[[int], object] = _ignore) -> None:
        """Store the texts of a shard and their fingerprints; `advance` is told of rows as they are done."""
        target = self._shard_folder(shard)
        if self.finished or target.exists():
            return advance(self.shards[shard].rows)

        def told() -> Iterator[list[list[str | None]]]:
            for batch in read_texts(self.shards[shard], self.columns):
                yield batch
                advance(len(batch[0]))

        with whole(target) as folder:
            write_texts(folder, told(), len(self.columns), self.settings.banding)

    def propose(self) -> None:
        """Find the different rows and the candidate pairs."""
        target = self.work / "proposed"
        if self.finished or target.exists():
            return
        opened = self._opened_columns()
        digests = [np.concatenate([shard.digests for shard in column]) for column in opened]
        rows = distinct_rows(np.stack(digests, axis=1), read_array(self.work / "order.npy"))
        del digests
        search = self._search(opened, rows)
        within, figures = search.candidates_within()
        with whole(target) as folder:
            folder.mkdir()
            write_array(folder / "rows.npy", rows.rows)
            write_array(folder / "numbers.npy", rows.numbers)
            for name, tasks in (("within", within), ("between", search.candidates_between())):
                for task, pairs in enumerate(tasks):
                    write_array(folder / f"{name}-{task:03d}.npy", pairs)
            write_json(folder / "figures.json", figures)

    def proposed_pairs(self) -> int:
        """How many pairs there are to compare."""
        return sum(len(read_array(path, mapped=True)) for path in self._proposals("*"))

    def compare(self, part: int, parts: int) -> None:
        """Compare a part of the candidate pairs."""
        target = self._compared(part, parts)
        if self.finished or target.exists():
            return
        search = self._search(self._opened_columns(), self._distinct_rows())
        with whole(target) as folder:
            folder.mkdir()
            for name, compare in (("within", search.compare_within), ("between", search.compare_between)):
                near = [compare(task, one) for task, one in enumerate(self._part_of_proposals(name, part, parts))]
                merged = NearPairs.merged(near)
                write_array(folder / f"{name}.npy", merged.pairs)
                write_array(folder / f"{name}-similarities.npy", merged.similarities)

    def decide(self, parts: int) -> None:
        """Choose what is kept, from all `parts` of the comparison."""
        target = self.work / "decided"
        if self.finished or target.exists():
            return
        near = {
            name: NearPairs.merged(
                [
                    NearPairs(read_array(folder / f"{name}.npy"), read_array(folder / f"{name}-similarities.npy"))
                    for folder in (self._compared(part, parts) for part in range(parts))
                ]
            )
            for name in ("within", "between")
        }
        figures = read_json(self.work / "proposed" / "figures.json")
        rows = self._distinct_rows()
        result = decide(rows, near["within"], near["between"], self.other_sets, self.settings, **figures)
        with whole(target) as folder:
            folder.mkdir()
            for name in _ROW_FIGURES:
                write_array(folder / f"{name}.npy", getattr(result, name))
            ids = read_ids(self.shards, self.id_column)
            write_json(folder / "report.json", asdict(DuplicateReport.of(result, ids)))

    def write(self, shard: int, advance: Callable[[int], object] = _ignore) -> None:
        """Write the rows of a shard that are kept, under its name."""
        target = self.out / self.shards[shard].name
        if self.finished or target.exists():
            return advance(self.shards[shard].rows)
        start = sum(one.rows for one in self.shards[:shard])
        kept = read_array(self.work / "decided" / "kept.npy", mapped=True)[start : start + self.shards[shard].rows]
        write_kept(self.shards[shard], target, kept, advance)

    def finish(self) -> DuplicateReport:
        """Write `dropped.jsonl` and `report.json`, remove the work folder, and return the report."""
        if not self.finished:
            decided = self.work / "decided"
            figures = {name: read_array(decided / f"{name}.npy", mapped=True) for name in _ROW_FIGURES}
            report = DuplicateReport.read(read_json(decided / "report.json"))
            with whole(self.out / DROPPED) as temporary:
                write_dropped(temporary, read_ids(self.shards, self.id_column), tuple(report.counts), figures)
            job = read_json(self.work / "job.json")
            with whole(self.out / REPORT) as temporary:
                write_json(temporary, {**asdict(report), "job": job})
        shutil.rmtree(self.work, ignore_errors=True)
        return DuplicateReport.read(read_json(self.out / REPORT))

    def _shard_folder(self, shard: int) -> Path:
        return self.work / f"shard-{shard:05d}"

    def _compared(self, part: int, parts: int) -> Path:
        return self.work / f"compared-{part:05d}-of-{parts:05d}"

    def _proposals(self, name: str) -> list[Path]:
        return sorted((self.work / "proposed").glob(f"{name}-[0-9]*.npy"))

    def _part_of_proposals(self, name: str, part: int, parts: int) -> Iterator[np.ndarray]:
        for path in self._proposals(name):
            pairs = read_array(path, mapped=True)
            start, stop = (len(pairs) * one // parts for one in (part, part + 1))
            yield np.array(pairs[start:stop])

    def _distinct_rows(self) -> DistinctRows:
        proposed = self.work / "proposed"
        return DistinctRows(read_array(proposed / "rows.npy"), read_array(proposed / "numbers.npy"))

    def _opened_columns(self) -> list[list[ColumnFiles]]:
        folders = [self._shard_folder(shard) for shard in range(len(self.shards))]
        banding = self.settings.banding
        return [
            [ColumnFiles.opened(folder, column, banding) for folder in folders] for column in range(len(self.columns))
        ]

    def _search(self, opened: list[list[ColumnFiles]], rows: DistinctRows) -> Search:
        others = ColumnFiles.opened(self.work / "against", 0, self.settings.banding)
        columns: list[SearchColumn] = [stored_column(column, rows.rows) for column in opened]
        return Search(columns, stored_column([others], np.arange(len(others))), self.settings)


_TEXTS_AT_A_TIME = 1024


def prepare_job(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    columns: Sequence[str],
    id_column: str | None = None,
    against: Mapping[str, Iterable[str]] | None = None,
    settings: DuplicateSettings | None = None,
) -> DuplicateJob:
    """Check everything and write down what the job is, or find the same job as it was left.

    Args:
        source: A folder of parquet files, or a list of them.
        out: The folder to write to: one that doesn't exist, is empty, or was begun by the same job.
        columns: The columns of text to compare.
        id_column: A column of different texts or integers; of near-duplicates, the row of smallest id stays. Without
            one, the first stays, files being ordered by name.
        against: Texts of other sets by the name of the set: rows with a text near one of them, in any of `columns`, are
            dropped too.
        settings: What counts as a near-duplicate; by default, `DuplicateSettings()`.

    Raises:
        ValueError: Files, columns or ids are not as they must be, `out` holds something else, or was begun with other
            files, settings or versions.
        ImportError: rensa isn't installed.
    """
    settings = settings or DuplicateSettings()
    if isinstance(columns, str) or not columns or len(set(columns)) < len(columns):
        raise ValueError("columns must be a list of at least one name, each once.")
    minhash_class()
    out = Path(out).absolute()
    shards = find_shards(source)
    if any(out == Path(one.path).parent or out in Path(one.path).parents for one in shards):
        raise ValueError(f"{out} holds the files to read; name another folder to write to.")
    if isinstance(source, str | os.PathLike) and Path(source).absolute() in out.parents:
        raise ValueError(f"{out} lies inside the folder to read; name another folder to write to.")
    check_columns(shards, columns, id_column)
    other_sets = {name: [text or "" for text in texts] for name, texts in (against or {}).items()}
    sizes = {name: len(texts) for name, texts in other_sets.items()}
    job = DuplicateJob(out, shards, tuple(columns), id_column, settings, sizes)
    description = _description(job, other_sets)
    before = _description_found(out)
    if before is None:
        _begin(job, description, other_sets)
    elif before != description:
        changed = ", ".join(name for name in description if before.get(name) != description[name])
        raise ValueError(f"{out} was begun with other {changed}; name another folder, or remove it and start again.")
    return job


def _begin(job: DuplicateJob, description: dict[str, Any], other_sets: dict[str, list[str]]) -> None:
    """Write what all tasks need."""
    texts = [text for one in other_sets.values() for text in one]
    order = id_order(job.shards, job.id_column)
    job.out.mkdir(parents=True, exist_ok=True)
    with whole(job.work) as folder:
        folder.mkdir()
        write_json(folder / "job.json", description)
        write_array(folder / "order.npy", order)
        write_texts(folder / "against", _batches(texts), 1, job.settings.banding)


def _description(job: DuplicateJob, other_sets: dict[str, list[str]]) -> dict[str, Any]:
    """All that the result depends on."""
    return {
        "files": [shard.identity() for shard in job.shards],
        "columns": list(job.columns),
        "id_column": job.id_column,
        "against": {name: {"texts": len(texts), "digest": _digest(texts)} for name, texts in other_sets.items()},
        "settings": asdict(job.settings),
        "versions": {"rensa": version("rensa")},
    }


def _description_found(out: Path) -> dict[str, Any] | None:
    """What the job in this folder is; None where none has begun."""
    if (out / REPORT).exists():
        return read_json(out / REPORT).get("job", {})
    if (out / WORK).exists():
        return read_json(out / WORK / "job.json")
    if out.exists() and (not out.is_dir() or any(entry.name != f".{WORK}.tmp" for entry in out.iterdir())):
        raise ValueError(f"{out} holds something else; name a folder that does not exist yet, or an empty one.")
    return None


def _batches(texts: list[str]) -> Iterator[list[list[str | None]]]:
    for start in range(0, len(texts), _TEXTS_AT_A_TIME):
        yield [list(texts[start : start + _TEXTS_AT_A_TIME])]


def _digest(texts: list[str]) -> str:
    digest = blake2b(digest_size=16)
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


_PAIRS_PER_PART = 100_000


def drop_near_duplicates(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    columns: Sequence[str],
    id_column: str | None = None,
    against: Mapping[str, Iterable[str]] | None = None,
    settings: DuplicateSettings | None = None,
    progress: bool = True,
) -> DuplicateReport:
    """Write the rows of parquet files that are not near-duplicates of others, to files of the same names.

    Beside them stand `report.json` (the figures, and what they were made from) and `dropped.jsonl` (a line for each row
    dropped: why, its cluster, and the row nearest to it).

    After an interruption of any kind, the same call goes on and gives the same result; a finished job is reported as it
    is. Let one process at a time work on a folder. Rows are read a thousand at a time, and what is held of each is a
    few hundred bytes; the texts are copied to the disk until the job is finished.

    Args:
        source: A folder of parquet files, or a list of them.
        out: The folder to write to: one that doesn't exist, is empty, or was begun by the same call.
        columns: The columns of text to compare; `settings.match` says whether in either or in all of them rows must be
            near.
        id_column: A column of different texts or integers; of near-duplicates, the row of smallest id stays. Without
            one, the first stays, files being ordered by name.
        against: Texts of other sets by the name of the set: rows with a text near one of them, in any of `columns`, are
            dropped too.
        settings: What counts as a near-duplicate; by default, `DuplicateSettings()`.
        progress: Whether to show progress bars.

    Raises:
        ValueError: Files, columns or ids are not as they must be, `out` holds something else, or was begun with other
            files, settings or versions.
        ImportError: rensa isn't installed.
    """
    job = prepare_job(source, out, columns=columns, id_column=id_column, against=against, settings=settings)
    if job.finished:
        return job.finish()
    _for_each_shard(job, job.fingerprint, "Fingerprinting", progress)
    with tqdm(desc="Proposing pairs", total=1, disable=not progress) as bar:
        job.propose()
        bar.update()
    pairs = job.proposed_pairs()
    parts = max(1, -(-pairs // _PAIRS_PER_PART))
    with tqdm(desc="Comparing", total=pairs, unit=" pairs", unit_scale=True, disable=not progress) as bar:
        for part in range(parts):
            job.compare(part, parts)
            bar.update(pairs * (part + 1) // parts - pairs * part // parts)
    job.decide(parts)
    _for_each_shard(job, job.write, "Writing", progress)
    return job.finish()


def _for_each_shard(
    job: DuplicateJob, task: Callable[[int, Callable[[int], object]], None], name: str, progress: bool
) -> None:
    rows = sum(shard.rows for shard in job.shards)
    with tqdm(desc=name, total=rows, unit=" rows", unit_scale=True, disable=not progress) as bar:
        for shard in range(len(job.shards)):
            task(shard, bar.update)
