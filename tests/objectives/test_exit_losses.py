import pytest
import torch

from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, ModularStarEncoderForSequenceClassification
from modular_star_encoder.objectives.exit_losses import ClassificationObjective, InContextObjective, exit_weights
from tests.errors import raises
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model

PAPER = (4, 9, 18, 27, 36)


@pytest.mark.parametrize(
    ("weighting", "exits", "expected"),
    [
        ("paper", PAPER, [4 / 36, 0.25, 0.5, 0.75, 1.0]),
        ("paper", PAPER[:2], [4 / 36, 0.25]),  # a slice refers to its parent's depth
        ("paper", (0, 9), [1 / 36, 0.25]),  # exit 0 counts as one layer, or its head would not be trained
        ("uniform", PAPER, [1.0] * 5),
        ("linear", PAPER, [0.2, 0.4, 0.6, 0.8, 1.0]),
        ([0, 2.5], (1, 2), [0.0, 2.5]),
    ],
)
def test_weights_are_named_or_given_and_normalised_ones_keep_their_proportions(weighting, exits, expected):
    assert exit_weights(weighting, exits, 36).tolist() == pytest.approx(expected)
    assert exit_weights("paper", (0,), 0).tolist() == [1.0]
    normalised = exit_weights(weighting, exits, 36, normalize=True)
    assert normalised.tolist() == pytest.approx([weight / sum(expected) for weight in expected])


@pytest.mark.parametrize(
    "weighting",
    ["papre", [1.0], [1, -1], [0, 0], [float("nan"), 1], [1, float("inf")], 3, ["a", "b"], {1: 0.5, 2: 1.0}, "12"],
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
