"""Heads: shared ones read the exit, losses are those of the formulas."""

import pytest
import torch
from torch import nn

from modular_star_encoder.modeling import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForSequenceClassification,
    modeling_modular_star_encoder,
)
from tests.tiny import EXIT_LAYERS, run, tiny_batch, tiny_model

INPUTS = tiny_batch()
LABELS = torch.full_like(INPUTS["input_ids"], -100)
LABELS[0, 2], LABELS[0, 5], LABELS[1, 9], LABELS[2, 11] = 17, 40, 250, 5
ICC_LABELS = torch.tensor([1, 0, 1])
BATCH = INPUTS | {"labels": LABELS, "icc_labels": ICC_LABELS}


@pytest.fixture
def pretraining_model():
    return tiny_model(ModularStarEncoderForPreTraining).eval()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def changed(before, after):
    return [not torch.equal(first, second) for first, second in zip(before, after, strict=True)]


def test_mlm_loss_is_cross_entropy_at_masked_positions_of_each_exit(pretraining_model):
    output, masked = run(pretraining_model, **BATCH), LABELS != -100
    for place, exit_layer in enumerate(EXIT_LAYERS):
        logits = run(pretraining_model, **INPUTS, exit_layer=exit_layer).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), LABELS.flatten())
        torch.testing.assert_close(output.mlm_losses[place], expected)
        accuracy = (logits.argmax(-1) == LABELS)[masked].float().mean()
        torch.testing.assert_close(output.mlm_accuracies[place], accuracy)
    assert len(set(output.mlm_losses.tolist())) == 3
    losses = output.mlm_losses + output.icc_losses
    torch.testing.assert_close(output.loss, losses[0] * 1 / 4 + losses[1] * 2 / 4 + losses[2] * 4 / 4)


def test_the_loss_does_not_depend_on_the_chunk_of_logits(pretraining_model, monkeypatch):
    def loss_and_gradients():
        loss = pretraining_model(**BATCH).loss
        return loss.detach(), gradients(pretraining_model, loss)

    whole = loss_and_gradients()
    monkeypatch.setattr(modeling_modular_star_encoder, "TOKENS_PER_CHUNK", 1)
    monkeypatch.setattr(modeling_modular_star_encoder, "LOGITS_PER_CHUNK", 300)  # one row of 300 logits at a time
    torch.testing.assert_close(whole, loss_and_gradients())


def test_gradients_of_the_mlm_losses_are_those_of_plain_cross_entropy(pretraining_model, monkeypatch):
    weights = torch.tensor([0.5, 2.0, 1.0])
    logits = [pretraining_model(**INPUTS, exit_layer=exit_layer).logits for exit_layer in EXIT_LAYERS]
    plain = [nn.functional.cross_entropy(exit.flatten(0, 1), LABELS.flatten()) for exit in logits]
    expected = gradients(pretraining_model, (torch.stack(plain) * weights).sum())
    # The vocabulary is no multiple of 64, so the last part is a short one.
    for name, size in {"TOKENS_PER_CHUNK": 1, "LOGITS_PER_CHUNK": 1500, "ROWS_PER_SUM": 64}.items():
        monkeypatch.setattr(modeling_modular_star_encoder, name, size)
    assert pretraining_model.config.vocab_size % 64
    losses = pretraining_model(**INPUTS, labels=LABELS).mlm_losses
    ours = gradients(pretraining_model, (losses * weights).sum())
    assert "heads.decoder.bias" in expected
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_as_a_tuple_the_loss_comes_first_and_without_labels_the_logits(pretraining_model):
    output = run(pretraining_model, **BATCH)
    assert output[0] is output.loss
    assert torch.equal(run(pretraining_model, **BATCH, return_dict=False)[0], output.loss)
    assert run(pretraining_model, **INPUTS, return_dict=False)[0].shape == (3, 12, 300)


def test_icc_loss_and_accuracy_have_class_1_for_the_same_repository(pretraining_model):
    output = run(pretraining_model, **BATCH)
    for place, logits in enumerate(output.icc_logits):
        torch.testing.assert_close(output.icc_losses[place], nn.functional.cross_entropy(logits, ICC_LABELS))
        accuracy = (logits.argmax(-1) == ICC_LABELS).float().mean()
        torch.testing.assert_close(output.icc_accuracies[place], accuracy)


@pytest.mark.parametrize("output_name", ["mlm_losses", "icc_logits"])
def test_shared_heads_read_the_exit(pretraining_model, output_name):
    before = getattr(run(pretraining_model, **BATCH), output_name)
    with torch.no_grad():
        pretraining_model.heads.exit_embedding.weight[1] += 1.0
    assert changed(before, getattr(run(pretraining_model, **BATCH), output_name)) == [False, True, False]


def test_without_masked_tokens_the_mlm_loss_is_zero_and_finite(pretraining_model):
    output = pretraining_model(**BATCH | {"labels": torch.full_like(LABELS, -100)})
    assert output.mlm_losses.tolist() == [0.0, 0.0, 0.0]
    assert torch.isfinite(output.loss)


def test_every_parameter_is_trained_by_the_pretraining_loss(pretraining_model):
    pretraining_model(**BATCH).loss.backward()
    idle = [name for name, p in pretraining_model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias shared by all keys shifts a row of attention scores evenly, which softmax does not see.
    assert [name for name in idle if "k_proj.bias" not in name] == []


@pytest.mark.parametrize(
    ("num_labels", "labels"), [(1, torch.tensor([0.1, 0.2, 0.3])), (3, torch.tensor([0, 2, 1])), (3, torch.eye(3))]
)
def test_classification_trains_any_exit(num_labels, labels):
    model = tiny_model(ModularStarEncoderForSequenceClassification, num_labels=num_labels)
    output = run(model, **INPUTS, labels=labels, exit_layers=(1, 4))
    assert output.logits.shape == (3, num_labels)
    assert output.exit_logits.shape == (2, 3, num_labels)
    alone = [run(model, **INPUTS, labels=labels, exit_layer=exit_layer).loss for exit_layer in (1, 4)]
    torch.testing.assert_close(output.loss, sum(alone))
