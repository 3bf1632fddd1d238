"""The one `Trainer` subclass: any objective, a loss per exit, each of them logged."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from modular_star_encoder.objectives import Objective, exit_weights


class MultiExitTrainer(Trainer):
    """Train every exit of a model with one objective.

    The total loss is the weighted sum of the objective's losses per exit. Every metric of the objective is averaged
    over the batches between two log lines, over all processes, and logged as `{metric}_exit_{layer}`.

    Args:
        model: a ModularStarEncoder model with heads that suit the objective.
        args: as for `Trainer`. `remove_unused_columns` is switched off, for batches are the objective's own.
        objective: called as `objective(model, batch, exit_layers)`; see `modular_star_encoder.objectives`.
        weights: weighting of the exits, `"paper"` (i/depth), `"uniform"`, or one number per exit.
        normalize_weights: divide the weights by their sum.
        exit_layers: exits to train; by default all of the model.
        **kwargs: passed to `Trainer`.

    Raises:
        ValueError: exits that the model does not have, or weights that do not fit them.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective,
        *,
        weights: str | Sequence[float] = "paper",
        normalize_weights: bool = False,
        exit_layers: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        args.remove_unused_columns = False
        self.objective = objective
        self.exit_layers = model.config.resolve_exits(exit_layers=exit_layers or model.config.exit_layers)
        depth = model.config.parent_num_hidden_layers
        self.exit_weights = exit_weights(weights, self.exit_layers, depth, normalize=normalize_weights)
        self._sums: dict[str, torch.Tensor] = {}
        self._batches = 0
        super().__init__(model, args, **kwargs)
        # Losses are means over the batch already: Trainer must divide them by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted sum of the exits' losses; with `return_outputs` also the metrics, each (E,)."""
        output = self.objective(model, dict(inputs), self.exit_layers)
        for name, values in output.metrics.items():
            self._sums[name] = self._sums.get(name, 0) + values.float()
        self._batches += 1
        loss = (output.losses * self.exit_weights.to(output.losses.device)).sum()
        return (loss, output.metrics) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics per exit gathered since the last training log."""
        if "loss" in logs:
            logs.update(self._drain_metrics())
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The total loss of one batch; the exits' metrics are gathered on the way."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`, with `{prefix}_{metric}_exit_{layer}` among the metrics."""
        # Training metrics that are not logged yet must survive an evaluation between two log lines.
        training = (self._sums, self._batches)
        self._sums, self._batches = {}, 0
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            metrics = self._drain_metrics()
        finally:
            self._sums, self._batches = training
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _drain_metrics(self) -> dict[str, float]:
        """Means since the last call, over batches and processes."""
        metrics = {}
        for name, total in self._sums.items():
            means = self.accelerator.reduce(total / self._batches, reduction="mean").tolist()
            metrics |= {f"{name}_exit_{exit}": value for exit, value in zip(self.exit_layers, means, strict=True)}
        self._sums, self._batches = {}, 0
        return metrics


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint folder in `output_dir` that was written to its end, or `None`.

    `trainer_state.json` is the last file that `Trainer` writes into a checkpoint: a folder without it, or with half of
    it, was interrupted and is passed over.
    """
    found = []
    for state in Path(output_dir).glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
        except (ValueError, KeyError):
            continue
    return max(found)[1] if found else None
