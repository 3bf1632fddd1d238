"""Count the rows of a built dataset, describe the dataset in a card (README.md), and upload it."""

import glob
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.data.pairs import RetrievalExample
from modular_star_encoder.synthconl.row_files import open_shard
from modular_star_encoder.synthconl.translation import LANGUAGE_NAMES
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import leads_outside
from modular_star_encoder.utils.http import check_repository_id, wrap_hub_errors
from modular_star_encoder.utils.reports import cell, load_card, render_card

CARD, STATISTICS = "README.md", "statistics.json"

MEANINGS = {
    "repository_name": "repository of the function",
    "func_path_in_repository": "path of its file in the repository",
    "func_documentation_string": "description of the function by its author",
    "func_code_url": "web address of the function's source, if known",
    "language1_CSN": "language of the function",
    "func1_CSN": "code of the function, as written by people",
    "language2": "language of the translation",
    "func2": "code of the translation, as written by the model",
    "id": "id of the row, which depends on the place and the code of the function",
    "license": "licence of the repository or file, if the source states one",
}
"""{column of the dataset: its meaning}."""

DATASET_SCHEMA = pa.schema([(name, pa.string()) for name in MEANINGS])


@dataclass(frozen=True, slots=True)
class CodeCounts:
    """The number of code samples in one language, and their average length in characters."""

    samples: int
    average_characters: float


@dataclass(frozen=True, slots=True)
class DatasetStatistics:
    """Numbers and average lengths of the functions, translations and descriptions in a dataset."""

    rows: int
    original: dict[str, CodeCounts]  # {language: the functions that people wrote}
    synthetic: dict[str, CodeCounts]  # {language: the translations}
    average_description_characters: float

    def to_markdown(self) -> str:
        """Return a Markdown table with one line for each language and a last line for all languages together."""
        lines = [
            "| language | original samples | average characters | synthetic samples | average characters |",
            "|---|---:|---:|---:|---:|",
        ]
        for language, name in [*((one, LANGUAGE_NAMES[one]) for one in LANGUAGES), ("", "all")]:
            cells = []
            for side in (self.original, self.synthetic):
                some = [side[one] for one in side if language in ("", one)]
                samples = sum(one.samples for one in some)
                characters = sum(one.samples * one.average_characters for one in some)
                cells.append(f"{samples:,} | {characters / max(samples, 1):,.0f}")
            if not language or language in self.original or language in self.synthetic:
                lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def dataset_statistics(triplets: Iterable[RetrievalExample]) -> DatasetStatistics:
    """Return the `DatasetStatistics` of `triplets`, each of a description, a function and its translation."""
    rows = description_characters = 0
    samples, characters = ({"original": Counter[str](), "synthetic": Counter[str]()} for _ in range(2))
    for triplet in triplets:
        rows += 1
        description_characters += len(triplet.description)
        for side, snippet in zip(samples, triplet.snippets, strict=True):
            samples[side][snippet.language] += 1
            characters[side][snippet.language] += len(snippet.code)
    original, synthetic = (
        {language: CodeCounts(count, characters[side][language] / count) for language, count in samples[side].items()}
        for side in samples
    )
    return DatasetStatistics(rows, original, synthetic, description_characters / max(rows, 1))


_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))


def size_category(rows: int) -> str:
    """Return the Hub's size category of a dataset of `rows` rows, such as `1K<n<10K`."""
    return next((name for name, limit in _SIZES if rows < limit), "10M<n<100M")


def dataset_card(
    *,
    settings: Mapping[str, Mapping[str, Any]],  # {stage: settings}
    reports: Mapping[str, Mapping[str, Any]],  # {stage: report}
    splits: Mapping[str, Mapping[str, int]],  # {split: {"rows": number, "repositories": number}}
    statistics: DatasetStatistics,
    licenses: Mapping[str, int],  # {licence: number of rows}
    versions: Mapping[str, str],
) -> str:
    """Return the text of a dataset's card: YAML metadata and Markdown."""
    rows = sum(split["rows"] for split in splits.values())
    card, translations = settings["dataset"]["card"], settings["translations"]
    of_license = ("license_name", "license_link") if card["license"] == "other" else ()
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    metadata = DatasetCardData(
        pretty_name=card["name"],
        language=["code", "en"],
        license=card["license"],
        **{name: card[name] for name in of_license if card[name]},
        task_categories=["text-retrieval", "sentence-similarity", "feature-extraction"],
        size_categories=[size_category(rows)],
        language_creators=["found", "machine-generated"],
        tags=["code", "code-search", *card["tags"]],
        configs=[{"config_name": "default", "data_files": files}],
    )
    targets = [LANGUAGE_NAMES[name] for name in LANGUAGES if name in translations["targets"]]
    languages = [name for name in LANGUAGES if any(name in pair.split(" → ") for pair in reports["triplets"]["pairs"])]
    return render_card(
        "dataset.md.jinja",
        metadata=metadata.to_yaml(line_break="\n"),
        rows=rows,
        card=card,
        settings=settings,
        reports=reports,
        statistics=statistics,
        licenses=licenses,
        # `body` may set another temperature, or None, which leaves the temperature to the endpoint.
        greedy=(translations["options"].get("body") or {}).get("temperature", 0) == 0,
        targets="" if len(targets) == len(LANGUAGES) else ", ".join(targets),
        versions=versions,
        split_rows=[(name, split["rows"], split["repositories"]) for name, split in splits.items()],
        column_rows=[(f"`{name}`", meaning) for name, meaning in MEANINGS.items()],
        model_rows=list(_model_rows(translations, reports["translations"])),
        pair_head=("", *(LANGUAGE_NAMES[name] for name in languages)),
        pair_rows=list(_pair_rows(languages, reports["triplets"]["pairs"])),
    )


def _model_rows(translation: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "model", f"`{translation['model']}`"
    yield "largest answer", f"{translation['max_tokens']} tokens"
    for name, value in translation["options"].items():
        yield name, json.dumps(value) if isinstance(value, dict | list) else value
    known: dict[str, list[str]] = defaultdict(list)
    for name, value in (one for backend in report["backends"] for one in backend.items()):
        known[name] += [str(one) for one in (value if isinstance(value, list) else [value]) if one is not None]
    for name, values in known.items():
        if values and name != "model" and name not in translation["options"]:
            yield name, ", ".join(dict.fromkeys(values))
    yield "tokens of the prompts", report["prompt_tokens"]
    yield "tokens written", report["completion_tokens"]


def _pair_rows(languages: Sequence[str], pairs: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, ...]]:
    for source in (name for name in languages if any(pair.startswith(f"{name} → ") for pair in pairs)):
        row = [pairs.get(f"{source} → {target}") for target in languages]
        counts = [(pair["accepted"], sum(pair.values()) - pair["accepted"]) if pair else None for pair in row]
        yield LANGUAGE_NAMES[source], *(f"{cell(one[0])} / {cell(one[1])}" if one else "" for one in counts)


@dataclass(frozen=True, slots=True)
class Upload:
    """The files that `push_dataset` uploaded or, with `upload=False`, would upload."""

    repository: str  # id of the dataset repository
    files: tuple[tuple[str, int], ...]  # (path in the repository, number of bytes) for each file
    url: str = ""  # web address of the dataset; empty if nothing was uploaded
    private: bool = True  # whether the repository is private; only meaningful after an upload

    def __str__(self) -> str:
        """Return lines with the size and path of each file, the total size, and whether the files were uploaded."""
        lines = [f"{size:>14,}  {name}" for name, size in self.files]
        total = f"{sum(size for _, size in self.files):>14,}  bytes in {len(self.files)} files"
        dry = f"nothing was uploaded to {self.repository}: a dry run; --upload uploads these files"
        kind = "private" if self.private else "public"
        end = f"uploaded to the {kind} repository {self.url}" if self.url else dry
        return "\n".join([*lines, total, end])


def push_dataset(
    folder: str | os.PathLike[str], repository: str, *, upload: bool = False, private: bool = True
) -> Upload:
    """Upload a built dataset if `upload` is true; return an `Upload` with its files. UserError if a file can't be used.

    `private` says whether a new repository is private; an existing repository stays private or public.
    """
    check_repository_id(repository)
    root = Path(folder) if Path(folder, CARD).is_file() else Path(folder, "dataset")
    paths = [root / CARD, root / STATISTICS, *sorted(root.glob("data/*.parquet"))]
    if len(paths) == 2 or not all(map(Path.is_file, paths[:2])):
        message = f"{folder} contains no finished dataset; build one with `mose dataset build`."
        raise UserError("synthconl.push.no_dataset", message)
    if wrong := [path for path in paths if leads_outside(path, folder) or not path.is_file()]:
        message = f"{wrong[0]} must be a regular file, not a link out of {folder}. Remove it, or put a copy of the "
        message += "linked file in its place."
        raise UserError("synthconl.push.file", message)
    for path in paths[2:]:
        open_shard(path)
    required = ("license", "task_categories", "configs", "size_categories")
    load_card(DatasetCard, root / CARD, required, "synthconl.push.card")
    files = tuple((path.relative_to(root).as_posix(), path.stat().st_size) for path in paths)
    if not upload:
        return Upload(repository, files)
    api = HfApi()
    with wrap_hub_errors(repository):
        url = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        is_private = bool(api.dataset_info(repository).private)
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=root,
            allow_patterns=[glob.escape(name) for name, _ in files],
            # Without this, files of an earlier upload with another number of shards would stay in the dataset.
            delete_patterns="data/*.parquet",
            commit_message="Upload dataset",
        )
    return Upload(repository, files, str(url), is_private)
