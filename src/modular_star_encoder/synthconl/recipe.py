"""Recipes of a dataset: one YAML file for what is translated, by which model, and what is kept; and its columns."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from modular_star_encoder.data.sources.source_files import LANGUAGES, check_languages
from modular_star_encoder.synthconl.near_duplicates.minhash import DuplicateSettings
from modular_star_encoder.synthconl.prompts import MAX_SYNTAX_ERROR_SHARE, target_language
from modular_star_encoder.synthconl.translation import TranslationSettings
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import build_settings, load_settings

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
CODE_COLUMNS = ("func1_CSN", "func2")


EXAMPLE = "examples/dataset/recipe.yaml"


@dataclass(frozen=True)
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

    def __post_init__(self) -> None:
        if not isinstance(self.tags, list | tuple) or not all(isinstance(tag, str) for tag in self.tags):
            raise UserError("synthconl.recipe", f"tags must be a list of words, not {self.tags!r}.")


@dataclass(frozen=True)
class DatasetRecipe:
    """How a dataset is built.

    Args:
        corpus: a source of files and its options, or a list of them; see `extraction.open_source`.
        translation: see `TranslationSettings`.
        languages: languages of the functions.
        max_characters: longest function, in characters; longer ones are not translated.
        max_syntax_error_share: largest share of a translation that may not parse; 1 accepts whatever the syntax.
        near_duplicates: see `DuplicateSettings`; and `columns`, those compared.
        against: benchmarks that no row may be near: by name, a `source`, a `column` of it, and further arguments of
            `open_dataset_rows`.
        validation_rows: rows of the validation split, at least, or a fifth of all if that is less; whole repositories
            are held out.
        max_repository_share: largest share of the rows of a repository that is held out, if the others suffice.
        card: see `CardSettings`.
        processes: processes that extract functions.
        seed: of all random draws.

    Raises:
        UserError: `synthconl.recipe`, `synthconl.targets`, or as the settings in it.
    """

    corpus: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    translation: TranslationSettings
    languages: Sequence[str] = LANGUAGES
    max_characters: int = 8000
    max_syntax_error_share: float = MAX_SYNTAX_ERROR_SHARE
    near_duplicates: Mapping[str, Any] = field(default_factory=dict)
    against: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    validation_rows: int = 2000
    max_repository_share: float = 0.05
    card: CardSettings = field(default_factory=CardSettings)
    processes: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        self._check("near_duplicates", isinstance(self.near_duplicates, Mapping), "a mapping of settings")
        self._check("against", isinstance(self.against, Mapping), "a mapping of settings")
        for name, one in self.against.items():
            if not isinstance(one, Mapping) or not {"source", "column"} <= set(one):
                raise UserError("synthconl.recipe", f"against.{name} must have a source and a column, not {one!r}.")
        for name, kind in (("translation", TranslationSettings), ("card", CardSettings)):
            if not isinstance(getattr(self, name), kind):
                object.__setattr__(self, name, build_settings(kind, getattr(self, name), name))
        object.__setattr__(self, "languages", check_languages(self.languages))
        corpora = [self.corpus] if isinstance(self.corpus, Mapping) else self.corpus
        are_mappings = isinstance(corpora, list | tuple) and all(isinstance(one, Mapping) for one in corpora)
        self._check("corpus", corpora and are_mappings, "a mapping such as `folder: PATH`, or a list of them")
        object.__setattr__(self, "corpus", tuple(corpora))
        for name in ("max_characters", "validation_rows"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_syntax_error_share", "max_repository_share"):
            self._check(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        for language in self.languages:
            target_language("", language, seed=0, targets=self.translation.targets)
        columns = self.duplicate_columns
        are_known = isinstance(columns, list | tuple) and set(columns) <= set(CODE_COLUMNS)
        self._check("duplicate_columns", columns and are_known, f"a list of {' or '.join(CODE_COLUMNS)}")
        self.duplicate_settings  # noqa: B018  it checks itself

    def _check(self, name: str, valid: object, rule: str) -> None:
        if not valid:
            raise UserError("synthconl.recipe", f"{name} must be {rule}, not {getattr(self, name)!r}.")

    @property
    def duplicate_columns(self) -> Sequence[str]:
        """The columns compared."""
        return self.near_duplicates.get("columns", CODE_COLUMNS)

    @property
    def duplicate_settings(self) -> DuplicateSettings:
        """What counts as a near-duplicate."""
        content = {name: value for name, value in self.near_duplicates.items() if name != "columns"}
        return build_settings(DuplicateSettings, content, "near_duplicates")

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
            "near_duplicates": {
                **asdict(self.duplicate_settings),
                "columns": self.duplicate_columns,
                "against": self.against,
            },
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
