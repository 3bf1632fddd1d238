"""The page: a question, two exits side by side, what each costs, and what each finds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from modular_star_encoder.demo.session import (
    EXPECTED_ERRORS,
    LONGEST_QUESTION,
    LinkTo,
    Reply,
    SearchSession,
    message_html,
    one_sentence,
    results_html,
)
from modular_star_encoder.inference.exit_profile import ExitProfile, Measurement, checkpoint_profile


@dataclass(frozen=True, slots=True)
class ExitCosts:
    """The exit profile of a checkpoint, or why there is none to show.

    Attributes:
        profile: the profile of exactly these weights; None if there is none.
        reason: why there is no profile, and how to make one; empty if there is one.
        note: a sentence if the profile was measured on another machine, else empty.
    """

    profile: ExitProfile | None
    reason: str = ""
    note: str = ""

    @classmethod
    def of(cls, checkpoint: str, checksum: str) -> ExitCosts:
        """Load the profile in a checkpoint's folder if it was measured with the weights of this checksum.

        Args:
            checkpoint: folder or Hub id.
            checksum: see `checkpoint_checksum`.
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
        if profile.checkpoint != checksum:
            return cls(None, f"The exit profile of {name} is of other weights: {advice}")
        moved = any("another machine" in str(one.message) for one in caught)
        return cls(profile, note="Measured on another machine: its times may not hold here." if moved else "")


def short_name(checkpoint: str) -> str:
    """Return the last folder name of a checkpoint's path, so that the page shows no private paths, or its Hub id."""
    folder = os.path.expanduser(checkpoint)
    return Path(folder).name if os.path.isabs(folder) or os.path.isdir(folder) else checkpoint


def cost_card(costs: ExitCosts, exit_layer: int) -> str:
    """Return HTML of one exit's latency, quality, memory and size, each relative to the largest of all exits."""
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
    """Return HTML of one line that says how and on which machine the profile was measured; empty without a profile."""
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
    """Return a labelled value and its bar; the full bar is the largest value of any exit."""
    value = values[exit_layer]
    largest = max((abs(one) for one in values.values() if one is not None), default=0.0)
    share = 0.0 if value is None or not largest else min(max(value / largest, 0.0), 1.0)
    shown = "not measured" if value is None else pattern.format(value)
    return (
        f'<div class="mose-meter mose-{kind}"><span class="mose-label" title="{escape(label)}">{escape(label)}</span>'
        f'<span class="mose-bar"><i style="width:{100 * share:.1f}%"></i></span><b>{escape(shown)}</b></div>'
    )


_ASK = "Ask in plain words what the code should do, and press Enter."
_ONE_EXIT = "The index has one exit: “mose index FOLDER --exit-layers all --rebuild” makes one to compare exits in."


class SearchPage:
    """The functions that the page's components call, independent of Gradio.

    Args:
        session: an open index.
        costs: costs of its exits.
        link_to: makes links to files.
    """

    def __init__(self, session: SearchSession, costs: ExitCosts, link_to: LinkTo) -> None:
        self.session, self.costs, self.link_to = session, costs, link_to

    @property
    def sides(self) -> int:
        """How many exits are compared: two, or the only one."""
        return min(len(self.session.exit_layers), 2)

    def header(self) -> str:
        """HTML that says what is searched."""
        folder = os.path.basename(self.session.index.folder)
        exits = ", ".join(map(str, self.session.exit_layers))
        facts = (
            f"{self.session.index.store.count():,} functions and windows",
            f"exit{'s' if len(self.session.exit_layers) > 1 else ''} {exits}",
            f"checkpoint {short_name(self.session.checkpoint)}",
        )
        head = f"<h1>Search <em>{escape(folder)}</em></h1><p>{' · '.join(map(escape, facts))}</p>"
        problem = message_html(self.session.problem, error=True) if self.session.problem else ""
        return f'<div class="mose-header">{head}</div>{problem}'

    def costs_at(self, position: Any) -> str:
        """HTML of the costs of the exit at a position of the slider."""
        exit_layer = self._exit_at(position)
        return f"<h2>Exit {exit_layer}</h2>{cost_card(self.costs, exit_layer)}"

    def footer(self) -> str:
        """Return HTML that says how the costs were measured."""
        one_exit = message_html(_ONE_EXIT) if self.sides == 1 else ""
        return circumstances(self.costs) + one_exit

    def answer(
        self, question: str, languages: Sequence[str] | None, path: str, rerank_exit_layer: Any, *positions: Any
    ) -> list[str]:
        """HTML of the results at the exits of all sliders; an error is one sentence on the first side.

        Args:
            question: as it was typed.
            languages, path: filters; empty for all.
            rerank_exit_layer: an exit of the checkpoint, or 0 for no re-ranking.
            positions: positions of the sliders.
        """
        try:
            exits = [self._exit_at(position) for position in positions]
            replies = [
                self.session.ask(
                    question or "",
                    exit_layer,
                    languages=tuple(languages or ()),
                    path=path or "",
                    rerank_exit_layer=int(rerank_exit_layer or 0) or None,
                )
                for exit_layer in exits
            ]
        except EXPECTED_ERRORS as error:
            return [message_html(one_sentence(error), error=True), *[""] * (len(positions) - 1)]
        others: list[Reply | None] = [*reversed(replies)] if len(replies) > 1 else [None]
        return [
            results_html(self.session, reply, other, self.link_to) for reply, other in zip(replies, others, strict=True)
        ]

    def moved(self, question: str, *arguments: Any) -> list[str]:
        """Return what `answer` returns after an exit or a filter changed; without a question, return instructions."""
        if not (question or "").strip():
            return [message_html(_ASK), *[""] * (self.sides - 1)]
        return self.answer(question, *arguments)

    def _exit_at(self, position: Any) -> int:
        """Return the exit at a slider position; invalid positions from a client are accepted."""
        exits = self.session.exit_layers
        return exits[min(max(int(position or 0), 0), len(exits) - 1)]


def build_blocks(page: SearchPage) -> Any:
    """The `gradio.Blocks` of a page.

    Raises:
        ImportError: Gradio isn't installed.
    """
    gradio = import_gradio()
    last = len(page.session.exit_layers) - 1
    with gradio.Blocks(title="mose search", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML(page.header())
        with gradio.Row(elem_classes="mose-ask"):
            question = gradio.Textbox(
                label="Question",
                placeholder=_ASK,
                max_lines=1,
                max_length=LONGEST_QUESTION,
                scale=6,
                elem_id="question",
            )
            button = gradio.Button("Search", variant="primary", scale=0, min_width=120, elem_id="search")
        with gradio.Row():
            languages = gradio.Dropdown(
                list(page.session.index.settings.languages), multiselect=True, label="Languages (all if none is chosen)"
            )
            path = gradio.Textbox(label="Files", placeholder="all, or a pattern: *.py or src/**", max_lines=1)
            deeper = page.session.rerank_exit_layers
            rerank = gradio.Dropdown(
                [("no", 0), *((f"by exit {one}", one) for one in deeper)],
                value=0,
                label="Re-rank the best",
                visible=bool(deeper),
            )
        sliders, results = [], []
        with gradio.Row(equal_height=False, elem_classes="mose-sides"):
            for side in range(page.sides):
                slider, result = _side(gradio, page, last if side == 1 else 0, side)
                sliders.append(slider)
                results.append(result)
        gradio.HTML(page.footer())
        inputs = [question, languages, path, rerank, *sliders]
        options = {"inputs": inputs, "outputs": results, "concurrency_id": "search", "concurrency_limit": 1}
        # The page's functions are not an API: programs use `mose search --json`.
        options |= {"api_visibility": "private", "show_progress": "minimal"}
        gradio.on([button.click, question.submit], page.answer, **options)
        changes = [languages.change, path.submit, rerank.change, *(slider.change for slider in sliders)]
        gradio.on(changes, page.moved, trigger_mode="always_last", **options)
    return blocks


def _side(gradio: Any, page: SearchPage, position: int, side: int) -> tuple[Any, Any]:
    """One exit: its slider, its costs, its results."""
    exits = page.session.exit_layers
    with gradio.Column(min_width=420, elem_classes="mose-side"):
        with gradio.Column(elem_classes="mose-exit", elem_id=f"exit-{side + 1}"):
            slider = gradio.Slider(
                0,
                max(len(exits) - 1, 1),
                value=position,
                step=1,
                label="Exit" if page.sides == 1 else ("Exit", "Compared with exit")[side],
                interactive=len(exits) > 1,
                buttons=[],
            )
            gradio.HTML(_ticks(exits))
            costs = gradio.HTML(page.costs_at(position), elem_classes="mose-costs")
        result = gradio.HTML(message_html(_ASK) if side == 0 else "", elem_id=f"results-{side + 1}")
        slider.change(
            page.costs_at, slider, costs, trigger_mode="always_last", api_visibility="private", show_progress="hidden"
        )
    return slider, result


def _ticks(exits: Sequence[int]) -> str:
    return f'<div class="mose-ticks" aria-hidden="true">{"".join(f"<span>{one}</span>" for one in exits)}</div>'


def import_gradio() -> Any:
    """Import Gradio with its analytics switched off.

    Raises:
        ImportError: it isn't installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported, too
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            "The page needs Gradio, which is not installed: pip install 'modular-star-encoder[demo]'"
        ) from error
    return gradio
