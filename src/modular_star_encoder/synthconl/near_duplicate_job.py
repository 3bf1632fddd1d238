"""Drop near-duplicate rows of parquet files in several tasks, which any process can run and repeat.

The tasks, in order; tasks of one kind may run at the same time, also on several machines that share a file system:

    fingerprint(shard)      for each shard: its texts and fingerprints
    propose()               once: distinct rows and candidate pairs
    compare(part, parts)    for each part of the candidate pairs: their true similarity
    decide(parts)           once: clusters, and which rows are kept
    write(shard)            for each shard: the rows that are kept
    finish()                once: the report and the dropped rows; the work folder is removed

The result of a task appears by a rename, and a task whose result exists does nothing. So the same tasks continue after
any interruption, and no row is lost or duplicated.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from modular_star_encoder.synthconl.minhash import DuplicateSettings, StoredColumn, minhash_class, store_fingerprints
from modular_star_encoder.synthconl.near_duplicates import (
    EQUAL,
    KEPT,
    NEAR,
    Column,
    DistinctRows,
    NearPairs,
    Search,
    decide,
    distinct_rows,
)
from modular_star_encoder.synthconl.row_files import (
    Shard,
    batches,
    check_columns,
    find_shards,
    id_order,
    locked,
    read_ids,
    read_texts,
    write_kept,
)
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import read_json, staged_file, staged_folder, write_json

WORK, REPORT, DROPPED = ".near-duplicate-job", "report.json", "dropped.jsonl"
_KINDS = ("within", "between")
_mapped = partial(np.load, mmap_mode="r")
_LARGEST_CLUSTERS, _TEXTS_AT_A_TIME, _LINES_AT_A_TIME, _PAIRS_PER_PART, _MAX_TASKS = 20, 1024, 8192, 100_000, 1000


@dataclass(frozen=True, slots=True)
class DuplicateReport:
    """The numbers of rows, clusters and compared pairs of a finished job."""

    rows: int
    counts: dict[str, int]  # the kept rows, and the dropped rows by reason
    clusters: int  # clusters of at least two rows
    largest_clusters: list[int]  # the sizes of the largest clusters, at most twenty
    giant_clusters: list[dict[str, Any]]  # `NearDuplicates.giant_clusters`, with ids
    pairs_compared: int  # candidate pairs whose true similarity was computed
    near_pairs: int  # pairs at or above the threshold
    largest_bucket: int  # the most distinct rows that share a band
    rows_over_limit: int  # the most rows in one band that were compared with only a part of their bucket

    @property
    def kept(self) -> int:
        return self.counts[KEPT]


def prepare_job(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    columns: Sequence[str],
    id_column: str | None = None,
    against: Mapping[str, Iterable[str | None]] | None = None,
    settings: DuplicateSettings | None = None,
) -> "DuplicateJob":
    """Prepare a job that copies parquet files to files of the same names, leaving out near-duplicate rows.

    This checks the input and writes the description of the job, or finds the same job, begun earlier; `run` does the
    work. `out` also gets `report.json` (the report and the description) and `dropped.jsonl`, with a line for each
    dropped row: `id`, `reason`, `cluster` (the smallest id in it), `nearest` (the id of the most similar row, or the
    0-based number of the near text in another set) and `similarity`.

    Args:
        source, out: The folder of parquet files; the folder to write, which is new, empty, or begun by the same job.
        columns: The columns of text to compare; `settings.match` says whether one or all of them must be near.
        id_column: A column of unique texts or integers; of near-duplicates, the row with the smallest id is kept.
            Without this column, the first row is kept, in the order of the file names.
        against: See `find_near_duplicates`.
    """
    if isinstance(columns, str) or not columns or len(set(columns)) < len(columns):
        message = f"`columns` must be a list of one or more different names, not {columns!r}."
        raise UserError("synthconl.near_duplicates.columns", message)
    minhash_class()  # an error now if rensa is missing
    source, out = Path(source).absolute(), Path(out).absolute()
    shards = find_shards(source)
    check_columns(shards, columns, id_column)
    other_sets = {name: [text or "" for text in texts] for name, texts in (against or {}).items()}
    sizes = {name: len(texts) for name, texts in other_sets.items()}
    job = DuplicateJob(out, shards, tuple(columns), id_column, settings or DuplicateSettings(), sizes)
    description = {
        "files": [shard.identity() for shard in shards],
        "columns": list(columns),
        "id_column": id_column,
        "against": {name: {"texts": len(texts), "digest": _digest(texts)} for name, texts in other_sets.items()},
        "settings": {one.name: getattr(job.settings, one.name) for one in fields(DuplicateSettings)},
        "versions": {"rensa": version("rensa")},
    }
    begun = job.finished or job.work.exists()
    used = out.is_file() or (out.is_dir() and any(one.name != f".{WORK}.tmp" for one in out.iterdir()))
    if (used and not begun) or out == source or out in source.parents or source in out.parents:
        message = f"{out}, the folder to write, must be empty or not exist; it must not lie in {source} or contain it."
        raise UserError("synthconl.near_duplicates.out", message)
    if begun:
        before = _read_json(out / REPORT).get("job", {}) if job.finished else _read_json(job.work / "job.json")
        if before != description:
            changed = ", ".join(name for name in description if before.get(name) != description[name])
            message = f"{out} was begun with other {changed}; name another folder, or remove this one and start again."
            raise UserError("synthconl.near_duplicates.other_job", message)
        return job
    order = id_order(shards, id_column)
    with staged_folder(job.work, resumable=True) as folder:
        write_json(folder / "job.json", description)
        np.save(folder / "order.npy", order)
        texts = [text for one in other_sets.values() for text in one]
        some = ([batch] for batch in batches(texts, _TEXTS_AT_A_TIME))
        store_fingerprints(folder / "against", some, 1, job.settings.banding)
    return job


def _digest(texts: list[str]) -> str:
    contents = [text.encode("utf-8", "surrogatepass") for text in texts]
    return blake2b(b"".join(len(one).to_bytes(8, "little") + one for one in contents), digest_size=16).hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        message = f"{path} is damaged ({error}); remove its folder and start again."
        raise UserError("synthconl.near_duplicates.damaged", message) from error


@dataclass(frozen=True, slots=True)
class DuplicateJob:
    """A job from `prepare_job`; `run` does all its tasks in order; methods such as `propose` do one of them each."""

    out: Path
    shards: tuple[Shard, ...]
    columns: tuple[str, ...]
    id_column: str | None
    settings: DuplicateSettings
    other_sets: dict[str, int]

    @property
    def work(self) -> Path:
        """The folder in `out` for intermediate results."""
        return self.out / WORK

    @property
    def finished(self) -> bool:
        """Whether all tasks of the job are done."""
        return (self.out / REPORT).exists()

    def run(self, progress: bool = True) -> DuplicateReport:
        """Run all remaining tasks in this process; raise UserError if another process runs them.

        This takes a few hundred bytes of memory for each row, and disk space for a copy of the texts until the end.
        """
        if self.finished:
            return self.finish()
        with locked(self.work):
            return self._run(progress)

    def _run(self, progress: bool) -> DuplicateReport:
        shards, rows = range(len(self.shards)), sum(shard.rows for shard in self.shards)
        bar_of = partial(tqdm, unit_scale=True, disable=not progress)
        with bar_of(desc="Fingerprinting", total=rows, unit=" rows") as bar:
            for shard in shards:
                self.fingerprint(shard, bar.update)
        with bar_of(desc="Proposing pairs", total=1) as bar:
            self.propose()
            bar.update()
        pairs = sum(len(_mapped(path)) for path in self._proposals("*"))
        parts = max(1, -(-pairs // _PAIRS_PER_PART))
        with bar_of(desc="Comparing", total=pairs, unit=" pairs") as bar:
            for part in range(parts):
                self.compare(part, parts)
                bar.update(pairs * (part + 1) // parts - pairs * part // parts)
        self.decide(parts)
        with bar_of(desc="Writing", total=rows, unit=" rows") as bar:
            for shard in shards:
                self.write(shard, bar.update)
        return self.finish()

    def fingerprint(self, shard: int, advance: Callable[[int], object] = lambda rows: None) -> None:
        """Store texts and fingerprints of shard number `shard`; `advance` is called with each number of rows read."""
        target = self.work / f"shard-{shard:05d}"
        if self.finished or target.exists():
            advance(self.shards[shard].rows)
            return
        with staged_folder(target, resumable=True) as folder:
            texts = read_texts(self.shards[shard], self.columns, advance)
            store_fingerprints(folder, texts, len(self.columns), self.settings.banding)

    def propose(self) -> None:
        """Find the distinct rows of all fingerprinted shards, and propose pairs of rows to compare."""
        target = self.work / "proposed"
        if self.finished or target.exists():
            return
        columns = self._stored_columns()
        digests = [np.concatenate([part.prints.digests for part in column]) for column in columns]
        rows = distinct_rows(np.stack(digests, axis=1), np.load(self.work / "order.npy"))
        del digests
        tasks, counts = self._search(columns, rows).candidates()
        with staged_folder(target, resumable=True) as folder:
            np.savez(folder / "rows.npz", rows=rows.rows, numbers=rows.numbers)
            for kind, found in tasks.items():
                for task, pairs in enumerate(found):
                    np.save(folder / f"{kind}-{task:03d}.npy", pairs)
            write_json(folder / "counts.json", counts)

    def compare(self, part: int, parts: int) -> None:
        """Compute the similarities of the proposed pairs in part `part` of `parts`, and store the near pairs."""
        target = self._compared(part, parts)
        if self.finished or target.exists():
            return
        arrays: dict[str, np.ndarray] = {}
        search = self._search(self._stored_columns(), self._distinct_rows())
        for kind in _KINDS:
            near = []
            for task, path in enumerate(self._proposals(kind)):
                pairs = _mapped(path)
                start, stop = (len(pairs) * one // parts for one in (part, part + 1))
                near.append(search.compare(kind, task, np.array(pairs[start:stop])))
            merged = NearPairs.merged(near)
            arrays |= {kind: merged.pairs, f"{kind}-similarities": merged.similarities}
        with staged_file(target, resumable=True) as temporary, temporary.open("wb") as output:
            np.savez(output, **arrays)  # type: ignore[arg-type]

    def decide(self, parts: int) -> None:
        """Decide which rows are kept, once all `parts` parts of the proposed pairs are compared."""
        target = self.work / "decided"
        if self.finished or target.exists():
            return
        files = [np.load(self._compared(part, parts)) for part in range(parts)]
        within, between = (
            NearPairs.merged([NearPairs(one[kind], one[f"{kind}-similarities"]) for one in files]) for kind in _KINDS
        )
        counts = _read_json(self.work / "proposed" / "counts.json")
        result = decide(self._distinct_rows(), within, between, self.other_sets, self.settings, **counts)
        sizes, ids = result.cluster_sizes, read_ids(self.shards, self.id_column)
        report = DuplicateReport(
            rows=len(result.kept),
            counts=result.counts,
            clusters=len(sizes),
            largest_clusters=sizes[:_LARGEST_CLUSTERS].tolist(),
            giant_clusters=[one | {"cluster": ids[one["cluster"]].as_py()} for one in result.giant_clusters],
            pairs_compared=result.compared,
            near_pairs=len(result.pairs),
            largest_bucket=result.largest_bucket,
            rows_over_limit=result.rows_over_limit,
        )
        with staged_folder(target, resumable=True) as folder:
            for name in ("kept", "reason", "clusters", "nearest", "similarity"):
                np.save(folder / f"{name}.npy", getattr(result, name))
            write_json(folder / "report.json", asdict(report))

    def write(self, shard: int, advance: Callable[[int], object] = lambda rows: None) -> None:
        """Write the kept rows of shard number `shard` to a file of the same name in `out`."""
        target = self.out / self.shards[shard].name
        if self.finished or target.exists():
            advance(self.shards[shard].rows)
            return
        start = sum(one.rows for one in self.shards[:shard])
        kept = self._decided("kept")[start : start + self.shards[shard].rows]
        write_kept(self.shards[shard], target, kept, advance)

    def finish(self) -> DuplicateReport:
        """Write `dropped.jsonl` and `report.json`, remove the work folder, and return the report."""
        if not self.finished:
            report = _read_json(self.work / "decided" / "report.json")
            with staged_file(self.out / DROPPED, resumable=True) as temporary, temporary.open("wb") as output:
                rows = self._dropped_rows(tuple(report["counts"]))
                output.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            write_json(self.out / REPORT, {**report, "job": _read_json(self.work / "job.json")}, resumable=True)
        shutil.rmtree(self.work, ignore_errors=True)
        written = _read_json(self.out / REPORT)
        return DuplicateReport(**{one.name: written[one.name] for one in fields(DuplicateReport)})

    def _dropped_rows(self, reasons: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """Yield the lines of `dropped.jsonl` in the order of the rows; see `prepare_job`."""
        ids = read_ids(self.shards, self.id_column)
        near_a_row = np.isin(np.array(reasons), (EQUAL, NEAR))
        dropped = np.flatnonzero(~self._decided("kept"))
        for start in range(0, len(dropped), _LINES_AT_A_TIME):
            rows = dropped[start : start + _LINES_AT_A_TIME]
            reason, clusters, nearest, similarity = (
                self._decided(name)[rows] for name in ("reason", "clusters", "nearest", "similarity")
            )
            is_row = near_a_row[reason]
            named = {"id": rows, "cluster": clusters, "nearest": np.where(is_row, nearest, 0)}
            table = pa.table({name: ids.take(pa.array(one)) for name, one in named.items()})
            for i, line in enumerate(table.to_pylist()):
                line |= {"reason": reasons[reason[i]], "similarity": float(similarity[i])}
                yield line if is_row[i] else line | {"nearest": int(nearest[i])}

    def _compared(self, part: int, parts: int) -> Path:
        return self.work / f"compared-{part:05d}-of-{parts:05d}.npz"

    def _proposals(self, kind: str) -> list[Path]:
        return sorted((self.work / "proposed").glob(f"{kind}-[0-9]*.npy"))

    def _decided(self, name: str) -> np.ndarray:
        return _mapped(self.work / "decided" / f"{name}.npy")

    def _distinct_rows(self) -> DistinctRows:
        return DistinctRows(**np.load(self.work / "proposed" / "rows.npz"))

    def _stored_columns(self) -> list[list[StoredColumn]]:
        folders = [self.work / f"shard-{shard:05d}" for shard in range(len(self.shards))]
        columns, banding = range(len(self.columns)), self.settings.banding
        return [[StoredColumn(folder, column, banding) for folder in folders] for column in columns]

    def _search(self, columns: list[list[StoredColumn]], rows: DistinctRows) -> Search:
        others = StoredColumn(self.work / "against", 0, self.settings.banding)
        return Search(
            [Column(column, [part.prints for part in column], rows.rows) for column in columns],
            Column([others], [others.prints], np.arange(len(others))),
            self.settings,
        )


def _datatrove_step(job: DuplicateJob, task: str, compare_tasks: int, _: Any, rank: int, world_size: int) -> None:
    """Run the method `task` of a job for every shard or part that falls to process `rank` of `world_size`."""
    counts = {"fingerprint": len(job.shards), "write": len(job.shards), "compare": compare_tasks}
    parts = [compare_tasks] if task in ("compare", "decide") else []
    for number in range(rank, counts.get(task, 1), world_size):
        getattr(job, task)(*([number] if task in counts else []), *parts)


def datatrove_steps(job: DuplicateJob, compare_tasks: int = 16) -> list[tuple[str, Callable[..., None], int]]:
    """Return a job's tasks for datatrove's executors (local, Slurm, Ray), which can spread them over many machines.

    Datatrove also has MinHash steps of its own. They make shingles of words, and drop rows that share a band without
    comparing the texts; the steps here do neither. The machines share a file system.

    The result lists (name, step, number of tasks); each step must run after the step before it. The comparison is
    split into `compare_tasks` tasks; do not change this number when a job is continued.

    Example:
        >>> job = prepare_job("rows", "deduplicated", columns=["code"], id_column="id")  # doctest: +SKIP
        >>> executor = None
        >>> for name, step, tasks in datatrove_steps(job, compare_tasks=200):  # doctest: +SKIP
        ...     options = {"tasks": tasks, "depends": executor, "logging_dir": f"logs/{name}"}
        ...     executor = SlurmPipelineExecutor([step], **options, time="4:00:00", partition="cpu")
        >>> executor.run()  # doctest: +SKIP
    """
    shards = min(len(job.shards), _MAX_TASKS)
    tasks = {"fingerprint": shards, "propose": 1, "compare": compare_tasks, "decide": 1, "write": shards, "finish": 1}
    return [(name, partial(_datatrove_step, job, name, compare_tasks), count) for name, count in tasks.items()]
