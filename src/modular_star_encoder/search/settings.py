"""What an index was made with: kept inside it, so that nothing else is ever mixed in or asked of it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modular_star_encoder.data.sources.source_files import LANGUAGES
from modular_star_encoder.search.snippets import Windows

FORMAT = 1
DEFAULT_CHECKPOINT = "runs/quickstart/model"
"""What `make quickstart` leaves behind."""
INDEX_FOLDER = ".mose"
"""Where the index of a folder is unless it is said otherwise: a hidden folder, which is never indexed itself."""

MARGINS_NAME = "margins.json"
"""The file beside an index's rows that keeps what was fitted on them (see `margins`)."""


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """What an index was made with.

    Attributes:
        checkpoint: absolute path of a folder, or a repository's name.
        fingerprint: of its weights, configuration and tokenizer (see `checkpoint_checksum`).
        exit_layers: exits of which the index has embeddings, ascending.
        dimension: components of an embedding.
        prompts: `query` and `document`, as texts were embedded.
        folder: what is indexed: an absolute path, or one relative to the index that lies inside it.
        languages: languages that are read, in our order whatever theirs was.
        window_lines, window_overlap: see `Windows`.
        states: whether states of the shallowest exit are kept for re-ranking.
        tests, vendored: whether test code and copies of other projects are read.
        format: of the index.
    """

    checkpoint: str
    fingerprint: str
    exit_layers: tuple[int, ...]
    dimension: int
    prompts: Mapping[str, str]
    folder: str
    languages: tuple[str, ...]
    window_lines: int = Windows().lines
    window_overlap: int = Windows().overlap
    states: bool = False
    tests: bool = False
    vendored: bool = False
    format: int = FORMAT

    def __post_init__(self) -> None:
        languages = tuple(name for name in LANGUAGES if name in self.languages)
        object.__setattr__(self, "languages", languages)  # frozen

    @property
    def windows(self) -> Windows:
        """How files without functions are divided."""
        return Windows(self.window_lines, self.window_overlap)

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
            raise ValueError(
                f"The index {location} has format {values.get('format')}, and this version reads {FORMAT}: build it "
                "anew (--rebuild)."
            )
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

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
        self.refuse_checkpoint(asked.checkpoint, asked.fingerprint, location)
        differences = [
            f"{label} {_shown(getattr(self, name))}, not {_shown(getattr(asked, name))}"
            for name, label in _LABELS.items()
            if getattr(self, name) != getattr(asked, name)
        ]
        if self.root(location) != asked.root(location):
            differences.insert(0, f"the folder {self.root(location)}, not {asked.root(location)}")
        if differences:
            raise ValueError(
                f"The index {location} was built with {'; '.join(differences)}: name another index, or build this one "
                "anew (--rebuild)."
            )

    def refuse_checkpoint(self, checkpoint: str, fingerprint: str, location: str) -> None:
        """Allow no other weights than those that made the embeddings.

        Raises:
            ValueError: says which checkpoint made the index, and which this is.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"The index {location} was built with another checkpoint: {self.checkpoint} (fingerprint "
                f"{self.fingerprint}), and this is {checkpoint} ({fingerprint}). Use that one, or build the index anew "
                "(--rebuild)."
            )

    def check_exit(self, exit_layer: int | None, location: str) -> int:
        """An exit of which the index has embeddings; the deepest for None.

        Raises:
            ValueError: it has none of that exit.
        """
        if exit_layer is None:
            return self.exit_layers[-1]
        if exit_layer not in self.exit_layers:
            raise ValueError(
                f"The index {location} was built at exit {_shown(self.exit_layers)}, not {exit_layer}: build one at "
                "that exit, or ask at one of its own."
            )
        return exit_layer


_LABELS = {
    "exit_layers": "exit",
    "dimension": "dimension",
    "prompts": "prompts",
    "languages": "languages",
    "window_lines": "windows of lines",
    "window_overlap": "an overlap of lines",
    "states": "states kept:",
    "tests": "tests read:",
    "vendored": "vendored code read:",
}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


_PUNCTUATION = re.compile(r"[.^$*+?{}\[\]\\|()]")
_RANGE_OR_CHARACTER = re.compile(".-.|.", re.DOTALL)


def glob_expression(pattern: str) -> str:
    """The anchored regular expression of a pattern of paths with forward slashes.

    `*` and `?` stay within a name, `**` crosses folders, `[abc]`, `[a-z]` and `[!abc]` are one character. A pattern
    without a slash is about the file's name in any folder; one that ends in a slash is about all below that folder.

    Raises:
        ValueError: a blank pattern, or one with a bracket that isn't closed or a range that ends before it begins.
    """
    if not pattern.strip():
        raise ValueError("A path pattern must not be blank; '*.py' and 'src/**' are patterns.")
    if "/" not in pattern:
        pattern = f"**/{pattern}"
    pattern = pattern.removeprefix("./").removeprefix("/")
    if pattern.endswith("/"):
        pattern += "**"
    parts, place = [], 0
    while place < len(pattern):
        token, place = _token(pattern, place)
        parts.append(token)
    return f"^{''.join(parts)}$"


def _token(pattern: str, place: int) -> tuple[str, int]:
    """The expression of what stands at `place`, and where the next thing stands."""
    if pattern.startswith("**/", place):
        return "(?:.*/)?", place + 3
    if pattern.startswith("**", place):
        return ".*", place + 2
    character = pattern[place]
    if character == "*":
        return "[^/]*", place + 1
    if character == "?":
        return "[^/]", place + 1
    if character == "[":
        return _bracket(pattern, place)
    return _PUNCTUATION.sub(r"\\\g<0>", character), place + 1


def _bracket(pattern: str, place: int) -> tuple[str, int]:
    negated = pattern.startswith("!", place + 1)
    start = place + 1 + negated
    end = pattern.find("]", start + 1)
    if end < 0:
        raise ValueError(f"The path pattern {pattern!r} has a '[' without a ']'.")
    inside = []
    for part in _RANGE_OR_CHARACTER.findall(pattern[start:end]):
        if part[0] > part[-1]:
            raise ValueError(f"The path pattern {pattern!r} has a range, {part}, that ends before it begins.")
        # `&&`, `--` and `~~` are set operations in Rust's expressions.
        inside.append("-".join(re.sub(r"[\\\[\]^&~-]", r"\\\g<0>", one) for one in part[::2]))
    return f"[{'^/' if negated else ''}{''.join(inside)}]", end + 1
