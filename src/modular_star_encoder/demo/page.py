"""The page: a question, two exits side by side, what each costs, and what each finds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from typing import Any

from modular_star_encoder.demo.exit_costs import ExitCosts, circumstances, cost_card, short_name
from modular_star_encoder.demo.results import LinkTo, message_html, results_html
from modular_star_encoder.demo.session import (
    EXPECTED_ERRORS,
    LONGEST_QUESTION,
    Reply,
    SearchSession,
    one_sentence,
)

_ASK = "Ask in plain words what the code should do, and press Enter."
_ONE_EXIT = "The index has one exit: “mose index FOLDER --exit-layers all --rebuild” makes one to compare exits in."


class SearchPage:
    """What the components of the page call; it knows nothing of Gradio.

    Args:
        session: an open index.
        costs: of its exits.
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
        """HTML of how the figures came to be."""
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
            positions: of the sliders.
        """
        try:
            exits = [self._exit_at(position) for position in positions]
            options = {
                "languages": tuple(languages or ()),
                "path": path or "",
                "rerank_exit_layer": int(rerank_exit_layer or 0) or None,
            }
            replies = [self.session.ask(question or "", exit_layer, **options) for exit_layer in exits]
        except EXPECTED_ERRORS as error:
            return [message_html(one_sentence(error), error=True), *[""] * (len(positions) - 1)]
        others: list[Reply | None] = [*reversed(replies)] if len(replies) > 1 else [None]
        return [
            results_html(self.session, reply, other, self.link_to) for reply, other in zip(replies, others, strict=True)
        ]

    def moved(self, question: str, *arguments: Any) -> list[str]:
        """The same after an exit or a filter was changed; before anything was asked, what to do."""
        if not (question or "").strip():
            return [message_html(_ASK), *[""] * (self.sides - 1)]
        return self.answer(question, *arguments)

    def _exit_at(self, position: Any) -> int:
        """The exit at a position of the slider, whatever a client sends."""
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
        # The functions of the page are no interface for programs: those have `mose search --json`.
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
    """Gradio, told to count and report nothing.

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
