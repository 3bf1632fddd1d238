"""One interface to embed texts with a ModularStarEncoder, a SentenceTransformer or an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.data.tokenizer import check_padding
from modular_star_encoder.data.tokenizer_files import check_tokenizer
from modular_star_encoder.inference import check_checkpoint, local_folder, resolve_checkpoint
from modular_star_encoder.inference.checkpoints import check_size, clear_errors, load_checkpoint, refuse_adapter
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import read_json
from modular_star_encoder.utils.http import HTTPClient, check_url, token_from_environment

OPENAI_URL = "https://api.openai.com/v1"
ENDPOINT_PREFIX = "openai:"
MAX_CHARACTERS, TEXTS_PER_REQUEST = 16_000, 128  # longer texts are cut, because endpoints reject too long texts

Prompted = tuple[str, str]  # (prompt, text that follows it)
ByExit = Mapping[int | None, np.ndarray]  # {exit_layer, or None for a model without exits: embeddings (N, D) float32}

_NONE = np.empty((0, 1), dtype=np.float32)


class Text(NamedTuple):
    """A text to embed: prose, or code in a programming language ("python", "c++", "c#", …)."""

    text: str
    language: str | None = None


class Encoder(Protocol):
    """The interface of a model that embeds texts."""

    name: str  # name in tables
    checksum: str  # changes if any embedding may change; key of cached embeddings
    exit_layers: tuple[int | None, ...] = (None,)  # the model's exits; (None,) if it has no exits
    dimensions: tuple[int | None, ...] = (None,)  # sizes to which embeddings can be cut; (None,) if they are not cut

    def prompt(self, text: Text) -> str:
        """Return the prompt to put before a text; empty by default."""
        return ""

    def encode(self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True) -> ByExit:
        """Return {exit_layer: embeddings (N, size) float32} of N pairs (prompt, text), computed in one pass."""


def load_encoder(name: str, exit_layers: Sequence[int] | None = None) -> Encoder:
    """Load a ModularStarEncoder up to the deepest of `exit_layers` (all layers if None), or an encoder without exits.

    `name` is a folder or Hub repository that sentence-transformers can load, or a model of this package. For a model
    behind an endpoint, `name` is `openai:MODEL` or `openai:MODEL@URL`. Raises the errors of `load_checkpoint`, and
    UserError if `exit_layers` are given for an encoder without exits.
    """
    source, is_endpoint = resolve_checkpoint(name), name.startswith(ENDPOINT_PREFIX)
    folder = local_folder(name)
    label = name if folder is None else "/".join(folder.resolve().parts[-2:])
    if not is_endpoint:
        check_checkpoint(name, of_modules=True)
        if _is_ours(source):
            own, tokenizer = load_checkpoint(name, max(exit_layers) if exit_layers else None)
            return ExitEncoder(own, tokenizer, label, exit_layers=exit_layers)
    if exit_layers:
        raise UserError("encoder.no_exits", f"{name} is not a ModularStarEncoder and lacks exits: omit `exit_layers`.")
    if is_endpoint:
        model, _, url = name.removeprefix(ENDPOINT_PREFIX).partition("@")
        return EndpointEncoder(model, url or OPENAI_URL)
    from sentence_transformers import SentenceTransformer

    refuse_adapter(source)
    with clear_errors(source):
        for one in (Path(source), *Path(source).glob("*/")):  # modules may have folders of their own
            check_tokenizer(one)
            if next(one.glob("*.safetensors"), None):
                check_size(_count_parameters(one) // 2, one)  # numbers may have 4 bits, and a decoder may be missing
        theirs = SentenceTransformer(source, trust_remote_code=False, model_kwargs={"use_safetensors": True})
        check_padding(theirs.tokenizer, source)
        return SentenceTransformerEncoder(theirs, label)


def _count_parameters(folder: Path) -> int:
    """Return the number of parameters of a SentenceTransformer's module, computed from config.json in its `folder`."""
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    if "model_type" not in config:
        return config.get("in_features", 0) * config.get("out_features", 0)
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False)).num_parameters()


def _is_ours(source: str) -> bool:
    try:
        return isinstance(AutoConfig.from_pretrained(source, trust_remote_code=False), ModularStarEncoderConfig)
    except (ValueError, OSError):
        # transformers does not know the model type, or config.json is elsewhere, as in old SentenceTransformers.
        return False


class ExitEncoder(Encoder):
    """Embeds texts with a `ModularStarEncoderForRetrieval`; `encode_options` are passed to `encode_exits`."""

    def __init__(
        self,
        model: ModularStarEncoderForRetrieval,
        tokenizer: Any,
        name: str,
        *,
        exit_layers: Sequence[int] | None = None,
        **encode_options: Any,
    ) -> None:
        config = model.config
        self.model, self.tokenizer, self.name, self._options = model, tokenizer, name, encode_options
        self.exit_layers: tuple[int | None, ...] = config.resolve_exits(exit_layers=exit_layers or config.exit_layers)
        nested = sorted({*(getattr(config, "nested_dimensions", None) or ()), config.projection_size}, reverse=True)
        self.dimensions: tuple[int | None, ...] = tuple(nested) if len(nested) > 1 else (None,)
        settings = {name: str(value) for name, value in encode_options.items() if name != "tokens_per_batch"}
        self.checksum = weights_checksum(model, tokenizer, config.to_json_string(), settings)

    def prompt(self, text: Text) -> str:
        """Return the published prompt for `text` (prose or code), with an instruction if the model expects it."""
        options = {"instructions": self.model.config.instruction_prompts}
        return text_prompt(**options) if text.language is None else code_prompt(text.language, **options)

    def encode(self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True) -> ByExit:
        prompted = [prompt + text for prompt, text in texts]
        exits = tuple(exit_layer for exit_layer in exit_layers if exit_layer is not None)
        options = {"exit_layers": exits, "progress": progress, **self._options}
        return dict[int | None, np.ndarray](encode_exits(self.model, self.tokenizer, prompted, **options).items())


class SentenceTransformerEncoder(Encoder):
    """Embeds texts with a SentenceTransformer. A plain model of transformers gets mean pooling."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        settings = {"modules": str(model), "max_seq_length": model.max_seq_length}
        self.checksum = weights_checksum(model, model.tokenizer, json.dumps(model.prompts), settings)

    def prompt(self, text: Text) -> str:
        """Return the model's prompt named "query" for prose or "document" for code; empty if it has no such prompt."""
        return self.model.prompts.get("query" if text.language is None else "document") or ""

    def encode(self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True) -> ByExit:
        # One call per prompt, because some models leave the prompt's tokens out of the mean, and must know the prompt.
        parts, order = [], sorted(range(len(texts)), key=lambda row: texts[row][0])
        for prompt, rows in groupby(order, key=lambda row: texts[row][0]):
            contents = [texts[row][1] for row in rows]
            parts.append(self.model.encode(contents, prompt=prompt, show_progress_bar=progress))
        return {None: np.concatenate(parts)[np.argsort(order)].astype(np.float32) if parts else _NONE}


def weights_checksum(model: torch.nn.Module, tokenizer: Any, config: str, settings: Mapping[str, Any]) -> str:
    """Return a hash, the same on every device, of weights, tokenizer, `config` and `settings`."""
    digest = hashlib.blake2b(json.dumps([config, settings], sort_keys=True, default=str).encode(), digest_size=20)
    digest.update(_tokenizer_state(tokenizer).encode(errors="surrogatepass"))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_state(tokenizer: Any) -> str:
    """Return a tokenizer as JSON, without its truncation and padding, because every call may change these settings."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy.to_str()


class EndpointEncoder(Encoder):
    """Embeds texts with a model behind an OpenAI-compatible endpoint, such as text-embedding-3-large.

    Put the API key in an environment variable: `OPENAI_API_KEY` for OpenAI's address, `MOSE_API_KEY` for any other. So
    a recipe that names a stranger's server does not send your OpenAI key there. The key is never stored, shown or
    logged. `client_options` are arguments of `HTTPClient`.
    """

    def __init__(self, model: str, base_url: str, **client_options: Any) -> None:
        self.name, self.base_url = model, check_url(base_url)
        self._dimensions = 0  # of the first answer's embeddings; all others must have as many
        self._client_options: dict[str, Any] = {"attempts": 7, "timeout": 120.0, **client_options}
        identity = json.dumps([model, self.base_url, MAX_CHARACTERS])
        self.checksum = "endpoint-" + hashlib.sha256(identity.encode()).hexdigest()[:32]

    def encode(self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True) -> ByExit:
        # Endpoints reject empty inputs.
        inputs = [(prompt + text)[:MAX_CHARACTERS] or " " for prompt, text in texts]
        parts, batches = [], range(0, len(inputs), TEXTS_PER_REQUEST)
        variable = "OPENAI_API_KEY" if self.base_url == OPENAI_URL else "MOSE_API_KEY"
        token = token_from_environment(variable, required=False)
        with HTTPClient(token=token, **self._client_options) as client:
            for start in tqdm(batches, desc=self.name, unit="request", disable=not progress, leave=False):
                parts.append(self._embed(client, inputs[start : start + TEXTS_PER_REQUEST]))
        return {None: np.concatenate(parts) if parts else _NONE}

    def _embed(self, client: HTTPClient, inputs: list[str]) -> np.ndarray:
        body = {"model": self.name, "input": inputs, "encoding_format": "float"}
        answer = client.request("POST", f"{self.base_url}/embeddings", body=body).json()
        try:
            rows = {row["index"]: row["embedding"] for row in answer["data"]}
            self._dimensions = self._dimensions or len(rows[0]) or 1
            with np.errstate(over="ignore"):  # callers refuse infinite values
                embeddings = np.array([rows[place] for place in range(len(inputs))], dtype=np.float32)
            return embeddings.reshape(len(inputs), self._dimensions)
        except (KeyError, TypeError, ValueError, OverflowError):
            message = f"{self.base_url} did not return embeddings of one size for {len(inputs)} texts. Check the model."
            raise UserError("encoder.endpoint.answer", message) from None
