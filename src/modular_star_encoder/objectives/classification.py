"""Classification of texts or pairs at every exit, such as clone detection."""

from typing import Any

from torch import nn

from modular_star_encoder.objectives.outputs import ObjectiveOutput


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
