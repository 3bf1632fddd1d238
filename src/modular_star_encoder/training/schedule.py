"""Learning-rate schedules that `Trainer` does not have."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


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
