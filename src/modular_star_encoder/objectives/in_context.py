"""In-context pre-training: masked language modelling plus in-context classification, at every exit."""

from typing import Any

from torch import nn

from modular_star_encoder.objectives.outputs import ObjectiveOutput


class InContextObjective:
    """L_MLM + L_ICC of each exit (arXiv 2503.03008, section on pre-training).

    The losses are computed inside the model's forward, where they can be reduced chunk by chunk and where wrappers such
    as DDP and FSDP2 have gathered the parameters; here they are added and named.
    """

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        """Losses of one batch.

        Args:
            model: a `ModularStarEncoderForPreTraining`, possibly wrapped.
            batch: `input_ids`, `attention_mask`, `labels` (B, T) and `icc_labels` (B,).
            exit_layers: the exits to train.
        """
        output = model(**batch, exit_layers=exit_layers)
        metrics = {
            "mlm_loss": output.mlm_losses,
            "mlm_accuracy": output.mlm_accuracies,
            "icc_loss": output.icc_losses,
            "icc_accuracy": output.icc_accuracies,
        }
        return ObjectiveOutput(
            losses=output.mlm_losses + output.icc_losses,
            metrics={name: value.detach() for name, value in metrics.items()},
        )
