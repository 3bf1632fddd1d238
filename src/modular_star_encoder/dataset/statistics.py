"""The statistics of a dataset of triplets, as the paper's table of SynthCoNL gives them.

Source: arXiv 2503.03008, Table 1: the number of samples and their average length in characters by language, of the
original functions and of the synthetic ones.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from modular_star_encoder.data.source_files import LANGUAGES
from modular_star_encoder.data.triplets import Triplet
from modular_star_encoder.dataset.translation_requests import LANGUAGE_NAMES


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
