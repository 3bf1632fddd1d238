"""vLLM's offline API as far as it is used, with a stand-in for the engine.

Signatures and behaviour are those of `vllm.LLM` and `vllm.SamplingParams`: `generate` returns one `RequestOutput` for
each prompt, in their order, and refuses prompts that are longer than `max_model_len`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.synthconl.stand_in import Oracle

__version__ = "0.33.0"


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None


class LLM:
    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        seed: int = 0,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        enable_prefix_caching: bool | None = None,
    ) -> None:
        if not Path(model, "config.json").is_file():
            raise ValueError(f"No model config found in {model!r}.\nMore lines follow.")
        self._model, self._longest = model, max_model_len

    def get_tokenizer(self) -> Any:
        return PreTrainedTokenizerFast.from_pretrained(self._model)

    def generate(
        self, prompts: Sequence[dict[str, Any]], sampling_params: SamplingParams, *, use_tqdm: bool = True
    ) -> list[Any]:
        assert sampling_params.temperature == 0
        oracle = Oracle(self._model, sampling_params.max_tokens)
        outputs = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            if len(ids) >= self._longest:
                raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length.")
            text, reason, _, written = oracle.answer_tokens(tuple(ids))
            answer = SimpleNamespace(index=0, text=text, token_ids=[0] * written, finish_reason=reason)
            outputs.append(SimpleNamespace(request_id="0", prompt_token_ids=ids, outputs=[answer], finished=True))
        return outputs
