"""Rows to train on and rows to evaluate with, which share no repository, no code and no description."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from modular_star_encoder.data.batch_plan import groups_of_negatives, same_content_groups
from modular_star_encoder.data.functions import DocumentedFunction, code_key, description_key
from modular_star_encoder.data.pairs import RetrievalExample, Snippet, SourceExamples, read_retrieval_examples
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import staged_folder, write_json

MAX_TEST_SHARE = 0.2
REPORT = "report.json"

_EARLIER_NAMES = {"held_out_share": "eval_fraction", "samples": "max_train_samples"}


@dataclass(frozen=True, slots=True)
class Split:
    """Rows to train on and rows held out.

    Attributes:
        train: In the order of the input.
        test: In the order of the input; none of its repositories is in `train`.
        removed_from_train: Number of training rows left out because their code or description is also in `test`.
    """

    train: list[DocumentedFunction]
    test: list[DocumentedFunction]
    removed_from_train: int


def drop_near_identical_descriptions(functions: Iterable[DocumentedFunction]) -> list[DocumentedFunction]:
    """`functions` without those whose description or code repeats that of an earlier one that was kept.

    Descriptions are equal when their letters and digits are, in any case; code when it differs in white space only.
    In a contrastive batch such rows would be negatives of each other, and in a benchmark, wrong answers that are right.
    """
    seen: set[tuple[str, str]] = set()
    kept = []
    for function in functions:
        keys = {("description", description_key(function.description)), ("code", code_key(function.code))}
        if keys.isdisjoint(seen):
            seen |= keys
            kept.append(function)
    return kept


def split_by_repository(
    functions: Sequence[DocumentedFunction], *, seed: int, min_test: int = 2000, max_repository_share: float = 0.05
) -> Split:
    """Hold out whole repositories until they have `min_test` functions; train on the others.

    Training rows whose code or description (compared as in `drop_near_identical_descriptions`) is also held out are
    removed.

    Args:
        functions: The rows to split.
        seed: See `draw_repositories`, as for the following.
        min_test: Number of functions to hold out, at least.
        max_repository_share: Largest share of all functions of a repository that is drawn first.

    Raises:
        UserError: `data.split.*` of `draw_repositories`; `data.split.nothing_to_train` if nothing is left to train on
            because the repositories hold the same functions.
    """
    sizes = Counter(function.repository for function in functions)
    held_out = draw_repositories(sizes, seed=seed, min_test=min_test, max_repository_share=max_repository_share)
    test = [function for function in functions if function.repository in held_out]
    descriptions = {description_key(function.description) for function in test}
    codes = {code_key(function.code) for function in test}
    candidates = [function for function in functions if function.repository not in held_out]
    train = [
        function
        for function in candidates
        if description_key(function.description) not in descriptions and code_key(function.code) not in codes
    ]
    if not train:
        raise UserError(
            "data.split.nothing_to_train",
            "Every training function is also in a held-out repository; add repositories that differ.",
        )
    return Split(train, test, removed_from_train=len(candidates) - len(train))


def draw_repositories(
    sizes: Mapping[str, int], *, seed: int, min_test: int = 2000, max_repository_share: float = 0.05
) -> set[str]:
    """The names of the repositories to hold out.

    Only repositories with at most `max_repository_share` of all functions are drawn, so that no single project decides
    the results. When these do not suffice, the smallest of the others follow. One repository at least is left for
    training.

    Args:
        sizes: The number of functions of each repository.
        seed: Decides which repositories are drawn. The draw depends on nothing but the seed and the repositories'
            names and sizes: not on the order of the rows, the Python version or the machine.
        min_test: Number of functions to hold out, at least; about a fifth of all functions if that is less.
        max_repository_share: Largest share of all functions, above 0 and up to 1, of a repository that is drawn first.

    Raises:
        UserError: `data.split.arguments` if an argument is out of range; `data.split.too_few_repositories` if there are
            fewer than two.
    """
    if min_test < 1 or not 0 < max_repository_share <= 1:
        raise UserError(
            "data.split.arguments",
            "min_test must be at least 1, and max_repository_share above 0 and up to 1; not "
            f"{min_test} and {max_repository_share}.",
        )
    if len(sizes) < 2:
        raise UserError(
            "data.split.too_few_repositories",
            f"A split by repository needs functions of at least two repositories; these are of {len(sizes)}.",
        )
    total = sum(sizes.values())
    target = min(min_test, max(1, round(MAX_TEST_SHARE * total)))
    allowed = [name for name in sizes if sizes[name] <= max_repository_share * total]
    others = [name for name in sizes if sizes[name] > max_repository_share * total]
    # A hash rather than a generator's shuffle: stable everywhere, and a new repository does not reorder the others.
    order = sorted(allowed, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    order += sorted(others, key=lambda name: (sizes[name], name))
    held_out: set[str] = set()
    count = 0
    for name in order[: len(sizes) - 1]:
        if count >= target:
            break
        held_out.add(name)
        count += sizes[name]
    return held_out


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """Rows of fine-tuning for retrieval.

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
        max_train_samples: Number of rows to train on, drawn at random; all if None.
        progress: Whether to show progress bars.

    Raises:
        UserError: If a source cannot be read; `data.split.too_few_repositories` if one has fewer than two;
            `data.split.nothing_to_train` or `data.split.max_train_samples` if there are no rows to train on, or fewer
            than `max_train_samples`; `data.split.other_settings` if `folder` holds data of other settings.
    """
    folder = Path(folder)
    arguments = {"eval_fraction": eval_fraction, "seed": seed, "max_train_samples": max_train_samples}
    requested = json.loads(json.dumps({"data": dict(settings), **arguments}, default=str))
    if not (folder / REPORT).is_file():
        sources = read_retrieval_examples(settings, progress=progress)
        data = _split_sources(sources, requested)
        with staged_folder(folder) as staging:
            for name in ("train", "held_out"):
                pyarrow.parquet.write_table(_table(getattr(data, name)), staging / f"{name}.parquet")
            write_json(staging / REPORT, data.report)
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    stored = {_EARLIER_NAMES.get(name, name): value for name, value in report["settings"].items()}
    if stored != requested:
        other = ", ".join(name for name in requested if stored.get(name) != requested[name])
        raise UserError("data.split.other_settings", f"{folder} holds data of another {other}; name another folder.")
    return RetrievalData(_rows(folder / "train.parquet"), _rows(folder / "held_out.parquet"), report)


def _split_sources(sources: Mapping[str, SourceExamples], requested: dict[str, Any]) -> RetrievalData:
    seed, limit = requested["seed"], requested["max_train_samples"]
    texts = [text for found in sources.values() for text in found.texts]
    held_out = np.concatenate([_held_out(found.texts, requested["eval_fraction"], seed) for found in sources.values()])
    unseen, groups = np.flatnonzero(held_out), same_content_groups(texts)
    # Each source draws by itself: a repository that one holds out may be another's too.
    repositories = {texts[row].repository for row in unseen} - {""}
    leaked = np.isin(groups, groups[unseen]) | np.array([text.repository in repositories for text in texts])
    negatives = groups_of_negatives(texts, groups)
    if negatives is not None:
        leaked |= np.isin(negatives, groups[unseen])
    leaked &= ~held_out
    train = np.flatnonzero(~held_out & ~leaked)
    if not len(train):
        raise UserError(
            "data.split.nothing_to_train",
            "Every row to train on shares its content or repository with one held out; add data.",
        )
    if limit is not None:
        if limit > len(train):
            raise UserError(
                "data.split.max_train_samples",
                f"max_train_samples is {limit}; there are {len(train)} rows to train on.",
            )
        train = np.sort(np.random.default_rng(seed).permutation(train)[:limit])
    report = {
        "settings": requested,
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


def _held_out(texts: Sequence[RetrievalExample], fraction: float, seed: int) -> np.ndarray:
    """Which rows of a source are held out, bool (rows,). A row of unknown repository is a repository of its own."""
    names = [text.repository or f"row {row}" for row, text in enumerate(texts)]
    drawn = draw_repositories(Counter(names), seed=seed, min_test=max(1, round(fraction * len(texts))))
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
