"""What the exits cost and give, for the page: everything is read from the exit profile of the checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from modular_star_encoder.evaluation.exit_profile import ExitProfile, Measurement
from modular_star_encoder.hub.budget import checkpoint_profile


@dataclass(frozen=True, slots=True)
class ExitCosts:
    """The exit profile of a checkpoint, or why there is none to show.

    Attributes:
        profile: of these very weights; None if there is none.
        reason: why there is none, and how to make one; empty if there is.
        note: that it was measured on another machine; empty if it wasn't.
    """

    profile: ExitProfile | None
    reason: str = ""
    note: str = ""

    @classmethod
    def of(cls, checkpoint: str, fingerprint: str) -> ExitCosts:
        """The profile beside a checkpoint, if it was measured with the weights of this fingerprint.

        Args:
            checkpoint: folder or Hub id.
            fingerprint: see `checkpoint_fingerprint`.
        """
        name = short_name(checkpoint)
        advice = f"“mose profile {name}” measures what each exit costs, and with --quality adds what it gives."
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                profile = checkpoint_profile(checkpoint)
        except FileNotFoundError:
            return cls(None, f"{name} has no exit profile: {advice}")
        except (ValueError, OSError):
            return cls(None, f"The exit profile of {name} can't be read: {advice}")
        if profile.checkpoint != fingerprint:
            return cls(None, f"The exit profile of {name} is of other weights: {advice}")
        moved = any("another machine" in str(one.message) for one in caught)
        return cls(profile, note="Measured on another machine: its times may not hold here." if moved else "")


def short_name(checkpoint: str) -> str:
    """A checkpoint without the folders that lead to it, which are nobody's affair on a page; a Hub id as it is."""
    folder = os.path.expanduser(checkpoint)
    return Path(folder).name if os.path.isabs(folder) or os.path.isdir(folder) else checkpoint


def cost_card(costs: ExitCosts, exit_layer: int) -> str:
    """HTML of one exit's latency, quality, memory and size, each beside the largest of all exits."""
    if costs.profile is None:
        return f'<p class="mose-note">{escape(costs.reason)}</p>'
    profile = costs.profile
    if exit_layer not in profile.exits:
        return f'<p class="mose-note">The exit profile knows nothing of exit {exit_layer}.</p>'
    shape = profile.shapes[0]

    def measured(value: Callable[[Measurement], float | None]) -> dict[int, float | None]:
        return {one: value(profile.measurement(one, shape)) for one in profile.exits}

    sizes: dict[int, float | None] = {one: part.parameters / 1e6 for one, part in profile.exits.items()}
    rows = [
        _meter("latency", measured(lambda one: one.latency_ms_p50), exit_layer, "{:,.1f} ms"),
        _meter("memory", measured(lambda one: one.peak_memory_mb), exit_layer, "{:,.0f} MB"),
        _meter("parameters", sizes, exit_layer, "{:,.1f} M"),
    ]
    for benchmark in profile.benchmarks:
        values = {one: part.quality.get(benchmark) for one, part in profile.exits.items()}
        rows.append(_meter(benchmark, values, exit_layer, "{:.3f}", kind="quality"))
    if not profile.benchmarks:
        rows.append('<p class="mose-note">Its quality is not measured: “mose profile --quality” adds it.</p>')
    return f'<div class="mose-meters">{"".join(rows)}</div>'


def circumstances(costs: ExitCosts) -> str:
    """HTML of a line that says of what and on what the figures were measured; empty without a profile."""
    if costs.profile is None:
        return ""
    profile = costs.profile
    size, length = profile.shapes[0]
    machine = profile.machine.get("gpu") or (
        f"{profile.machine.get('processor', 'unknown processor')}, {profile.machine.get('threads', '?')} thread(s)"
    )
    text = (
        f"Latency: median time to embed {size} × {length} tokens; memory: the most that a process needs. Exit profile "
        f"of {profile.date}: {machine}, {profile.device}, {profile.dtype}. {costs.note}"
    )
    return f'<p class="mose-note">{escape(text.strip())}</p>'


def _meter(label: str, values: Mapping[int, float | None], exit_layer: int, pattern: str, *, kind: str = "cost") -> str:
    """A labelled figure and its bar, whose whole length is the largest figure of any exit."""
    value = values[exit_layer]
    largest = max((abs(one) for one in values.values() if one is not None), default=0.0)
    share = 0.0 if value is None or not largest else min(max(value / largest, 0.0), 1.0)
    shown = "not measured" if value is None else pattern.format(value)
    return (
        f'<div class="mose-meter mose-{kind}"><span class="mose-label" title="{escape(label)}">{escape(label)}</span>'
        f'<span class="mose-bar"><i style="width:{100 * share:.1f}%"></i></span><b>{escape(shown)}</b></div>'
    )
