"""What an index was made with: kept inside it, so that nothing else is ever mixed in or asked of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modular_star_encoder.data.languages.registry import SEARCH_LANGUAGES
from modular_star_encoder.utils.errors import UserError

FORMAT = 2
DEFAULT_CHECKPOINT = "mose-code"
"""The model that the package holds."""


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """What an index was made with.

    Attributes:
        checkpoint: absolute path of a folder, or a repository's name.
        checksum: of its weights, configuration and tokenizer (see `checkpoint_checksum`).
        exit_layers: exits of which the index has embeddings, ascending.
        dimension: components of an embedding.
        prompts: `query` and `document`, as texts were embedded.
        folder: what is indexed: an absolute path, or one relative to the index that lies inside it.
        languages: languages that are read, in our order whatever theirs was.
        tests, vendored: whether test code and copies of other projects are read.
        format: of the index.
    """

    checkpoint: str
    checksum: str
    exit_layers: tuple[int, ...]
    dimension: int
    prompts: Mapping[str, str]
    folder: str
    languages: tuple[str, ...]
    tests: bool = True
    vendored: bool = False
    format: int = FORMAT

    def __post_init__(self) -> None:
        languages = tuple(name for name in SEARCH_LANGUAGES if name in self.languages)
        object.__setattr__(self, "languages", languages)  # frozen

    def to_dict(self) -> dict[str, Any]:
        """For a store."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], location: str) -> IndexSettings:
        """What `to_dict` gave.

        Raises:
            ValueError: an index of another version of this package.
        """
        if values.get("format") != FORMAT:
            raise UserError(
                "search.index.format",
                f"The index {location} has format {values.get('format')}, but this version reads {FORMAT}. Rebuild it "
                "(--rebuild).",
            )
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**options)

    def root(self, location: str) -> str:
        """The absolute path of the folder, for an index at `location`."""
        if os.path.isabs(self.folder):
            return self.folder
        return os.path.normpath(os.path.join(os.path.realpath(os.path.expanduser(location)), self.folder))

    def refuse_others(self, asked: IndexSettings, location: str) -> None:
        """Allow no update with other settings.

        Raises:
            ValueError: says what the index was made with, and what was asked.
        """
        self.refuse_checkpoint(asked.checkpoint, asked.checksum, location)
        differences = [
            f"{label} {_shown(getattr(self, name))}, not {_shown(getattr(asked, name))}"
            for name, label in _LABELS.items()
            if getattr(self, name) != getattr(asked, name)
        ]
        if self.root(location) != asked.root(location):
            differences.insert(0, f"the folder {self.root(location)}, not {asked.root(location)}")
        if differences:
            raise UserError(
                "search.index.other_settings",
                f"The index {location} was built with {'; '.join(differences)}. Name another index, or rebuild this "
                "one (--rebuild).",
            )

    def refuse_checkpoint(self, checkpoint: str, checksum: str, location: str) -> None:
        """Allow no other weights than those that made the embeddings.

        Raises:
            ValueError: says which checkpoint made the index, and which this is.
        """
        if checksum != self.checksum:
            raise UserError(
                "search.index.other_model",
                f"The index {location} was built with another checkpoint: {self.checkpoint} (checksum "
                f"{self.checksum}), not {checkpoint} ({checksum}). Use that checkpoint, or rebuild the index "
                "(--rebuild).",
            )

    def check_exit(self, exit_layer: int | None, location: str) -> int:
        """An exit of which the index has embeddings; the deepest for None.

        Raises:
            ValueError: it has none of that exit.
        """
        if exit_layer is None:
            return self.exit_layers[-1]
        if exit_layer not in self.exit_layers:
            raise UserError(
                "search.index.exit_layer",
                f"The index {location} was built at exit {_shown(self.exit_layers)}, not {exit_layer}. Choose one of "
                "its exits, or build an index at that exit.",
            )
        return exit_layer


_LABELS = {
    "exit_layers": "exit",
    "dimension": "dimension",
    "prompts": "prompts",
    "languages": "languages",
    "tests": "tests read:",
    "vendored": "vendored code read:",
}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
