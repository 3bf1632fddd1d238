"""Back ends that complete prompts: any endpoint of OpenAI's protocol, and transformers in this process.

A request carries the id of its row, and its completion returns with that id: completions are never matched by their
text or their position. Nothing here imports torch before the first request.
"""

import operator
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field as Constraint
from pydantic import ValidationError, validate_call

from modular_star_encoder.synthconl.row_files import batches
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.http import (
    HTTPClient,
    HTTPRequestError,
    Response,
    check_url,
    token_from_environment,
    url_host,
)
from modular_star_encoder.utils.settings import Count, NonNegative, Positive

ERROR, TOO_LONG = "error", "too_long"
_LARGEST_ANSWER = 2**24  # bytes
_BATCHES_SORTED_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A prompt to complete, and the id by which its completion is recognised."""

    id: str  # of its row
    prompt: str  # the user's message, without a chat template


@dataclass(frozen=True, slots=True)
class Completion:
    """A model's answer to one request."""

    id: str  # id of the request
    text: str  # the answer
    finish_reason: str  # a word of OpenAI's protocol; `TOO_LONG` for a prompt without room for an answer; or `ERROR`
    prompt_tokens: int = 0  # chat template included; 0 if an endpoint does not report it
    completion_tokens: int = 0  # the final token included; 0 if an endpoint does not report it
    error: str = ""  # why the request failed; empty otherwise


class CompletionBackend(Protocol):
    """A language model that completes prompts greedily, in this process or on a server."""

    in_flight: int  # the largest number of pending requests; a kill of the process loses at most these
    run_options: ClassVar[frozenset[str]]  # options that do not change the answers, up to rounding

    def complete(self, requests: Iterable[CompletionRequest]) -> Generator[Completion]:
        """Yield one completion for each request, in any order, as soon as it arrives.

        At most `in_flight` requests are taken from the iterable before their completions are yielded. A UserError, such
        as for a wrong key or an endpoint that is down, means that no further request can be answered.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return names and versions of software and model for a dataset's card; call it after the first completion."""
        ...


class OpenAIBackend(CompletionBackend):
    """Let a server with OpenAI's chat protocol complete prompts: vLLM, SGLang, llama.cpp, Ollama or a hosted service.

    A request that temporarily fails is sent again (see `HTTPClient`); a failure that every further request would repeat
    stops the run. Source of the protocol: OpenAI's API reference, `POST /chat/completions`.

    Args:
        model, max_tokens, revision: See `open_backend`; `revision` is only shown in the dataset's card.
        base_url: Address of the API, such as `http://127.0.0.1:8000/v1`.
        api_key_variable: Environment variable with the API key; None for an endpoint that needs none.
        concurrency, attempts, pause, timeout: See `HTTPClient`.
        body: Fields that are added to the body of every request or replaced in it, such as
            `{"repetition_penalty": 1.0}`; a field with the value None is not sent.
    """

    run_options = frozenset({"base_url", "api_key_variable", "concurrency", "attempts", "pause", "timeout"})

    @validate_call
    def __init__(
        self,
        model: str,
        max_tokens: int,
        *,
        base_url: str,
        revision: str | None = None,
        api_key_variable: str | None = None,
        concurrency: Annotated[Count, Constraint(le=1000)] = 16,
        attempts: Annotated[Count, Constraint(le=100)] = 6,
        pause: NonNegative = 1.0,
        timeout: Positive = 300.0,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        if fixed := sorted({"messages", "model", "n", "stream"} & set(body or {})):
            raise UserError("synthconl.backend.body", f"`body` must not set {', '.join(fixed)}; remove it.")
        http: dict[str, Any] = {"concurrency": concurrency, "attempts": attempts, "pause": pause, "timeout": timeout}
        self._url = check_url(base_url) + "/chat/completions"
        http |= {"token": token_from_environment(api_key_variable), "total_time": attempts * (timeout + 60)}
        http["max_bytes"] = _LARGEST_ANSWER
        self._open_client = partial(HTTPClient, **http)
        self._model, self._revision, self.in_flight = model, revision, concurrency
        body = {"model": model, "temperature": 0, "max_tokens": max_tokens} | dict(body or {})
        self._body = {name: value for name, value in body.items() if value is not None}
        self._served: set[str] = set()

    def complete(self, requests: Iterable[CompletionRequest]) -> Generator[Completion]:
        """See `CompletionBackend`; before an error is raised, the completions of all pending requests are yielded."""
        failure: UserError | None = None
        asked: dict[Future[Response], CompletionRequest] = {}
        remaining = iter(requests)
        with self._open_client() as client:
            while True:
                while not failure and len(asked) < self.in_flight and (request := next(remaining, None)):
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
        """See `CompletionBackend`; `served` lists the model names that the server has put into its answers."""
        served = sorted(self._served)
        return {"backend": "openai", "model": self._model, "revision": self._revision, "served": served}

    def _completion(self, request: CompletionRequest, future: "Future[Response]") -> Completion:
        try:
            content = future.result().json()
        except HTTPRequestError as error:
            if error.status in (400, 413, 422):  # the fault may be this prompt's
                too_long = re.search(r"context[ _](?:length|size|window)", error.text, re.IGNORECASE)
                return Completion(request.id, "", TOO_LONG if too_long else ERROR, error=error.reason)
            raise UserError(error.key, f"Model {self._model!r}: {error}") from error
        try:
            choice = content["choices"][0]
            message, usage = choice["message"], content.get("usage") or {}
            text, refusal = message.get("content") or "", message.get("refusal")
            reason = "content_filter" if refusal and not text else choice.get("finish_reason") or "stop"
            asked, written = (operator.index(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
            if not 0 <= min(asked, written) <= max(asked, written) < 2**32:
                raise ValueError("no numbers of tokens")
            self._served.add(str(content.get("model") or self._model))
        except (TypeError, LookupError, AttributeError, ValueError):
            message = f"{url_host(self._url)} does not answer in OpenAI's chat protocol; check `base_url`."
            raise UserError("synthconl.backend.protocol", message) from None
        return Completion(request.id, str(text), str(reason), asked, written)


def _is_an_error(response: Response) -> bool:  # with status 200, as some gateways send
    content = response.json()
    return isinstance(content, dict) and "choices" not in content and "error" in content


class TransformersBackend(CompletionBackend):
    """Complete prompts with transformers in this process: slow, but it runs everywhere.

    The prompts of 16 batches at a time are sorted by length; batches are padded on the left.

    Args:
        model, max_tokens, revision: See `open_backend`.
        dtype, attn_implementation: See `AutoModelForCausalLM.from_pretrained`.
        device: Device to run on; by default a GPU if there is one, else the CPU.
    """

    run_options = frozenset({"batch_size", "device"})

    @validate_call
    def __init__(
        self,
        model: str,
        max_tokens: int,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: Count = 8,
        device: str | None = None,
        attn_implementation: str | None = None,
    ) -> None:
        self._name, self._max_tokens, self._batch_size, self._device = model, max_tokens, batch_size, device
        self._options = {"revision": revision, "dtype": dtype, "attn_implementation": attn_implementation}
        self.in_flight = batch_size * _BATCHES_SORTED_TOGETHER

    def complete(self, requests: Iterable[CompletionRequest]) -> Generator[Completion]:
        """See `CompletionBackend`."""
        for window in batches(requests, self.in_flight):
            model, tokenizer = self._loaded
            positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
            longest = positions - self._max_tokens
            if longest <= 0:
                fault = (
                    f"max_tokens={self._max_tokens} must be below {positions}, the context length of {self._name!r}."
                )
                raise UserError("synthconl.backend.max_tokens", fault)
            rows = []
            for request in window:
                messages = [{"role": "user", "content": request.prompt}]
                if tokenizer.chat_template:
                    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
                else:
                    tokens = tokenizer(request.prompt)
                rows.append((request, tokens["input_ids"]))
            # The longest come first: a batch that does not fit into memory fails at once.
            rows.sort(key=lambda row: len(row[1]), reverse=True)
            while rows and len(rows[0][1]) > longest:
                request, ids = rows.pop(0)
                fault = f"The prompt has {len(ids)} tokens; at most {longest} are possible."
                yield Completion(request.id, "", TOO_LONG, prompt_tokens=len(ids), error=fault)
            for batch in batches(rows, self._batch_size):
                yield from self._generate(batch)

    def describe(self) -> dict[str, Any]:
        """See `CompletionBackend`."""
        model, _ = self._loaded
        return {
            "backend": "transformers",
            "model": self._name,
            "revision": getattr(model.config, "_commit_hash", None) or self._options["revision"],
            "dtype": str(model.dtype).removeprefix("torch."),
            "transformers": version("transformers"),
            "torch": version("torch"),
        }

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        options = {name: value for name, value in self._options.items() if value is not None}
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self._name, revision=self._options["revision"])
            model: Any = AutoModelForCausalLM.from_pretrained(self._name, **options)
        except (OSError, ValueError, TypeError) as error:
            first_line = str(error).strip().partition("\n")[0].rstrip(".")
            message = f"The model {self._name!r} can't be loaded: {first_line}."
            raise UserError("synthconl.backend.model", message) from error
        model = model.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        ends = model.generation_config.eos_token_id
        # Replace the model's own settings: their penalties and temperatures are not greedy.
        model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._max_tokens,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=tokenizer.pad_token_id or 0,  # attention leaves padding out, so any token will do
        )
        return model, tokenizer

    def _generate(self, batch: list[tuple[CompletionRequest, list[int]]]) -> Iterator[Completion]:
        import torch

        from modular_star_encoder.data.collators import pad_inputs

        model, tokenizer = self._loaded
        settings = model.generation_config
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        inputs = pad_inputs([torch.tensor(ids) for _, ids in batch], settings.pad_token_id, "left")
        width = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            written = model.generate(**{name: rows.to(model.device) for name, rows in inputs.items()})
        for (request, ids), row in zip(batch, written[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            text = str(tokenizer.decode(row[:end], skip_special_tokens=True))
            reason, count = ("length", len(row)) if end is None else ("stop", end + 1)
            yield Completion(request.id, text, reason, len(ids), count)


BackendName = Literal["openai", "transformers"]
BACKENDS: Mapping[BackendName, type[OpenAIBackend | TransformersBackend]] = {
    "openai": OpenAIBackend,
    "transformers": TransformersBackend,
}


def open_backend(name: BackendName, model: str, max_tokens: int, options: Mapping[str, Any]) -> CompletionBackend:
    """Return the back end of this name for a model; it loads or requests nothing before the first prompt.

    Args:
        model: The server's name of the model (back end "openai"), or a folder or Hub id (see the option `revision`).
        max_tokens: Largest number of tokens of an answer.
        options: Further arguments of the back end's class, such as `OpenAIBackend`.
    """
    try:
        return BACKENDS[name](model, max_tokens, **options)
    except ValidationError as error:
        fault = error.errors()[0]
        message = f"`translation.options` of the back end {name!r}: {fault['loc'][-1]}: {fault['msg']}"
        raise UserError("synthconl.backend.options", f"{message}, not {str(fault['input'])[:60]!r}.") from error
