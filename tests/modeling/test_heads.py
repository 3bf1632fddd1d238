"""Heads: shared ones know the exit, losses are those of the formulas."""

import pytest
import torch
from torch import nn

from modular_star_encoder.modeling import (
    ModularStarEncoderForPreTraining,
    ModularStarEncoderForSequenceClassification,
    modeling_modular_star_encoder,
)
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model


@pytest.fixture
def pretraining_model():
    return tiny_model(ModularStarEncoderForPreTraining).eval()


def labelled_batch():
    batch = tiny_batch()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 2], labels[0, 5], labels[1, 9], labels[2, 11] = 17, 40, 250, 5
    return {**batch, "labels": labels, "icc_labels": torch.tensor([1, 0, 1])}


def test_mlm_loss_is_cross_entropy_at_masked_positions_of_each_exit(pretraining_model):
    batch = labelled_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        output = pretraining_model(**batch)
        for place, exit_layer in enumerate(EXIT_LAYERS):
            logits = pretraining_model(**inputs, exit_layer=exit_layer).logits
            expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            torch.testing.assert_close(output.mlm_losses[place], expected)
            masked = batch["labels"] != -100
            accuracy = (logits.argmax(-1) == batch["labels"])[masked].float().mean()
            torch.testing.assert_close(output.mlm_accuracies[place], accuracy)
    assert len(set(output.mlm_losses.tolist())) == 3


def test_the_loss_does_not_depend_on_the_chunk_of_logits(pretraining_model, monkeypatch):
    def loss_and_gradient():
        pretraining_model.zero_grad()
        loss = pretraining_model(**labelled_batch()).loss
        loss.backward()
        return loss.detach(), pretraining_model.heads.decoder.weight.grad.clone()

    whole = loss_and_gradient()
    monkeypatch.setattr(modeling_modular_star_encoder, "TOKENS_PER_CHUNK", 1)
    monkeypatch.setattr(modeling_modular_star_encoder, "LOGITS_PER_CHUNK", 300)  # one row of 300 logits at a time
    chunked = loss_and_gradient()
    torch.testing.assert_close(whole, chunked)


def test_gradients_of_the_mlm_losses_are_those_of_plain_cross_entropy(pretraining_model, monkeypatch):
    batch, weights = labelled_batch(), torch.tensor([0.5, 2.0, 1.0])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def gradients(loss):
        pretraining_model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in pretraining_model.named_parameters() if p.grad is not None}

    logits = [pretraining_model(**inputs, exit_layer=exit_layer).logits for exit_layer in EXIT_LAYERS]
    plain = [nn.functional.cross_entropy(exit.flatten(0, 1), batch["labels"].flatten()) for exit in logits]
    expected = gradients((torch.stack(plain) * weights).sum())
    monkeypatch.setattr(modeling_modular_star_encoder, "TOKENS_PER_CHUNK", 1)
    monkeypatch.setattr(modeling_modular_star_encoder, "LOGITS_PER_CHUNK", 1500)
    # The vocabulary is no multiple of it, so that the last part is a short one.
    monkeypatch.setattr(modeling_modular_star_encoder, "ROWS_PER_SUM", 64)
    assert pretraining_model.config.vocab_size % 64
    ours = gradients((pretraining_model(**inputs, labels=batch["labels"]).mlm_losses * weights).sum())
    assert "heads.decoder.bias" in expected
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_total_is_the_sum_over_exits_weighted_by_depth(pretraining_model):
    output = pretraining_model(**labelled_batch())
    losses = output.mlm_losses + output.icc_losses
    torch.testing.assert_close(output.loss, losses[0] * 1 / 4 + losses[1] * 2 / 4 + losses[2] * 4 / 4)


def test_as_a_tuple_the_loss_comes_first_and_without_labels_the_logits(pretraining_model):
    batch = labelled_batch()
    with torch.inference_mode():
        output = pretraining_model(**batch)
        assert output[0] is output.loss
        assert torch.equal(pretraining_model(**batch, return_dict=False)[0], output.loss)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert pretraining_model(**inputs, return_dict=False)[0].shape == (3, 12, 300)


def test_icc_loss_is_cross_entropy_with_class_1_for_the_same_repository(pretraining_model):
    batch = labelled_batch()
    output = pretraining_model(**batch)
    for logits, loss in zip(output.icc_logits, output.icc_losses, strict=True):
        torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, torch.tensor([1, 0, 1])))


@pytest.mark.parametrize("output_name", ["mlm_losses", "icc_logits"])
def test_shared_heads_are_told_the_exit(pretraining_model, output_name):
    with torch.no_grad():
        before = getattr(pretraining_model(**labelled_batch()), output_name).clone()
        pretraining_model.heads.exit_embedding.weight[1] += 1.0
        after = getattr(pretraining_model(**labelled_batch()), output_name)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False]


def test_without_masked_tokens_the_mlm_loss_is_zero_and_finite(pretraining_model):
    batch = labelled_batch()
    batch["labels"][:] = -100
    output = pretraining_model(**batch)
    assert output.mlm_losses.tolist() == [0.0, 0.0, 0.0]
    assert torch.isfinite(output.loss)


def test_every_parameter_is_trained_by_the_pretraining_loss(pretraining_model):
    pretraining_model(**labelled_batch()).loss.backward()
    idle = [name for name, p in pretraining_model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias shared by all keys shifts a row of attention scores evenly, which softmax does not see.
    assert [name for name in idle if "k_proj.bias" not in name] == []


@pytest.mark.parametrize(
    ("num_labels", "labels"), [(1, torch.tensor([0.1, 0.2, 0.3])), (3, torch.tensor([0, 2, 1])), (3, torch.eye(3))]
)
def test_classification_trains_any_exit(num_labels, labels):
    model = tiny_model(ModularStarEncoderForSequenceClassification, num_labels=num_labels)
    output = model(**tiny_batch(), labels=labels, exit_layers=(1, 4))
    assert output.logits.shape == (3, num_labels)
    assert output.exit_logits.shape == (2, 3, num_labels)
    alone = [model.eval()(**tiny_batch(), labels=labels, exit_layer=exit_layer).loss for exit_layer in (1, 4)]
    torch.testing.assert_close(model(**tiny_batch(), labels=labels, exit_layers=(1, 4)).loss, sum(alone))


def test_each_exit_embeds_through_its_own_head(model):
    with torch.no_grad():
        before = model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings.clone()
        model.projection_heads["2"].out_proj.bias += 1.0
        after = model(**tiny_batch(), exit_layers=EXIT_LAYERS).exit_embeddings
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False]
    torch.testing.assert_close(after.norm(dim=-1), torch.ones(3, 3))
