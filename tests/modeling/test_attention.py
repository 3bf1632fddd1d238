"""Attention: bidirectional, blind to padding, the same on every backend; texts packed into one row are kept apart."""

from itertools import pairwise

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modular_star_encoder.modeling import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForSequenceClassification,
    ModularStarEncoderModel,
)
from tests.tiny import EXIT_LAYERS, run, tiny_batch, tiny_model

LENGTHS = (12, 7, 11, 3, 12)
BACKENDS = ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def embeddings(backend, batch, **changes):
    model = tiny_model(**changes)
    model.set_attn_implementation(backend)
    return run(model, **batch, exit_layers=EXIT_LAYERS).exit_embeddings


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_first_token_sees_the_last(backend):
    model, batch = tiny_model(ModularStarEncoderModel), tiny_batch(lengths=(6,))
    model.set_attn_implementation(backend)
    changed = batch["input_ids"].clone()
    changed[0, -1] = (changed[0, -1] + 1) % 300
    before, after = (run(model, **batch | {"input_ids": ids}, exit_layer=1)[0] for ids in (batch["input_ids"], changed))
    assert (before - after)[0, 0].abs().max() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padding_on_either_side_or_none_gives_the_same_embeddings(backend, pooling):
    left = embeddings(backend, tiny_batch("left"), pooling=pooling)
    batch = tiny_batch("right")
    close(left, embeddings(backend, batch, pooling=pooling))
    for row, length in enumerate((12, 7, 3)):
        alone = {name: values[row : row + 1, :length] for name, values in batch.items()}
        close(embeddings(backend, alone, pooling=pooling)[:, 0], left[:, row])
    # Rows of different texts must differ, or the comparison above would say nothing.
    assert (left[:, 0] - left[:, 1]).abs().max() > 0.1


def test_backends_agree_and_ignore_ids_in_the_padding():
    batch = tiny_batch("left")
    expected = embeddings("sdpa", batch)
    noisy = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 77)
    close(embeddings("sdpa", batch | {"input_ids": noisy}), expected)
    close(embeddings("eager", batch), expected)


def test_poolings_and_orders_of_tokens_differ():
    batch = tiny_batch(lengths=(6,))
    expected = embeddings("sdpa", batch)
    assert (embeddings("sdpa", batch, pooling="lasttoken") - expected).abs().max() > 0.1
    assert (embeddings("sdpa", batch | {"input_ids": batch["input_ids"].flip(1)}) - expected).abs().max() > 1e-2


def packed():
    """The texts of `tiny_batch` in one row: token ids, positions, and where texts begin and end."""
    batch = tiny_batch(lengths=LENGTHS)
    input_ids = batch["input_ids"][batch["attention_mask"].bool()].unsqueeze(0)
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return input_ids, position_ids, bounds


def by_restarting_positions():
    input_ids, position_ids, _ = packed()
    return {"input_ids": input_ids, "position_ids": position_ids}


def by_bounds():
    input_ids, _, bounds = packed()
    lengths = dict.fromkeys(("max_length_q", "max_length_k"), max(LENGTHS))
    return {"input_ids": input_ids, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **lengths}


PACKINGS = [by_restarting_positions, by_bounds]


def alone(model, **kwargs):
    """Each text by itself, without padding."""
    batch = tiny_batch(lengths=LENGTHS)
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [run(model, input_ids=ids[mask.bool()].unsqueeze(0), **kwargs) for ids, mask in rows]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_texts_do_not_see_each_other(backend, packing):
    model = tiny_model(ModularStarEncoderModel)
    expected = [output.exit_hidden_states for output in alone(model, exit_layers=EXIT_LAYERS)]
    model.set_attn_implementation(backend)
    states = run(model, **packing(), exit_layers=EXIT_LAYERS).exit_hidden_states
    for exit_states, separate in zip(states, zip(*expected, strict=True), strict=True):
        close(exit_states, torch.cat(separate, dim=1))


def test_without_marks_texts_in_one_row_do_see_each_other():
    model = tiny_model(ModularStarEncoderModel)
    together = run(model, input_ids=packed()[0]).last_hidden_state
    separate = torch.cat([output.last_hidden_state for output in alone(model)], dim=1)
    assert (together - separate).abs().max() > 0.1


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_each_packed_text_has_its_own_embedding(packing, pooling):
    model = tiny_model(pooling=pooling)
    expected = torch.cat([output.exit_embeddings for output in alone(model, exit_layers=EXIT_LAYERS)], dim=1)
    embeddings = run(model, **packing(), exit_layers=EXIT_LAYERS).exit_embeddings
    close(embeddings, expected)


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_packed_text_is_classified_by_itself(packing):
    for model_class, logits in (
        (ModularStarEncoderForSequenceClassification, "exit_logits"),
        (ModularStarEncoderForPreTraining, "icc_logits"),
    ):
        model = tiny_model(model_class)
        expected = torch.cat([getattr(output, logits) for output in alone(model, exit_layers=EXIT_LAYERS)], dim=1)
        outputs = run(model, **packing(), exit_layers=EXIT_LAYERS)
        close(getattr(outputs, logits), expected)


def test_several_packed_rows_are_kept_apart_too():
    one, two = (
        run(tiny_model(), **{name: ids.repeat(rows, 1) for name, ids in by_restarting_positions().items()})
        for rows in (1, 2)
    )
    close(two.last_hidden_state, one.last_hidden_state.repeat(2, 1, 1))
    close(two.sentence_embedding, one.sentence_embedding.repeat(2, 1))


def flash_attention_stand_in(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **kwargs):
    """What flash attention computes from bounds, text by text."""
    assert attention_mask is None
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == cu_seq_lens_q.diff().max()
    assert cu_seq_lens_q.dtype == kwargs["cu_seq_lens_k"].dtype == torch.int32
    outputs = []
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        part = (states[:, :, start:end] for states in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(*part, scale=scaling, enable_gqa=True)
        outputs.append(attended.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


@pytest.mark.parametrize("packing", [*PACKINGS, "unpadded"])
def test_flash_attention_is_given_the_bounds_of_the_texts(monkeypatch, packing):
    """Everything but the kernel, which needs a GPU."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_attention_stand_in)
    model = tiny_model(unpad_inputs=packing == "unpadded")
    inputs = tiny_batch(lengths=LENGTHS) if packing == "unpadded" else packing()
    expected = torch.cat([output.sentence_embedding for output in alone(tiny_model())])
    model.config._attn_implementation = "flash_attention_2"
    close(run(model, **inputs).sentence_embedding, expected)


@pytest.mark.parametrize("recorded", [False, True])
def test_one_row_of_positions_counts_for_all_rows(recorded):
    model = tiny_model()
    rows, positions = torch.cat([packed()[0], packed()[0].flip(1)]), packed()[1]
    options = {"output_hidden_states": True} if recorded else {}
    short = run(model, input_ids=rows, position_ids=positions, **options)
    full = run(model, input_ids=rows, position_ids=positions.repeat(2, 1), **options)
    assert len(short.sentence_embedding) == 2 * len(LENGTHS)
    assert torch.equal(short.sentence_embedding, full.sentence_embedding)
    assert torch.equal(short.last_hidden_state, full.last_hidden_state)


def test_bounds_need_one_row():
    with pytest.raises(ValueError, match=r"cu_seq_lens_q .* flat batch"):
        run(tiny_model(), **by_bounds() | {"input_ids": packed()[0].repeat(2, 1)})


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_padding_out_changes_no_real_token_and_no_embedding(backend, padding_side):
    batch = tiny_batch(padding_side, lengths=LENGTHS)
    padded = run(tiny_model(), **batch, exit_layers=EXIT_LAYERS)
    model = tiny_model(unpad_inputs=True)
    model.set_attn_implementation(backend)
    unpadded = run(model, **batch, exit_layers=EXIT_LAYERS)
    real = batch["attention_mask"].bool()
    close(unpadded.exit_embeddings, padded.exit_embeddings)
    for ours, expected in zip(unpadded.exit_hidden_states, padded.exit_hidden_states, strict=True):
        assert ours.shape == expected.shape
        close(ours[real], expected[real])
        assert not ours[~real].any()


def test_token_wise_layers_see_real_tokens_only():
    model, seen = tiny_model(unpad_inputs=True), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    run(model, **tiny_batch(lengths=LENGTHS))
    assert seen == [(1, sum(LENGTHS), 32)]


def test_leaving_padding_out_gives_the_same_gradients():
    gradients = []
    for unpad_inputs in (False, True):
        model = tiny_model(unpad_inputs=unpad_inputs, attention_dropout=0, residual_dropout=0, embedding_dropout=0)
        model.train()
        embeddings = model(**tiny_batch(lengths=LENGTHS), exit_layers=EXIT_LAYERS).exit_embeddings
        embeddings[..., 0].sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_a_causal_model_is_causal_in_every_form():
    model = tiny_model(ModularStarEncoderModel, is_causal=True)
    expected = torch.cat([output.last_hidden_state for output in alone(model)], dim=1)
    for packing in PACKINGS:
        states = run(model, **packing()).last_hidden_state
        close(states, expected)
    changed = packed()[0]
    changed[0, 5] = 7
    difference = (run(model, **by_bounds() | {"input_ids": changed})[0] - expected).abs().amax(-1)[0]
    assert difference[:5].max() < 1e-5 < difference[5:12].min()


@pytest.mark.parametrize("where", ["call", "configuration"])
def test_hidden_states_of_a_batch_without_padding_have_the_padded_shape(where):
    batch = tiny_batch(lengths=LENGTHS)
    asked = {"output_hidden_states": True}
    model = tiny_model(ModularStarEncoderModel, unpad_inputs=True, **(asked if where == "configuration" else {}))
    outputs = run(model, **batch, **(asked if where == "call" else {}))
    assert {states.shape[:2] for states in outputs.hidden_states} == {batch["input_ids"].shape}


def test_positions_that_are_given_count_without_padding_too():
    batch = tiny_batch(lengths=LENGTHS)
    positions = torch.arange(batch["input_ids"].shape[1])[None] * 3
    padded, unpadded = (
        run(tiny_model(unpad_inputs=unpad_inputs), **batch, position_ids=positions).sentence_embedding
        for unpad_inputs in (False, True)
    )
    close(unpadded, padded)


def test_a_batch_of_nothing_but_padding_embeds_to_zeros_in_any_precision():
    batch = dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(2, 5, dtype=torch.long))
    for unpad_inputs in (False, True):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert not run(tiny_model(unpad_inputs=unpad_inputs).to(dtype), **batch).sentence_embedding.any()


def test_recorded_states_of_packed_rows_have_the_shape_of_the_rows():
    rows = {name: ids.repeat(2, 1) for name, ids in by_restarting_positions().items()}
    model = tiny_model(ModularStarEncoderModel)
    outputs = run(model, **rows, output_hidden_states=True)
    assert {states.shape[:2] for states in outputs.hidden_states} == {(2, sum(LENGTHS))}
    close(outputs.last_hidden_state, run(model, **rows).last_hidden_state)


def test_heads_refuse_a_mask_that_does_not_tell_tokens_from_padding():
    with pytest.raises(ValueError, match=r"attention_mask of shape \(B, T\)"):
        run(tiny_model(), input_ids=torch.tensor([[5, 6, 7, 8]]), attention_mask=torch.zeros(1, 1, 4, 4))
