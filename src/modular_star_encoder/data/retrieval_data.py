"""The data of one fine-tuning: sources → rows to train on and rows held out, in a folder that is made once."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from modular_star_encoder.data.batch_plan import groups_of_negatives, same_content_groups
from modular_star_encoder.data.pairs import RetrievalExample, Snippet, SourceExamples, read_retrieval_examples
from modular_star_encoder.data.splits import draw_repositories
from modular_star_encoder.utils.files import staged_folder, write_json

REPORT = "report.json"

_EARLIER_NAMES = {"held_out_share": "eval_fraction", "samples": "max_train_samples"}


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """Rows for training and rows held out.

    Attributes:
        train: In the order of the sources.
        held_out: None of their repositories, descriptions or codes is in `train`.
        report: What was read and left out: `settings`; `sources`, with `rows`, `skipped` (counts by reason) and
            `examples` of each; `shared_with_held_out`, rows left out of training for their content or repository;
            `train` and `held_out`, numbers of rows; and the names of `held_out_repositories`.
    """

    train: list[RetrievalExample]
    held_out: list[RetrievalExample]
    report: dict[str, Any]


def prepare_retrieval_data(
    settings: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    eval_fraction: float,
    seed: int,
    max_train_samples: int | None = None,
    progress: bool = True,
) -> RetrievalData:
    """Read the sources, hold out whole repositories of each, and write the result; or read what an earlier call wrote.

    `folder` gets `train.parquet`, `held_out.parquet` and `report.json`, all at once.

    Args:
        settings: The sources; see `read_retrieval_examples`.
        folder: Where the data is, or will be.
        eval_fraction: Share of each source's rows to hold out, up to a fifth.
        seed: Decides which repositories are held out, and which rows are drawn.
        max_train_samples: Train on so many rows, drawn at random; all if None.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If a source cannot be read, has fewer than two repositories, or has fewer rows than
            `max_train_samples`; if no row is left to train on; or if `folder` holds data of other settings.
    """
    folder = Path(folder)
    asked = {
        "data": dict(settings),
        "eval_fraction": eval_fraction,
        "seed": seed,
        "max_train_samples": max_train_samples,
    }
    asked = json.loads(json.dumps(asked, default=str))
    if not (folder / REPORT).is_file():
        sources = read_retrieval_examples(settings, progress=progress)
        data = _split(sources, eval_fraction, seed, max_train_samples, asked)
        with staged_folder(folder) as staging:
            for name in ("train", "held_out"):
                pyarrow.parquet.write_table(_table(getattr(data, name)), staging / f"{name}.parquet")
            write_json(staging / REPORT, data.report)
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    stored = {_EARLIER_NAMES.get(name, name): value for name, value in report["settings"].items()}
    if stored != asked:
        other = ", ".join(name for name in asked if stored.get(name) != asked[name])
        raise ValueError(f"{folder} holds data of another {other}; name another folder.")
    return RetrievalData(_rows(folder / "train.parquet"), _rows(folder / "held_out.parquet"), report)


def _split(
    sources: Mapping[str, SourceExamples], share: float, seed: int, max_train_samples: int | None, asked: dict[str, Any]
) -> RetrievalData:
    texts = [text for found in sources.values() for text in found.texts]
    held_out = np.concatenate([_held_out(found.texts, share, seed) for found in sources.values()])
    unseen, groups = np.flatnonzero(held_out), same_content_groups(texts)
    # Each source draws by itself: a repository that one holds out may be another's too.
    repositories = {texts[row].repository for row in unseen} - {""}
    of_these = np.array([text.repository in repositories for text in texts])
    negatives = groups_of_negatives(texts, groups)
    leaked = np.isin(groups, groups[unseen]) | of_these
    if negatives is not None:
        leaked |= np.isin(negatives, groups[unseen])
    leaked &= ~held_out
    train = np.flatnonzero(~held_out & ~leaked)
    if not len(train):
        raise ValueError("Every row to train on shares its content or repository with one held out; add data.")
    if max_train_samples is not None:
        if max_train_samples > len(train):
            raise ValueError(f"max_train_samples is {max_train_samples}, and there are {len(train)} rows to train on.")
        train = np.sort(np.random.default_rng(seed).permutation(train)[:max_train_samples])
    report = {
        "settings": asked,
        "sources": {
            name: {"rows": len(found.texts), "skipped": dict(found.skipped), "examples": found.examples}
            for name, found in sources.items()
        },
        "shared_with_held_out": int(leaked.sum()),
        "train": len(train),
        "held_out": len(unseen),
        "held_out_repositories": sorted(repositories),
    }
    return RetrievalData([texts[row] for row in train], [texts[row] for row in unseen], report)


def _held_out(texts: Sequence[RetrievalExample], share: float, seed: int) -> np.ndarray:
    """Which rows of a source are held out, bool (rows,). A row of unknown repository is one of its own."""
    names = [text.repository or f"row {row}" for row, text in enumerate(texts)]
    drawn = draw_repositories(Counter(names), seed=seed, min_test=max(1, round(share * len(texts))))
    return np.array([name in drawn for name in names])


def _table(texts: Sequence[RetrievalExample]) -> pyarrow.Table:
    columns = {
        "description": [text.description for text in texts],
        "languages": [[snippet.language for snippet in text.snippets] for text in texts],
        "codes": [[snippet.code for snippet in text.snippets] for text in texts],
        "repository": [text.repository for text in texts],
        "negative_language": [text.negative and text.negative.language for text in texts],
        "negative_code": [text.negative and text.negative.code for text in texts],
    }
    text = pyarrow.large_string()  # `string` ends at 2 GiB a column
    kinds = (text, pyarrow.large_list(text), pyarrow.large_list(text), text, text, text)
    return pyarrow.table(columns, schema=pyarrow.schema(list(zip(columns, kinds, strict=True))))


def _rows(path: Path) -> list[RetrievalExample]:
    return [
        RetrievalExample(
            row["description"],
            tuple(map(Snippet, row["languages"], row["codes"])),
            row["repository"],
            # Earlier versions wrote no such columns.
            Snippet(row["negative_language"], row["negative_code"]) if row.get("negative_code") else None,
        )
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        for row in batch.to_pylist()
    ]
