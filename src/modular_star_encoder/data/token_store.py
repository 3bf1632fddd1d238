"""A tokenized corpus on disk, for corpora larger than memory: written once, restartable, read memory-mapped.

A store is a folder of flat little-endian arrays, without a header, and two text files:

    tokens.bin            uint16 or uint32 (tokens,): the rows one after the other
    bounds.bin            int64 (rows + 1,): row i is tokens bounds[i]:bounds[i + 1]
    repositories.bin      int32 (rows,): the repository of each row, a line of repositories.jsonl
    languages.bin         int32 (rows,): the language of each row, an entry of "languages" in state.json
    repositories.jsonl    one JSON string per line
    state.json            how much of these files counts, and what they were made from

Files only ever grow, and `state.json` is replaced atomically after what it counts has reached the disk. Whatever lies
beyond its counts was being written when the process ended, and is cut off by the next.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from operator import length_hint
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.sources.source_files import SourceFile
from modular_star_encoder.data.tokenizer import TEXTS_PER_BATCH, ContentEncoder, TokenRows, encode_content

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
        tokenizer_checksum: That of the tokenizer that made the rows; see `ContentEncoder`.
    """

    rows: TokenRows
    row_numbers: np.ndarray
    repository_names: tuple[str, ...]
    repository_of: np.ndarray
    language_names: tuple[str, ...]
    language_of: np.ndarray
    tokenizer_checksum: str

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def repositories(self) -> tuple[str, ...]:
        """Names of the repositories that have a text in this corpus, in the order of `repository_names`."""
        return tuple(self.repository_names[i] for i in np.unique(self.repository_of[self.row_numbers]))

    def split(self, eval_fraction: float, seed: int) -> tuple["TokenCorpus", "TokenCorpus"]:
        """Return (what is left, what is held out): two views that share no repository.

        Args:
            eval_fraction: Share of the repositories to hold out, between 0 and 1; at least one is, and one is left.
            seed: Decides which. The draw depends on the seed and the names alone, not on their order or their texts.

        Raises:
            ValueError: If the share is out of range or there are fewer than two repositories.
        """
        if not 0 < eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie between 0 and 1, not be {eval_fraction}.")
        used = np.unique(self.repository_of[self.row_numbers])
        if len(used) < 2:
            raise ValueError(f"A split needs texts of at least two repositories; these are of {len(used)}.")
        # A hash rather than a generator's shuffle: stable everywhere, and a new repository does not reorder the others.
        order = sorted(used, key=lambda i: hashlib.sha256(f"{seed}:{self.repository_names[i]}".encode()).digest())
        count = min(max(round(eval_fraction * len(used)), 1), len(used) - 1)
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
            self.tokenizer_checksum,
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
        ContentEncoder(tokenizer).checksum,
    )


def _numbered(names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the different names, sorted, and the index of each name among them."""
    different = sorted(set(names))
    index = {name: i for i, name in enumerate(different)}
    return tuple(different), np.array([index[name] for name in names], dtype=np.int32)


_STATE, _NEW_STATE = "state.json", "state.json.new"
_NAMES = "repositories.jsonl"
_BOUND, _INDEX = np.dtype("<i8"), np.dtype("<i4")


@dataclass
class _State:
    """What `state.json` says; sizes are in entries, except that of the names, in bytes."""

    tokenizer: str
    dtype: str
    files: int = 0
    tokens: int = 0
    name_bytes: int = 0
    files_digest: str = ""
    complete: bool = False
    languages: list[str] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """The size in bytes that each file has at least; one row per file."""
        return {
            "tokens.bin": self.tokens * np.dtype(self.dtype).itemsize,
            "bounds.bin": (self.files + 1) * _BOUND.itemsize,
            "repositories.bin": self.files * _INDEX.itemsize,
            "languages.bin": self.files * _INDEX.itemsize,
            _NAMES: self.name_bytes,
        }


class TokenStore(TokenCorpus):
    """The corpus that `build_token_store` made, memory-mapped: opening it reads next to nothing.

    It can be handed to worker processes: they open it anew.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open a finished store.

        Raises:
            ValueError: If `folder` holds no store, one that is not finished, or one whose files were cut short.
        """
        folder = Path(folder)
        state = _read_state(folder)
        if state is None:
            raise ValueError(f"{str(folder)!r} holds no token store; make one with build_token_store.")
        if not state.complete:
            raise ValueError(
                f"The token store {str(folder)!r} is not finished; call build_token_store again with the same files."
            )
        _check_sizes(folder, state)
        names = (folder / _NAMES).read_bytes()[: state.name_bytes].splitlines()
        super().__init__(
            rows=_MappedRows(folder),
            row_numbers=np.arange(state.files),
            repository_names=tuple(json.loads(line) for line in names),
            repository_of=_mapped(folder / "repositories.bin", _INDEX, state.files),
            language_names=tuple(state.languages),
            language_of=_mapped(folder / "languages.bin", _INDEX, state.files),
            tokenizer_checksum=state.tokenizer,
        )


class _MappedRows(TokenRows):
    def __init__(self, folder: Path) -> None:
        state = _read_state(folder)
        self._folder = folder.absolute()
        super().__init__(
            _mapped(folder / "tokens.bin", np.dtype(state.dtype), state.tokens),
            _mapped(folder / "bounds.bin", _BOUND, state.files + 1),
        )

    def __reduce__(self) -> tuple[Callable[[Path], "_MappedRows"], tuple[Path]]:
        # Worker processes open the files; numpy would send them the whole content.
        return _MappedRows, (self._folder,)


def build_token_store(
    files: Iterable[SourceFile],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | os.PathLike[str],
    *,
    files_per_commit: int = 4096,
    progress: bool = True,
) -> TokenStore:
    """Tokenize `files` into a store, or go on with one that was interrupted, at any moment and in any way.

    Texts are encoded as by `encode_content`: special tokens written in them are ordinary characters. Every file is one
    row, in the order of `files`. To go on, give the same files in the same order: those already stored are read again
    and compared, but not tokenized. A finished store is opened as it is, without a look at `files`. Let one process at
    a time work on a folder.

    Args:
        files: Source files; they are iterated once, and some thousands are in memory at a time.
        tokenizer: A fast tokenizer.
        folder: A store that was begun with this tokenizer, or a folder that is empty or does not exist.
        files_per_commit: After so many files the work so far is safe.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `folder` holds something else, was begun with another tokenizer or other files, or its files
            were cut short; or if `files_per_commit` is below 1.
    """
    if files_per_commit < 1:
        raise ValueError(f"files_per_commit must be at least 1, not {files_per_commit}.")
    folder, encoder = Path(folder), ContentEncoder(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    state = _read_state(folder) or _begin(folder, encoder)
    if state.tokenizer != encoder.checksum:
        raise ValueError(f"The token store {str(folder)!r} was made with another tokenizer; name another folder.")
    if not state.complete:
        with closing(_Writer(folder, state, encoder)) as writer:
            iterator = iter(files)
            with tqdm(desc="Tokenizing", total=length_hint(files) or None, unit=" files", disable=not progress) as bar:
                _skip_stored(state, iterator, bar)
                for batch in _batches(iterator, files_per_commit):
                    for start in range(0, len(batch), TEXTS_PER_BATCH):
                        bar.update(writer.append(batch[start : start + TEXTS_PER_BATCH]))
                    writer.commit()
            state.complete = True
            writer.commit()
    return TokenStore(folder)


class _Writer:
    """Appends rows to the files of a store; `state` follows."""

    def __init__(self, folder: Path, state: _State, encoder: ContentEncoder) -> None:
        _check_sizes(folder, state)
        self._folder, self._state, self._encoder = folder, state, encoder
        for name, size in state.sizes().items():
            os.truncate(folder / name, size)
        names = (folder / _NAMES).read_bytes().splitlines()
        self._repositories = {json.loads(line): i for i, line in enumerate(names)}
        self._languages = {name: i for i, name in enumerate(state.languages)}
        self._outputs = {name: (folder / name).open("ab") for name in state.sizes()}

    def append(self, files: list[SourceFile]) -> int:
        """Write a few files; return how many."""
        state = self._state
        rows = self._encoder([file.text for file in files])
        bounds = state.tokens + np.cumsum([len(row) for row in rows])
        new = [name for name in dict.fromkeys(file.repository for file in files) if name not in self._repositories]
        self._repositories |= {name: i for i, name in enumerate(new, len(self._repositories))}
        names = "".join(json.dumps(name) + "\n" for name in new).encode()
        language_of = [self._languages.setdefault(file.language, len(self._languages)) for file in files]
        for name, values, dtype in (
            ("tokens.bin", np.concatenate(rows), state.dtype),
            ("bounds.bin", bounds, _BOUND),
            ("repositories.bin", [self._repositories[file.repository] for file in files], _INDEX),
            ("languages.bin", language_of, _INDEX),
        ):
            self._outputs[name].write(np.asarray(values).astype(dtype).tobytes())
        self._outputs[_NAMES].write(names)
        state.files += len(files)
        state.tokens = int(bounds[-1])
        state.name_bytes += len(names)
        state.languages = list(self._languages)
        for file in files:
            state.files_digest = _digest(state.files_digest, file)
        return len(files)

    def commit(self) -> None:
        """Bring what was appended to the disk, and only then count it."""
        for output in self._outputs.values():
            output.flush()
            os.fsync(output.fileno())
        _write_state(self._folder, self._state)

    def close(self) -> None:
        for output in self._outputs.values():
            output.close()


def _skip_stored(state: _State, files: Iterator[SourceFile], bar: tqdm) -> None:
    """Pass over the files that are stored, and refuse others."""
    digest = ""
    for file in islice(files, state.files):
        digest = _digest(digest, file)
        bar.update()
    if digest != state.files_digest:
        raise ValueError(
            "The token store was begun with other files; give the same ones in the same order, or name another folder."
        )


def _digest(before: str, file: SourceFile) -> str:
    """The digest of a sequence of files, from that of all but the last."""
    content = json.dumps([before, file.repository, file.path, file.language, file.text])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _batches(files: Iterator[SourceFile], size: int) -> Iterator[list[SourceFile]]:
    return iter(lambda: list(islice(files, size)), [])


def _begin(folder: Path, encoder: ContentEncoder) -> _State:
    if any(entry.name not in (_NEW_STATE, *_State("", "<u2").sizes()) for entry in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty and holds no token store; name another folder.")
    state = _State(encoder.checksum, encoder.dtype.newbyteorder("<").str)
    for name in state.sizes():
        (folder / name).write_bytes(bytes(_BOUND.itemsize) if name == "bounds.bin" else b"")
    _write_state(folder, state)
    return state


def _read_state(folder: Path) -> _State | None:
    try:
        return _State(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(folder / _STATE)!r} was not written by this version; make the store anew.") from error


def _write_state(folder: Path, state: _State) -> None:
    new = folder / _NEW_STATE
    with new.open("w", encoding="utf-8") as output:
        json.dump(asdict(state), output, indent=1)
        output.flush()
        os.fsync(output.fileno())
    os.replace(new, folder / _STATE)


def _check_sizes(folder: Path, state: _State) -> None:
    for name, size in state.sizes().items():
        path = folder / name
        if not path.exists() or path.stat().st_size < size:
            raise ValueError(f"{str(path)!r} is missing or was cut short; remove the folder and make the store anew.")


def _mapped(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    # An ordinary array over the map: slices of numpy's own class cost more. An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r", shape=(length,)).view(np.ndarray) if length else np.empty(0, dtype)
