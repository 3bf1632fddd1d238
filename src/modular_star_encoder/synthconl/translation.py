"""The stage of translation: every function of a folder, once, whatever interrupts it."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from modular_star_encoder.data.sources.source_files import LANGUAGES, check_languages
from modular_star_encoder.synthconl.backends import FREE_OPTIONS, open_backend
from modular_star_encoder.synthconl.completions import (
    ERROR,
    PROMPT,
    TOO_LONG,
    BackendError,
    Completion,
    CompletionBackend,
    CompletionRequest,
    check_prompt,
    target_language,
    translation_request,
)
from modular_star_encoder.synthconl.row_files import count_rows, read_file, row_files, write_parquet
from modular_star_encoder.utils.files import write_json

MAX_ERRORS_IN_A_ROW = 20
SESSIONS = "sessions.json"

_SECONDS_BETWEEN_NOTES = 30.0


@dataclass(frozen=True)
class TranslationSettings:
    """How functions are translated.

    Args:
        backend: `vllm`, `openai` (any endpoint of that protocol) or `transformers`.
        model: the model, as the back end calls it.
        max_tokens: largest number of tokens of an answer; longer ones are cut, and then rejected.
        prompt: template with the fields {source_language}, {target_language} and {code}.
        targets: languages to translate to; each row is translated to one other than its own.
        options: further arguments of the back end; see `VLLMBackend`, `OpenAIBackend` and `TransformersBackend`.
        prompt_price, completion_price: price of a million tokens, for the report.
    """

    backend: str
    model: str
    max_tokens: int = 2048
    prompt: str = PROMPT
    targets: Sequence[str] = LANGUAGES
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.backend not in FREE_OPTIONS:
            raise ValueError(f"backend must be one of {', '.join(FREE_OPTIONS)}, not {self.backend!r}.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}.")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options must be a mapping, not {self.options!r}.")
        object.__setattr__(self, "targets", check_languages(self.targets))
        check_prompt(self.prompt)

    def identity(self) -> dict[str, Any]:
        """What decides the translations, up to rounding: all settings but the prices and how the back end is run."""
        free = FREE_OPTIONS[self.backend]
        return {
            "backend": self.backend,
            "model": self.model,
            "max_tokens": self.max_tokens,
            "prompt": self.prompt,
            "targets": sorted(self.targets),
            "options": {name: value for name, value in self.options.items() if name not in free},
        }

    def open(self) -> CompletionBackend:
        """The back end; see `open_backend`."""
        return open_backend(self.backend, self.model, self.max_tokens, self.options)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of so many tokens."""
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6


def translate(
    functions: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: TranslationSettings,
    *,
    seed: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask a model for the translation of every function, continuing whatever an earlier call left in `out`.

    Args:
        functions: Folder of row files with the columns `id`, `language1_CSN` and `func1_CSN`.
        out: Folder, which exists, that gets one file of completions for each file of functions; see `CompletionFiles`.
        settings: How. That they are those of the earlier call is the caller's to check.
        seed: Decides the languages to translate to.
        progress: Whether to show a progress bar.

    Returns:
        The report, of all calls together: `completions`, `errors`, `prompt_tokens`, `completion_tokens`, `cost`,
        `seconds` and `completions_per_second`; and `backends`, what each back end that was at work says of itself.

    Raises:
        BackendError: If the back end can't go on, or answers nothing but errors. What it had answered is kept.
    """
    functions, out, backend = Path(functions), Path(out), settings.open()
    begun = any(file.stat().st_size for file in out.glob("rows-*"))
    with (
        _Session(out / SESSIONS, backend) as session,
        CompletionFiles(out) as files,
        tqdm(desc="Translating", total=count_rows(functions), unit=" functions", disable=not progress) as bar,
        closing(backend.complete(_requests(functions, files, settings, seed, bar))) as completions,
    ):
        for trusted in _trusted(completions, begun):
            files.add(trusted)
            session.add(trusted)
            bar.update(len(trusted))
            bar.set_postfix(_running(settings, session), refresh=False)
    return _report(out, settings)


def _requests(
    functions: Path, files: "CompletionFiles", settings: TranslationSettings, seed: int, bar: tqdm
) -> Iterator[CompletionRequest]:
    for file in row_files(functions):
        if files.is_complete(file.name):
            bar.update(pq.read_metadata(file).num_rows)
            continue
        rows = read_file(file, ("id", "language1_CSN", "func1_CSN"))
        missing = files.open(file.name, [row["id"] for row in rows])
        bar.update(len(rows) - len(missing))
        for row in rows:
            if row["id"] in missing:
                source = row["language1_CSN"]
                target = target_language(row["id"], source, seed=seed, targets=settings.targets)
                yield translation_request(row["id"], row["func1_CSN"], source, target, settings.prompt)


def _trusted(completions: Iterable[Completion], answered: bool) -> Iterator[list[Completion]]:
    """Yield completions; errors only after a later request was answered, which shows that the fault is their own.

    Args:
        completions: From the back end.
        answered: Whether the model has answered anything in an earlier call.

    Raises:
        BackendError: If there are too many errors in a row, or nothing but errors.
    """
    doubtful: list[Completion] = []
    for completion in completions:
        if completion.finish_reason == ERROR:
            doubtful.append(completion)
            if len(doubtful) >= MAX_ERRORS_IN_A_ROW:
                break
        elif completion.finish_reason == TOO_LONG:
            # Certain by itself, and no sign that the others are answered.
            yield [completion]
        else:
            yield [*doubtful, completion]
            doubtful, answered = [], True
    if len(doubtful) >= MAX_ERRORS_IN_A_ROW or (doubtful and not answered):
        raise BackendError(f"The model answered none of the last {len(doubtful)} requests: {doubtful[-1].error}")
    if doubtful:
        yield doubtful


class _Session:
    """One call's work, kept in a list of all calls' in a file: what a killed one did is right to half a minute."""

    def __init__(self, path: Path, backend: CompletionBackend) -> None:
        self._path, self._backend = path, backend
        self._earlier = read_sessions(path)
        self._counts: Counter[str] = Counter()
        self._start = self._written = time.monotonic()

    def __enter__(self) -> "_Session":
        return self

    def __exit__(self, *_: object) -> None:
        if self._counts:
            self._write()

    def add(self, completions: Sequence[Completion]) -> None:
        """Count completions."""
        first = not self._counts
        for completion in completions:
            self._counts["prompt_tokens"] += completion.prompt_tokens
            self._counts["completion_tokens"] += completion.completion_tokens
        self._counts["completions"] += len(completions)
        if first or time.monotonic() - self._written > _SECONDS_BETWEEN_NOTES:
            self._write()

    def to_dict(self) -> dict[str, Any]:
        """Counts, seconds, and what the back end says of itself."""
        return {**self._counts, "seconds": time.monotonic() - self._start, "backend": self._backend.describe()}

    def _write(self) -> None:
        write_json(self._path, [*self._earlier, self.to_dict()])
        self._written = time.monotonic()


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """The calls that worked on a folder of completions, in order."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _running(settings: TranslationSettings, session: _Session) -> dict[str, str]:
    """What the progress bar says beside the count."""
    so_far = session.to_dict()
    cost = settings.cost(so_far["prompt_tokens"], so_far["completion_tokens"])
    speed = {"tokens/s": f"{so_far['completion_tokens'] / so_far['seconds']:.0f}"}
    return speed | ({"cost": f"{cost:.2f}"} if cost else {})


def _report(out: Path, settings: TranslationSettings) -> dict[str, Any]:
    """Counts of the completions themselves; speed by what the sessions say."""
    totals: Counter[str] = Counter()
    for file in row_files(out):
        table = pq.read_table(file, columns=["finish_reason", "prompt_tokens", "completion_tokens"])
        totals["completions"] += len(table)
        totals["errors"] += pc.sum(pc.is_in(table["finish_reason"], pa.array([ERROR, TOO_LONG]))).as_py() or 0
        for name in ("prompt_tokens", "completion_tokens"):
            totals[name] += pc.sum(table[name]).as_py() or 0
    sessions = read_sessions(out / SESSIONS)
    seconds = sum(session["seconds"] for session in sessions)
    backends = [session["backend"] for session in sessions]
    counted = sum(session["completions"] for session in sessions)
    return {
        **totals,
        "cost": settings.cost(totals["prompt_tokens"], totals["completion_tokens"]),
        "seconds": round(seconds, 3),
        "completions_per_second": round(counted / seconds, 3) if seconds else 0.0,
        "backends": [one for i, one in enumerate(backends) if one not in backends[:i]],
    }


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("error", pa.string()),
    ]
)

_SECONDS_BETWEEN_SYNCS = 1.0


class CompletionFiles:
    """The completions of a folder of rows, file by file; several files may be open at once.

    Use it as a context manager, so that journals are closed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Name the folder, which exists."""
        self._folder = Path(folder)
        self._open: dict[str, _OpenFile] = {}
        self._file_of: dict[str, str] = {}

    def __enter__(self) -> "CompletionFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.journal.close()

    def is_complete(self, name: str) -> bool:
        """Whether there is a completion for every row of the file `name`."""
        return (self._folder / name).is_file()

    def open(self, name: str, ids: Sequence[str]) -> set[str]:
        """Open the file `name` for the rows with these ids, and return those that have no completion yet.

        Raises:
            ValueError: If its journal is damaged, or is of other rows.
        """
        if self.is_complete(name):
            self._journal_path(name).unlink(missing_ok=True)
            return set()
        path = self._journal_path(name)
        answered = _read_journal(path)
        strangers = answered.keys() - set(ids)
        if strangers:
            raise ValueError(
                f"{path} holds an answer to {min(strangers)}, which is no row of {name}: name another folder."
            )
        self._open[name] = _OpenFile(tuple(ids), answered, path.open("ab"))
        missing = set(ids) - answered.keys()
        self._file_of |= dict.fromkeys(missing, name)
        if not missing:
            self._finish(name)
        return missing

    def add(self, completions: Iterable[Completion]) -> None:
        """Keep completions of rows that are open and have none yet.

        Raises:
            ValueError: If a completion is of no such row.
        """
        for completion in completions:
            name = self._file_of.pop(completion.id, None)
            if name is None:
                raise ValueError(
                    f"The back end answered {completion.id!r}, which it was not asked, or asked once only."
                )
            file = self._open[name]
            file.append(completion)
            if len(file.answered) == len(file.ids):
                self._finish(name)

    def _finish(self, name: str) -> None:
        file = self._open.pop(name)
        rows = [asdict(file.answered[row_id]) for row_id in file.ids]
        write_parquet(self._folder / name, [pa.Table.from_pylist(rows, SCHEMA)], SCHEMA)
        file.journal.close()
        self._journal_path(name).unlink()

    def _journal_path(self, name: str) -> Path:
        return self._folder / f"{name}.journal"


class _OpenFile:
    """The rows of a file, their completions so far, and the journal that they go to."""

    def __init__(self, ids: tuple[str, ...], answered: dict[str, Completion], journal: BinaryIO) -> None:
        self.ids, self.answered, self.journal = ids, answered, journal
        self._synced = time.monotonic()

    def append(self, completion: Completion) -> None:
        """Write a completion through to the system, and at least once a second to the disk."""
        completion = _without_halves(completion)
        self.answered[completion.id] = completion
        self.journal.write(json.dumps(asdict(completion)).encode() + b"\n")
        self.journal.flush()
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            os.fsync(self.journal.fileno())
            self._synced = time.monotonic()


def _without_halves(completion: Completion) -> Completion:
    """The completion with question marks for lone surrogates, which JSON can escape and parquet can't hold."""
    texts = {name: getattr(completion, name) for name in ("text", "finish_reason", "error")}
    return replace(completion, **{name: text.encode(errors="replace").decode() for name, text in texts.items()})


def _read_journal(path: Path) -> dict[str, Completion]:
    """Return the completions of a journal by id, after cutting off a last line that was not written to its end.

    Raises:
        ValueError: If another line is damaged.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    answered = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            completion = _without_halves(Completion(**json.loads(line)))
        except (ValueError, TypeError, AttributeError):
            raise ValueError(
                f"{path} is damaged in line {number}: delete that line to have its row asked again."
            ) from None
        answered[completion.id] = completion
    return answered
