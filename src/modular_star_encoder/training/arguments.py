"""`MultiExitTrainingArguments`: arguments for training a model with exits, and a check of training arguments."""

import copy
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import scratch_folder
from modular_star_encoder.utils.settings import Int, NonNegative

EXIT_SCHEDULES = ("all", "rotate", "alternate", "deepest_first")
_WITHOUT_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")  # values of `lr_scheduler_type`

logger = logging.get_logger(__name__)


@dataclass
class MultiExitTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus arguments that say how the exits of a ModularStarEncoder are trained.

    Args:
        exit_weights: weights of the exits' losses: `"paper"` (the exit after layer i gets i / number of layers),
            `"uniform"`, `"linear"`, `"geometric"`, or a list of one number per exit; see the function `exit_weights`
            of `modular_star_encoder.objectives.exit_losses`.
        normalize_exit_weights: divide the exits' weights by their sum.
        exit_schedule: exits to train in a step: `"all"`, `"rotate"`, `"alternate"` or `"deepest_first"`. `"rotate"`
            trains the deepest exit and one other exit, which changes from step to step. `"alternate"` trains only the
            deepest exit in every second step, and all exits in other steps (BERxiT, Xin et al., EACL 2021).
            `"deepest_first"` trains only the deepest exit in the first half of the steps, then all exits (the mixed
            regime of arXiv 2407.14320).
        detach_shallow_exits: only the deepest exit's loss trains the trunk; the loss of each shallower exit trains only
            the head of this exit. DeeBERT (arXiv 2004.12993) first trains the trunk, then the heads; here both are
            trained at once. The model must have projection heads.
        share_heads: keep the projection heads of all exits equal. All heads start as copies of the deepest exit's head,
            and are trained with the sum of the exits' gradients.
        ema_decay: decay of an exponential moving average of the weights, or 0 for no average. The saved model has the
            average in place of the last step's weights. An average can't be used with FSDP or `load_best_model_at_end`.
        log_gradient_norms: compare the gradients of the exits' weighted losses. A logged step runs one more backward
            pass per exit. `gradient_norm_exit_{layer}` is the norm of the gradient of an exit's loss with respect to
            the trunk. `gradient_cosine_layer_{number}` is the cosine between the gradients of two exits' losses with
            respect to one layer, averaged over all pairs of exits; a cosine below 0 means that the exits conflict.
            Layer 0 means all weights of the trunk outside its layers. FSDP is not supported.
        milestones: ascending steps at which the learning rate changes to the next of `fractions`. With milestones,
            `lr_scheduler_type` has no effect; see `rate_fraction`.
        fractions: for each milestone, the learning rate from that step on, as a fraction of `learning_rate`.

    Raises:
        UserError: `milestones` or `fractions` are invalid (`training.schedule`), `exit_schedule` is unknown
            (`training.exit_schedule`), or `ema_decay` is out of range or used with FSDP or `load_best_model_at_end`
            (`training.ema_decay`).
        ValueError: `transformers.TrainingArguments` rejects an argument.

    Example:
        >>> arguments = MultiExitTrainingArguments("runs/example", exit_weights="uniform", use_cpu=True)
        >>> arguments.exit_weights, arguments.exit_schedule
        ('uniform', 'all')
    """

    exit_weights: str | list[float] = field(default="paper", metadata={"help": "weights of the exits' losses"})
    normalize_exit_weights: bool = field(default=False, metadata={"help": "divide exit_weights by their sum"})
    exit_schedule: str = field(default="all", metadata={"help": "exits to train in each step"})
    detach_shallow_exits: bool = field(default=False, metadata={"help": "only the deepest exit trains the trunk"})
    share_heads: bool = field(default=False, metadata={"help": "keep the exits' projection heads equal"})
    ema_decay: float = field(default=0.0, metadata={"help": "decay of the moving average of the weights, or 0"})
    log_gradient_norms: bool = field(default=False, metadata={"help": "log norms of the exits' gradients"})
    milestones: list[int] = field(default_factory=list, metadata={"help": "steps at which the learning rate changes"})
    fractions: list[float] = field(default_factory=list, metadata={"help": "learning rate by milestone, 1 = peak"})

    def __post_init__(self) -> None:
        decay, other_weights = self.ema_decay, self.fsdp or self.load_best_model_at_end
        try:
            steps = self.milestones = TypeAdapter(list[Int]).validate_python(self.milestones)
            self.fractions = TypeAdapter(list[NonNegative]).validate_python(self.fractions)
            fits = len(steps) == len(self.fractions) and steps == sorted(set(steps))
            fits = fits and (not steps or steps[0] >= self.get_warmup_steps(self.max_steps))
        except (ValidationError, TypeError):  # TypeError: `warmup_steps` is not a number
            fits = False
        if not fits:
            message = f"milestones={self.milestones!r} must be ascending steps, none below warmup_steps="
            message += f"{self.warmup_steps}; fractions={self.fractions!r} must be one number >= 0 for each milestone."
            raise UserError("training.schedule", message)
        if not isinstance(decay, int | float) or not 0 <= decay < 1 or (decay and other_weights):
            message = f"ema_decay={decay!r} must be at least 0 and below 1; set it to 0 if you use fsdp or "
            message += "load_best_model_at_end."
            raise UserError("training.ema_decay", message)
        if self.exit_schedule not in EXIT_SCHEDULES:
            message = f"exit_schedule={self.exit_schedule!r} must be one of {', '.join(EXIT_SCHEDULES)}."
            raise UserError("training.exit_schedule", message)
        if self.greater_is_better is None and self.metric_for_best_model:
            # transformers looks only for names that end with `loss`; those of our losses end with `loss_exit_4`.
            self.greater_is_better = not re.search(r"loss(_exit_\d+)?$", self.metric_for_best_model)
        super().__post_init__()
        rises = self.milestones or self.lr_scheduler_type not in _WITHOUT_WARM_UP
        if rises and 0 < self.max_steps <= (warmup := self.get_warmup_steps(self.max_steps)):
            message = f"A warm-up of {warmup} steps is not shorter than max_steps={self.max_steps}: the learning rate "
            logger.warning_once(f"{message}never reaches learning_rate. Lower warmup_steps.")

    def rate_fraction(self, step: int, max_steps: int | None = None) -> float:
        """Return the learning rate at an optimiser step (counted from 0) as a fraction of the peak, `learning_rate`.

        The fraction rises to 1 over `warmup_steps` and stays 1 until `milestones[0]`. From step `milestones[i]` on,
        the fraction is `fractions[i]`. A `warmup_steps` below 1 is a share of `max_steps`, if given,
        else of the training argument of that name.

        In pre-training, the paper (arXiv 2503.03008) has 4,000 warm-up steps and factors 0.36, 0.1, 0.031, 0.01 and
        0.001 at steps 120k, 185k, 220k, 230k and 240k of 245k. The paper does not say whether the factors multiply.
        Here each factor is a fraction of the peak, because the product of all five factors is only 1e-8.
        """
        if step < (warmup := self.get_warmup_steps(max_steps or self.max_steps)):
            return step / warmup
        passed = sum(step >= milestone for milestone in self.milestones)
        return self.fractions[passed - 1] if passed else 1.0


def check_arguments(arguments: MultiExitTrainingArguments) -> None:
    """Run a tiny model with `arguments`, so that errors of transformers or torch occur now, before the training.

    With DeepSpeed or FSDP, nothing is checked.
    """
    if arguments.deepspeed_plugin is not None or arguments.fsdp:  # a process can set up each of them only once
        return
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "projection_size"), 8)
    counts = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    model = ModularStarEncoderForRetrieval(ModularStarEncoderConfig(**sizes, **counts, exit_layers=[1])).train()
    arguments = copy.deepcopy(arguments)  # `Trainer` changes them, and creates `output_dir`
    with scratch_folder("arguments") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments.output_dir = str(folder)
        trainer = Trainer(model, arguments, eval_dataset=[])
        trainer.create_optimizer()
        schedule: Any = trainer.create_scheduler(arguments.max_steps)
        for step in (arguments.max_steps // 2, arguments.max_steps):  # a warm-up hides errors in the first steps
            schedule.step(step)
        if arguments.gradient_checkpointing:
            options: Any = arguments.gradient_checkpointing_kwargs or {}
            own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
            model.gradient_checkpointing_enable(options or None, **own)
        model(torch.zeros(1, 4, dtype=torch.long, device=model.device)).exit_embeddings.sum().backward()
