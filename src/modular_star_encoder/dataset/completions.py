"""What the stage of translation asks of a language model, and the interface that every back end has.

A request carries the id of its row through the back end, and its completion comes back with that id: completions are
never matched by their text or their place.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")


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
            or whatever else an endpoint says; `"error"` if this one request could not be answered.
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


def too_long(request: CompletionRequest, tokens: int, limit: int) -> Completion:
    """The completion of a request whose prompt leaves no room for an answer."""
    message = f"The prompt has {tokens} tokens; {limit} fit."
    return Completion(request.id, "", "error", prompt_tokens=tokens, error=message)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one shorter."""
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])


def prompt_text(tokenizer: Any, prompt: str) -> str:
    """The text that a local model reads: the prompt in the tokenizer's chat template, if it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids of `prompt_text`; the template writes its special tokens itself."""
    templated = bool(getattr(tokenizer, "chat_template", None))
    return list(tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=not templated)["input_ids"])
