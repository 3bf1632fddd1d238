"""`MultiExitTrainer`, a subclass of `Trainer` for objectives that return one loss per exit, and its callbacks."""

import fnmatch
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.inference.checkpoints import is_servable, write_sentence_transformer_files
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.objectives.exit_losses import Objective, exit_weights
from modular_star_encoder.training.arguments import MultiExitTrainingArguments
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import staged_file

logger = logging.get_logger(__name__)

# A larger share of masked negatives causes a warning; with half of them masked, training fails
# (benchmarks/results/mini_parallel_ablation.md).
MOST_MASKED_NEGATIVES = 0.1

_WITHOUT_EFFECT = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")

STATES = ("optimizer*", "scheduler.pt", "rng_state*.pth")
"""Patterns of the files, besides the weights, that a checkpoint needs to continue a run exactly."""

AVERAGE = "average.safetensors"


class MultiExitTrainer(Trainer):
    """Train every exit of a model with one objective.

    The total loss is the weighted sum of the exits' losses. Every metric of the objective is logged as
    `{metric}_exit_{layer}`: its mean over all batches of all processes since the last log line. If a loss is not
    finite, its batch is written to the output folder, and a UserError (`training.loss.not_finite`) ends the training.
    A gradient that is not finite also ends the training (`training.gradient.not_finite`), except with float16.

    Args:
        model: a ModularStarEncoder model with heads that fit the objective, or one wrapped by PEFT; None with
            `model_init`, a function that returns a new model for each training.
        args: `MultiExitTrainingArguments`; with plain `TrainingArguments`, the arguments about exits have their
            defaults. `remove_unused_columns` is set to False, because the objective defines the columns of a batch.
        objective: called as `objective(model, batch, exit_layers)`; returns an `ObjectiveOutput` with one float32 loss
            per exit, shape (E,). See `modular_star_encoder.objectives`.
        exit_layers: the exits to train; all exits of the model by default.
        evaluator: a function that returns {metric: value}, such as a `MultiExitEvaluator`; it needs no `eval_dataset`.
            At every evaluation, every process calls `evaluator(model, folder, epoch, steps, across_processes=True)`
            once; `folder` is None in all processes but the first. The metrics of the first process are logged with the
            prefix `eval_`, and `args.metric_for_best_model` may name one of these metrics.
        **kwargs: passed to `Trainer`: `train_dataset`, `eval_dataset`, `data_collator`, `callbacks`, …

    Raises:
        UserError: the model lacks one of `exit_layers`; the model lacks projection heads for `detach_shallow_exits` or
            `share_heads`; `exit_weights` is wrong for the exits; the objective is incompatible with the model,
            `exit_schedule` or `log_gradient_norms`; an argument of `Trainer`, such as `compute_metrics`, would have
            no effect; or plain `TrainingArguments` would keep the checkpoint with the highest loss of an exit.

    Example:
        >>> import tempfile
        >>> from modular_star_encoder.inference.checkpoints import load_checkpoint
        >>> from modular_star_encoder.objectives.contrastive import ContrastiveObjective
        >>> model, _ = load_checkpoint("mose-code")
        >>> arguments = MultiExitTrainingArguments(tempfile.mkdtemp(), exit_weights="uniform", use_cpu=True)
        >>> MultiExitTrainer(model, arguments, ContrastiveObjective()).exit_layers
        (0, 1, 2, 4, 6)
    """

    def __init__(
        self,
        model: nn.Module | None,
        args: TrainingArguments,
        objective: Objective,
        *,
        exit_layers: Sequence[int] | None = None,
        evaluator: Callable[..., Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if given := [name for name in _WITHOUT_EFFECT if kwargs.get(name) is not None]:
            message = f"Leave out {given[0]}: it has no effect. The objective computes losses and metrics; pass an "
            message += "`evaluator` for other metrics."
            raise UserError("training.no_effect", message)
        # Plain arguments don't show whether the user chose True or it is the default, which is wrong for losses.
        plain, metric = not isinstance(args, MultiExitTrainingArguments), args.metric_for_best_model or ""
        if plain and args.greater_is_better and re.search(r"loss_exit_\d+$", metric):
            message = f"The lowest {metric} is the best: set greater_is_better=False or use MultiExitTrainingArguments."
            raise UserError("training.greater_is_better", message)
        args.remove_unused_columns = False
        self._folder = str(args.output_dir)
        self.evaluator = evaluator
        if evaluator is not None and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = []  # `Trainer` would not evaluate without one
        self.exit_schedule = _option(args, "exit_schedule")
        self.log_gradient_norms = _option(args, "log_gradient_norms")
        self.objective: Objective = objective
        self._asked_exits, self._shared_heads = exit_layers, SharedHeads()
        self._detached: list[nn.Module] = []  # heads whose inputs are detached in training
        if model is not None:
            self._set_up(model, args)
        self._gathered: dict[str, list[torch.Tensor]] = {}
        if self.exit_schedule != "all" and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True
        super().__init__(model, args, **kwargs)
        # Losses are means over the batch already: Trainer must divide them by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.add_callback(self._shared_heads)
        self._average = AveragedWeights(decay) if (decay := _option(args, "ema_decay")) else None
        if self._average is not None:
            self.add_callback(self._average)

    def _set_up(self, model: nn.Module, args: TrainingArguments) -> None:
        """Check that `model` fits the objective and the arguments, and prepare its heads."""
        config: Any = model.config
        self.exit_layers = config.resolve_exits(exit_layers=self._asked_exits or config.exit_layers)
        self.exit_weights = check_objective(self.objective, args, config, self.exit_layers)
        if _option(args, "detach_shallow_exits") or _option(args, "share_heads"):
            heads = getattr(_bare(model), "projection_heads", None)
            if heads is None:
                message = "Leave out detach_shallow_exits and share_heads: this model has no projection heads."
                raise UserError("training.heads", message)
            own = [heads[str(exit_layer)] for exit_layer in self.exit_layers]
            if _option(args, "share_heads"):
                self._shared_heads.share(own)
            self._detached = own[:-1] if _option(args, "detach_shallow_exits") else []

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model from `model_init`, as `Trainer` does; check the model and prepare its heads."""
        model = super().call_model_init(trial)
        self._set_up(model, self.args)
        return model

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted sum of the exits' losses, shape (); with `return_outputs` also a dict of the metrics."""
        exits, weights = self._exits_of_this_step(model)
        output = self.objective(model, dict(inputs), exits)
        for name, values in output.metrics.items():
            self._add(name, exits, values)
        weighted = output.losses * weights.to(output.losses.device)
        if model.training and _option(self.args, "exit_weights") == "geometric":
            weighted = weighted / output.losses.detach().clamp(min=1e-6)
        step = self.state.global_step + 1
        logged = step % max(1, self.state.logging_steps) == 0 or (step == 1 and self.args.logging_first_step)
        if self.log_gradient_norms and model.training and logged:
            norms, cosines = self._compare_gradients(weighted)
            self._add("gradient_norm", exits, norms)
            for layer, cosine in cosines.items():
                self._add(f"gradient_cosine_layer_{layer}", exits, cosine)
        loss = weighted.sum()
        if model.training and not torch.isfinite(loss):
            self._stop(inputs, dict(zip(exits, output.losses.tolist(), strict=True)))
        return (loss, output.metrics) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient's norm, as `Trainer` does; UserError if it is not finite, except with float16."""
        norm = super()._get_grad_norm(model, grad_norm)
        # With float16, the gradient scaler leaves such a step out and goes on.
        if norm is not None and not math.isfinite(norm) and self.accelerator.scaler is None:
            message = f"The gradient of step {self.state.global_step + 1} is not finite ({norm}). Lower learning_rate."
            raise UserError("training.gradient.not_finite", message)
        return norm

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Return the learning-rate schedule: by `args.milestones` if set, otherwise by `args.lr_scheduler_type`."""
        args, chosen = self.args, optimizer or self.optimizer
        if isinstance(args, MultiExitTrainingArguments) and args.milestones and chosen and self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(chosen, partial(args.rate_fraction, max_steps=num_training_steps))
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of parameters with weight decay: all except biases, norms and the logit scale."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_scale")]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a checkpoint for `AutoModel` and, if possible, `SentenceTransformer`; delete `Trainer`'s pickle file."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self._folder)
            for weights in folder.glob("*.safetensors"):  # peft writes files that only their owner can read
                shutil.copymode(folder / TRAINING_ARGS_NAME, weights)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            for left in folder.glob(".saving-*"):  # by `save_pretrained` in a process that was killed
                shutil.rmtree(left)
            write_serving_files(self.accelerator.unwrap_model(self.model), folder)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer` does, with `detach_shallow_exits`; the model keeps no hook for later trainings."""
        with ExitStack() as hooks:
            for head in self._detached:
                hook = head.register_forward_pre_hook(lambda _, inputs: tuple(states.detach() for states in inputs))
                hooks.enter_context(hook)
            return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch as `Trainer` does; train nothing if the resumed checkpoint is from the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint; first correct checkpoint dates that are in the future, as `Trainer` keeps the newest."""
        now, steps = time.time(), checkpoints(self._folder) if self.args.should_save else {}
        if any(folder.stat().st_mtime > now for folder in steps.values()):
            for age, number in enumerate(sorted(steps, reverse=True), start=1):
                os.utime(steps[number], (now - age, now - age))
        if self._average is not None and self.args.should_save:
            # Before `Trainer`'s files, because a checkpoint with `trainer_state.json` must be complete.
            self._average.save(os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and scheduler as `Trainer` does; warn of missing states; keep the path of the average."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        own = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if missing := missing_files(checkpoint, (*STATES[:-1], own)):
            message = f"{checkpoint} has no {', '.join(missing)} (because of save_only_model or of another number of "
            message += "processes): training continues with new states, so the weights will differ from those of an "
            message += "uninterrupted run."
            logger.warning_once(message)
        if self._average is not None:
            self._average.resumed_from = Path(checkpoint)

    def _exits_of_this_step(self, model: nn.Module) -> tuple[tuple[int, ...], torch.Tensor]:
        shallow, step = self.exit_layers[:-1], self.state.global_step
        if self.exit_schedule == "all" or not model.training or not shallow:
            return self.exit_layers, self.exit_weights
        if self.exit_schedule == "rotate":
            turn = step % len(shallow)
            return (shallow[turn], self.exit_layers[-1]), self.exit_weights[[turn, -1]]
        deepest = step % 2 == 0 if self.exit_schedule == "alternate" else 2 * step < self.state.max_steps
        return (self.exit_layers[-1:], self.exit_weights[-1:]) if deepest else (self.exit_layers, self.exit_weights)

    def _stop(self, batch: Mapping[str, Any], losses: Mapping[int, float]) -> NoReturn:
        step, rank = self.state.global_step + 1, self.args.process_index
        tensors = {name: one.detach().cpu().clone().contiguous() for name, one in _tensors(batch)}
        by_exit = ", ".join(f"exit {exit_layer}: {loss:g}" for exit_layer, loss in losses.items())
        path = Path(self._folder, f"non_finite_loss_step_{step}_rank_{rank}.safetensors").absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as staging:
            save_file(tensors, staging, metadata={"losses": by_exit})
        message = f"The loss of step {step} is not finite ({by_exit}). Lower learning_rate or check the batch, stored "
        message += f"in {path}."
        raise UserError("training.loss.not_finite", message)

    def _compare_gradients(self, losses: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Return the norm of each loss's gradient on the trunk, and {layer: mean cosine of two such gradients}."""
        trunk = _bare(self.accelerator.unwrap_model(self.model)).model
        names, parameters = zip(*[item for item in trunk.named_parameters() if item[1].requires_grad], strict=True)
        found = []
        for loss in losses:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(gradients, parameters, strict=True)
            found.append([torch.zeros_like(own) if one is None else one for one, own in pairs])
        norms = torch.stack([torch.nn.utils.get_total_norm([one.float() for one in own]) for own in found])
        # Weights named layers.0.… are of layer 1; weights outside all layers count as layer 0.
        layers = [int(name.split(".")[1]) + 1 if name.startswith("layers.") else 0 for name in names]
        cosines = {}
        for layer in sorted(set(layers)):
            places = [place for place, at in enumerate(layers) if at == layer]
            flat = [torch.cat([own[place].float().flatten() for place in places]) for own in found]
            rows = torch.stack([one for one in flat if one.any()] or flat[:1])
            if len(rows) > 1:
                units = nn.functional.normalize(rows, dim=1)
                cosines[layer] = (units @ units.T)[*torch.triu_indices(len(rows), len(rows), 1)].mean()
        return norms, cosines

    def _add(self, name: str, exits: Sequence[int], values: torch.Tensor) -> None:
        keys = [f"{name}_exit_{exit_layer}" for exit_layer in exits] if values.dim() else [name]
        for key, value in zip(keys, values.detach().float().reshape(-1), strict=True):
            self._gathered.setdefault(key, []).append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does; add to a log line of training the mean of each metric since the previous line."""
        if "loss" in logs:
            logs.update(self._drain_metrics())
            if logs.get("masked_negatives", 0) > MOST_MASKED_NEGATIVES:
                message = "The deepest exit masks more than a tenth of all negatives as false negatives. First improve "
                message += "this exit: fine-tune without `false_negative_margin` and `false_negative_factor`."
                logger.warning_once(message)
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Return (total loss, None, None) of one batch, and keep its metrics for `evaluation_loop`."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(dict(inputs)))
        assert isinstance(loss, torch.Tensor)  # because return_outputs is False
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as `Trainer` does, and add `{prefix}_{metric}_exit_{layer}` to the metrics."""
        metric_key_prefix = kwargs.get("metric_key_prefix", "eval")
        # Training metrics that are not logged yet must survive an evaluation between two log lines.
        training, self._gathered = self._gathered, {}
        try:
            output = super().evaluation_loop(*args, **kwargs)
            metrics = self._drain_metrics()
        finally:
            self._gathered = training
        added = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        # Run the evaluator only with the trainer's own eval_dataset; if this is a dict, only with its first dataset.
        first = f"_{next(iter(self.eval_dataset))}" if isinstance(self.eval_dataset, dict) else ""
        if self.evaluator is not None and metric_key_prefix == f"eval{first}":
            folder = os.path.join(self._folder, "eval") if self.is_world_process_zero() else None
            model, step = self.accelerator.unwrap_model(self.model), self.state.global_step
            found = self.evaluator(model, folder, self.state.epoch or 0, step, across_processes=True)
            # All processes take the metrics of the first process, so that they choose the same best checkpoint.
            added |= {f"eval_{name}": value for name, value in broadcast_object_list([found])[0].items()}
        return output._replace(metrics={**(output.metrics or {}), **added})

    def _drain_metrics(self) -> dict[str, float]:
        gathered, self._gathered = self._gathered, {}
        if not gathered:
            return {}
        means = torch.stack([torch.stack(values).mean() for values in gathered.values()])
        return dict(zip(gathered, self.accelerator.reduce(means, reduction="mean").tolist(), strict=True))


def check_objective(
    objective: Objective, args: TrainingArguments, config: Any, exit_layers: tuple[int, ...]
) -> torch.Tensor:
    """Return the weight of each exit's loss, shape (E exits,); UserError if the arguments are incompatible."""
    if hasattr(objective, "check"):
        objective.check(exit_layers, config.projection_size, rotates=_option(args, "exit_schedule") != "all")
    if _option(args, "log_gradient_norms") and getattr(objective, "caches_gradients", False):
        message = "Set either `mini_batch_tokens` or `log_gradient_norms`: the first discards the autograd graph that "
        message += "the second needs."
        raise UserError("training.log_gradient_norms.cached", message)
    if args.label_smoothing_factor:
        message = "Leave out label_smoothing_factor: it has no effect on the objective's loss."
        raise UserError("training.no_effect", message)
    weighting, normalize = _option(args, "exit_weights"), _option(args, "normalize_exit_weights")
    return exit_weights(weighting, exit_layers, config.parent_num_hidden_layers, normalize=normalize)


def _option(args: TrainingArguments, name: str) -> Any:
    """Return an argument of `MultiExitTrainingArguments`, or its default if `args` is a plain `TrainingArguments`."""
    return getattr(args, name, getattr(MultiExitTrainingArguments, name))


def _bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _tensors(batch: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in batch.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value


def checkpoints(output_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """Return {step: folder} of all checkpoints in `output_dir`, complete or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return {int(path.name[11:]): path for path in found if re.fullmatch(r"0|[1-9][0-9]*", path.name[11:])}


def missing_files(checkpoint: str | os.PathLike[str], needed: Sequence[str]) -> list[str]:
    """Return the file name patterns in `needed` that no file of a checkpoint matches."""
    names = os.listdir(checkpoint)
    # DeepSpeed keeps the states in folders of its own.
    return [] if fnmatch.filter(names, "global_step*") else [one for one in needed if not fnmatch.filter(names, one)]


def write_serving_files(model: nn.Module, folder: Path) -> None:
    """Write SentenceTransformer's files to `folder`, if SentenceTransformer can compute the model's embeddings."""
    config: Any = getattr(model, "config", None)
    saved = isinstance(model, ModularStarEncoderForRetrieval) and (folder / "tokenizer_config.json").is_file()
    if saved and is_servable(config):
        prompts = sentence_transformer_prompts(instructions=config.instruction_prompts)
        write_sentence_transformer_files(folder, config, prompts)


class SharedHeads(TrainerCallback):
    """Callback that keeps heads equal: all start as copies of the last head and get the sum of all heads' gradients."""

    def __init__(self) -> None:
        self.parameters: list[tuple[nn.Parameter, ...]] = []  # the parameters that are equal; none until `share`

    def share(self, heads: Sequence[nn.Module]) -> None:
        """Keep the heads in `heads` equal, and no longer the heads of an earlier call."""
        self.parameters = list(zip(*(head.parameters() for head in heads), strict=True))

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for several in self.parameters:
            for one in several[:-1]:
                one.copy_(several[-1])

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for several in self.parameters:
            total = torch.stack([one.grad for one in several if one.grad is not None]).sum(dim=0)
            for one in several:
                one.grad = total.clone()


class AveragedWeights(TrainerCallback):
    """Callback that averages the trained parameters over the steps and puts the average into the model at the end.

    The decay at step s is min(`decay`, (1 + s) / (10 + s)). The model may be replicated (DDP), not sharded (FSDP).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.resumed_from: Path | None = None  # the checkpoint with the average to start from

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the moving average of the weights: from the model or, if training is resumed, from the checkpoint."""
        trained = [(name, one) for name, one in kwargs["model"].named_parameters() if one.requires_grad]
        self.parameters, self.average = dict(trained), {name: one.detach().clone() for name, one in trained}
        if self.resumed_from is not None:
            stored = load_file(self.resumed_from / AVERAGE)
            self.average = {name: stored[name].to(one) for name, one in self.average.items()}
            self.resumed_from = None

    def save(self, folder: str) -> None:
        """Write the average of the weights to the file `AVERAGE` in a checkpoint's folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with staged_file(Path(folder, AVERAGE)) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self.average.items()}, temporary)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, average in self.average.items():
            average.lerp_(self.parameters[name], 1 - decay)

    @torch.no_grad()
    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for name, average in self.average.items():
            self.parameters[name].copy_(average)
