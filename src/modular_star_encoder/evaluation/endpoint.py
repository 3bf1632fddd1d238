"""Embeddings from an OpenAI-compatible endpoint: `POST {base_url}/embeddings` with `{"model": …, "input": […]}`."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from modular_star_encoder.evaluation.embedding_cache import Prompted
from modular_star_encoder.evaluation.tasks import Text

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
