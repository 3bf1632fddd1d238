"""Completions from `transformers`' own generation, in this process: slow, and everywhere."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modular_star_encoder.data.padding import pad_inputs
from modular_star_encoder.dataset.completions import (
    BackendError,
    Completion,
    CompletionRequest,
    batches,
    tokenized,
)

_BATCHES_SORTED_TOGETHER = 16


class TransformersBackend:
    """Generates in batches of prompts of similar length, padded on the left.

    Attributes:
        in_flight: The number of requests that are sorted by length together: 16 batches.
    """

    def __init__(
        self,
        model: str,
        max_tokens: int,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 8,
        device: str | None = None,
        attn_implementation: str | None = None,
    ) -> None:
        """Check the settings; the model is loaded when the first request comes.

        Args:
            model: Folder or Hub id of a causal language model with its tokenizer.
            max_tokens: Largest number of tokens of an answer.
            revision: Branch, tag or commit on the Hub.
            dtype: Of the weights, such as `"bfloat16"`; `"auto"` is that of the checkpoint.
            batch_size: Number of prompts of a batch.
            device: Where to run; a GPU if there is one.
            attn_implementation: Attention to use; transformers' default for the model.

        Raises:
            ValueError: If a setting is out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        self._name, self._max_tokens, self._batch_size = model, max_tokens, batch_size
        self._options = {"revision": revision, "dtype": dtype, "attn_implementation": attn_implementation}
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.in_flight = batch_size * _BATCHES_SORTED_TOGETHER

    def complete(self, requests: Iterable[CompletionRequest]) -> Iterator[Completion]:
        """See `CompletionBackend`."""
        for window in batches(requests, self.in_flight):
            rows, errors = tokenized(window, self._tokenizer, self._longest_prompt)
            yield from errors
            # The longest first: what does not fit into memory shows at once.
            rows.sort(key=lambda row: len(row[1]), reverse=True)
            for batch in batches(rows, self._batch_size):
                yield from self._generate(batch)

    def describe(self) -> dict[str, Any]:
        """The model, its commit on the Hub if it came from there, its dtype, and the versions of the software."""
        return {
            "backend": "transformers",
            "model": self._name,
            "revision": getattr(self._model.config, "_commit_hash", None) or self._options["revision"],
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = _load(AutoTokenizer, self._name, revision=self._options["revision"], padding_side="left")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise BackendError(f"The tokenizer of {self._name!r} has neither a padding nor an end token.")
        return tokenizer

    @cached_property
    def _model(self) -> PreTrainedModel:
        options = {name: value for name, value in self._options.items() if value is not None}
        model = _load(AutoModelForCausalLM, self._name, **options).to(self._device).eval()
        ends = model.generation_config.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        # In place of the model's own settings: their penalties and temperatures would not be greedy.
        model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._max_tokens,
            eos_token_id=ends,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        return model

    @cached_property
    def _longest_prompt(self) -> int:
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return 2**31
        if positions <= self._max_tokens:
            raise BackendError(f"{self._name!r} has {positions} positions: max_tokens must be fewer.")
        return positions - self._max_tokens

    def _generate(self, batch: list[tuple[CompletionRequest, list[int]]]) -> Iterator[Completion]:
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        inputs = pad_inputs([torch.tensor(ids) for _, ids in batch], self._tokenizer.pad_token_id, "left")
        width = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            written = self._model.generate(**{name: rows.to(self._device) for name, rows in inputs.items()})
        for (request, ids), row in zip(batch, written[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            text = self._tokenizer.decode(row[:end], skip_special_tokens=True)
            reason, count = ("length", len(row)) if end is None else ("stop", end + 1)
            yield Completion(request.id, text, reason, len(ids), count)


def _load(kind: Any, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0].rstrip(".")
        raise BackendError(f"The model {name!r} can't be loaded: {first_line}.") from error
