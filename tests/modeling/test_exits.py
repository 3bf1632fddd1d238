"""Exits: what runs, what comes out, and that a cut model is the full one's beginning."""

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from modular_star_encoder.modeling import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderForSequenceClassification,
    ModularStarEncoderModel,
)
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_config, tiny_model


def executed_layers(model, **arguments):
    """How many layers a forward pass ran."""
    calls = []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in model.model.layers]
    with torch.inference_mode():
        model(**tiny_batch(), **arguments)
    for hook in hooks:
        hook.remove()
    return len(calls)


@pytest.mark.parametrize("exit_layer", EXIT_LAYERS)
def test_a_forward_runs_exactly_exit_layer_layers(model, exit_layer):
    assert executed_layers(model, exit_layer=exit_layer) == exit_layer


def test_several_exits_cost_one_pass_to_the_deepest(model):
    assert executed_layers(model, exit_layers=(1, 2)) == 2
    assert executed_layers(model) == 4


def test_one_pass_gives_every_exit_bit_for_bit(model):
    with torch.inference_mode():
        together = model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings
        alone = [model(**tiny_batch(), exit_layer=exit_layer).sentence_embedding for exit_layer in EXIT_LAYERS]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_exits_come_shallowest_first_whatever_the_order_asked_for(model):
    with torch.inference_mode():
        ascending = model(**tiny_batch(), exit_layers=(1, 4)).exit_embeddings
        descending = model(**tiny_batch(), exit_layers=(4, 1)).exit_embeddings
    assert torch.equal(ascending, descending)


@pytest.mark.parametrize("exit_norm", ["last", "all", "none"])
@pytest.mark.parametrize("exit_layer", EXIT_LAYERS)
def test_a_model_cut_at_load_equals_the_full_one_bit_for_bit(tmp_path, exit_norm, exit_layer):
    full = tiny_model(exit_norm=exit_norm).eval()
    full.save_pretrained(tmp_path)
    cut, report = AutoModel.from_pretrained(tmp_path, exit_layer=exit_layer, output_loading_info=True)
    with torch.inference_mode():
        for shallower in [exit for exit in EXIT_LAYERS if exit <= exit_layer]:
            expected = full(**tiny_batch(), exit_layer=shallower).sentence_embedding
            assert torch.equal(cut(**tiny_batch(), exit_layer=shallower).sentence_embedding, expected)
    assert not any(report.values()), report
    assert len(cut.model.layers) == cut.config.num_hidden_layers == exit_layer
    assert cut.config.exit_layer is None


def test_the_final_norm_applies_where_the_configuration_says():
    states = {}
    for exit_norm in ("last", "all", "none"):
        model = tiny_model(ModularStarEncoderModel, exit_norm=exit_norm).eval()
        with torch.inference_mode():
            output = model(**tiny_batch(), exit_layers=EXIT_LAYERS, output_residual_states=True)
        pairs = zip(output.exit_hidden_states, output.residual_states, strict=True)
        states[exit_norm] = [not torch.equal(exit_state, residual) for exit_state, residual in pairs]
    assert states == {"last": [False, False, True], "all": [True, True, True], "none": [False, False, False]}


@pytest.mark.parametrize("exit_norm", ["last", "all"])
@pytest.mark.parametrize("exit_layer", EXIT_LAYERS)
@pytest.mark.parametrize("model_class", [ModularStarEncoderModel, ModularStarEncoderForRetrieval])
def test_a_slice_in_memory_equals_the_full_model_bit_for_bit_and_shares_its_weights(model_class, exit_layer, exit_norm):
    full = tiny_model(model_class, exit_norm=exit_norm).eval()
    cut = full.slice(exit_layer)
    assert cut.config.num_hidden_layers == exit_layer
    with torch.inference_mode():
        for shallower in [exit for exit in EXIT_LAYERS if exit <= exit_layer]:
            expected = full(**tiny_batch(), exit_layer=shallower)[0]
            assert torch.equal(cut(**tiny_batch(), exit_layer=shallower)[0], expected)
    assert cut.get_input_embeddings().weight is full.get_input_embeddings().weight
    with pytest.raises(ValueError, match=r"its exits are 1, 2, 4\."):
        full.slice(3)


@pytest.mark.parametrize(
    "model_class",
    [ModularStarEncoderForPreTraining, ModularStarEncoderForSequenceClassification, ModularStarEncoderModel],
)
def test_every_head_can_be_cut_at_load(tmp_path, model_class):
    full = tiny_model(model_class).eval()
    full.save_pretrained(tmp_path)
    cut, report = model_class.from_pretrained(tmp_path, exit_layer=2, output_loading_info=True)
    assert not any(report.values()), report
    with torch.inference_mode():
        expected, got = full(**tiny_batch(), exit_layer=2)[0], cut(**tiny_batch())[0]
    assert torch.equal(expected, got)


def test_a_cut_model_keeps_its_parents_depth_exits_and_embedding_rows(tmp_path):
    tiny_model(ModularStarEncoderForPreTraining).save_pretrained(tmp_path)
    cut = AutoModelForMaskedLM.from_pretrained(tmp_path, exit_layer=2)
    cut.save_pretrained(tmp_path / "again")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again").config
    assert again.exit_layers == [1, 2]
    assert (again.parent_num_hidden_layers, list(again.parent_exit_layers)) == (4, [1, 2, 4])
    assert again.exit_weight(2) == 2 / 4
    assert again.exit_index(2) == 1
    assert again.num_hidden_layers == 2


def test_cutting_does_not_change_the_callers_configuration():
    config = tiny_config(exit_layer=2)
    before = copy.deepcopy(config.to_dict())
    model = ModularStarEncoderForRetrieval(config)
    assert config.to_dict() == before
    assert len(model.model.layers) == 2


@pytest.mark.parametrize("exit_norm", ["last", "all"])
def test_a_deeper_exit_resumes_from_a_shallower_ones_states_bit_for_bit(exit_norm):
    trunk = tiny_model(ModularStarEncoderModel, exit_norm=exit_norm).eval()
    batch = tiny_batch()
    with torch.inference_mode():
        straight = trunk(**batch).last_hidden_state
        shallow = trunk(**batch, exit_layer=2, output_residual_states=True).residual_states[-1]
        resumed = trunk(inputs_embeds=shallow, attention_mask=batch["attention_mask"], start_layer=2)
    assert torch.equal(straight, resumed.last_hidden_state)


def test_resuming_needs_states_and_a_deeper_exit(model):
    with pytest.raises(ValueError, match="start_layer 2 needs inputs_embeds, and exits deeper than it"):
        model.model(**tiny_batch(), start_layer=2)
    with pytest.raises(ValueError, match="exits deeper"):
        model.model(inputs_embeds=torch.zeros(1, 3, 32), start_layer=2, exit_layer=2)


@pytest.mark.parametrize("arguments", [{"exit_layer": 3}, {"exit_layers": (1, 3)}, {"exit_layer": 0}])
def test_an_exit_that_does_not_exist_is_refused_with_those_that_do(model, arguments):
    with pytest.raises(ValueError, match=r"exit_layer (3|0) is not an exit of this model; its exits are 1, 2, 4\."):
        model(**tiny_batch(), **arguments)


def test_an_exit_that_does_not_exist_is_refused_at_load(tmp_path, model):
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"exit_layer 3 is not an exit of this model; its exits are 1, 2, 4\."):
        AutoModel.from_pretrained(tmp_path, exit_layer=3)


def test_contradicting_arguments_are_refused(model):
    with pytest.raises(ValueError, match="either exit_layer or exit_layers"):
        model(**tiny_batch(), exit_layer=1, exit_layers=(1,))
    with pytest.raises(ValueError, match="at least one exit"):
        model(**tiny_batch(), exit_layers=())
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
