"""The schedule of pre-training."""

import pytest
import torch

from modular_star_encoder.training.arguments import MultiStepSchedule
from tests.errors import raises

PAPER = MultiStepSchedule(4_000, (120_000, 185_000, 220_000, 230_000, 240_000), (0.36, 0.1, 0.031, 0.01, 0.001))


@pytest.mark.parametrize(
    ("step", "fraction"),
    [
        (0, 0.0),
        (1, 1 / 4_000),
        (3_999, 3_999 / 4_000),
        (4_000, 1.0),
        (119_999, 1.0),
        (120_000, 0.36),
        (184_999, 0.36),
        (185_000, 0.1),
        (219_999, 0.1),
        (220_000, 0.031),
        (229_999, 0.031),
        (230_000, 0.01),
        (239_999, 0.01),
        (240_000, 0.001),
        (244_999, 0.001),
    ],
)
def test_the_papers_rate_at_every_boundary(step, fraction):
    assert PAPER.fraction(step) == pytest.approx(fraction)


def test_the_scheduler_sets_these_rates():
    schedule = MultiStepSchedule(2, (4, 5), (0.5, 0.1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=10.0)
    scheduler = schedule.scheduler(optimizer)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.0, 5.0, 10.0, 10.0, 5.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ((0, (5, 5), (0.1, 0.1)), "[5, 5]"),
        ((6, (5,), (0.1,)), "warmup_steps 6"),
        ((0, (5,), ()), "1 milestones and 0 fractions"),
        ((0, (5,), (-0.1,)), "[-0.1]"),
        ((0, (5,), (float("nan"),)), "[nan]"),
    ],
)
def test_contradictions_are_refused(arguments, value):
    with raises("training.schedule", value):
        MultiStepSchedule(*arguments)
