"""Near-deduplication of parquet files on one machine."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from tqdm.auto import tqdm

from modular_star_encoder.dataset.near_duplicates.job import DuplicateJob
from modular_star_encoder.dataset.near_duplicates.preparation import prepare_job
from modular_star_encoder.dataset.near_duplicates.report import DuplicateReport
from modular_star_encoder.dataset.near_duplicates.settings import DuplicateSettings

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
