"""`MultiExitTrainingArguments`: how the exits are trained, and the learning-rate schedule of the paper."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.settings import Float, Int


@dataclass
class MultiExitTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and how the exits of a ModularStarEncoder are trained.

    Args:
        exit_weights: weights of the exits' losses: `"paper"` (i/depth), `"uniform"`, `"linear"`, or a list of one
            number per exit; see `exit_weights` of `modular_star_encoder.objectives.exit_losses`.
        normalize_exit_weights: divide the weights by their sum.
        rotate_shallow_exits: train the deepest exit and one other per step, in turn, instead of all.
        log_gradient_norms: log with every line the norm of the gradient of each exit's weighted loss on the trunk,
            `gradient_norm_exit_{layer}`; one more backward pass per exit in that step. Not under FSDP.
        milestones: steps at which the learning rate falls to the next of `fractions`, in place of `lr_scheduler_type`;
            see `MultiStepSchedule`.
        fractions: fractions of the peak learning rate, one per milestone.

    Raises:
        UserError: `milestones` and `fractions` do not fit each other (`training.schedule`).
        ValueError: as `transformers.TrainingArguments`.

    Example:
        >>> arguments = MultiExitTrainingArguments("runs/example", exit_weights="uniform", use_cpu=True)
        >>> arguments.exit_weights, arguments.rotate_shallow_exits
        ('uniform', False)
    """

    exit_weights: str | list[float] = field(default="paper", metadata={"help": "weights of the exits' losses"})
    normalize_exit_weights: bool = field(default=False, metadata={"help": "divide exit_weights by their sum"})
    rotate_shallow_exits: bool = field(default=False, metadata={"help": "train one shallow exit per step, in turn"})
    log_gradient_norms: bool = field(default=False, metadata={"help": "log each exit's gradient norm on the trunk"})
    milestones: list[int] = field(default_factory=list, metadata={"help": "steps at which the rate falls"})
    fractions: list[float] = field(default_factory=list, metadata={"help": "fractions of the peak rate"})

    def __post_init__(self) -> None:
        try:
            self.milestones = TypeAdapter(list[Int]).validate_python(self.milestones)
            self.fractions = TypeAdapter(list[Float]).validate_python(self.fractions)
        except ValidationError as error:
            given = f"milestones {self.milestones!r} and fractions {self.fractions!r}"
            raise UserError("training.schedule", f"{given} must be lists of steps and of numbers.") from error
        MultiStepSchedule(self.warmup_steps, self.milestones, self.fractions)
        super().__post_init__()

    @property
    def schedule(self) -> "MultiStepSchedule | None":
        """The schedule of the milestones; None where `lr_scheduler_type` applies."""
        return MultiStepSchedule(self.warmup_steps, self.milestones, self.fractions) if self.milestones else None


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
        UserError: milestones do not ascend, begin within the warm-up, or have another number than the fractions; or a
            fraction is negative or not finite. The key is `training.schedule`.
    """

    warmup_steps: float = 0
    milestones: Sequence[int] = ()
    fractions: Sequence[float] = ()

    def __post_init__(self) -> None:
        steps = list(self.milestones)
        if len(steps) != len(self.fractions):
            fault = (
                f"There are {len(steps)} milestones and {len(self.fractions)} fractions; give one fraction for each."
            )
        elif steps != sorted(set(steps)) or (steps and steps[0] < self.warmup_steps):
            fault = f"milestones {steps} must ascend, from warmup_steps {self.warmup_steps} on."
        elif not all(0 <= fraction < float("inf") for fraction in self.fractions):
            fault = f"fractions {list(self.fractions)} must be 0 or more."
        else:
            return
        raise UserError("training.schedule", fault)

    def fraction(self, step: int) -> float:
        """Fraction of the peak rate in the optimiser step with this index, counted from 0."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        passed = sum(step >= milestone for milestone in self.milestones)
        return self.fractions[passed - 1] if passed else 1.0

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """A scheduler of `optimizer`, whose rate is the peak."""
        return LambdaLR(optimizer, self.fraction)


def bf16_is_faster() -> bool:
    """Whether this machine's default device has instructions that multiply matrices in bfloat16.

    True on recent GPUs and on CPUs with AMX, AVX512-BF16 or Arm's BF16; others emulate bfloat16, and autocast would
    slow training down. The answer comes from the machine's flags (Linux), not from a measurement, so that an
    interrupted run gets the same answer when it is resumed.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(words)
