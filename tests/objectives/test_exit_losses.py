"""Weights of the exits, and the objectives whose losses the model computes."""

import pytest
import torch

from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, ModularStarEncoderForSequenceClassification
from modular_star_encoder.objectives.exit_losses import ClassificationObjective, InContextObjective, exit_weights
from tests.errors import raises
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model

PAPER = (4, 9, 18, 27, 36)


def test_the_papers_weights_are_exit_over_depth():
    weights = exit_weights("paper", PAPER, 36)
    assert [round(weight, 3) for weight in weights.tolist()] == [0.111, 0.25, 0.5, 0.75, 1.0]
    assert weights.sum().item() == pytest.approx(2.611, abs=1e-3)


def test_a_slice_weighs_its_exits_by_its_parents_depth():
    assert exit_weights("paper", (4, 9), 36).tolist() == pytest.approx([4 / 36, 9 / 36])


def test_normalised_weights_keep_their_proportions():
    weights = exit_weights("paper", PAPER, 36, normalize=True)
    assert weights.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(weights / weights[-1], exit_weights("paper", PAPER, 36))


def test_uniform_and_explicit_weights():
    assert exit_weights("uniform", PAPER, 36).tolist() == [1.0] * 5
    assert exit_weights("linear", PAPER, 36).tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert exit_weights([0, 2.5], (1, 2), 2).tolist() == [0.0, 2.5]


@pytest.mark.parametrize(
    "weighting", ["papre", [1.0], [1, -1], [0, 0], [float("nan"), 1], 3, ["a", "b"], {1: 0.5, 2: 1.0}, "12"]
)
def test_weights_that_do_not_fit_are_refused(weighting):
    with raises("exit_weights", repr(weighting), "paper, uniform, linear", "1, 2"):
        exit_weights(weighting, (1, 2), 2)


def test_each_exits_loss_of_pretraining_is_the_sum_of_both_tasks():
    batch = tiny_batch() | {"icc_labels": torch.tensor([1, 0, 1])}
    batch["labels"] = torch.where(torch.arange(12) % 3 == 2, batch["input_ids"], -100)
    model = tiny_model(ModularStarEncoderForPreTraining).eval()
    output, own = InContextObjective()(model, batch, EXIT_LAYERS), model(**batch)
    torch.testing.assert_close(output.losses, own.mlm_losses + own.icc_losses)
    assert set(output.metrics) == {"mlm_loss", "mlm_accuracy", "icc_loss", "icc_accuracy"}
    assert all(values.shape == (3,) and not values.requires_grad for values in output.metrics.values())


def test_the_loss_of_classification_at_each_exit_is_that_of_the_model_at_this_exit():
    model = tiny_model(ModularStarEncoderForSequenceClassification).eval()
    batch = tiny_batch() | {"labels": torch.tensor([0, 1, 1])}
    output = ClassificationObjective()(model, batch, EXIT_LAYERS)
    for exit_layer, loss in zip(EXIT_LAYERS, output.losses, strict=True):
        expected = model(**batch, exit_layer=exit_layer).loss / model.config.exit_weight(exit_layer)
        torch.testing.assert_close(loss, expected)
