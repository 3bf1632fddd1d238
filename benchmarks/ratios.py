"""Contenders that take turns in one run, and what one takes as a ratio of the other.

Absolute times change from hour to hour on a shared machine. Contenders that run one after the other, again and again,
in an order drawn anew for each round, meet the same machine; so each round gives a ratio, and the median of those is
the figure. Its 95 % interval is a bootstrap over the rounds.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

Seconds = dict[str, list[float]]


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: int = 1, name: str = "timing"
) -> Seconds:
    """Seconds of each contender in each round, rounds of warm-up left out."""
    seconds: Seconds = {contender: [] for contender in contenders}
    generator = random.Random(0)
    for done in tqdm(range(-warm_up, rounds), desc=name, unit="round", leave=False):
        for contender in generator.sample(sorted(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[contender]()
            if done >= 0:
                seconds[contender].append(time.perf_counter() - start)
    return seconds


def median_of(values: Sequence[float]) -> dict[str, float | int]:
    """Median, its 95 % bootstrap interval, and the number of rounds."""
    sample = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(sample), size=(2000, len(sample)))
    low, high = np.percentile(np.median(sample[drawn], axis=1), [2.5, 97.5])
    return {
        "value": round(float(np.median(sample)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "rounds": len(sample),
    }


def ratio(seconds: Seconds, numerator: str, denominator: str, *, scale: float = 1.0) -> dict[str, float | int]:
    """`scale` × numerator / denominator, round by round."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return median_of([scale * over / under for over, under in pairs])


def figure(
    name: str, measured: Mapping[str, Any], *, most: float | None = None, least: float | None = None, **more: Any
) -> dict[str, Any]:
    """One row of a results file: what was measured, and the target where there is one (`most` or `least`)."""
    target = {} if most is None and least is None else {"most": most} if least is None else {"least": least}
    return {"name": name, **measured, **target, **more}


def is_met(row: Mapping[str, Any]) -> bool | None:
    """Whether the figure reaches its target; None without one."""
    if "most" in row:
        return row["value"] <= row["most"]
    return row["value"] >= row["least"] if "least" in row else None


def describe(row: Mapping[str, Any]) -> str:
    """`1.03 × (1.01–1.05)`."""
    unit = row.get("unit", "×")
    interval = f" ({row['low']:.2f}–{row['high']:.2f})" if "low" in row else ""
    value = f"{row['value']:.2f}" if abs(row["value"]) >= 0.01 else f"{row['value']:.1e}"
    return f"{value} {unit}{interval}"


def target_of(row: Mapping[str, Any]) -> str:
    """`≤ 1.1 ×`, or nothing."""
    for key, sign in (("most", "≤"), ("least", "≥")):
        if key in row:
            return f"{sign} {row[key]:g} {row.get('unit', '×')}"
    return ""
