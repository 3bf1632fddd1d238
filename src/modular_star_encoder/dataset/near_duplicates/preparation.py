"""Before a job starts: what can be wrong with it is told, and what it is gets written down."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modular_star_encoder.dataset.near_duplicates.files import read_json, whole, write_array, write_json
from modular_star_encoder.dataset.near_duplicates.fingerprints import minhash_class
from modular_star_encoder.dataset.near_duplicates.job import REPORT, WORK, DuplicateJob
from modular_star_encoder.dataset.near_duplicates.settings import DuplicateSettings
from modular_star_encoder.dataset.near_duplicates.shards import check_columns, find_shards, id_order
from modular_star_encoder.dataset.near_duplicates.text_store import write_texts

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
