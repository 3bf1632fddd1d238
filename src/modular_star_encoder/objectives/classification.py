"""In-context pre-training: masked language modelling plus in-context classification, at every exit."""

from typing import Any

import torch
from torch import distributed, nn

from modular_star_encoder.objectives.exit_losses import ObjectiveOutput


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
    """Masked tokens of this process over the mean of all processes, as a factor of its mean loss.

    The average over processes of losses times this factor is the mean over all masked tokens.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return 1.0
    here = (labels != -100).sum().float()
    everywhere = here.clone()
    distributed.all_reduce(everywhere)
    return here * distributed.get_world_size() / everywhere.clamp(min=1)


class ClassificationObjective:
    """Cross-entropy of each exit."""

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        """Losses of one batch.

        Args:
            model: a `ModularStarEncoderForSequenceClassification`, possibly wrapped.
            batch: `input_ids`, `attention_mask` (B, T) and `labels` (B,), class indices.
            exit_layers: the exits to train.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, exit_layers=exit_layers).exit_logits.float()
        targets = batch["labels"].expand(len(exit_layers), -1)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)
        accuracies = (logits.argmax(dim=-1) == targets).float().mean(dim=1)
        return ObjectiveOutput(losses=losses, metrics={"loss": losses.detach(), "accuracy": accuracies})
