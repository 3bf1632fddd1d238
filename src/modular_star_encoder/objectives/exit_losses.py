"""Output of every objective, weights of the exits' losses, and the objectives of pre-training and classification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import distributed, nn

from modular_star_encoder.objectives.contrastive_settings import rank_and_count
from modular_star_encoder.utils.errors import UserError


@dataclass
class ObjectiveOutput:
    """What an objective returns: the losses and metrics of one batch at each exit."""

    losses: torch.Tensor  # (E,) float32 with gradient, one loss per exit, shallowest first
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)  # {name: (E,) or ()}, detached
    terms: dict[str, torch.Tensor] = field(default_factory=dict)  # {name: (E,) with gradient}; their sum is `losses`


class Objective(Protocol):
    """A training objective: the trainer calls it with the model, one batch and the exits.

    An objective may have a method `check(exit_layers, embedding_size, rotates=…)`, which raises UserError if the
    objective does not fit the model. `rotates` means that some steps skip shallow exits; it is an error if the
    objective needs all exits in every step. An objective may have an attribute `caches_gradients`, true if only
    `losses.backward()`, not `torch.autograd.grad`, gives gradients.
    """

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        """Return the losses (E,) and metrics of one batch at the E exits `exit_layers`."""


def exit_weights(
    weighting: str | Sequence[float], exit_layers: Sequence[int], depth: int, *, normalize: bool = False
) -> torch.Tensor:
    """Return the weight of each exit's loss, (E,) float32; `depth` is the number of layers of the whole model.

    `weighting` is one non-negative number per exit, or a name. `"paper"`: i/depth at exit i, as in the paper's loss
    (arXiv 2503.03008, i/36), and 1/depth at exit 0. `"uniform"`: 1. `"linear"`: j/E for the j-th of E exits.
    `"geometric"`: 1, but the trainer divides each loss by its detached current value, so that large and small
    losses count equally (arXiv 1904.08492). `normalize` divides the weights by their sum.
    """
    if weighting == "paper":
        weights = torch.tensor([max(1, exit_layer) / max(1, depth) for exit_layer in exit_layers])
    elif weighting in ("uniform", "geometric"):
        weights = torch.ones(len(exit_layers))
    elif weighting == "linear":
        weights = torch.arange(1, len(exit_layers) + 1) / len(exit_layers)
    else:
        try:
            weights = torch.tensor([float(weight) for weight in weighting if not isinstance(weighting, str | Mapping)])
        except (TypeError, ValueError):
            weights = torch.empty(0)
        if len(weights) != len(exit_layers) or not (weights >= 0).all() or weights.sum() in (0, torch.inf):
            numbers = f"non-negative numbers (not all 0), one for each of the exits {', '.join(map(str, exit_layers))}"
            allowed = f"paper, uniform, linear, geometric, or {len(exit_layers)} {numbers}"
            raise UserError("exit_weights", f"exit_weights={weighting!r} must be {allowed}.")
    return weights / weights.sum() if normalize else weights


class InContextObjective:
    """Masked language modelling plus in-context classification at each exit (arXiv 2503.03008, pre-training).

    The model is a `ModularStarEncoderForPreTraining`, possibly wrapped. A batch of B rows of T tokens has `input_ids`,
    `attention_mask` and `labels` (B, T), and `icc_labels` (B,). The losses are computed in the model's `forward`,
    because DDP and FSDP2 need this.
    """

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        output = model(**batch, exit_layers=exit_layers)
        share: torch.Tensor | float = 1.0
        processes = rank_and_count()[1]
        if processes > 1:
            # The average over processes of (mean loss × share) is the mean over the masked tokens of all processes.
            here = (batch["labels"] != -100).sum().float()
            everywhere = here.clone()
            distributed.all_reduce(everywhere)
            share = here * processes / everywhere.clamp(min=1)
        metrics = {"mlm_loss": output.mlm_losses * share, "mlm_accuracy": output.mlm_accuracies * share}
        metrics |= {"icc_loss": output.icc_losses, "icc_accuracy": output.icc_accuracies}
        losses = metrics["mlm_loss"] + metrics["icc_loss"]
        return ObjectiveOutput(losses, {name: value.detach() for name, value in metrics.items()})


class ClassificationObjective:
    """Cross-entropy of each exit of a `ModularStarEncoderForSequenceClassification`; `labels` has a class per text."""

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, exit_layers=exit_layers).exit_logits.float()
        targets = batch["labels"].expand(len(exit_layers), -1)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)
        accuracies = (logits.argmax(dim=-1) == targets).float().mean(dim=1)
        return ObjectiveOutput(losses=losses, metrics={"loss": losses.detach(), "accuracy": accuracies})
