"""Models that the benchmarks of speed compare, with random weights: time does not depend on what weights are."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import ModernBertConfig, PreTrainedModel, Starcoder2Config

from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval

TOKENS_PER_CHUNK = 1024  # tokens that a compiled MLP processes at once, at least two
HUB_CONFIGS = Path(__file__).parent.parent / "hub_configs"


def random_model(
    model_class: type[PreTrainedModel], config: ModularStarEncoderConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """A model in evaluation mode, initialised as for training, without a float32 copy on the way."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return model_class(config).eval()
    finally:
        torch.set_default_dtype(before)


def shape(name: str, layers: int | None = None, exit_layers: list[int] | None = None) -> ModularStarEncoderConfig:
    """The configuration of a folder of hub_configs/, with another depth if asked for."""
    config = ModularStarEncoderConfig.from_json_file(HUB_CONFIGS / name / "config.json")
    if layers is not None:
        config.num_hidden_layers = layers
        config.exit_layers = exit_layers or [layers]
        config.parent_exit_layers, config.parent_num_hidden_layers = list(config.exit_layers), layers
    config.architectures = [ModularStarEncoderForRetrieval.__name__]
    return config


def save_random_checkpoint(config: ModularStarEncoderConfig, texts: list[str], folder: Path) -> Path:
    """A float32 retrieval checkpoint with a tokenizer trained on these texts."""
    # Imported here: the other helpers also run where only torch and transformers are installed.
    from modular_star_encoder.data.tokenizer import train_tokenizer
    from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint

    tokenizer = train_tokenizer(texts, min(config.vocab_size, 16384), progress=False)
    config.pad_token_id = tokenizer.pad_token_id
    model = random_model(ModularStarEncoderForRetrieval, config, torch.float32)
    return save_retrieval_checkpoint(model, tokenizer, folder)


def compile_for_inference(model: ModularStarEncoderForRetrieval) -> ModularStarEncoderForRetrieval:
    """A copy of `model`, which must be on a CPU, with compiled MLPs, which are faster in bfloat16.

    The copy shares the parameters of `model`, but each compiled MLP has a copy of its weights, which later changes do
    not reach. It runs only in `torch.inference_mode()` without autocast; elsewhere the plain MLP runs. Compiling takes
    a second or more per layer, and may need a C++ compiler.
    """
    compiled = model.slice(model.config.num_hidden_layers).eval()
    for layer in compiled.model.layers:
        # Only an attribute of the instance is set, so that the names of the parameters in saved files do not change.
        layer.mlp.forward = _in_chunks(layer.mlp.forward, _compile(layer.mlp, model))
    return compiled


def _compile(mlp: nn.Module, model: ModularStarEncoderForRetrieval) -> Callable[[torch.Tensor], torch.Tensor]:
    """An MLP's compiled function for two or more tokens; later changes of the weights do not reach it."""
    import torch._dynamo.config
    import torch._inductor.config

    # All layers share one function, so torch counts compiling each layer as recompiling it, and has a limit for this.
    limits = torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
    compiled = torch.compile(mlp.forward, dynamic=True, fullgraph=True)
    # Two lengths: at the first, torch compiles for this length only; at the second, it compiles for any length.
    with limits, torch._inductor.config.patch(freezing=True), torch.inference_mode():
        for tokens in (64, 96):
            compiled(torch.zeros(tokens, model.config.hidden_size, dtype=model.dtype))
    return compiled


def _in_chunks(
    plain: Callable[[torch.Tensor], torch.Tensor], compiled: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that runs `compiled` on chunks of tokens, or `plain` under autocast or with gradients."""

    def forward(states: torch.Tensor) -> torch.Tensor:
        flat = states.flatten(0, -2)
        if not torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or len(flat) < 2:
            return plain(states)
        # Parts of about equal length, because a short last part would be slow.
        parts = flat.tensor_split(-(-len(flat) // TOKENS_PER_CHUNK))
        outputs = [compiled(part) for part in parts]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view_as(states)

    return forward


class MatmulPeak:
    """The most floating-point operations per second that torch's matrix product reaches in bfloat16, of three sizes."""

    SIZES = (1024, 2048, 4096)

    def __init__(self) -> None:
        self.best = 0.0
        self._factors = [[torch.randn(size, size).bfloat16() for _ in range(2)] for size in self.SIZES]

    def measure(self) -> None:
        """One product of each size."""
        for left, right in self._factors:
            start = time.perf_counter()
            left @ right
            self.best = max(self.best, 2 * len(left) ** 3 / (time.perf_counter() - start))


def starcoder2_config(config: ModularStarEncoderConfig) -> Starcoder2Config:
    """The same dimensions."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "hidden_act", "max_position_embeddings", "norm_epsilon", "use_bias")
    values = {name: getattr(config, name) for name in names}
    return Starcoder2Config(
        **values, rope_parameters=dict(config.rope_parameters), sliding_window=None, bos_token_id=0, eos_token_id=0
    )


def modernbert_config(config: ModularStarEncoderConfig) -> ModernBertConfig:
    """The same width and depth, and MLPs (three matrices) that make a layer's matrices as large as ours."""
    hidden = config.hidden_size
    key_value = config.num_key_value_heads * config.head_dim
    ours = 2 * hidden * config.intermediate_size + 2 * hidden * hidden + 2 * hidden * key_value
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    return ModernBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        intermediate_size=round((ours - 4 * hidden * hidden) / (3 * hidden)),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        **special,
    )
