"""Stores tokenized corpora on disk. A corpus may be larger than memory, and an interrupted build can be resumed.

A store has one row for each source file. It is a folder of little-endian arrays without headers, and two text files:

    tokens.bin            uint16 or uint32 (tokens,): the token ids of all rows, one row after the other
    bounds.bin            int64 (rows + 1,): row i is tokens[bounds[i] : bounds[i + 1]]
    repositories.bin      int32 (rows,): each row's repository, as its line number (from 0) in repositories.jsonl
    languages.bin         int32 (rows,): each row's language, as its index in "languages" of state.json
    repositories.jsonl    the name of one repository per line, as a JSON string
    state.json            sizes of the valid parts of these files, hashes of the tokenizer and of the source files

The first five files only grow. `state.json` is replaced atomically, after the data that it counts has reached the disk.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from operator import length_hint
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from modular_star_encoder.data.sources import SourceFile
from modular_star_encoder.data.splits import check_enough, hashed_order
from modular_star_encoder.data.tokenizer import TEXTS_PER_BATCH, ContentEncoder, TokenRows
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import write_json


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Tokenized texts, each with its repository and language: a store on disk (`TokenStore`), or a part of a store."""

    rows: TokenRows  # token ids of every text; a part of a corpus keeps the rows of the whole corpus
    row_numbers: np.ndarray  # int64 (texts,), sorted: the indices of the rows that belong to this corpus
    repository_names: tuple[str, ...]
    repository_of: np.ndarray  # int32 (rows,), indices of `repository_names`
    language_names: tuple[str, ...]  # lower-case
    language_of: np.ndarray  # int32 (rows,), indices of `language_names`
    tokenizer_checksum: str  # of the tokenizer that made the rows

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def repositories(self) -> tuple[str, ...]:
        """Names of the repositories that have a text in this corpus, in the order of `repository_names`."""
        return tuple(self.repository_names[i] for i in np.unique(self.repository_of[self.row_numbers]))

    def split(self, eval_fraction: float, seed: int) -> tuple["TokenCorpus", "TokenCorpus"]:
        """Return (training corpus, held-out corpus with a share `eval_fraction` of repositories, chosen by `seed`)."""
        names = self.repositories
        check_enough(names)
        least = 2 if len(names) >= 4 else 1
        count = min(max(round(eval_fraction * len(names)), least), len(names) - least)
        drawn = set(hashed_order(names, seed)[:count])
        is_drawn = np.array([name in drawn for name in self.repository_names])
        held_out = is_drawn[self.repository_of[self.row_numbers]]
        whole = {one.name: getattr(self, one.name) for one in fields(TokenCorpus)}
        left, out = (TokenCorpus(**whole | {"row_numbers": self.row_numbers[part]}) for part in (~held_out, held_out))
        return left, out


_STATE, _NAMES, _INDEX_FILES = "state.json", "repositories.jsonl", ("repositories.bin", "languages.bin")
_BOUND, _INDEX = np.dtype("<i8"), np.dtype("<i4")
_FILES_PER_COMMIT = 4096


@dataclass
class _State:
    """The content of `state.json`: the tokenizer, and the numbers of files, tokens and bytes of repository names."""

    tokenizer: str
    dtype: str
    files: int = 0
    tokens: int = 0
    name_bytes: int = 0
    files_digest: str = ""
    complete: bool = False
    languages: list[str] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """Return {file name: number of valid bytes}. A killed process may have left further bytes in a file."""
        return {
            "tokens.bin": self.tokens * np.dtype(self.dtype).itemsize,
            "bounds.bin": (self.files + 1) * _BOUND.itemsize,
            **dict.fromkeys(_INDEX_FILES, self.files * _INDEX.itemsize),
            _NAMES: self.name_bytes,
        }


class TokenStore(TokenCorpus):
    """A tokenized corpus that `build_token_store` wrote to a folder; its arrays are memory-mapped."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open the token store in `folder`; raise UserError if the store is missing, unfinished or damaged."""
        folder = Path(folder)
        rows = _MappedRows(folder.absolute())
        state = rows.state
        names = tuple(map(json.loads, (folder / _NAMES).read_bytes()[: state.name_bytes].splitlines()))
        repository_of, language_of = (_mapped(folder / name, _INDEX, state.files) for name in _INDEX_FILES)
        columns = (names, repository_of, tuple(state.languages), language_of)
        super().__init__(rows, np.arange(state.files), *columns, state.tokenizer)


class _MappedRows(TokenRows):
    """The memory-mapped rows of a store. Pickling stores only the folder's path, not the tokens."""

    def __init__(self, folder: Path) -> None:
        state = _read_state(folder)
        if state is None or not state.complete:
            message = f"{folder} holds no finished token store: make one with build_token_store."
            raise UserError("data.token_store.missing", message)
        self._folder, self.state = folder, state
        tokens = _mapped(folder / "tokens.bin", np.dtype(state.dtype), state.tokens)
        super().__init__(tokens, _mapped(folder / "bounds.bin", _BOUND, state.files + 1))

    def __reduce__(self) -> tuple[type["_MappedRows"], tuple[Path]]:
        return _MappedRows, (self._folder,)


def build_token_store(
    files: Iterable[SourceFile],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> TokenStore:
    """Tokenize `files` into a store in `folder`, one row per file, and return the store.

    To continue an interrupted call, pass the same files in the same order. A finished store is opened without reading
    `files`. Only one process may work on a folder at a time; this is not checked. Raises UserError if the folder holds
    unrelated files, a damaged store, or a store made by another tokenizer or from other source files.
    """
    folder, encoder = Path(folder), ContentEncoder(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    state = _read_state(folder) or _begin(folder, encoder)
    if state.tokenizer != encoder.checksum:
        message = f"The token store {folder} was made by another tokenizer: pass that tokenizer, or another folder."
        raise UserError("data.token_store.other_tokenizer", message)
    if state.complete:
        return TokenStore(folder)
    iterator = iter(files)
    bar = tqdm(desc="Tokenizing", total=length_hint(files) or None, unit=" texts", disable=not progress)
    with bar, closing(_Writer(folder, state, encoder)) as writer:
        digest = ""
        for file in islice(iterator, state.files):  # the files that are already stored
            digest = _digest(digest, file)
            bar.update()
        if digest != state.files_digest:
            message = f"The token store {folder} was begun with other files: pass the same files in the same order,"
            raise UserError("data.token_store.other_files", f"{message} or name another folder.")
        while batch := list(islice(iterator, _FILES_PER_COMMIT)):
            for start in range(0, len(batch), TEXTS_PER_BATCH):
                bar.update(writer.append(batch[start : start + TEXTS_PER_BATCH]))
            writer.commit()
        state.complete = True
        writer.commit()
    return TokenStore(folder)


class _Writer:
    def __init__(self, folder: Path, state: _State, encoder: ContentEncoder) -> None:
        self._folder, self._state, self._encoder = folder, state, encoder
        for name, size in state.sizes().items():
            os.truncate(folder / name, size)
        names = (folder / _NAMES).read_bytes().splitlines()
        self._repositories = {json.loads(line): i for i, line in enumerate(names)}
        self._languages = {name: i for i, name in enumerate(state.languages)}
        self._outputs = {name: (folder / name).open("ab") for name in state.sizes()}

    def append(self, files: list[SourceFile]) -> int:
        """Tokenize `files` and append one row for each file; return the number of files."""
        state = self._state
        rows = self._encoder([file.text for file in files])
        bounds = state.tokens + np.cumsum([len(row) for row in rows])
        known = len(self._repositories)
        repository_of = [self._repositories.setdefault(file.repository, len(self._repositories)) for file in files]
        added = list(islice(reversed(self._repositories), len(self._repositories) - known))[::-1]
        names = "".join(json.dumps(name) + "\n" for name in added).encode()
        language_of = [self._languages.setdefault(file.language, len(self._languages)) for file in files]
        for name, values, dtype in (
            ("tokens.bin", np.concatenate(rows), state.dtype),
            ("bounds.bin", bounds, _BOUND),
            ("repositories.bin", repository_of, _INDEX),
            ("languages.bin", language_of, _INDEX),
        ):
            self._outputs[name].write(np.asarray(values).astype(dtype).tobytes())
        self._outputs[_NAMES].write(names)
        state.files, state.tokens = state.files + len(files), int(bounds[-1])
        state.name_bytes, state.languages = state.name_bytes + len(names), list(self._languages)
        for file in files:
            state.files_digest = _digest(state.files_digest, file)
        return len(files)

    def commit(self) -> None:
        """Flush the appended rows to the disk, and only then count them in `state.json`."""
        for output in self._outputs.values():
            output.flush()
            os.fsync(output.fileno())
        write_json(self._folder / _STATE, asdict(self._state), resumable=True)

    def close(self) -> None:
        for output in self._outputs.values():
            output.close()


def _digest(before: str, file: SourceFile) -> str:
    """Return the digest of all files up to and including `file`; `before` is the digest of the files before `file`."""
    content = json.dumps([before, file.repository, file.path, file.language, file.text])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _begin(folder: Path, encoder: ContentEncoder) -> _State:
    leftovers = {f".{_STATE}.tmp", *_State("", "<u2").sizes()}
    if any(entry.name not in leftovers for entry in folder.iterdir()):
        raise UserError(
            "data.token_store.other_content", f"{folder} holds other files: name an empty folder for the store."
        )
    state = _State(encoder.checksum, encoder.dtype.newbyteorder("<").str)
    for name in state.sizes():
        (folder / name).write_bytes(bytes(_BOUND.itemsize) if name == "bounds.bin" else b"")
    write_json(folder / _STATE, asdict(state), resumable=True)
    return state


def _read_state(folder: Path) -> _State | None:
    """Return the state of the token store in `folder`; None if there is no store. UserError if a file is damaged."""
    if not (folder / _STATE).exists():
        return None
    fault = _STATE
    with suppress(TypeError, ValueError):
        state = _State(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        fault = next((name for name, size in state.sizes().items() if sizes.get(name, -1) < size), "")
    if fault:
        message = f"The file {fault} of the token store {folder} is missing, cut short or of another format."
        raise UserError("data.token_store.damaged", f"{message} Remove the folder and build the store again.")
    return state


def _mapped(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    # A plain array, because slices of a `memmap` are slower. An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r", shape=(length,)).view(np.ndarray) if length else np.empty(0, dtype)
