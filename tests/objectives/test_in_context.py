"""In-context pre-training."""

import torch

from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from modular_star_encoder.objectives.exit_losses import InContextObjective
from tests.tiny import EXIT_LAYERS, tiny_batch, tiny_model


def labelled_batch():
    batch = tiny_batch()
    labels = torch.where(torch.arange(12) % 3 == 2, batch["input_ids"], -100)
    return {**batch, "labels": labels, "icc_labels": torch.tensor([1, 0, 1])}


def test_each_exits_loss_is_the_sum_of_both_tasks():
    model = tiny_model(ModularStarEncoderForPreTraining).eval()
    output, own = InContextObjective()(model, labelled_batch(), EXIT_LAYERS), model(**labelled_batch())
    torch.testing.assert_close(output.losses, own.mlm_losses + own.icc_losses)
    assert set(output.metrics) == {"mlm_loss", "mlm_accuracy", "icc_loss", "icc_accuracy"}
    assert all(values.shape == (3,) and not values.requires_grad for values in output.metrics.values())
