"""Completions from vLLM's offline engine, in this process: the fast way on a GPU.

Greedy decoding in vLLM is not deterministic to the last token across batch sizes, unless its environment variable
`VLLM_BATCH_INVARIANT=1` can be used. Source: vLLM's documentation, on reproducibility.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from modular_star_encoder.dataset.completions import (
    BackendError,
    Completion,
    CompletionRequest,
    batches,
    tokenized,
)


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
