from itertools import pairwise

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modular_star_encoder import modeling
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from tests.tiny import EXIT_LAYERS, NO_DROPOUT, run, tiny_batch, tiny_model

LENGTHS = (12, 7, 11, 3, 12)
BACKENDS = ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def embeddings(backend, batch, **changes):
    model = tiny_model(**changes)
    model.set_attn_implementation(backend)
    return run(model, **batch, exit_layers=EXIT_LAYERS).exit_embeddings


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padding_on_either_side_or_none_gives_the_same_embeddings(backend, pooling):
    left, batch = embeddings(backend, tiny_batch("left"), pooling=pooling), tiny_batch("right")
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
    # Poolings differ, and so do orders of tokens.
    assert (embeddings("sdpa", batch, pooling="lasttoken") - expected).abs().max() > 0.1
    assert (embeddings("sdpa", batch | {"input_ids": batch["input_ids"].flip(1)}) - expected).abs().max() > 1e-2


TEXTS = tiny_batch(lengths=LENGTHS)
REAL = TEXTS["attention_mask"].bool()
PACKED = TEXTS["input_ids"][REAL].unsqueeze(0)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
RECORDED = {"output_hidden_states": True}
# Two ways to mark the texts of a row.
BY_POSITIONS = {"input_ids": PACKED, "position_ids": POSITIONS}
BY_BOUNDS = {"input_ids": PACKED, "cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}
BY_BOUNDS |= {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
PACKINGS = pytest.mark.parametrize("packing", [BY_POSITIONS, BY_BOUNDS], ids=["positions", "bounds"])


def alone(model, name, dim=1, **kwargs):
    """Run the model on each text by itself, without padding; return one of its outputs, concatenated."""
    rows = [ids[mask].unsqueeze(0) for ids, mask in zip(TEXTS["input_ids"], REAL, strict=True)]
    return torch.cat([getattr(run(model, input_ids=ids, **kwargs), name) for ids in rows], dim=dim)


@PACKINGS
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("model_class", "changes", "name"),
    [
        (ModularStarEncoderForRetrieval, {"pooling": "mean"}, "exit_embeddings"),
        (ModularStarEncoderForRetrieval, {"pooling": "lasttoken"}, "exit_embeddings"),
        (modeling.ModularStarEncoderForSequenceClassification, {}, "exit_logits"),
        (modeling.ModularStarEncoderForPreTraining, {}, "icc_logits"),
    ],
)
def test_packed_texts_do_not_see_each_other(model_class, changes, name, packing, backend):
    model = tiny_model(model_class, **changes)
    expected = alone(model, name, exit_layers=EXIT_LAYERS)
    model.set_attn_implementation(backend)
    close(getattr(run(model, **packing, exit_layers=EXIT_LAYERS), name), expected)


@pytest.mark.parametrize("options", [{}, RECORDED], ids=["", "recorded"])
def test_several_packed_rows_are_kept_apart_too(options):
    one = run(tiny_model(), **BY_POSITIONS)
    rows = PACKED.repeat(2, 1)
    # One row of positions counts for all rows.
    for positions in (POSITIONS, POSITIONS.repeat(2, 1)):
        two = run(tiny_model(), input_ids=rows, position_ids=positions, **options)
        close(two.last_hidden_state, one.last_hidden_state.repeat(2, 1, 1))
        close(two.sentence_embedding, one.sentence_embedding.repeat(2, 1))
        assert two.hidden_states is None or {states.shape[:2] for states in two.hidden_states} == {rows.shape}
        assert (two.hidden_states is None) is (not options)


def flash_attention_stand_in(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **kwargs):
    """Compute text by text what flash attention computes from the bounds of the texts."""
    assert attention_mask is None
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == cu_seq_lens_q.diff().max()
    assert cu_seq_lens_q.dtype == kwargs["cu_seq_lens_k"].dtype == torch.int32
    outputs = []
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        part = (states[:, :, start:end] for states in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(*part, scale=scaling, enable_gqa=True)
        outputs.append(attended.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


@pytest.mark.parametrize("inputs", [BY_POSITIONS, BY_BOUNDS, TEXTS], ids=["positions", "bounds", "unpadded"])
def test_flash_attention_is_given_the_bounds_of_the_texts(monkeypatch, inputs):
    # Without flash attention's kernel, which needs a GPU.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_attention_stand_in)
    expected = alone(tiny_model(), "sentence_embedding", dim=0)
    model = tiny_model(unpad_inputs=inputs is TEXTS)
    model.config._attn_implementation = "flash_attention_2"
    close(run(model, **inputs).sentence_embedding, expected)


def test_bounds_need_one_row():
    with pytest.raises(ValueError, match=r"cu_seq_lens_q .* \(1, N\)"):
        run(tiny_model(), **BY_BOUNDS | {"input_ids": PACKED.repeat(2, 1)})


@pytest.mark.parametrize("options", [RECORDED, {"position_ids": torch.arange(max(LENGTHS))[None] * 3}])
def test_recorded_states_and_given_positions_are_as_with_padding(options):
    padded, unpadded = (run(tiny_model(unpad_inputs=unpad), **TEXTS, **options) for unpad in (False, True))
    close(unpadded.sentence_embedding, padded.sentence_embedding)
    assert {states.shape[:2] for states in unpadded.hidden_states or ()} <= {TEXTS["input_ids"].shape}


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


def test_legacy_pooling_keeps_the_padding_that_it_may_read():
    model, batch = tiny_model(pooling="legacy"), tiny_batch("left", lengths=LENGTHS)
    close(run(model, **batch, unpad_inputs=True).sentence_embedding, run(model, **batch).sentence_embedding)


def test_leaving_padding_out_gives_the_same_gradients():
    gradients = []
    for unpad_inputs in (False, True):
        model = tiny_model(unpad_inputs=unpad_inputs, **NO_DROPOUT)
        model.train()(**TEXTS, exit_layers=EXIT_LAYERS).exit_embeddings[..., 0].sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@PACKINGS
@pytest.mark.parametrize("is_causal", [False, True])
def test_only_a_causal_model_hides_later_tokens_in_every_form(packing, is_causal):
    model = tiny_model(modeling.ModularStarEncoderModel, is_causal=is_causal)
    expected = alone(model, "last_hidden_state")
    close(run(model, **packing).last_hidden_state, expected)
    assert (run(model, input_ids=PACKED).last_hidden_state - expected).abs().max() > 0.1  # without marks
    changed = PACKED.clone()
    changed[0, 5] = 7
    difference = (run(model, **packing | {"input_ids": changed})[0] - expected).abs().amax(-1)[0]
    assert bool(difference[:5].max() < 1e-5) is is_causal
    assert difference[5:12].min() > 1e-5
