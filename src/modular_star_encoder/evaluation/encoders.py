"""Models that embed texts, behind one protocol: ours at all exits, and whatever sentence-transformers loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.evaluation.embedding_cache import Prompted
from modular_star_encoder.evaluation.encode import encode_exits
from modular_star_encoder.evaluation.tasks import Text


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
