"""Models that embed texts, behind one protocol: ours at all exits, and whatever sentence-transformers loads."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.inference.embedding_cache import Prompted
from modular_star_encoder.inference.encode import encode_exits


class ExitEncoder:
    """A `ModularStarEncoderForRetrieval`, whose exits all come from one pass.

    Sizes of nested embeddings are those that the configuration names (`nested_dimensions`), if it names any.

    Args:
        model, tokenizer: as `load_checkpoint` returns them.
        name: as tables show it.
        exit_layers: which exits; all that the model has if None.
        encode_options: go to `encode_exits`: max_length, tokens_per_batch, dtype.

    Raises:
        ValueError: an exit that the model doesn't have.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        name: str,
        *,
        exit_layers: Sequence[int] | None = None,
        **encode_options: Any,
    ) -> None:
        config = model.config
        self.model, self.tokenizer, self.name, self._options = model, tokenizer, name, encode_options
        self.exit_layers = config.resolve_exits(exit_layers=config.exit_layers if exit_layers is None else exit_layers)
        nested = sorted({*(getattr(config, "nested_dimensions", None) or ()), config.projection_size}, reverse=True)
        self.dimensions = tuple(nested) if len(nested) > 1 else (None,)
        settings = {name: str(value) for name, value in encode_options.items() if name != "tokens_per_batch"}
        self.fingerprint = weights_fingerprint(model, tokenizer, config.to_json_string(), settings)

    def untrained(self, seed: int = 0) -> ExitEncoder:
        """The same architecture with fresh weights: what the wording of texts gives away by itself."""
        parameter = next(self.model.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(self.model)(self.model.config).to(device=parameter.device, dtype=parameter.dtype)
        name = f"{self.name}, untrained"
        return ExitEncoder(model, self.tokenizer, name, exit_layers=self.exit_layers, **self._options)

    def prompt(self, text: Text) -> str:
        """The published instruction, if the model was fine-tuned with instructions."""
        instructions = self.model.config.instruction_prompts
        if text.language is None:
            return text_prompt(instructions=instructions)
        return code_prompt(text.language, instructions=instructions)

    def encode(
        self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True
    ) -> Mapping[int | None, np.ndarray]:
        """See `Encoder`."""
        prompted = [prompt + text for prompt, text in texts]
        options = {"exit_layers": exit_layers, "progress": progress, **self._options}
        return encode_exits(self.model, self.tokenizer, prompted, **options)


class SentenceTransformerEncoder:
    """A SentenceTransformer, or any encoder of transformers, which sentence-transformers pools by the mean.

    Prose gets the model's prompt `query` and code its prompt `document`, where it has them.

    Args:
        model: a `SentenceTransformer`.
        name: as tables show it.
        batch_size: texts per batch.
    """

    exit_layers: tuple[int | None, ...] = (None,)
    dimensions: tuple[int | None, ...] = (None,)

    def __init__(self, model: Any, name: str, *, batch_size: int = 32) -> None:
        self.model, self.name, self._batch_size = model, name, batch_size
        settings = {"modules": str(model), "max_seq_length": model.max_seq_length}
        self.fingerprint = weights_fingerprint(model, model.tokenizer, json.dumps(model.prompts), settings)

    def prompt(self, text: Text) -> str:
        """The prompt `query` or `document`."""
        return self.model.prompts.get("query" if text.language is None else "document") or ""

    def encode(
        self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True
    ) -> Mapping[int | None, np.ndarray]:
        """See `Encoder`; texts of one prompt go together, since some models don't pool over the prompt."""
        embeddings: np.ndarray | None = None
        order = sorted(range(len(texts)), key=lambda row: texts[row][0])
        for prompt, group in groupby(order, key=lambda row: texts[row][0]):
            rows = list(group)
            part = self.model.encode(
                [texts[row][1] for row in rows],
                prompt=prompt,
                batch_size=self._batch_size,
                show_progress_bar=progress,
                convert_to_numpy=True,
            )
            if embeddings is None:
                embeddings = np.empty((len(texts), part.shape[1]), dtype=np.float32)
            embeddings[rows] = part
        return {None: np.empty((0, 1), dtype=np.float32) if embeddings is None else embeddings}


def weights_fingerprint(model: torch.nn.Module, tokenizer: Any, config: str, settings: Mapping[str, Any]) -> str:
    """A hash of what a model's embeddings depend on: weights and their types, configuration, tokenizer, settings.

    The device isn't in it: embeddings made on a GPU serve on a CPU, to which they are equal up to rounding.
    """
    digest = hashlib.blake2b(json.dumps([config, settings], sort_keys=True, default=str).encode(), digest_size=20)
    digest.update(_tokenizer_state(tokenizer).encode(errors="surrogatepass"))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_state(tokenizer: Any) -> str:
    """All that decides about token ids, without the truncation and padding that its last call has left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy.to_str()


OPENAI_URL = "https://api.openai.com/v1"
_RETRIED = {408, 409, 429, 500, 502, 503, 504}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class EndpointEncoder:
    """A model behind an OpenAI-compatible endpoint, such as text-embedding-3-large.

    The key is read from the environment when a request is made; it is never kept, shown or logged.

    Args:
        model: the name that the endpoint knows.
        base_url: without `/embeddings`.
        key_variable: the environment variable that holds the key; without one, requests carry none.
        batch_size: texts per request.
        max_characters: longer texts are cut, since endpoints refuse what is longer than their model reads.
        retries: how often a request is repeated after an overloaded or unreachable server, after 1, 2, 4 … seconds or
            what the server asks for.
        timeout: seconds per request.

    Raises:
        ValueError: `base_url` is no http or https address.
    """

    exit_layers: tuple[int | None, ...] = (None,)
    dimensions: tuple[int | None, ...] = (None,)

    def __init__(
        self,
        model: str,
        base_url: str = OPENAI_URL,
        *,
        key_variable: str = "OPENAI_API_KEY",
        batch_size: int = 128,
        max_characters: int = 16_000,
        retries: int = 6,
        timeout: float = 120.0,
    ) -> None:
        if not base_url.startswith(("https://", "http://")):
            raise ValueError(f"{base_url!r} is no address of an endpoint: it must begin with https:// or http://.")
        self.name, self.base_url = model, base_url.rstrip("/")
        self.key_variable, self.batch_size, self.max_characters = key_variable, batch_size, max_characters
        self.retries, self.timeout = retries, timeout
        identity = json.dumps([model, self.base_url, max_characters])
        self.fingerprint = "endpoint-" + hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._opener = urllib.request.build_opener(_NoRedirects)

    def prompt(self, text: Text) -> str:
        """None: such endpoints take the text alone."""
        return ""

    def encode(
        self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True
    ) -> Mapping[int | None, np.ndarray]:
        """See `Encoder`.

        Raises:
            ValueError: the endpoint refuses, or answers with something that isn't one embedding per text.
            OSError: it can't be reached, or stays overloaded.
        """
        # Endpoints refuse empty inputs.
        inputs = [(prompt + text)[: self.max_characters] or " " for prompt, text in texts]
        batches = range(0, len(inputs), self.batch_size)
        parts = [
            self._embed(inputs[start : start + self.batch_size])
            for start in tqdm(batches, desc=self.name, unit="request", disable=not progress, leave=False)
        ]
        return {None: np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.float32)}

    def _embed(self, inputs: list[str]) -> np.ndarray:
        answer = self._post({"model": self.name, "input": inputs, "encoding_format": "float"})
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            if [row["index"] for row in rows] != list(range(len(inputs))):
                raise ValueError
            return np.array([row["embedding"] for row in rows], dtype=np.float32).reshape(len(inputs), -1)
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{self.base_url} did not answer with one embedding for each of {len(inputs)} texts."
            ) from None

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable, "").strip()  # files of keys end in a newline
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{self.key_variable} holds characters that no key has.")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            f"{self.base_url}/embeddings", json.dumps(body).encode(), headers
        )
        for attempt in range(self.retries + 1):
            pause = float(2**attempt)
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code not in _RETRIED:
                    raise ValueError(
                        f"{self.base_url} refuses with status {error.code}: {_reason(error, key)}"
                    ) from None
                failure, asked = f"status {error.code}", error.headers.get("Retry-After", "")
                pause = min(float(asked), 60.0) if asked.isdecimal() else pause
            except ValueError:
                raise ValueError(f"{self.base_url} did not answer with JSON.") from None
            except (OSError, http.client.HTTPException) as error:
                failure = type(error).__name__ if not str(error) else str(error)
            if attempt < self.retries:
                time.sleep(pause)
        raise OSError(f"{self.base_url} gave no embeddings after {self.retries + 1} attempts ({failure}).")


def _reason(error: urllib.error.HTTPError, key: str) -> str:
    """The server's message, without what is or looks like a key."""
    try:
        message = str(json.loads(error.read(4096))["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return "no reason given"
    words = ["…" if "sk-" in word or (key and key in word) else word for word in message.split()]
    return " ".join(words)[:300]


class Text(NamedTuple):
    """A text to embed: prose, or code in a programming language ("python", "c++", "c#", …)."""

    text: str
    language: str | None = None
