"""Completions from `transformers`' own generation, in this process: slow, and everywhere."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modular_star_encoder.data.in_context import pad_inputs
from modular_star_encoder.synthconl.completions import BackendError, Completion, CompletionRequest, tokenized
from modular_star_encoder.synthconl.row_files import batches

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


class VLLMBackend:
    """Hands batches of prompts to the engine, which schedules them itself.

    Attributes:
        in_flight: `batch_size`.
    """

    def __init__(
        self,
        model: str,
        max_tokens: int,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 1024,
        max_model_len: int = 8192,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the settings; the engine starts when the first request comes.

        Args:
            model: Folder or Hub id of the model.
            max_tokens: Largest number of tokens of an answer.
            revision: Branch, tag or commit on the Hub.
            dtype: Of the weights; `"auto"` is that of the checkpoint.
            batch_size: Number of prompts handed over at once. The engine idles a little at the end of each batch, so
                that small ones are slow; a batch is lost when the process is killed.
            max_model_len: Longest prompt and answer together, in tokens.
            tensor_parallel_size: Number of GPUs that share the model.
            gpu_memory_utilization: Share of a GPU's memory that the engine takes.
            engine: More arguments of `vllm.LLM`, such as `quantization`.

        Raises:
            ValueError: If a setting is out of range.
            ImportError: If vLLM isn't installed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if max_model_len <= max_tokens:
            raise ValueError(f"max_model_len {max_model_len} must be more than max_tokens, which is {max_tokens}.")
        self._name, self._max_tokens, self._longest_prompt = model, max_tokens, max_model_len - max_tokens
        self._options = {"revision": revision, "dtype": dtype, "max_model_len": max_model_len}
        self._options |= {"tensor_parallel_size": tensor_parallel_size}
        self._options |= {"gpu_memory_utilization": gpu_memory_utilization, **(engine or {})}
        self._vllm = _vllm()
        self.in_flight = batch_size

    def complete(self, requests: Iterable[CompletionRequest]) -> Iterator[Completion]:
        """See `CompletionBackend`."""
        for batch in batches(requests, self.in_flight):
            rows, errors = tokenized(batch, self._tokenizer, self._longest_prompt)
            yield from errors
            if rows:
                yield from self._generate(rows)

    def describe(self) -> dict[str, Any]:
        """The model, its revision and dtype as asked for, and the version of vLLM."""
        return {
            "backend": "vllm",
            "model": self._name,
            "revision": self._options["revision"],
            "dtype": self._options["dtype"],
            "vllm": getattr(self._vllm, "__version__", "unknown"),
        }

    @cached_property
    def _engine(self) -> Any:
        # The instruction opens every prompt: with prefix caching it is computed once.
        options = {"seed": 0, "enable_prefix_caching": True} | self._options
        try:
            return self._vllm.LLM(model=self._name, **options)
        except (OSError, ValueError, TypeError) as error:
            first_line = str(error).strip().partition("\n")[0].rstrip(".")
            raise BackendError(f"vLLM can't load the model {self._name!r}: {first_line}.") from error

    @cached_property
    def _tokenizer(self) -> Any:
        return self._engine.get_tokenizer()

    def _generate(self, rows: list[tuple[CompletionRequest, list[int]]]) -> Iterator[Completion]:
        greedy = self._vllm.SamplingParams(temperature=0.0, max_tokens=self._max_tokens)
        prompts = [{"prompt_token_ids": ids} for _, ids in rows]
        # `generate` returns the outputs in the order of the prompts.
        outputs = self._engine.generate(prompts, greedy, use_tqdm=False)
        for (request, ids), output in zip(rows, outputs, strict=True):
            if list(output.prompt_token_ids) != ids:
                raise BackendError("vLLM returned an answer to another prompt than the one it was given.")
            answer = output.outputs[0]
            yield Completion(request.id, answer.text, answer.finish_reason, len(ids), len(answer.token_ids))


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ImportError("Translating with vLLM needs it: pip install 'modular-star-encoder[vllm]'.") from error
    return vllm
