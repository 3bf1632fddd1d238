"""Recipes of a dataset: one YAML file for what is translated, by which model, and what is kept; and its columns."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import AfterValidator, BeforeValidator
from pydantic import Field as Constraint

from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.synthconl.minhash import DuplicateSettings
from modular_star_encoder.synthconl.prompts import MAX_SYNTAX_ERROR_SHARE, target_language
from modular_star_encoder.synthconl.translation import Languages, TranslationSettings
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import Count, Float, Int, Probability, load_settings, settings_class

MEANINGS = {
    "repository_name": "repository that the function comes from",
    "func_path_in_repository": "its file in there",
    "func_documentation_string": "what its author says it does",
    "func_code_url": "where to read it, if known",
    "language1_CSN": "its language",
    "func1_CSN": "the function, as written by people",
    "language2": "the language that it was translated to",
    "func2": "the translation, as written by the model",
    "id": "id of the row, a function of where the function was found and of its code",
    "license": "licence of the repository or file, if the source says it",
}
"""The columns of the dataset."""

DATASET_COLUMNS = tuple(MEANINGS)
FUNCTION_COLUMNS = (
    "id",
    "repository_name",
    "func_path_in_repository",
    "func_code_url",
    "language1_CSN",
    "func1_CSN",
    "func_documentation_string",
    "license",
)
"""The columns of a function before its translation."""

FUNCTION_SCHEMA = pa.schema([(name, pa.string()) for name in FUNCTION_COLUMNS])
DATASET_SCHEMA = pa.schema([(name, pa.string()) for name in DATASET_COLUMNS])


EXAMPLE = "examples/dataset/recipe.yaml"


@settings_class
class CardSettings:
    """What the user adds to the dataset's card.

    Args:
        name: title of the card.
        corpus: the source of the functions, in a sentence.
        license: the dataset's licence, as the Hub spells it.
        license_name, license_link: name and address of a licence that the Hub does not know (`license: other`).
        tags: further tags.
    """

    name: str = "SynthCoNL, rebuilt"
    corpus: str = ""
    license: str = "other"
    license_name: str = "as-in-the-repositories"
    license_link: str = ""
    tags: Sequence[str] = ()


@settings_class
class NearDuplicateSettings(DuplicateSettings):
    """See `DuplicateSettings`.

    Args:
        columns: the compared columns.
    """

    columns: Annotated[Sequence[Literal["func1_CSN", "func2"]], Constraint(min_length=1)] = ("func1_CSN", "func2")


def _as_list(corpus: Any) -> Any:
    return [corpus] if isinstance(corpus, Mapping) else corpus


def _check_benchmark(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if not {"source", "column"} <= set(options):
        raise UserError("synthconl.recipe.against", f"A benchmark must have a source and a column, not {options}.")
    return options


@settings_class
class DatasetRecipe:
    """How a dataset is built.

    Args:
        corpus: a source of files and its options, or a list of them; see `extraction.open_source`.
        translation: see `TranslationSettings`.
        languages: languages of the functions.
        max_characters: longest function, in characters; longer ones are not translated.
        max_syntax_error_share: largest share of a translation that may not parse; 1 accepts whatever the syntax.
        near_duplicates: see `NearDuplicateSettings`.
        against: benchmarks that no row may be near: by name, a `source`, a `column` of it, and further arguments of
            `open_dataset_rows`.
        validation_rows: smallest number of rows of the validation split, or a fifth of all if that is less; whole
            repositories are held out.
        max_repository_share: largest share of the rows of a repository that is held out, if the others suffice.
        card: see `CardSettings`.
        processes: processes that extract functions.
        seed: of all random draws.
    """

    corpus: Annotated[tuple[Mapping[str, Any], ...], BeforeValidator(_as_list), Constraint(min_length=1)]
    translation: TranslationSettings
    languages: Languages = LANGUAGES
    max_characters: Count = 8000
    max_syntax_error_share: Probability = MAX_SYNTAX_ERROR_SHARE
    near_duplicates: NearDuplicateSettings = NearDuplicateSettings()
    against: Mapping[str, Annotated[Mapping[str, Any], AfterValidator(_check_benchmark)]] = Constraint(
        default_factory=dict
    )
    validation_rows: Count = 2000
    max_repository_share: Annotated[Float, Constraint(gt=0, le=1)] = 0.05
    card: CardSettings = CardSettings()
    processes: Int = 2
    seed: Int = 0

    def __post_init__(self) -> None:
        for language in self.languages:
            target_language("", language, seed=0, targets=self.translation.targets)

    def stage_settings(self) -> dict[str, dict[str, Any]]:
        """By stage, in order, the settings that decide its result, as plain values."""
        settings = {
            "functions": {
                "corpus": self.corpus,
                "languages": sorted(self.languages),
                "max_characters": self.max_characters,
            },
            "translations": {**self.translation.identity(), "seed": self.seed},
            "triplets": {"max_syntax_error_share": self.max_syntax_error_share},
            "near_duplicates": {**asdict(self.near_duplicates), "against": self.against},
            "split": {
                "validation_rows": self.validation_rows,
                "max_repository_share": self.max_repository_share,
                "seed": self.seed,
            },
            "dataset": {"card": asdict(self.card)},
        }
        return json.loads(json.dumps(settings, default=str))


def load_dataset_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> DatasetRecipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value`, with dots for settings inside settings (`translation.model=…`); values are YAML.

    Raises:
        UserError: the file or an override is not of this form, or a setting is unknown, missing or out of range.
        OSError: the file is there and can't be read.
    """
    return load_settings(DatasetRecipe, path, overrides, example=EXAMPLE)
