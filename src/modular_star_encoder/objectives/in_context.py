"""In-context pre-training: masked language modelling plus in-context classification, at every exit."""

from typing import Any

import torch
from torch import distributed, nn

from modular_star_encoder.objectives.outputs import ObjectiveOutput


class InContextObjective:
    """L_MLM + L_ICC of each exit (arXiv 2503.03008, section on pre-training).

    The losses are computed inside the model's forward, where they can be reduced chunk by chunk and where wrappers such
    as DDP and FSDP2 have gathered the parameters; here they are added and named. Over several processes, whose
    gradients are averaged, the masked-token loss is the mean over the masked tokens of all of them.
    """

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        """Losses of one batch.

        Args:
            model: a `ModularStarEncoderForPreTraining`, possibly wrapped.
            batch: `input_ids`, `attention_mask`, `labels` (B, T) and `icc_labels` (B,).
            exit_layers: the exits to train.
        """
        output = model(**batch, exit_layers=exit_layers)
        share = share_of_masked_tokens(batch["labels"])
        metrics = {
            "mlm_loss": output.mlm_losses * share,
            "mlm_accuracy": output.mlm_accuracies * share,
            "icc_loss": output.icc_losses,
            "icc_accuracy": output.icc_accuracies,
        }
        return ObjectiveOutput(
            losses=output.mlm_losses * share + output.icc_losses,
            metrics={name: value.detach() for name, value in metrics.items()},
        )


def share_of_masked_tokens(labels: torch.Tensor) -> torch.Tensor | float:
    """Masked tokens here over their mean per process: what turns averages of local means into the global mean."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return 1.0
    here = (labels != -100).sum().float()
    everywhere = here.clone()
    distributed.all_reduce(everywhere)
    return here * distributed.get_world_size() / everywhere.clamp(min=1)
