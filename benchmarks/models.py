"""Models that the benchmarks of speed compare, with random weights: time does not depend on what weights are."""

import copy
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modular_star_encoder.data.tokenizer import train_tokenizer
from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval
from modular_star_encoder.training.recipes import load_config


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
    config = copy.deepcopy(load_config(name))
    if layers is not None:
        config.num_hidden_layers = layers
        config.exit_layers = exit_layers or [layers]
        config.parent_exit_layers, config.parent_num_hidden_layers = list(config.exit_layers), layers
    config.architectures = [ModularStarEncoderForRetrieval.__name__]
    return config


def save_random_checkpoint(config: ModularStarEncoderConfig, texts: list[str], folder: Path) -> Path:
    """A float32 retrieval checkpoint with a tokenizer trained on these texts."""
    tokenizer = train_tokenizer(texts, min(config.vocab_size, 16384), progress=False)
    config.pad_token_id = tokenizer.pad_token_id
    model = random_model(ModularStarEncoderForRetrieval, config, torch.float32)
    return save_retrieval_checkpoint(model, tokenizer, folder)


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
