"""What the stage of translation asks of a language model, and the interface that every back end has.

A request carries the id of its row through the back end, and its completion comes back with that id: completions are
never matched by their text or their place.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Protocol

from modular_star_encoder.data.sources.source_files import LANGUAGES

ERROR, TOO_LONG = "error", "too_long"


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One prompt.

    Attributes:
        id: Id of the row that it is for.
        prompt: What the user says, without any chat template.
    """

    id: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote for one request.

    Attributes:
        id: Id of the request.
        text: What was written.
        finish_reason: Why it ended there, in the words of OpenAI's protocol: `"stop"`, `"length"`, `"content_filter"`,
            or whatever else an endpoint says; `"too_long"` if the prompt leaves no room for an answer, and `"error"` if
            this one request could not be answered for another reason.
        prompt_tokens: Number of tokens of the prompt, chat template included; 0 where an endpoint does not say.
        completion_tokens: Number of tokens written, the one that ends the text included; 0 where an endpoint does not
            say.
        error: Why the request could not be answered; empty otherwise.
    """

    id: str
    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


class BackendError(OSError):
    """A back end that can't go on: a wrong key, an unknown model, an endpoint that is down. One sentence says it."""


class CompletionBackend(Protocol):
    """A language model, wherever it runs. Decoding is greedy."""

    in_flight: int
    """The largest number of requests that are under way at once: what is lost at most when the process is killed."""

    def complete(self, requests: Iterable[CompletionRequest]) -> Iterator[Completion]:
        """Yield one completion for each request, in any order, as soon as it is there.

        Requests are taken from the iterable as they are needed, no more than `in_flight` ahead of what was yielded.

        Raises:
            BackendError: If no further request can be answered; what was already answered has been yielded.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What a reader of the dataset should know: names and versions of the software, and what is known of the model.

        Complete after the first completion.
        """
        ...


def tokenized(
    requests: Iterable[CompletionRequest], tokenizer: Any, longest: int
) -> tuple[list[tuple[CompletionRequest, list[int]]], list[Completion]]:
    """Return requests with the token ids that a local model reads, and errors for those of more than `longest` ids.

    A prompt is put in the tokenizer's chat template, if it has one.
    """
    rows, errors = [], []
    for request in requests:
        ids = _prompt_ids(tokenizer, request.prompt)
        if len(ids) <= longest:
            rows.append((request, ids))
        else:
            message = f"The prompt has {len(ids)} tokens; {longest} fit."
            errors.append(Completion(request.id, "", TOO_LONG, prompt_tokens=len(ids), error=message))
    return rows, errors


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


LANGUAGE_NAMES = {
    "python": "Python",
    "javascript": "JavaScript",
    "go": "Go",
    "java": "Java",
    "php": "PHP",
    "ruby": "Ruby",
    "c": "C",
    "cpp": "C++",
}
"""The languages as prompts and tables write them."""

PROMPT = """\
Translate the function below from {source_language} to {target_language}. Keep what it does and the idiom of the \
target language. Answer with the translated code alone, in one code block, without explanations.

Source language: {source_language}
Target language: {target_language}
Code:
{code}
"""

_FIELDS = {"source_language", "target_language", "code"}


def target_language(row_id: str, source_language: str, *, seed: int, targets: Sequence[str] = LANGUAGES) -> str:
    """Draw the language that a row is translated to, uniformly among the `targets` other than its own.

    The draw is a function of the seed and the row's id alone: neither the order nor the number of the rows matters.

    Raises:
        ValueError: If `targets` has no language other than `source_language`.
    """
    others = sorted(set(targets) - {source_language})
    if not others:
        raise ValueError(f"There is no language to translate {source_language} to; targets are {', '.join(targets)}.")
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return others[int.from_bytes(digest[:8]) % len(others)]


def check_prompt(prompt: str) -> None:
    """Check a template of prompts.

    Raises:
        ValueError: If its fields are not `{source_language}`, `{target_language}` and `{code}`.
    """
    try:
        fields = {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
    except ValueError as error:
        raise ValueError(f"The prompt is not a template: {error}; other braces are written twice.") from error
    if fields != _FIELDS:
        raise ValueError(
            "The prompt must have the fields {source_language}, {target_language} and {code}, and no others; "
            "other braces are written twice."
        )


def translation_request(
    row_id: str, code: str, source_language: str, target: str, prompt: str = PROMPT
) -> CompletionRequest:
    """Return what a model is asked for one row.

    Args:
        row_id: Id of the row.
        code: The function.
        source_language: One of `LANGUAGES`, that of the code.
        target: One of `LANGUAGES`, to translate to.
        prompt: A template that `check_prompt` accepts.
    """
    names = {"source_language": LANGUAGE_NAMES[source_language], "target_language": LANGUAGE_NAMES[target]}
    return CompletionRequest(row_id, prompt.format(**names, code=code))
