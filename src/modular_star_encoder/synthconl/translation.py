"""Translate functions with a language model behind a server with OpenAI's chat protocol.

A repeated call continues an interrupted call. A model's answer (a completion) is matched to its function by an id,
never by text or order.
"""

import hashlib
import json
import os
import re
import time
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from math import isfinite
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, ValidationError, validate_call
from pydantic import Field as Constraint
from tqdm.auto import tqdm

from modular_star_encoder.data.languages.registry import LANGUAGES, check_languages
from modular_star_encoder.synthconl.row_files import count_rows, read_file, read_rows, row_files, write_parquet
from modular_star_encoder.utils import http
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import check_types, read_json, write_json
from modular_star_encoder.utils.http import HTTPClient, HTTPRequestError, Response, check_url
from modular_star_encoder.utils.settings import Count, NonNegative, Positive, settings_class

ERROR, TOO_LONG = "error", "too_long"
MAX_ANSWER_CHARACTERS = 2**17  # functions to translate have at most 8,000; longer nonsense is slow to parse
# Arguments of `OpenAIBackend` that do not change the answers, except through rounding in the server.
RUN_OPTIONS = frozenset({"base_url", "api_key_variable", "concurrency", "attempts", "pause", "timeout"})


class CompletionRequest(NamedTuple):
    """A prompt to send to a model, and the id of the row to translate; the model's answer gets the same id."""

    id: str
    prompt: str  # the user's message, without a chat template


@dataclass(frozen=True, slots=True)
class Completion:
    """A model's answer to one request."""

    id: str  # id of the request
    text: str  # the answer
    finish_reason: str  # as in OpenAI's protocol, or `TOO_LONG` (the prompt leaves no room for an answer), or `ERROR`
    prompt_tokens: int = 0  # chat template included; 0 if the server does not report it
    completion_tokens: int = 0  # the final token included; 0 if the server does not report it
    error: str = ""  # why the request failed; empty otherwise


class OpenAIBackend:
    """Gets answers, decoded greedily, from a server such as `vllm serve`, llama.cpp, Ollama or a hosted service.

    A request that fails temporarily is sent again (see `HTTPClient`). An error that all requests would meet, such as a
    wrong key, ends `complete` with a UserError. The server must have OpenAI's endpoint `POST /chat/completions`.
    """

    @validate_call
    def __init__(
        self,
        model: str,
        max_tokens: int,
        *,
        base_url: str,
        revision: str | None = None,  # not sent, only shown in the dataset's card
        # Begins with MOSE_, so that a recipe from somebody else can't send another secret to its server.
        api_key_variable: str | None = None,
        concurrency: Annotated[Count, Constraint(le=1000)] = 16,
        attempts: Annotated[Count, Constraint(le=100)] = 6,
        pause: NonNegative = 1.0,
        timeout: Positive = 300.0,
        body: Mapping[str, Any] | None = None,  # fields to add to or replace in each request; None: not sent
    ) -> None:
        if fixed := sorted({"messages", "model", "n", "stream"} & set(body or {})):
            raise UserError("synthconl.backend.body", f"Remove {', '.join(fixed)} from `body`: it is set already.")
        if api_key_variable is not None and not api_key_variable.startswith("MOSE_"):
            must = f"`api_key_variable` must be an environment variable named MOSE_…, not {api_key_variable!r}"
            message = f"{must}. Put the server's key in MOSE_API_KEY, and set api_key_variable=MOSE_API_KEY."
            raise UserError("http.token.variable", message)
        try:
            json.dumps(body, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            message = f"Change `body`: it can't be sent as JSON ({str(error).rstrip('.')})."
            raise UserError("synthconl.backend.body", message) from error
        self._url = check_url(base_url) + "/chat/completions"
        options: dict[str, Any] = {"concurrency": concurrency, "attempts": attempts, "pause": pause, "timeout": timeout}
        options |= {"token": http.token_from_environment(api_key_variable), "max_bytes": 2**24}
        self._open_client = partial(HTTPClient, **options)
        self._model, self._revision, self._concurrency = model, revision, concurrency
        body = {"model": model, "temperature": 0, "max_tokens": max_tokens} | dict(body or {})
        self._body = {name: value for name, value in body.items() if value is not None}
        self._served: set[str] = set()

    def complete(self, requests: Iterable[CompletionRequest]) -> Generator[Completion]:
        """Yield one completion for each request, in the order in which the answers arrive.

        A killed process loses at most `concurrency` answers. Before a UserError, all other pending answers are yielded.
        """
        failure: UserError | None = None
        asked: dict[Future[Response], CompletionRequest] = {}
        remaining = iter(requests)
        with self._open_client() as client:
            while True:
                while not failure and len(asked) < self._concurrency and (request := next(remaining, None)):
                    body = self._body | {"messages": [{"role": "user", "content": request.prompt}]}
                    asked[client.submit("POST", self._url, body=body, retry_if=_is_an_error)] = request
                if not asked:
                    break
                for future in wait(asked, return_when=FIRST_COMPLETED).done:
                    try:
                        yield self._completion(asked.pop(future), future)
                    except UserError as error:
                        failure = failure or error
        if failure:
            raise failure

    def describe(self) -> dict[str, Any]:
        """Return {`backend`, `model`, `revision`, `served`}; `served` lists the model names in the server's answers."""
        served = sorted(self._served)
        return {"backend": "openai", "model": self._model, "revision": self._revision, "served": served}

    def _completion(self, request: CompletionRequest, future: "Future[Response]") -> Completion:
        try:
            content = future.result().json()
        except HTTPRequestError as error:
            if error.status in (400, 413, 422):  # perhaps only this prompt is at fault
                too_long = re.search(r"context[ _](?:length|size|window)", error.text, re.IGNORECASE)
                return Completion(request.id, "", TOO_LONG if too_long else ERROR, error=error.reason)
            raise UserError(error.key, f"Model {self._model!r}: {error}") from error
        try:
            if content["choices"] == []:  # some gateways answer one prompt so
                return Completion(request.id, "", ERROR, error="the answer has no choices")
            choice = content["choices"][0]
            message, usage = choice["message"], content.get("usage") or {}
            text, refusal = message.get("content") or "", message.get("refusal")
            if isinstance(text, list):  # parts, such as {"type": "text", "text": "…"}
                text = "".join(part.get("text") or "" for part in text)
            reason = "content_filter" if refusal and not text else str(choice.get("finish_reason") or "stop")[:40]
            if reason in (ERROR, TOO_LONG):
                return Completion(request.id, "", ERROR, error=f"the answer has finish_reason {reason!r}")
            if len(text.encode(errors="replace")) > MAX_ANSWER_CHARACTERS:  # a file of such answers couldn't be read
                text, reason = text[:1000], "length"
            asked, written = array("I", [usage.get(name) or 0 for name in _TOKENS])  # checks that they fit into 32 bits
            if len(self._served) < _MAX_SERVED:
                self._served.add(str(content.get("model") or self._model)[:200])
        except (TypeError, LookupError, AttributeError, ValueError, OverflowError):
            message = f"{http.url_host(self._url)} answers, but not in OpenAI's chat protocol; check `base_url`."
            raise UserError("synthconl.backend.protocol", message) from None
        return Completion(request.id, text, reason, asked, written)


def _is_an_error(response: Response) -> bool:  # some gateways send errors with status 200
    content = response.json()
    return isinstance(content, dict) and not content.get("choices") and bool(content.get("error"))


LANGUAGE_NAMES = {name: name.title() for name in LANGUAGES} | {"javascript": "JavaScript", "php": "PHP", "cpp": "C++"}
"""{language: its name in prompts and tables}."""

PROMPT = """\
Translate the function below from {source_language} to {target_language}. Keep what it does and the idiom of the \
target language. Answer with the translated code alone, in one code block, without explanations.

Source language: {source_language}
Target language: {target_language}
Code:
{code}
"""

MAX_ERRORS_IN_A_ROW = 20
SESSIONS = "sessions.json"
_MAX_SERVED = 100  # names of models from a server, in one session
_TOKENS = ("prompt_tokens", "completion_tokens")
SCHEMA = pa.schema([(one.name, pa.int64() if one.name in _TOKENS else pa.string()) for one in fields(Completion)])
_SECONDS_BETWEEN_NOTES = 30.0

Languages = Annotated[Sequence[str], AfterValidator(check_languages)]


def target_language(row_id: str, source_language: str, *, seed: int, targets: Sequence[str] = LANGUAGES) -> str:
    """Draw a language to translate a row to, one of `targets` except `source_language`; UserError if there is none.

    The same `seed` and `row_id` draw the same language.
    """
    others = sorted(set(targets) - {source_language})
    if not others:
        message = f"`targets` must name a language other than {source_language}; found only {', '.join(targets)}."
        raise UserError("synthconl.targets", message)
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return others[int.from_bytes(digest[:8]) % len(others)]


def check_prompt(prompt: str) -> str:
    """Return `prompt` unchanged; UserError if its fields in braces are not those of `PROMPT`, without formats."""
    try:
        parts = [part for part in Formatter().parse(prompt) if part[1] is not None]
        fields = {f"{name}{f'!{kind}' * bool(kind)}{f':{form}' * bool(form)}" for _, name, form, kind in parts}
    except ValueError as error:
        fields = {str(error)}
    if fields != {"source_language", "target_language", "code"}:
        wanted = "the fields {source_language}, {target_language} and {code}. Double all other braces"
        raise UserError("synthconl.prompt", f"`prompt` must have {wanted}. Found: {', '.join(sorted(fields))}.")
    return prompt


def translation_request(
    row_id: str, code: str, source_language: str, target: str, prompt: str = PROMPT
) -> CompletionRequest:
    """Return the request to translate the code of row `row_id` to the language `target`."""
    names = {"source_language": LANGUAGE_NAMES[source_language], "target_language": LANGUAGE_NAMES[target]}
    return CompletionRequest(row_id, prompt.format(**names, code=code))


@settings_class
class TranslationSettings:
    """Settings that say which model translates functions, and how.

    Args:
        backend: `openai`: any server with OpenAI's chat protocol, such as `vllm serve` or `transformers serve`.
        model: name of the model on the server.
        max_tokens: largest number of tokens of an answer; longer answers are cut by the server and rejected.
        prompt: template with the fields {source_language}, {target_language} and {code}.
        targets: languages to translate to; for each function, a target other than the function's language is drawn.
        options: further arguments of `OpenAIBackend`, such as `base_url`.
        prompt_price, completion_price: prices of a million tokens of prompts and of answers, for the report.
    """

    backend: Literal["openai"]
    model: str
    max_tokens: Count = 2048
    prompt: Annotated[str, AfterValidator(check_prompt)] = PROMPT
    targets: Languages = LANGUAGES
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt_price: NonNegative = 0.0
    completion_price: NonNegative = 0.0

    def identity(self) -> dict[str, Any]:
        """Return the settings that can change the translations: all except prices and the options in `RUN_OPTIONS`."""
        own = {name: getattr(self, name) for name in ("backend", "model", "max_tokens", "prompt")}
        options = {name: value for name, value in self.options.items() if name not in RUN_OPTIONS}
        return {**own, "targets": sorted(self.targets), "options": options}

    def open(self) -> OpenAIBackend:
        """Return the `OpenAIBackend` of these settings; UserError if an option is unknown, missing or invalid."""
        try:
            return OpenAIBackend(self.model, self.max_tokens, **self.options)
        except ValidationError as error:
            fault = error.errors()[0]
            message = f"translation.options.{fault['loc'][-1]}: {fault['msg']}. Given: {str(fault['input'])[:60]!r}."
            raise UserError("synthconl.backend.options", message) from error

    def cost(self, tokens: Mapping[str, int]) -> float:
        """Return the price of `tokens`, which is {"prompt_tokens": number, "completion_tokens": number}."""
        return (tokens["prompt_tokens"] * self.prompt_price + tokens["completion_tokens"] * self.completion_price) / 1e6


def translate(
    functions: Path, out: Path, settings: TranslationSettings, *, seed: int, progress: bool = True
) -> dict[str, Any]:
    """Ask a model to translate the functions that have no answer in `out` yet; return a report on all calls.

    `functions` is a folder that `write_rows` wrote. For each file in `functions`, the existing folder `out` gets a file
    of answers. All calls with the same `out` must have the same `settings` and `seed`; this is not checked.
    """
    backend = settings.open()
    files: dict[str, _CompletionFile] = {}  # the file of each row that waits for its completion
    begun = any(file.stat().st_size for file in out.glob("rows-*"))
    session = _Session(out / SESSIONS, backend)

    def requests() -> Iterator[CompletionRequest]:
        for path in row_files(functions):
            target = out / path.name
            if target.is_file():
                Path(f"{target}.journal").unlink(missing_ok=True)  # a killed process may have left it
                bar.update(pq.read_metadata(path).num_rows)
                continue
            rows = read_file(path, ("id", "language1_CSN", "func1_CSN"))
            file = _CompletionFile(target, [row["id"] for row in rows])
            journals.callback(file.journal.close)
            files.update(dict.fromkeys(file.missing, file))
            bar.update(len(rows) - len(file.missing))
            for row in rows:
                if row["id"] in file.missing:
                    source = row["language1_CSN"]
                    language = target_language(row["id"], source, seed=seed, targets=settings.targets)
                    yield translation_request(row["id"], row["func1_CSN"], source, language, settings.prompt)

    with (
        ExitStack() as journals,
        tqdm(desc="Translating", total=count_rows(functions), unit=" functions", disable=not progress) as bar,
        closing(backend.complete(requests())) as completions,
    ):
        journals.callback(session.write)
        for trusted in _trusted(completions, begun):
            for completion in trusted:
                files.pop(completion.id).add(completion)
            session.add(trusted)
            bar.update(len(trusted))
            speed, cost = session.counts["completion_tokens"] / session.seconds(), settings.cost(session.counts)
            bar.set_postfix_str(f"{speed:.0f} tokens/s, cost {cost:.2f}", refresh=False)
    return _report(out, settings, session.sessions)


def _trusted(completions: Iterable[Completion], answered: bool) -> Iterator[list[Completion]]:
    """Yield lists of completions; hold failed completions back until an answer shows that the server still works.

    `answered` says whether an earlier call received an answer. UserError if 20 requests in a row fail, or if all fail.
    """
    doubtful: list[Completion] = []
    for completion in completions:
        if completion.finish_reason == ERROR:
            doubtful.append(completion)
            if len(doubtful) >= MAX_ERRORS_IN_A_ROW:
                break
        elif completion.finish_reason == TOO_LONG:
            # The prompt is at fault, so this says nothing about the back end.
            yield [completion]
        else:
            yield [*doubtful, completion]
            doubtful, answered = [], True
    if len(doubtful) >= MAX_ERRORS_IN_A_ROW or (doubtful and not answered):
        message = f"The model answered none of the last {len(doubtful)} requests: {doubtful[-1].error}"
        raise UserError("synthconl.backend.errors", message)
    if doubtful:
        yield doubtful


class _Session:
    """Counts the completions of one call of `translate`; saves the counts of all calls about every 30 seconds."""

    def __init__(self, path: Path, backend: OpenAIBackend) -> None:
        self._path, self._backend = path, backend
        self.counts: Counter[str] = Counter()
        self._start, self._next_note = time.monotonic(), 0.0
        try:
            self.sessions = self._earlier = read_json(path) if path.is_file() else []
            if not all(isfinite(one["seconds"] + one["completions"]) and one["backend"] for one in self.sessions):
                raise ValueError("infinite or missing values")
        except (ValueError, TypeError, LookupError) as error:
            message = f"{path} is damaged. Remove this file: it holds counts and times, but no answers."
            raise UserError("synthconl.journal", message) from error

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, completions: Sequence[Completion]) -> None:
        for name in _TOKENS:
            self.counts[name] += sum(getattr(one, name) for one in completions)
        self.counts["completions"] += len(completions)
        if self.seconds() > self._next_note:
            self.write()

    def write(self) -> None:
        if self.counts:
            own = {**self.counts, "seconds": self.seconds(), "backend": self._backend.describe()}
            self.sessions = [*self._earlier, own]
            write_json(self._path, self.sessions, resumable=True)
            self._next_note = self.seconds() + _SECONDS_BETWEEN_NOTES


def _report(out: Path, settings: TranslationSettings, sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = Counter(dict.fromkeys(("completions", "errors", *_TOKENS), 0))
    for row in read_rows(out, ["finish_reason", *_TOKENS]):
        failed = row.pop("finish_reason") in (ERROR, TOO_LONG)
        counts.update(row, completions=1, errors=failed)
    seconds, counted = (sum(session[name] for session in sessions) for name in ("seconds", "completions"))
    backends = [session["backend"] for session in sessions]
    return {
        **counts,
        "cost": settings.cost(counts),
        "seconds": round(seconds, 3),
        "completions_per_second": round(counted / seconds, 3) if seconds else 0.0,
        "backends": [one for i, one in enumerate(backends) if one not in backends[:i]],
    }


class _CompletionFile:
    """Stores the answers for one file of rows: in a journal until every row has its answer, then as a Parquet file."""

    def __init__(self, target: Path, ids: Sequence[str]) -> None:
        self._target, self._ids, self._path = target, ids, Path(f"{target}.journal")
        self._answered = _read_journal(self._path, set(ids))
        self.missing = set(ids) - self._answered.keys()
        self.journal = self._path.open("ab")
        self._finish()

    def add(self, completion: Completion) -> None:
        """Append a completion to the journal, a file that survives if this process is killed."""
        # JSON can escape lone surrogates but parquet can't hold them; question marks replace them.
        texts = {name: getattr(completion, name) for name in ("text", "finish_reason", "error")}
        texts = {name: text.encode(errors="replace").decode() for name, text in texts.items()}
        self._answered[completion.id] = completion = replace(completion, **texts)
        self.journal.write(json.dumps(asdict(completion)).encode() + b"\n")
        self.journal.flush()
        self._finish()

    def _finish(self) -> None:
        if len(self._answered) == len(self._ids):
            rows = [asdict(self._answered[row_id]) for row_id in self._ids]
            write_parquet(self._target, [pa.Table.from_pylist(rows, SCHEMA)], SCHEMA)
            self.journal.close()
            self._path.unlink()


def _read_journal(path: Path, ids: set[str]) -> dict[str, Completion]:
    """Return {id: completion} of a journal, and cut off an incomplete last line.

    UserError if another line is damaged, or has an id that is not in `ids`.
    """
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    answered: dict[str, Completion] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            completion = Completion(**json.loads(line))
            check_types(completion)
            pa.Table.from_pylist([asdict(completion)], SCHEMA)  # fails for lone surrogates and huge numbers
            if completion.id not in ids:
                raise ValueError("an unknown id")
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            message = f"Line {number} of {path} is damaged or has an unknown id: delete the line, and build again."
            raise UserError("synthconl.journal", message) from error
        answered[completion.id] = completion
    return answered
