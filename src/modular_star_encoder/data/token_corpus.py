"""Tokenized texts that know their repository and language: what in-context pairs are drawn from."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.source_files import SourceFile
from modular_star_encoder.data.tokenizer import ContentEncoder, TokenRows, encode_content

UNNAMED_LANGUAGE = ""


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Texts in memory (`corpus_of_texts`, `corpus_of_files`) or on disk (`TokenStore`), or a part of them (`split`).

    Attributes:
        rows: Token ids of every text; of a part, those of the whole.
        row_numbers: int64 (texts,), sorted: the rows that belong to this corpus.
        repository_names: Names of all repositories of `rows`.
        repository_of: int32 (rows,): the repository of each row, as an index of `repository_names`.
        language_names: Lower-case names of all languages of `rows`.
        language_of: int32 (rows,): the language of each row, as an index of `language_names`.
        tokenizer_fingerprint: That of the tokenizer that made the rows; see `ContentEncoder`.
    """

    rows: TokenRows
    row_numbers: np.ndarray
    repository_names: tuple[str, ...]
    repository_of: np.ndarray
    language_names: tuple[str, ...]
    language_of: np.ndarray
    tokenizer_fingerprint: str

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def repositories(self) -> tuple[str, ...]:
        """Names of the repositories that have a text in this corpus, in the order of `repository_names`."""
        return tuple(self.repository_names[i] for i in np.unique(self.repository_of[self.row_numbers]))

    def split(self, held_out_share: float, seed: int) -> tuple["TokenCorpus", "TokenCorpus"]:
        """Return (what is left, what is held out): two views that share no repository.

        Args:
            held_out_share: Share of the repositories to hold out, between 0 and 1; at least one is, and one is left.
            seed: Decides which. The draw depends on the seed and the names alone, not on their order or their texts.

        Raises:
            ValueError: If the share is out of range or there are fewer than two repositories.
        """
        if not 0 < held_out_share < 1:
            raise ValueError(f"held_out_share must lie between 0 and 1, not be {held_out_share}.")
        used = np.unique(self.repository_of[self.row_numbers])
        if len(used) < 2:
            raise ValueError(f"A split needs texts of at least two repositories; these are of {len(used)}.")
        # A hash rather than a generator's shuffle: stable everywhere, and a new repository does not reorder the others.
        order = sorted(used, key=lambda i: hashlib.sha256(f"{seed}:{self.repository_names[i]}".encode()).digest())
        count = min(max(round(held_out_share * len(used)), 1), len(used) - 1)
        held_out = np.zeros(len(self.repository_names), dtype=bool)
        held_out[order[:count]] = True
        is_held_out = held_out[self.repository_of[self.row_numbers]]
        left, right = self.row_numbers[~is_held_out], self.row_numbers[is_held_out]
        return self._part(left), self._part(right)

    def _part(self, row_numbers: np.ndarray) -> "TokenCorpus":
        return TokenCorpus(
            self.rows,
            row_numbers,
            self.repository_names,
            self.repository_of,
            self.language_names,
            self.language_of,
            self.tokenizer_fingerprint,
        )


def corpus_of_files(
    files: Iterable[SourceFile], tokenizer: PreTrainedTokenizerFast, *, progress: bool = True
) -> TokenCorpus:
    """Tokenize source files into memory; `build_token_store` is for those that do not fit.

    Args:
        files: Source files, in any order; one row each.
        tokenizer: A fast tokenizer.
        progress: Whether to show a progress bar.
    """
    kept = list(files)
    return _corpus(
        [file.text for file in kept],
        [file.repository for file in kept],
        [file.language for file in kept],
        tokenizer,
        progress,
    )


def corpus_of_texts(
    texts_by_repository: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerFast, *, progress: bool = True
) -> TokenCorpus:
    """Tokenize texts (files, functions) of one language into memory.

    Args:
        texts_by_repository: The texts of each repository.
        tokenizer: A fast tokenizer.
        progress: Whether to show a progress bar.
    """
    repositories = [name for name in sorted(texts_by_repository) for _ in texts_by_repository[name]]
    texts = [text for name in sorted(texts_by_repository) for text in texts_by_repository[name]]
    return _corpus(texts, repositories, [UNNAMED_LANGUAGE] * len(texts), tokenizer, progress)


def _corpus(
    texts: Sequence[str],
    repositories: Sequence[str],
    languages: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    progress: bool,
) -> TokenCorpus:
    repository_names, repository_of = _numbered(repositories)
    language_names, language_of = _numbered(languages)
    return TokenCorpus(
        encode_content(tokenizer, texts, progress=progress),
        np.arange(len(texts)),
        repository_names,
        repository_of,
        language_names,
        language_of,
        ContentEncoder(tokenizer).fingerprint,
    )


def _numbered(names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the different names, sorted, and the index of each name among them."""
    different = sorted(set(names))
    index = {name: i for i, name in enumerate(different)}
    return tuple(different), np.array([index[name] for name in names], dtype=np.int32)
