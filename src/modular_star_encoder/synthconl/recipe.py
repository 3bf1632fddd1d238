"""Recipes of a dataset: one YAML file that says which functions are translated by what, and what is kept."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from modular_star_encoder.data.sources.source_files import LANGUAGES, check_languages
from modular_star_encoder.synthconl.cleaning import MAX_SYNTAX_ERROR_SHARE
from modular_star_encoder.synthconl.near_duplicates.minhash import DuplicateSettings
from modular_star_encoder.synthconl.translation import TranslationSettings
from modular_star_encoder.utils.settings import build_settings, load_settings

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
"""What is known of a function before it is translated."""

DATASET_COLUMNS = (
    "repository_name",
    "func_path_in_repository",
    "func_documentation_string",
    "func_code_url",
    "language1_CSN",
    "func1_CSN",
    "language2",
    "func2",
    "id",
    "license",
)

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

FUNCTION_SCHEMA = pa.schema([(name, pa.string()) for name in FUNCTION_COLUMNS])
DATASET_SCHEMA = pa.schema([(name, pa.string()) for name in DATASET_COLUMNS])

CODE_COLUMNS = ("func1_CSN", "func2")

_PUBLISHED_NAMES = {"cpp": "c++"}


def published_name(language: str) -> str:
    """The name of one of `LANGUAGES` in the dataset and in prompts: `"cpp"` is `"c++"` there."""
    return _PUBLISHED_NAMES.get(language, language)


EXAMPLE = "examples/dataset/recipe.yaml"


@dataclass(frozen=True)
class CardSettings:
    """What only the user knows of the dataset, for its card.

    Args:
        name: title of the card.
        corpus: what the functions were taken from, in a sentence.
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
        """Check the tags."""
        if not isinstance(self.tags, list | tuple) or not all(isinstance(tag, str) for tag in self.tags):
            raise ValueError(f"tags must be a list of words, not {self.tags!r}.")


@dataclass(frozen=True)
class DatasetRecipe:
    """How a dataset is built.

    Args:
        corpus: a source of files and its options, or a list of them; see `open_source`.
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
        seed: of everything that is drawn.
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
        """Make settings of the mappings in it, and check what is told by the recipe alone."""
        for name in ("near_duplicates", "against"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping of settings, not {getattr(self, name)!r}.")
        for name, kind in (("translation", TranslationSettings), ("card", CardSettings)):
            if not isinstance(getattr(self, name), kind):
                object.__setattr__(self, name, build_settings(kind, getattr(self, name), name))
        object.__setattr__(self, "languages", check_languages(self.languages))
        corpora = [self.corpus] if isinstance(self.corpus, Mapping) else self.corpus
        if not isinstance(corpora, list | tuple) or not all(isinstance(one, Mapping) for one in corpora) or not corpora:
            raise ValueError(
                f"corpus must be a mapping such as `folder: PATH`, or a list of them, not {self.corpus!r}."
            )
        object.__setattr__(self, "corpus", tuple(corpora))
        if self.max_characters < 1 or self.validation_rows < 1:
            raise ValueError("max_characters and validation_rows must be at least 1.")
        if not 0 <= self.max_syntax_error_share <= 1 or not 0 < self.max_repository_share <= 1:
            raise ValueError("max_syntax_error_share and max_repository_share must be from 0 to 1.")
        for language in self.languages:
            if not set(self.translation.targets) - {language}:
                raise ValueError(f"translation.targets must have a language other than {language}.")
        self._check_comparisons()

    def _check_comparisons(self) -> None:
        columns = self.duplicate_columns
        if not isinstance(columns, list | tuple) or not columns or not set(columns) <= set(CODE_COLUMNS):
            raise ValueError(
                f"near_duplicates.columns must be a list out of {', '.join(CODE_COLUMNS)}, not {columns!r}."
            )
        self.duplicate_settings  # noqa: B018  it checks itself
        for name, one in self.against.items():
            if not isinstance(one, Mapping) or not {"source", "column"} <= set(one):
                raise ValueError(f"against.{name} must have a source and a column.")

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
        """By stage, in order, what decides its result beside what the stages before it do; plain values."""
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
        ValueError: the file or an override is not of this form, or a setting is unknown, missing or out of range.
        OSError: the file is there and can't be read.
    """
    return load_settings(DatasetRecipe, path, overrides, example=EXAMPLE)
