"""What every objective returns: one loss per exit, and metrics."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn


@dataclass
class ObjectiveOutput:
    """Losses and metrics of one batch.

    Args:
        losses: (E,) float32 with gradient, one loss per exit, shallowest first.
        metrics: name → (E,), or () for what belongs to no exit; detached, averaged over batches for the logs.
    """

    losses: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A training objective: a value given to the trainer, called with the model and one batch.

    It may have three members more: `check(exit_layers, embedding_size)`, which the trainer calls when it is made and
    which raises a `ValueError` if the objective does not fit the model; `check_rotation(exit_layers)`, the same where
    each step trains the deepest exit and one other; and `caches_gradients`, true where no graph leads from the losses
    to the parameters.
    """

    def __call__(self, model: nn.Module, batch: dict[str, Any], exit_layers: tuple[int, ...]) -> ObjectiveOutput:
        """Losses (E,) and metrics of `batch` at `exit_layers`."""
        ...
