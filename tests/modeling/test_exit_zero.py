"""Exit 0, which runs no layer; linear heads; and means weighted by a learned number for each token."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderConfig
from tests.tiny import tiny_batch, tiny_model, tiny_tokenizer

EXITS = (0, 1, 2, 4)
OPTIONS = {
    "exit_layers": EXITS,
    "exit_norm": "none",
    "projection_head": "linear",
    "projection_order": "pool_then_project",
    "token_weights": True,
}


@pytest.fixture
def model():
    model = tiny_model(**OPTIONS).eval()
    weights = torch.rand(model.config.vocab_size, 1, generator=torch.Generator().manual_seed(2))
    model.model.token_weights.weight.data = weights
    return model


def embeddings(model, batch=None, **kwargs):
    with torch.no_grad():
        return model(**(batch or tiny_batch()), exit_layers=EXITS, **kwargs).exit_embeddings


def test_exit_zero_is_the_weighted_mean_of_the_token_table_through_its_head(model):
    batch = tiny_batch()
    table, weights = model.model.embed_tokens.weight, model.model.token_weights.weight
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        ids = ids[mask.bool()]
        mean = (weights[ids] * table[ids]).sum(0) / weights[ids].sum()
        expected = torch.nn.functional.normalize(model.projection_heads["0"].dense(mean), dim=0)
        assert torch.allclose(embeddings(model)[0, row], expected, atol=1e-6)


def test_exit_zero_runs_no_layer(model):
    for layer in model.model.layers:
        layer.forward = None
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch(), exit_layer=0).sentence_embedding.isfinite().all(), torch.tensor(True))
        with pytest.raises(TypeError):
            model(**tiny_batch(), exit_layer=1)


@pytest.mark.parametrize("exit_layer", EXITS)
def test_a_slice_equals_its_exit_bit_for_bit(model, exit_layer, tmp_path):
    whole = embeddings(model)[EXITS.index(exit_layer)]
    part = model.slice(exit_layer)
    assert part.config.num_hidden_layers == exit_layer
    part.save_pretrained(tmp_path / "slice")
    model.save_pretrained(tmp_path / "whole")
    loaded = AutoModel.from_pretrained(tmp_path / "slice")
    cut = AutoModel.from_pretrained(tmp_path / "whole", exit_layer=exit_layer)
    with torch.no_grad():
        for other in (part, loaded, cut):
            assert torch.equal(other.eval()(**tiny_batch()).sentence_embedding, whole)


def test_padding_packing_and_unpadding_change_nothing(model):
    expected = embeddings(model)
    assert torch.allclose(embeddings(model, tiny_batch("right")), expected, atol=1e-6)
    batch = tiny_batch()
    real = batch["attention_mask"].bool()
    bounds = torch.nn.functional.pad(batch["attention_mask"].sum(1).cumsum(0), (1, 0))
    packed = {"input_ids": batch["input_ids"][real][None], "cu_seq_lens_q": bounds}
    assert torch.allclose(embeddings(model, packed), expected, atol=1e-6)
    model.config.unpad_inputs = True
    assert torch.allclose(embeddings(model), expected, atol=1e-6)


def test_token_weights_learn_and_begin_at_one():
    model = tiny_model(**OPTIONS)
    assert (model.model.token_weights.weight == 1).all()
    model(**tiny_batch(), exit_layers=EXITS).exit_embeddings[:, 0, 0].sum().backward()
    assert model.model.token_weights.weight.grad.abs().sum() > 0


def test_weights_need_the_ids_of_tokens_also_beside_their_vectors(model):
    batch = tiny_batch()
    vectors = {"inputs_embeds": model.model.embed_tokens(batch["input_ids"]), "attention_mask": batch["attention_mask"]}
    with pytest.raises(ValueError, match="input_ids"):
        model(**vectors, exit_layer=0)
    assert torch.equal(embeddings(model, {**vectors, "input_ids": batch["input_ids"]}), embeddings(model))


@pytest.mark.slow
def test_stock_modules_of_sentence_transformers_give_the_model_s_embeddings(model, tmp_path):
    from sentence_transformers import SentenceTransformer

    tokenizer = tiny_tokenizer()
    save_retrieval_checkpoint(model, tokenizer, tmp_path / "model")
    texts = ["def add(first, second): return first", "add"]
    sentence_transformer = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")
    expected = embeddings(model, dict(tokenizer(texts, padding=True, return_tensors="pt")))
    for row, exit_layer in enumerate(EXITS):
        found = sentence_transformer.encode(texts, exit_layer=exit_layer)
        assert np.abs(found - expected[row].numpy()).max() < 1e-6


def test_the_published_models_have_none_of_these():
    config = ModularStarEncoderConfig()
    assert (config.projection_head, config.token_weights, config.exit_layers[0]) == ("mlp", False, 4)
