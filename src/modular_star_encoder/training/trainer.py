"""The one `Trainer` subclass: any objective, a loss per exit, each of them logged."""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from modular_star_encoder.objectives.exit_losses import Objective, exit_weights
from modular_star_encoder.utils.files import write_json


class NonFiniteLossError(ValueError):
    """The loss is infinite or not a number; the message names the file that holds the batch."""


def stop_for_non_finite_loss(
    batch: Mapping[str, Any], losses: Mapping[int, float], folder: str | os.PathLike, *, step: int, rank: int = 0
) -> NoReturn:
    """Write a batch and raise.

    `non_finite_loss_step_{step}_rank_{rank}.safetensors` gets the tensors, named by their place in the batch
    (`query.input_ids`), and the `.json` beside it the losses and what else the batch holds.

    Args:
        batch: tensors and other values, in mappings and lists of any depth.
        losses: exit → its loss.
        folder: where to write, made if missing.
        step: the optimiser step in progress, counted from 1.
        rank: number of this process.

    Raises:
        NonFiniteLossError: always.
    """
    leaves = dict(_leaves(batch))
    tensors = {name: value.detach().cpu().clone() for name, value in leaves.items() if isinstance(value, torch.Tensor)}
    path = Path(folder, f"non_finite_loss_step_{step}_rank_{rank}.safetensors").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    report = {
        "step": step,
        "rank": rank,
        # JSON has neither infinities nor NaN.
        "losses": {str(exit_layer): loss if math.isfinite(loss) else str(loss) for exit_layer, loss in losses.items()},
        "other_values": {name: str(value) for name, value in leaves.items() if name not in tensors},
    }
    write_json(path.with_suffix(".json"), report)
    by_exit = ", ".join(f"exit {exit_layer}: {loss:g}" for exit_layer, loss in losses.items())
    raise NonFiniteLossError(f"The loss of step {step} is not finite ({by_exit}); its batch is in {path}.")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of everything in nested mappings and lists."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        yield name, value
        return
    for key, part in parts:
        yield from _leaves(part, f"{name}.{key}" if name else str(key))


@dataclass(frozen=True)
class MultiStepSchedule:
    """Linear warm-up, then a constant rate that falls in steps.

    The paper (arXiv 2503.03008, pre-training) has 4,000 warm-up steps and factors 0.36, 0.1, 0.031, 0.01 and 0.001 at
    steps 120k, 185k, 220k, 230k and 240k of 245k. It does not say whether the factors multiply; they are read here as
    fractions of the peak, one per step, since multiplied they would end at 1e-9 of it.

    Args:
        warmup_steps: the rate at step s < `warmup_steps` is s / `warmup_steps` of the peak.
        milestones: steps, ascending, from which on the next fraction applies.
        fractions: of the peak, one per milestone.

    Raises:
        ValueError: milestones are not ascending, begin within the warm-up, or are not as many as the fractions; or a
            fraction is not from 0 on.
    """

    warmup_steps: int = 0
    milestones: Sequence[int] = ()
    fractions: Sequence[float] = ()

    def __post_init__(self) -> None:
        steps = list(self.milestones)
        if len(steps) != len(self.fractions):
            raise ValueError(f"There are {len(steps)} milestones and {len(self.fractions)} fractions; give one each.")
        if steps != sorted(set(steps)) or (steps and steps[0] < self.warmup_steps):
            raise ValueError(f"milestones {steps} must ascend, from warmup_steps {self.warmup_steps} on.")
        if not all(0 <= fraction < float("inf") for fraction in self.fractions):
            raise ValueError(f"fractions {list(self.fractions)} must be numbers from 0 on.")

    def fraction(self, step: int) -> float:
        """Fraction of the peak rate in the optimiser step with this index, counted from 0."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        passed = sum(step >= milestone for milestone in self.milestones)
        return self.fractions[passed - 1] if passed else 1.0

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """A scheduler of `optimizer`, whose rate is the peak."""
        return LambdaLR(optimizer, self.fraction)


logger = logging.get_logger(__name__)

# Few pairs of a batch are alike. With half masked, training fails (benchmarks/results/mini_parallel_ablation.md).
MOST_MASKED_NEGATIVES = 0.1


class ExitEvaluator(Protocol):
    """What `MultiExitTrainer` calls at every evaluation, such as a `MultiExitEvaluator`."""

    def __call__(
        self, model: nn.Module, output_path: str | None, epoch: float, steps: int, *, across_processes: bool
    ) -> dict[str, float]:
        """Metrics of the bare model. Every process calls; `output_path`, a folder, is given to the first one alone."""
        ...


class MultiExitTrainer(Trainer):
    """Train every exit of a model with one objective.

    The total loss is the weighted sum of the objective's losses per exit. Every metric of the objective is averaged
    over the batches between two log lines, over all processes, and logged as `{metric}_exit_{layer}`. A loss that is
    not finite ends the training, and the batch is written to the output folder.

    Args:
        model: a ModularStarEncoder model with heads that suit the objective.
        args: as for `Trainer`. `remove_unused_columns` is switched off, for batches are the objective's own.
        objective: called as `objective(model, batch, exit_layers)`; see `modular_star_encoder.objectives`.
        weights: weighting of the exits, `"paper"` (i/depth), `"uniform"`, or one number per exit.
        normalize_weights: divide the weights by their sum.
        exit_layers: exits to train; by default all of the model.
        rotate_shallow_exits: train the deepest exit and one other per step, each in its turn, instead of all.
        log_gradient_norms: with every log line also the norm of the gradient that each exit's weighted loss alone has
            on the trunk, `gradient_norm_exit_{layer}`; one more backward pass per exit in that step. Not under FSDP.
        schedule: a learning-rate schedule in place of `args.lr_scheduler_type`.
        evaluator: called whenever the trainer evaluates, with or without an `eval_dataset` (once where that is a
            mapping of several); its metrics are logged with `eval_` in front and can be `args.metric_for_best_model`.
        **kwargs: passed to `Trainer`.

    Raises:
        ValueError: exits that the model does not have, weights that do not fit them, or an objective that does not fit
            the model, `rotate_shallow_exits` or `log_gradient_norms`.
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
        rotate_shallow_exits: bool = False,
        log_gradient_norms: bool = False,
        schedule: MultiStepSchedule | None = None,
        evaluator: ExitEvaluator | None = None,
        **kwargs: Any,
    ) -> None:
        args.remove_unused_columns = False
        self.evaluator = evaluator
        if evaluator is not None and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = []  # `Trainer` would not evaluate without one
        self.rotate_shallow_exits, self.log_gradient_norms = rotate_shallow_exits, log_gradient_norms
        self.schedule = schedule
        self.objective = objective
        self.exit_layers = model.config.resolve_exits(exit_layers=exit_layers or model.config.exit_layers)
        if hasattr(objective, "check"):
            objective.check(self.exit_layers, model.config.projection_size)
        if rotate_shallow_exits and hasattr(objective, "check_rotation"):
            objective.check_rotation(self.exit_layers)
        if log_gradient_norms and getattr(objective, "caches_gradients", False):
            raise ValueError(
                "log_gradient_norms needs a graph down to the trunk; it does not go with mini_batch_tokens."
            )
        depth = model.config.parent_num_hidden_layers
        self.exit_weights = exit_weights(weights, self.exit_layers, depth, normalize=normalize_weights)
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        if rotate_shallow_exits and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True
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
        exits, weights = self._exits_of_this_step(model)
        output = self.objective(model, dict(inputs), exits)
        for name, values in output.metrics.items():
            self._add(name, exits, values)
        weighted = output.losses * weights.to(output.losses.device)
        if self.log_gradient_norms and model.training and self._is_logged_step():
            self._add("gradient_norm", exits, self._gradient_norms(weighted))
        loss = weighted.sum()
        if model.training and not torch.isfinite(loss):
            stop_for_non_finite_loss(
                inputs,
                dict(zip(exits, output.losses.tolist(), strict=True)),
                self.args.output_dir,
                step=self.state.global_step + 1,
                rank=self.args.process_index,
            )
        return (loss, output.metrics) if return_outputs else loss

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """`schedule`, where one was given."""
        if self.schedule is not None and self.lr_scheduler is None:
            self.lr_scheduler = self.schedule.scheduler(optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but biases, norms and a learned logit scale: CLIP decays no gains (arXiv 2103.00020, section 2.5)."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_scale")]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in `Trainer`, but without the pickle of the settings: what was saved may be published as it is."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _exits_of_this_step(self, model: nn.Module) -> tuple[tuple[int, ...], torch.Tensor]:
        """The exits to train now, and their weights."""
        shallow = self.exit_layers[:-1]
        if not self.rotate_shallow_exits or not model.training or not shallow:
            return self.exit_layers, self.exit_weights
        turn = self.state.global_step % len(shallow)
        return (shallow[turn], self.exit_layers[-1]), self.exit_weights[[turn, -1]]

    def _is_logged_step(self) -> bool:
        """Whether the step in progress ends with a log line."""
        step = self.state.global_step + 1
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    def _gradient_norms(self, losses: torch.Tensor) -> torch.Tensor:
        """Norm (E,) of each loss's gradient on the trunk's parameters."""
        model = self.accelerator.unwrap_model(self.model)
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a model with adapters
        parameters = [parameter for parameter in bare.model.parameters() if parameter.requires_grad]
        norms = []
        for loss in losses:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            found = [gradient.float().norm() for gradient in gradients if gradient is not None]
            norms.append(torch.stack(found).norm())
        return torch.stack(norms)

    def _add(self, name: str, exits: Sequence[int], values: torch.Tensor) -> None:
        """Gather a metric, one value per exit or one for all, for the next log line."""
        values = values.detach().float()
        keys = [f"{name}_exit_{exit_layer}" for exit_layer in exits] if values.dim() else [name]
        for key, value in zip(keys, values.reshape(-1), strict=True):
            self._sums[key] = self._sums.get(key, 0) + value
            self._counts[key] = self._counts.get(key, 0) + 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics per exit gathered since the last training log."""
        if "loss" in logs:
            logs.update(self._drain_metrics())
            if logs.get("masked_negatives", 0) > MOST_MASKED_NEGATIVES:
                logger.warning_once(
                    "The deepest exit takes more than a tenth of all negatives for false ones: it can't guide yet. "
                    "Fine-tune without false_negative_margin and false_negative_factor first, or set them stricter."
                )
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
        training = (self._sums, self._counts)
        self._sums, self._counts = {}, {}
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            metrics = self._drain_metrics()
        finally:
            self._sums, self._counts = training
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if self._evaluator_is_due(metric_key_prefix):
            output.metrics.update({f"eval_{name}": value for name, value in self._evaluate_exits().items()})
        return output

    def _evaluator_is_due(self, metric_key_prefix: str) -> bool:
        """Whether this is `evaluate` on the trainer's own data, and the first of them if there are several."""
        first = f"_{next(iter(self.eval_dataset))}" if isinstance(self.eval_dataset, dict) else ""
        return self.evaluator is not None and metric_key_prefix == f"eval{first}"

    def _evaluate_exits(self) -> dict[str, float]:
        """The evaluator's metrics, those of the first process, so that all choose the same best checkpoint."""
        folder = os.path.join(self.args.output_dir, "eval") if self.is_world_process_zero() else None
        model = self.accelerator.unwrap_model(self.model)
        metrics = self.evaluator(model, folder, self.state.epoch or 0, self.state.global_step, across_processes=True)
        return broadcast_object_list([metrics])[0]

    def _drain_metrics(self) -> dict[str, float]:
        """Means since the last call, over batches and processes."""
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        means = self.accelerator.reduce(means, reduction="mean").tolist()
        metrics = dict(zip(self._sums, means, strict=True))
        self._sums, self._counts = {}, {}
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


PER_EXIT = re.compile(r"(?P<metric>.+)_exit_(?P<exit>\d+)")


def format_log(logs: dict[str, float]) -> str:
    """`{"loss": 1.2, "clip_loss_exit_4": 1.3, "clip_loss_exit_9": 1}` → `loss 1.200 · clip_loss 4: 1.300, 9: 1.000`."""
    single, per_exit = [], defaultdict(list)
    for name, value in logs.items():
        match = PER_EXIT.fullmatch(name)
        if match:
            per_exit[match["metric"]].append(f"{match['exit']}: {value:.3f}")
        elif name in ("loss", "eval_loss", "grad_norm", "logit_scale", "masked_negatives"):
            single.append(f"{name} {value:.3f}")
        elif name == "learning_rate":
            single.append(f"{name} {value:.1e}")
    return " · ".join(single + [f"{metric} {', '.join(values)}" for metric, values in per_exit.items()])


class ExitProgressCallback(ProgressCallback):
    """`Trainer`'s progress bar, with readable log lines."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line above the bar; the summary at the end of training has no line."""
        line = format_log(logs or {})
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps} · {line}")
