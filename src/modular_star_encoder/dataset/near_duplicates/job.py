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

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from modular_star_encoder.dataset.near_duplicates.decision import NearPairs, decide
from modular_star_encoder.dataset.near_duplicates.distinct_rows import DistinctRows, distinct_rows
from modular_star_encoder.dataset.near_duplicates.files import read_array, read_json, whole, write_array, write_json
from modular_star_encoder.dataset.near_duplicates.report import DuplicateReport, write_dropped
from modular_star_encoder.dataset.near_duplicates.search import Search, SearchColumn
from modular_star_encoder.dataset.near_duplicates.settings import DuplicateSettings
from modular_star_encoder.dataset.near_duplicates.shards import Shard, read_ids, read_texts, write_kept
from modular_star_encoder.dataset.near_duplicates.text_store import ColumnFiles, stored_column, write_texts

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
