"""Attention: bidirectional, blind to padding, the same on every backend."""

import pytest
import torch

from modular_star_encoder.modeling import ModularStarEncoderModel
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model

BACKENDS = ("eager", "sdpa")


def embeddings(backend, batch, **changes):
    model = tiny_model(**changes).eval()
    model.set_attn_implementation(backend)
    with torch.inference_mode():
        return model(**batch, exit_layers=EXIT_LAYERS).exit_embeddings


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_token_sees_the_last(backend):
    model = tiny_model(ModularStarEncoderModel).eval()
    model.set_attn_implementation(backend)
    batch = tiny_batch(lengths=(6,))
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, -1] = (changed["input_ids"][0, -1] + 1) % 300
    with torch.inference_mode():
        before, after = (model(**inputs, exit_layer=1).last_hidden_state[0, 0] for inputs in (batch, changed))
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_on_either_side_or_none_gives_the_same_embeddings(backend, pooling):
    left = embeddings(backend, tiny_batch("left"), pooling=pooling)
    right = embeddings(backend, tiny_batch("right"), pooling=pooling)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
    batch = tiny_batch("right")
    for row, length in enumerate((12, 7, 3)):
        alone = {name: values[row : row + 1, :length] for name, values in batch.items()}
        torch.testing.assert_close(embeddings(backend, alone, pooling=pooling)[:, 0], left[:, row], rtol=0, atol=1e-5)
    # Rows of different texts must differ, or the comparison above would say nothing.
    assert (left[:, 0] - left[:, 1]).abs().max() > 0.1


def test_what_stands_in_the_padding_does_not_matter():
    batch = tiny_batch("left")
    noisy = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 77)}
    torch.testing.assert_close(embeddings("sdpa", batch), embeddings("sdpa", noisy), rtol=0, atol=1e-6)


def test_backends_agree():
    torch.testing.assert_close(embeddings("eager", tiny_batch()), embeddings("sdpa", tiny_batch()), rtol=0, atol=1e-5)


def test_the_poolings_differ():
    assert (embeddings("sdpa", tiny_batch()) - embeddings("sdpa", tiny_batch(), pooling="lasttoken")).abs().max() > 0.1


def test_the_order_of_tokens_matters():
    batch = tiny_batch(lengths=(6,))
    swapped = {**batch, "input_ids": batch["input_ids"].flip(1)}
    assert (embeddings("sdpa", batch) - embeddings("sdpa", swapped)).abs().max() > 1e-2
