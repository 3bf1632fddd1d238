"""The card of a built dataset: metadata for the Hub, and how it was made, for its readers."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub import DatasetCardData

from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.data.pairs import Triplet
from modular_star_encoder.synthconl.completions import LANGUAGE_NAMES
from modular_star_encoder.synthconl.recipe import DATASET_COLUMNS, MEANINGS
from modular_star_encoder.utils.hub import cell, render_card


@dataclass(frozen=True, slots=True)
class CodeFigures:
    """Of the codes of one language: how many there are, and their average length in characters."""

    samples: int
    average_characters: float


@dataclass(frozen=True, slots=True)
class DatasetStatistics:
    """Figures of a dataset.

    Attributes:
        rows: The number of triplets.
        original: By language, the functions as people wrote them.
        synthetic: By language, the translations.
        average_description_characters: Average length of a description.
    """

    rows: int
    original: dict[str, CodeFigures]
    synthetic: dict[str, CodeFigures]
    average_description_characters: float

    def to_dict(self) -> dict[str, Any]:
        """All figures, as plain values."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The table, one line per language and one for all."""
        none = CodeFigures(0, 0.0)
        lines = [
            "| language | original samples | average characters | synthetic samples | average characters |",
            "|---|---:|---:|---:|---:|",
        ]
        for language in LANGUAGES:
            original, synthetic = self.original.get(language, none), self.synthetic.get(language, none)
            if original.samples or synthetic.samples:
                lines.append(_line(LANGUAGE_NAMES[language], original, synthetic))
        return "\n".join([*lines, _line("all", _all(self.original), _all(self.synthetic))])


def dataset_statistics(triplets: Iterable[Triplet]) -> DatasetStatistics:
    """Count the triplets of a stream; memory does not grow with it."""
    samples: dict[str, Counter[str]] = {"original": Counter(), "synthetic": Counter()}
    characters: dict[str, Counter[str]] = {"original": Counter(), "synthetic": Counter()}
    rows = description_characters = 0
    for triplet in triplets:
        rows += 1
        description_characters += len(triplet.description)
        for side, language, code in (
            ("original", triplet.language, triplet.code),
            ("synthetic", triplet.other_language, triplet.other_code),
        ):
            samples[side][language] += 1
            characters[side][language] += len(code)
    original, synthetic = (
        {name: CodeFigures(count, characters[side][name] / count) for name, count in samples[side].items()}
        for side in ("original", "synthetic")
    )
    return DatasetStatistics(rows, original, synthetic, description_characters / rows if rows else 0.0)


def _all(figures: dict[str, CodeFigures]) -> CodeFigures:
    samples = sum(one.samples for one in figures.values())
    characters = sum(one.samples * one.average_characters for one in figures.values())
    return CodeFigures(samples, characters / samples if samples else 0.0)


def _line(name: str, original: CodeFigures, synthetic: CodeFigures) -> str:
    cells = [f"{one.samples:,} | {one.average_characters:,.0f}" for one in (original, synthetic)]
    return f"| {name} | {' | '.join(cells)} |"


TEMPLATE = "dataset.md.jinja"
_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))


def size_category(rows: int) -> str:
    """The Hub's name for the order of magnitude of a number of rows."""
    return next((name for name, limit in _SIZES if rows < limit), "10M<n<100M")


def card_metadata(card: Mapping[str, Any], rows: int, splits: Sequence[str]) -> DatasetCardData:
    """The card's metadata block.

    Args:
        card: `CardSettings`, as plain values.
        rows: Number of rows of all splits.
        splits: Names of the splits, in order; their files are `data/{split}-*.parquet`.
    """
    named = {"license_name": card["license_name"], "license_link": card["license_link"]}
    return DatasetCardData(
        pretty_name=card["name"],
        language=["code", "en"],
        license=card["license"],
        **({name: value for name, value in named.items() if value} if card["license"] == "other" else {}),
        task_categories=["text-retrieval", "sentence-similarity", "feature-extraction"],
        size_categories=[size_category(rows)],
        language_creators=["found", "machine-generated"],
        tags=["code", "code-search", *card["tags"]],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
    )


def dataset_card(
    *,
    card: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    reports: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, Mapping[str, int]],
    statistics: DatasetStatistics,
    licenses: Mapping[str, int],
    versions: Mapping[str, str],
) -> str:
    """The card: YAML metadata and Markdown.

    Args:
        card: `CardSettings`, as plain values.
        settings: By stage, what decided its result: `DatasetRecipe.stage_settings()`.
        reports: By stage, what it counted.
        splits: By split, its number of `rows` and `repositories`.
        statistics: Of all splits.
        licenses: Number of rows by licence.
        versions: Of the software that built it.
    """
    rows = sum(split["rows"] for split in splits.values())
    translations = settings["translations"]
    targets = [LANGUAGE_NAMES[name] for name in LANGUAGES if name in translations["targets"]]
    languages = [name for name in LANGUAGES if any(name in pair.split(" → ") for pair in reports["triplets"]["pairs"])]
    return render_card(
        TEMPLATE,
        metadata=card_metadata(card, rows, list(splits)).to_yaml(line_break="\n"),
        rows=rows,
        card=card,
        settings=settings,
        reports=reports,
        statistics=statistics,
        licenses=licenses,
        # An endpoint may have been told otherwise, or nothing: then it decides.
        greedy=(translations["options"].get("body") or {}).get("temperature", 0) == 0,
        targets="" if len(targets) == len(LANGUAGES) else ", ".join(targets),
        versions=versions,
        split_rows=[(name, split["rows"], split["repositories"]) for name, split in splits.items()],
        column_rows=[(f"`{name}`", MEANINGS[name]) for name in DATASET_COLUMNS],
        model_rows=list(_model_rows(translations, reports["translations"])),
        pair_head=("", *(LANGUAGE_NAMES[name] for name in languages)),
        pair_rows=list(_pair_rows(languages, reports["triplets"]["pairs"])),
    )


def _model_rows(translation: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is known of the model: settings, what the back ends said of themselves, tokens."""
    yield "model", f"`{translation['model']}`"
    yield "largest answer", f"{translation['max_tokens']} tokens"
    for name, value in translation["options"].items():
        yield name, json.dumps(value) if isinstance(value, dict | list) else value
    known: dict[str, list[str]] = {}
    for backend in report["backends"]:
        for name, value in backend.items():
            for one in value if isinstance(value, list) else [value]:
                if name != "model" and one is not None and str(one) not in known.setdefault(name, []):
                    known[name].append(str(one))
    yield from ((name, ", ".join(values)) for name, values in known.items() if name not in translation["options"])
    yield "tokens of the prompts", report["prompt_tokens"]
    yield "tokens written", report["completion_tokens"]


def _pair_rows(languages: Sequence[str], pairs: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, ...]]:
    for source in (name for name in languages if any(pair.startswith(f"{name} → ") for pair in pairs)):
        row = [pairs.get(f"{source} → {target}") for target in languages]
        counts = [(pair["accepted"], sum(pair.values()) - pair["accepted"]) if pair else None for pair in row]
        yield LANGUAGE_NAMES[source], *(f"{cell(one[0])} / {cell(one[1])}" if one else "" for one in counts)
