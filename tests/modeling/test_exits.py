import re
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel

from modular_star_encoder import modeling
from modular_star_encoder.inference.checkpoints import check_servable, is_servable, save_retrieval_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval, ModularStarEncoderModel
from tests.errors import raises
from tests.tiny import EXIT_LAYERS, NO_DROPOUT, VOCAB_SIZE, ZERO, equal, run, tiny_batch, tiny_config, tiny_model

EXITS = ZERO["exit_layers"]


def zero_model(model_class=ModularStarEncoderForRetrieval, **changes):
    """A model with exit 0 and random token weights; one entry of the vocabulary in ten has weight 0."""
    model = tiny_model(model_class, **ZERO | changes).eval()
    weights = getattr(model, "model", model).token_weights
    if weights is not None:
        with torch.no_grad():
            weights.weight.copy_(torch.rand(VOCAB_SIZE, 1, generator=torch.Generator().manual_seed(2)) * 4)
            weights.weight[::10] = 0
    return model


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [*(({"exit_layer": exit_layer}, exit_layer) for exit_layer in EXITS), ({"exit_layers": (0, 2)}, 2), ({}, 4)],
)
def test_a_forward_runs_the_layers_up_to_the_deepest_exit(arguments, layers):
    model, calls = zero_model(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    run(model, **tiny_batch(), **arguments)
    assert len(calls) == layers


@pytest.mark.parametrize("unpad_inputs", [False, True])
@pytest.mark.parametrize("form", [{"exit_layers": EXIT_LAYERS}, ZERO], ids=["published", "zero"])
def test_one_pass_gives_every_exit_bit_for_bit_shallowest_first(form, unpad_inputs):
    model, exits = tiny_model(**form, unpad_inputs=unpad_inputs), form["exit_layers"]
    together = run(model, **tiny_batch(), exit_layers=exits[::-1]).exit_embeddings
    equal(together, torch.stack([run(model, **tiny_batch(), exit_layer=exit).sentence_embedding for exit in exits]))
    assert all(not torch.allclose(first, second, atol=1e-2) for first, second in pairwise(together))


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model_class", "form"),
    [
        (ModularStarEncoderForRetrieval, {"exit_norm": "last"}),
        (ModularStarEncoderForRetrieval, ZERO),
        (modeling.ModularStarEncoderForPreTraining, {}),
        *(slow(ModularStarEncoderForRetrieval, {"exit_norm": norm}) for norm in ("all", "none")),
        *(slow(ModularStarEncoderModel, {"exit_norm": norm}) for norm in ("last", "all")),
        slow(modeling.ModularStarEncoderForSequenceClassification, {}),
    ],
)
def test_slices_and_cuts_equal_the_full_model_bit_for_bit(tmp_path, model_class, form):
    full = zero_model() if form is ZERO else tiny_model(model_class, **form)
    full.save_pretrained(tmp_path)
    exits = list(full.config.exit_layers)
    for exit_layer in exits:
        cut, report = model_class.from_pretrained(tmp_path, exit_layer=exit_layer, output_loading_info=True)
        assert not any(report.values()), report
        cut.save_pretrained(tmp_path / "again")
        sliced, again = full.slice(exit_layer), model_class.from_pretrained(tmp_path / "again")
        assert sliced.get_input_embeddings().weight is full.get_input_embeddings().weight
        kept = [exit for exit in exits if exit <= exit_layer]
        expected = run(full, **tiny_batch(), exit_layers=kept).to_tuple()
        for model in (sliced, cut, again):
            assert len(getattr(model, "model", model).layers) == model.config.num_hidden_layers == exit_layer
            assert model.config.exit_layer is None
            assert list(model.config.exit_layers) == kept
            equal(run(model, **tiny_batch(), exit_layers=kept).to_tuple(), expected)
            # Rows of the exit embedding and loss weights refer to the parent.
            assert list(model.config.parent_exit_layers) == exits
            assert model.config.exit_weight(exit_layer) == max(1, exit_layer) / 4
            assert model.config.exit_index(exit_layer) == exits.index(exit_layer)


@pytest.mark.parametrize(
    ("exit_norm", "normed"), [("last", [False, False, False, True]), ("all", [True] * 4), ("none", [False] * 4)]
)
def test_the_final_norm_applies_where_the_configuration_says(exit_norm, normed):
    model = tiny_model(ModularStarEncoderModel, exit_layers=EXITS, exit_norm=exit_norm)
    output = run(model, **tiny_batch(), exit_layers=EXITS, output_residual_states=True)
    pairs = zip(output.exit_hidden_states, output.residual_states, strict=True)
    assert [not torch.equal(exit_state, residual) for exit_state, residual in pairs] == normed
    static = model.slice(0)
    equal(run(static, **tiny_batch()).last_hidden_state, output.exit_hidden_states[0])
    assert static.config.exit_norm == ("all" if exit_norm == "all" else "none")


@pytest.mark.parametrize("exit_norm", ["last", "all"])
@pytest.mark.parametrize("start", [0, 2])
def test_a_deeper_exit_resumes_from_a_shallower_ones_states_bit_for_bit(start, exit_norm):
    trunk, batch = tiny_model(ModularStarEncoderModel, exit_layers=EXITS, exit_norm=exit_norm), tiny_batch()
    states = run(trunk, **batch, exit_layer=start, output_residual_states=True).residual_states[-1]
    resumed = run(trunk, inputs_embeds=states, attention_mask=batch["attention_mask"], start_layer=start)
    equal(resumed.last_hidden_state, run(trunk, **batch).last_hidden_state)


STATES = {"input_ids": None, "inputs_embeds": torch.zeros(3, 12, 32)}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"exit_layers": (1, 3)}, r"exit_layer 3 .* 1, 2, 4\."),
        ({"exit_layer": 0}, r"exit_layer 0 .* 1, 2, 4\."),
        ({"exit_layer": 1, "exit_layers": (1,)}, r"exit_layer=1 and exit_layers=\(1,\)"),
        ({"exit_layers": ()}, r"at least one exit, .* exit_layers=\(\)"),
        ({"exit_layers": 1}, "at least one exit, .* exit_layers=1"),
        ({"input_ids": None}, "input_ids and inputs_embeds"),
        (STATES | {"input_ids": torch.ones(3, 12)}, "input_ids and inputs_embeds"),
        ({"start_layer": 2}, "start_layer=2 needs inputs_embeds"),
        (STATES | {"start_layer": 1, "exit_layers": (1, 2)}, r"start_layer=1 .*\(1, 2\)"),
        ({"input_ids": torch.ones(12, dtype=torch.long)}, r"\(B, T\) .* not \(12,\)"),
        (STATES | {"inputs_embeds": torch.ones(12, 32)}, r"\(B, T, H\), not \(12, 32\)"),
        ({"attention_mask": torch.ones(3, 11)}, r"attention_mask .* \(3, 12\), not \(3, 11\)"),
        ({"attention_mask": torch.ones(1, 12)}, r"attention_mask .* \(3, 12\), not \(1, 12\)"),
        ({"attention_mask": torch.ones(3, 1, 12, 12)}, r"attention_mask of shape \(rows, tokens\)"),
        ({"input_ids": torch.full((3, 12), 10**6)}, "input_ids must be from 0 to"),
        ({"input_ids": torch.full((3, 12), -1)}, "input_ids must be from 0 to"),
    ],
)
def test_arguments_that_contradict_the_model_or_each_other_are_refused(model, arguments, match):
    with pytest.raises(ValueError, match="input_ids instead of inputs_embeds"):  # token weights need ids
        zero_model()(inputs_embeds=STATES["inputs_embeds"], exit_layer=0)
    with pytest.raises(ValueError, match=match):
        model(**tiny_batch() | arguments)
    with pytest.raises(ValueError, match=r"exit_layer 3 .* 1, 2, 4\."):
        model.slice(3)


def test_a_configuration_may_ask_for_tuples(model):
    tokens, exits = torch.tensor([[5, 6, 7]]), {"exit_layers": [1, 2]}
    expected = model(tokens, **exits).exit_embeddings
    model.config.return_dict = False
    assert any(torch.equal(one, expected) for one in model(tokens, **exits))
    assert torch.equal(model(tokens, **exits, return_dict=True).exit_embeddings, expected)


def test_an_empty_batch_has_an_empty_result(model):
    empty = {name: value[:0] for name, value in tiny_batch().items()}
    assert run(model, **empty, exit_layers=(1, 4)).exit_embeddings.shape[:2] == (2, 0)


def test_an_exit_is_an_integer_also_of_numpy(model, checkpoint, tmp_path):
    def one(exit_layer):
        return run(model, **tiny_batch(), exit_layer=exit_layer)

    def several(exit_layer):
        return run(model, **tiny_batch(), exit_layers=(1, exit_layer))

    wrong = [2.0, True, "2", torch.tensor(2)]
    for call in (model.slice, model.config.cut, model.config.exit_weight, several, one):
        for value in wrong if call is one else [*wrong, None]:
            with pytest.raises(ValueError, match=rf"exit_layer {re.escape(repr(value))} of type .* 1, 2, 4\."):
                call(value)
        call(np.int64(2))
    for load in (AutoModel.from_pretrained, ModularStarEncoderForRetrieval.from_pretrained):
        cut = load(checkpoint, exit_layer=np.int64(2))
        assert type(cut.config.num_hidden_layers) is int
        cut.save_pretrained(tmp_path / "cut")
        for value in [*wrong, 3]:
            with pytest.raises(ValueError, match=r"^exit_layer .* is not an exit of this model; .* 1, 2, 4\.$"):
                load(checkpoint, exit_layer=value)


def test_embeddings_are_linear_heads_of_means_weighted_by_token():
    model, batch = zero_model(), tiny_batch()
    output = run(model, **batch, exit_layers=EXITS)
    equal(output.exit_hidden_states[0], model.model.embed_tokens(batch["input_ids"]).detach())
    mask = batch["attention_mask"].bool()
    for place, exit_layer in enumerate(EXITS):
        head = model.projection_heads[str(exit_layer)].dense
        for row, ids in enumerate(batch["input_ids"]):
            weights = model.model.token_weights.weight[ids[mask[row]]].double()
            states = output.exit_hidden_states[place][row][mask[row]].double()
            projected = head.weight.double() @ ((weights * states).sum(0) / weights.sum()) + head.bias.double()
            close(output.exit_embeddings[place, row], nn.functional.normalize(projected, dim=0).float())


@pytest.mark.parametrize("exits", [EXITS, (0,)])
def test_weighted_means_do_not_depend_on_padding_or_packing(exits):
    model, batch = zero_model(), tiny_batch("left")
    expected = run(model, **batch, exit_layers=exits)
    for unpad_inputs in (False, True):
        output = run(zero_model(unpad_inputs=unpad_inputs), **tiny_batch("right"), exit_layers=exits)
        close(output.exit_embeddings, expected.exit_embeddings)
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(1)
    flat, positions = batch["input_ids"][mask], torch.cat([torch.arange(length) for length in lengths])
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    by_positions = [(n, {"position_ids": positions.repeat(n, 1)}) for n in (1, 2)]
    for rows, marks in ((1, {"cu_seq_lens_q": bounds}), *by_positions):
        packed = run(model, input_ids=flat.repeat(rows, 1), **marks, exit_layers=exits)
        close(packed.exit_embeddings, expected.exit_embeddings.repeat(1, rows, 1))
        tokens = expected.last_hidden_state[mask].repeat(rows, 1, 1)
        torch.testing.assert_close(packed.last_hidden_state.view_as(tokens), tokens, atol=1e-5, rtol=1e-5)


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
        equal(model(**batch, exit_layer=0).sentence_embedding, zero)
    embedding = model(**batch, exit_layer=0).sentence_embedding[2]
    directions = []
    for sign in (1, -1):
        weight.grad = None
        (sign * embedding[0]).backward(retain_graph=True)
        directions.append(float(weight.grad[token]))
    # The step that raises the weight is kept, the one that lowers it further is not.
    assert min(directions) < 0.0 == max(directions)


def test_new_weights_are_1_and_give_the_plain_mean(tmp_path):
    weighted, plain = tiny_model(**ZERO), tiny_model(**ZERO | {"token_weights": False})
    plain.load_state_dict({n: t for n, t in weighted.state_dict().items() if "token_weights" not in n})
    close(*(run(model, **tiny_batch(), exit_layers=EXITS).exit_embeddings for model in (weighted, plain)))
    tiny_model(ModularStarEncoderModel, exit_layers=EXITS).save_pretrained(tmp_path)
    changes = {"token_weights": True, "projection_head": "linear"}
    fresh, report = ModularStarEncoderForRetrieval.from_pretrained(tmp_path, output_loading_info=True, **changes)
    assert "model.token_weights.weight" in report["missing_keys"]
    assert all((model.model.token_weights.weight == 1).all() for model in (weighted, fresh))


def test_new_tokens_have_weight_1(tmp_path):
    model = zero_model()
    before = run(model, **tiny_batch(), exit_layer=0).sentence_embedding
    old = model.model.token_weights.weight.detach().clone()
    model.resize_token_embeddings(VOCAB_SIZE + 5, mean_resizing=False)
    equal(model.model.token_weights.weight.detach(), torch.cat((old, torch.ones(5, 1))))
    equal(run(model, **tiny_batch(), exit_layer=0).sentence_embedding, before)
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).model.token_weights.weight.shape == (VOCAB_SIZE + 5, 1)
    model.resize_token_embeddings(VOCAB_SIZE - 5)
    assert model.model.token_weights.weight.shape == (VOCAB_SIZE - 5, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unpad_inputs", [False, True])
@pytest.mark.parametrize("length", [0, 5])
def test_a_text_without_tokens_embeds_to_zeros_in_any_precision(length, unpad_inputs, dtype):
    nothing = dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(2, length, dtype=torch.long))
    for model in (zero_model(unpad_inputs=unpad_inputs), tiny_model(unpad_inputs=unpad_inputs)):
        exits = model.config.exit_layers
        output = run(model.to(dtype), **nothing, exit_layers=exits)
        equal(output.exit_embeddings, torch.zeros(len(exits), 2, 16, dtype=dtype))


@pytest.mark.parametrize("order", ["pool_then_project", "project_then_pool"])
def test_a_saved_model_is_a_sentence_transformer_with_the_models_own_embeddings(tmp_path, tokenizer, order):
    model = zero_model(projection_order=order)
    save_retrieval_checkpoint(model, tokenizer, tmp_path / "saved")
    texts = ["def add(first, second):", "return", "first + second\n" * 5]
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for exit_layer, own in encode_exits(model, tokenizer, texts, progress=False).items():
        close(torch.tensor(stock.encode(texts, exit_layer=exit_layer)), torch.tensor(own))


@pytest.mark.parametrize("changes", [{"projection_head": "mlp"}, {"pooling": "lasttoken", "token_weights": False}])
def test_only_a_linear_head_and_a_mean_can_change_places(changes):
    config = tiny_config(**ZERO | changes)
    assert not is_servable(config)
    with raises("checkpoint.not_servable", "projection_order='pool_then_project'"):
        check_servable(config)
