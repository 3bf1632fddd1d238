"""Exit 0, which runs no layer; linear heads; the mean of tokens weighted by learned weights."""

import json
from itertools import pairwise

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel

from modular_star_encoder.inference.checkpoints import check_servable, is_servable, save_retrieval_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.modeling import (
    ModularStarEncoderConfig,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderModel,
)
from tests.tiny import VOCAB_SIZE, tiny_batch, tiny_config, tiny_model, tiny_tokenizer

EXITS = (0, 1, 2, 4)
LENGTHS = (12, 7, 3)
FORM = {
    "exit_layers": EXITS,
    "exit_norm": "none",
    "projection_head": "linear",
    "projection_order": "pool_then_project",
    "token_weights": True,
}
NO_DROPOUT = {"attention_dropout": 0, "residual_dropout": 0, "embedding_dropout": 0}


def zero_model(model_class=None, **changes):
    """A model with exit 0 whose tokens weigh differently; one entry of the vocabulary in ten weighs nothing."""
    settings = FORM | changes
    model = tiny_model(**settings) if model_class is None else tiny_model(model_class, **settings)
    weights = getattr(model, "model", model).token_weights
    if weights is not None:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            weights.weight.copy_(torch.rand(VOCAB_SIZE, 1, generator=generator) * 4)
            weights.weight[::10] = 0
    return model.eval()


def run(model, *args, **kwargs):
    with torch.inference_mode():
        return model(*args, **kwargs)


def by_formula(model, ids, states, exit_layer):
    """normalize(W Σ w x / Σ w + b), of one text."""
    head = model.projection_heads[str(exit_layer)].dense
    weights = model.model.token_weights.weight[ids].double()
    mean = (weights * states.double()).sum(0) / weights.sum()
    return nn.functional.normalize(head.weight.double() @ mean + head.bias.double(), dim=0).float()


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_exit_0_is_the_weighted_mean_of_the_token_table_through_its_head():
    model, batch = zero_model(), tiny_batch()
    got = run(model, **batch, exit_layer=0).sentence_embedding
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        ids = ids[mask]
        close(got[row], by_formula(model, ids, model.model.embed_tokens.weight[ids], 0))


def test_deeper_exits_are_pooled_by_the_same_weights():
    model, batch = zero_model(), tiny_batch()
    output = run(model, **batch, exit_layers=EXITS)
    mask = batch["attention_mask"].bool()
    for place, exit_layer in enumerate(EXITS):
        states = output.exit_hidden_states[place]
        for row, ids in enumerate(batch["input_ids"]):
            expected = by_formula(model, ids[mask[row]], states[row][mask[row]], exit_layer)
            close(output.exit_embeddings[place, row], expected)


def test_exit_0_runs_no_layer():
    model, calls = zero_model(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    run(model, **tiny_batch(), exit_layer=0)
    assert not calls
    run(model, **tiny_batch(), exit_layers=(0, 2))
    assert len(calls) == 2


@pytest.mark.parametrize("unpad_inputs", [False, True])
def test_one_pass_gives_every_exit_bit_for_bit(unpad_inputs):
    model = zero_model(unpad_inputs=unpad_inputs)
    together = run(model, **tiny_batch(), exit_layers=EXITS).exit_embeddings
    alone = torch.stack([run(model, **tiny_batch(), exit_layer=exit).sentence_embedding for exit in EXITS])
    assert torch.equal(together, alone)
    assert all(not torch.allclose(first, second, atol=1e-2) for first, second in pairwise(together))


@pytest.mark.parametrize("unpad_inputs", [False, True])
def test_padding_on_either_side_or_none_changes_no_embedding(unpad_inputs):
    left = run(zero_model(), **tiny_batch("left"), exit_layers=EXITS).exit_embeddings
    right = run(zero_model(unpad_inputs=unpad_inputs), **tiny_batch("right"), exit_layers=EXITS).exit_embeddings
    close(left, right)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("exits", [EXITS, (0,)])
def test_packed_texts_equal_padded_ones(rows, exits):
    model, batch = zero_model(), tiny_batch(lengths=LENGTHS)
    expected = run(model, **batch, exit_layers=exits)
    mask = batch["attention_mask"].bool()
    flat = batch["input_ids"][mask].unsqueeze(0).repeat(rows, 1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0).repeat(rows, 1)
    packed = run(model, input_ids=flat, position_ids=positions, exit_layers=exits)
    close(packed.exit_embeddings, expected.exit_embeddings.repeat(1, rows, 1))
    tokens = expected.last_hidden_state[mask].repeat(rows, 1, 1)
    torch.testing.assert_close(packed.last_hidden_state.view_as(tokens), tokens, atol=1e-5, rtol=1e-5)
    if rows == 1:
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        by_bounds = run(model, input_ids=flat, cu_seq_lens_q=bounds, exit_layers=exits)
        close(by_bounds.exit_embeddings, expected.exit_embeddings)


def test_the_plain_mean_of_last_hidden_state_is_the_embedding():
    for order in ("pool_then_project", "project_then_pool"):
        model, batch = zero_model(projection_order=order), tiny_batch()
        for exit_layer in EXITS:
            output = run(model, **batch, exit_layer=exit_layer)
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
            close(nn.functional.normalize(mean, dim=1), output.sentence_embedding)


def test_a_pass_resumes_from_exit_0():
    trunk, batch = zero_model(ModularStarEncoderModel), tiny_batch()
    states = run(trunk, **batch, exit_layer=0, output_residual_states=True).residual_states[0]
    resumed = run(trunk, inputs_embeds=states, attention_mask=batch["attention_mask"], exit_layer=2)
    assert torch.equal(resumed.last_hidden_state, run(trunk, **batch, exit_layer=2).last_hidden_state)
    with pytest.raises(ValueError, match="exits deeper"):
        trunk(inputs_embeds=states, start_layer=1, exit_layers=(0, 2))


@pytest.mark.parametrize("exit_layer", EXITS)
def test_slices_and_cuts_equal_the_full_model_bit_for_bit(tmp_path, exit_layer):
    full = zero_model()
    full.save_pretrained(tmp_path)
    cut, report = AutoModel.from_pretrained(tmp_path, exit_layer=exit_layer, output_loading_info=True)
    assert not any(report.values()), report
    cut.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    expected = run(full, **tiny_batch(), exit_layers=[exit for exit in EXITS if exit <= exit_layer]).exit_embeddings
    for model in (full.slice(exit_layer), cut, again):
        assert len(model.model.layers) == model.config.num_hidden_layers == exit_layer
        assert list(model.projection_heads) == [str(exit) for exit in model.config.exit_layers]
        assert torch.equal(run(model.eval(), **tiny_batch(), exit_layers=model.config.exit_layers)[2], expected)
    assert again.config.parent_num_hidden_layers == 4
    assert list(again.config.parent_exit_layers) == list(EXITS)


def test_the_final_norm_applies_at_exit_0_where_the_configuration_says():
    last = tiny_config(num_hidden_layers=0, exit_layers=(0,), exit_norm="last")
    assert last.has_norm_at(0)
    full = tiny_config(exit_layers=EXITS, exit_norm="last")
    assert not full.has_norm_at(0)
    assert full.cut(0).exit_norm == "none"
    every = zero_model(exit_norm="all")
    with torch.no_grad():
        every.model.norm.bias.fill_(3.0)
    states = run(every, **tiny_batch(), exit_layer=0).exit_hidden_states[0]
    close(states, every.model.norm(every.model.embed_tokens(tiny_batch()["input_ids"])).detach())
    assert torch.equal(run(every.slice(0), **tiny_batch()).exit_hidden_states[0], states)


@pytest.mark.parametrize("unpad_inputs", [False, True])
def test_exit_0_trains_the_table_the_weights_and_its_head_alone(unpad_inputs):
    model = zero_model(unpad_inputs=unpad_inputs, **NO_DROPOUT).train()
    model(**tiny_batch(), exit_layer=0).sentence_embedding[:, 0].sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    head = {"projection_heads.0.dense.weight", "projection_heads.0.dense.bias"}
    assert trained == {"model.embed_tokens.weight", "model.token_weights.weight"} | head
    model(**tiny_batch(), exit_layers=EXITS).exit_embeddings[..., 0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_weight_never_counts_below_zero_and_can_come_back():
    model, batch = zero_model(), tiny_batch()
    token = int(batch["input_ids"][2, -1])
    weight = model.model.token_weights.weight
    with torch.no_grad():
        weight[token] = 0.0
        zero = model(**batch, exit_layer=0).sentence_embedding
        weight[token] = -1.0
        assert torch.equal(model(**batch, exit_layer=0).sentence_embedding, zero)
    embedding = model(**batch, exit_layer=0).sentence_embedding[2]
    directions = []
    for sign in (1, -1):
        weight.grad = None
        (sign * embedding[0]).backward(retain_graph=True)
        directions.append(float(weight.grad[token]))
    # The step that raises the weight is kept, the one that lowers it further is not.
    assert min(directions) < 0.0 == max(directions)


def test_new_weights_are_1_and_give_the_plain_mean():
    torch.manual_seed(0)
    weighted = tiny_model(**FORM).eval()
    assert (weighted.model.token_weights.weight == 1).all()
    plain = tiny_model(**FORM | {"token_weights": False}).eval()
    plain.load_state_dict({n: t for n, t in weighted.state_dict().items() if "token_weights" not in n})
    both = [run(model, **tiny_batch(), exit_layers=EXITS).exit_embeddings for model in (weighted, plain)]
    close(*both)


def test_a_trunk_without_weights_starts_with_the_plain_mean(tmp_path):
    tiny_model(ModularStarEncoderModel, exit_layers=EXITS).save_pretrained(tmp_path)
    changes = {"token_weights": True, "projection_head": "linear"}
    model, report = ModularStarEncoderForRetrieval.from_pretrained(tmp_path, output_loading_info=True, **changes)
    assert "model.token_weights.weight" in report["missing_keys"]
    assert (model.model.token_weights.weight == 1).all()


def test_new_tokens_have_weight_1(tmp_path):
    model = zero_model()
    before = run(model, **tiny_batch(), exit_layer=0).sentence_embedding
    old = model.model.token_weights.weight.detach().clone()
    model.resize_token_embeddings(VOCAB_SIZE + 5, mean_resizing=False)
    assert torch.equal(model.model.token_weights.weight[:VOCAB_SIZE], old)
    assert (model.model.token_weights.weight[VOCAB_SIZE:] == 1).all()
    assert torch.equal(run(model, **tiny_batch(), exit_layer=0).sentence_embedding, before)
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).model.token_weights.weight.shape == (VOCAB_SIZE + 5, 1)
    model.resize_token_embeddings(VOCAB_SIZE - 5)
    assert model.model.token_weights.weight.shape == (VOCAB_SIZE - 5, 1)


def test_embeddings_in_place_of_ids_have_no_weights():
    model = zero_model()
    states = model.model.embed_tokens(tiny_batch()["input_ids"])
    with pytest.raises(ValueError, match="give it input_ids instead of inputs_embeds"):
        model(inputs_embeds=states, exit_layer=0)
    assert zero_model(token_weights=False)(inputs_embeds=states, exit_layer=0).sentence_embedding.shape == (3, 16)


@pytest.mark.parametrize("length", [0, 5])
def test_a_text_without_tokens_embeds_to_zeros(length):
    nothing = torch.zeros(2, length, dtype=torch.long)
    for unpad_inputs in (False, True):
        model = zero_model(unpad_inputs=unpad_inputs)
        output = run(model, input_ids=nothing, attention_mask=nothing, exit_layers=EXITS)
        assert output.exit_embeddings.shape == (4, 2, 16)
        assert not output.exit_embeddings.any()


def test_float16_is_close_to_float32():
    exact = run(zero_model(), **tiny_batch(), exit_layers=EXITS).exit_embeddings
    half = run(zero_model().half(), **tiny_batch(), exit_layers=EXITS).exit_embeddings
    assert half.dtype == torch.float16
    assert nn.functional.cosine_similarity(exact, half.float(), dim=-1).min() > 0.999


@pytest.mark.parametrize("order", ["pool_then_project", "project_then_pool"])
def test_a_saved_model_is_a_sentence_transformer_with_the_models_own_embeddings(tmp_path, order):
    model, tokenizer = zero_model(projection_order=order), tiny_tokenizer()
    save_retrieval_checkpoint(model, tokenizer, tmp_path / "saved")
    texts = ["def add(first, second):", "return", "first + second\n" * 5]
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert [type(module).__name__ for module in stock] == ["Transformer", "Pooling", "Normalize"]
    own = encode_exits(model, tokenizer, texts, progress=False)
    for exit_layer in EXITS:
        close(torch.tensor(stock.encode(texts, exit_layer=exit_layer)), torch.tensor(own[exit_layer]))


def test_only_a_linear_head_and_a_mean_can_change_places():
    for changes in ({"projection_head": "mlp"}, {"pooling": "lasttoken", "token_weights": False}):
        config = tiny_config(**FORM | changes)
        assert not is_servable(config)
        with pytest.raises(ValueError, match="projection_order='pool_then_project'"):
            check_servable(config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"exit_layers": (-1, 4)}, "between 0 and num_hidden_layers=4"),
        ({"exit_layers": (0, 0, 4)}, "ascending"),
        ({"exit_layers": (0, 2)}, "the last of them 4"),
        ({"projection_head": "none"}, "must be one of mlp, linear"),
        ({"token_weights": True, "pooling": "lasttoken"}, "pooling 'lasttoken' must be 'mean'"),
    ],
)
def test_a_contradiction_is_refused(changes, sentence):
    with pytest.raises(StrictDataclassError, match=sentence):
        tiny_config(**changes)


def test_a_configuration_resolves_cuts_and_weighs_exit_0():
    config = tiny_config(**FORM)
    assert config.resolve_exits(0) == (0,)
    assert config.resolve_exits(exit_layers=(2, 0)) == (0, 2)
    assert [config.exit_index(exit) for exit in EXITS] == [0, 1, 2, 3]
    assert config.exit_weight(0) == 0
    cut = config.cut(0)
    assert (cut.num_hidden_layers, cut.exit_layers, cut.resolve_exits()) == (0, [0], (0,))
    assert ModularStarEncoderConfig(num_hidden_layers=0).exit_layers == [0]


def test_defaults_are_those_of_the_published_models(tmp_path):
    config = ModularStarEncoderConfig()
    assert (config.projection_head, config.token_weights, config.exit_layers) == ("mlp", False, [4, 9, 18, 27, 36])
    tiny_model().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name in ("projection_head", "token_weights"):
        del written[name]
    (tmp_path / "config.json").write_text(json.dumps(written))
    old, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(run(old, **tiny_batch())[0], run(tiny_model().eval(), **tiny_batch())[0])
    assert not any("token_weights" in name for name in old.state_dict())
