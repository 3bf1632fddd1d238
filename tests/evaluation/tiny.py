"""A retrieval model and tokenizer small enough to build in every test."""

from pathlib import Path

import torch

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.data.tokenizer import train_tokenizer
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval

EXIT_LAYERS = (1, 2, 4)
PROJECTION_SIZE = 16


def tiny_tokenizer():
    texts = [text_prompt(), code_prompt("python"), "def add(first, second):\n    return first + second\n"]
    return train_tokenizer(texts, 300, progress=False)


def tiny_model(vocab_size=300):
    torch.manual_seed(0)
    config = ModularStarEncoderConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        exit_layers=EXIT_LAYERS,
        projection_size=PROJECTION_SIZE,
        pad_token_id=0,
    )
    return ModularStarEncoderForRetrieval(config)


def save_tiny_checkpoint(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
