"""A causal language model of random weights, its greedy answers token by token, and vLLM's offline API around it.

As vLLM's, `generate` returns one output for each prompt, in their order, and refuses prompts that are too long.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modular_star_encoder.synthconl.translation import PROMPT

__version__ = "0.33.0"
TEMPLATE = "{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}<assistant>"
CODE = "def add(first, second):\n    return first + second\n\nfunc Add(a int, b int) int {\n\treturn a + b\n}\n"


def save_stand_in(folder: Path, positions: int) -> Path:
    """Write a checkpoint. A tenth of the tokens end a text, so that some texts end before they are cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<user>", "<end>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((PROMPT, CODE), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2, *range(100, 100 + len(fast) // 10)]
    # As Qwen's checkpoints have, and stronger: what a greedy back end must not follow.
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=9.0)
    model.save_pretrained(folder)
    return folder


class Oracle:
    """What a checkpoint's greedy answer is, token by token and one prompt at a time, without `generate`."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self._model = LlamaForCausalLM.from_pretrained(folder).eval()
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self._max_tokens = max_tokens
        self.answer_tokens = cache(self._answer_tokens)

    def answer(self, prompt: str) -> tuple[str, str, int, int]:
        """Text, finish reason, tokens of the prompt, tokens written."""
        # The chat template, written out.
        prompt = f"<user>{prompt}<end><assistant>"
        return self.answer_tokens(tuple(self._tokenizer(prompt, add_special_tokens=False)["input_ids"]))

    @torch.inference_mode()
    def _answer_tokens(self, prompt: tuple[int, ...]) -> tuple[str, str, int, int]:
        written: list[int] = []
        ends = self._model.generation_config.eos_token_id
        while len(written) < self._max_tokens and not (written and written[-1] in ends):
            written.append(int(self._model(torch.tensor([[*prompt, *written]])).logits[0, -1].argmax()))
        stopped = written[-1] in ends
        text = self._tokenizer.decode(written[:-1] if stopped else written, skip_special_tokens=True)
        return text, "stop" if stopped else "length", len(prompt), len(written)


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int


class LLM:
    def __init__(self, model: str, *, max_model_len: int, **options: Any) -> None:
        known = {"revision", "dtype", "seed", "tensor_parallel_size", "gpu_memory_utilization", "enable_prefix_caching"}
        assert options.keys() <= known
        if not Path(model, "config.json").is_file():
            raise ValueError(f"No model config found in {model!r}.\nMore lines follow.")
        self._model, self._longest = model, max_model_len

    def get_tokenizer(self) -> Any:
        return PreTrainedTokenizerFast.from_pretrained(self._model)

    def generate(self, prompts: list[dict[str, Any]], sampling_params: SamplingParams, *, use_tqdm: bool) -> list[Any]:
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
