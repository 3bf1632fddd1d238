"""The demo page as HTML: a field for a question, and two exits side by side, each with its costs and search results."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from operator import attrgetter
from pathlib import Path
from typing import Any

from pygments import format
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_by_name
from pygments.token import Text, _TokenType
from pygments.util import ClassNotFound

from modular_star_encoder.inference.exit_profile import ExitProfile, checkpoint_profile
from modular_star_encoder.search.hits import Answer, Hit
from modular_star_encoder.search.index import LONGEST_QUESTION, CodeIndex
from modular_star_encoder.search.ranking import Cascade
from modular_star_encoder.search.vector_store import LONGEST_PATH, readable_path
from modular_star_encoder.utils.errors import UserError, naming_extra
from modular_star_encoder.utils.reports import printable

TOP_K = 5
MOST_WAITING = 100  # largest number of questions that wait for an answer; more are refused (HTTP status 503)
BAD_REQUEST = "The server can't use this request. Reload the demo page."
_CANDIDATES = 50
# Errors that a user can fix: the page shows one sentence instead of a traceback.
_EXPECTED_ERRORS = (ValueError, OSError, ImportError)


@dataclass(frozen=True, slots=True)
class ExitCosts:
    """The exit profile of a checkpoint (the costs of its exits), or the reason why the profile can't be shown."""

    profile: ExitProfile | None  # None if the profile is missing, unreadable or of other weights
    note: str = ""  # why there is no profile, and how to measure one; or that another machine measured it

    @classmethod
    def of(cls, checkpoint: str, checksum: str, name: str) -> ExitCosts:
        """Return a checkpoint's profile, or only a note if the profile is missing, unreadable or of other weights."""
        advice = f"“mose profile {name}” measures the cost of each exit; its option --quality adds scores."
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                profile = checkpoint_profile(checkpoint)
        except FileNotFoundError:
            return cls(None, f"{name} has no exit profile: {advice}")
        except (ValueError, OSError):
            return cls(None, f"The exit profile of {name} can't be read: {advice}")
        if profile.checkpoint != checksum:
            return cls(None, f"The exit profile of {name} was measured with other weights: {advice}")
        moved = any("another machine" in str(one.message) for one in caught)
        return cls(profile, "The times were measured on another machine and may differ on this one." if moved else "")


def short_name(checkpoint: str) -> str:
    """Return the name to show for a checkpoint on a page that may be public: a Hub id, or the last part of a path."""
    folder = os.path.expanduser(checkpoint)
    return Path(folder).name if os.path.isabs(folder) or os.path.isdir(folder) else checkpoint


def cost_card(costs: ExitCosts, exit_layer: int) -> str:
    """Return HTML with a bar for each cost and quality score of an exit; full bars mean the top value of all exits."""
    if (profile := costs.profile) is None:
        return f'<p class="mose-note">{escape(costs.note)}</p>'
    if exit_layer not in profile.exits:
        return f'<p class="mose-note">The exit profile has no measurements of exit {exit_layer}.</p>'
    measured = {one: profile.measurement(one, profile.shapes[0]) for one in profile.exits}
    rows = [
        _meter("latency", {k: one.latency_ms_p50 for k, one in measured.items()}, exit_layer, "{:,.1f} ms"),
        _meter("memory", {k: one.peak_memory_mb for k, one in measured.items()}, exit_layer, "{:,.0f} MB"),
        _meter("parameters", {k: one.parameters / 1e6 for k, one in profile.exits.items()}, exit_layer, "{:,.1f} M"),
    ]
    for benchmark in profile.benchmarks:
        values = {k: one.quality.get(benchmark) for k, one in profile.exits.items()}
        rows.append(_meter(benchmark, values, exit_layer, "{:.3f}", kind="quality"))
    if not profile.benchmarks:
        rows.append(
            '<p class="mose-note">The profile has no quality scores. To add some, use “mose profile --quality”.</p>'
        )
    return f'<div class="mose-meters">{"".join(rows)}</div>'


def circumstances(costs: ExitCosts) -> str:
    """Return a line of HTML that says how and on which machine `costs` were measured; "" if they have no profile."""
    if (profile := costs.profile) is None:
        return ""
    size, length = profile.shapes[0]
    processor, threads = profile.machine.get("processor", "unknown processor"), profile.machine.get("threads", "?")
    machine = profile.machine.get("gpu") or f"{processor}, {threads} thread{'s' * (threads != 1)}"
    text = f"Latency: median time to embed a batch of {size} × {length} tokens; memory: peak of a process. Measured on "
    text += f"{profile.date}: {machine}, {profile.device}, {profile.dtype}. {costs.note}"
    return f'<p class="mose-note">{escape(text.strip())}</p>'


def _meter(label: str, values: Mapping[int, float | None], exit_layer: int, pattern: str, *, kind: str = "cost") -> str:
    value = values[exit_layer]
    largest = max((abs(one) for one in values.values() if one is not None), default=0.0)
    share = 0.0 if value is None or not largest else min(max(value / largest, 0.0), 1.0)
    shown = "not measured" if value is None else pattern.format(value)
    return (
        f'<div class="mose-meter mose-{kind}"><span class="mose-label" title="{escape(label)}">{escape(label)}</span>'
        f'<span class="mose-bar"><i style="width:{100 * share:.1f}%"></i></span><b>{escape(shown)}</b></div>'
    )


_ASK = "Say in plain words what the code should do, and press Enter."
_ONE_EXIT = "The index has only one exit. For all exits, run “mose index FOLDER --exit-layers all --rebuild”."


class SearchPage:
    """The methods that the components of the demo page call. The methods return HTML and do not need Gradio."""

    def __init__(self, index: CodeIndex, link_to: LinkTo, checkpoint: str | None = None) -> None:
        self.index, self.link_to = index, link_to
        self.checkpoint = checkpoint or index.settings.checkpoint
        self.exit_layers = index.settings.exit_layers
        self.sides = min(len(self.exit_layers), 2)
        self.rerank_exit_layers: tuple[int, ...] = ()
        self.problem = ""
        try:
            if checkpoint is not None:
                self.index = CodeIndex.open(index.store, checkpoint=checkpoint)
            exits = self.index.embedder.trained_exits
            # This loads the layers up to the index's deepest exit, so that no measured search includes loading them.
            self.index.search(["warm up"], top_k=1, exit_layer=self.exit_layers[-1])
            self.rerank_exit_layers = tuple(one for one in exits if one > self.exit_layers[0])
            model, name = self.index.embedder.checkpoint, short_name(self.checkpoint)
            self.costs = ExitCosts.of(model, index.settings.checksum, name)
        except _EXPECTED_ERRORS as error:
            self.problem = _one_sentence(error)
            self.costs = ExitCosts(None, "The checkpoint can't be used, so its costs are unknown.")

    def header(self) -> str:
        """Return HTML with the searched folder's name, its number of pieces of code, the exits and the checkpoint."""
        exits = f"exit{'s' if self.sides > 1 else ''} {', '.join(map(str, self.exit_layers))}"
        facts = f"{self.index.store.count():,} pieces of code · {exits} · checkpoint {short_name(self.checkpoint)}"
        folder, line = (escape(printable(text)) for text in (os.path.basename(self.index.folder), facts))
        problem = message_html(self.problem, error=True) if self.problem else ""
        return f'<div class="mose-header"><h1>Search <em>{folder}</em></h1><p>{line}</p></div>{problem}'

    def costs_at(self, position: Any) -> str:
        """Return HTML with the costs of the exit at a slider's `position`; 0 is the index's shallowest exit."""
        exit_layer = self._exit_at(position)
        return f"<h2>Exit {exit_layer}</h2>{cost_card(self.costs, exit_layer)}"

    def footer(self) -> str:
        """Return HTML on how costs were measured and, if the index has only one exit, on how to index all exits."""
        return circumstances(self.costs) + (message_html(_ONE_EXIT) if self.sides == 1 else "")

    def answer(
        self, question: str | None, languages: Sequence[str] | None, path: str | None, rerank: Any, *positions: Any
    ) -> list[str]:
        """Search at the exit of each slider position (see `costs_at`); return one HTML text of hits per position.

        If the question is empty or an error occurs, the first text says what to do. `rerank`: a deeper exit, or 0.
        """
        rest = [""] * (len(positions) - 1)
        if not question or not question.strip():
            return [message_html(_ASK), *rest]
        try:
            where = {"languages": languages or None, "path": path if (path or "").strip() else None}
            deeper = rerank if type(rerank) is int and rerank in self.rerank_exit_layers else 0
            replies = [self._ask(question, self._exit_at(position), deeper, where) for position in positions]
        except _EXPECTED_ERRORS as error:
            return [message_html(_one_sentence(error), error=True), *rest]
        others = reversed(replies) if len(replies) > 1 else [None]
        folder = readable_path(self.index.folder)
        return [results_html(*pair, folder, self.link_to) for pair in zip(replies, others, strict=True)]

    def _ask(self, question: str, exit_layer: int, rerank: int, where: dict[str, Any]) -> Reply:
        fault = self.problem
        if len(question) > LONGEST_QUESTION:
            fault = f"The question has {len(question):,} characters; shorten it to at most {LONGEST_QUESTION:,}."
        if fault:
            raise UserError("demo.question", fault)
        cascade = Cascade(rerank, _CANDIDATES) if rerank > exit_layer else None
        self.index.embedder.forget()  # so that the time of a repeated question includes re-embedding
        start = time.perf_counter()
        (answer,) = self.index.search([question], top_k=TOP_K, exit_layer=exit_layer, cascade=cascade, **where)
        return Reply(answer, exit_layer, 1000 * (time.perf_counter() - start))

    def _exit_at(self, position: Any) -> int:
        if not isinstance(position, int | float) or position != position:  # None, or NaN
            position = 0
        return self.exit_layers[int(min(max(position, 0), len(self.exit_layers) - 1))]


def _one_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


FIRST_LINES = 9
MOST_CHARACTERS = 10_000  # largest number of characters shown of a hit's code; in HTML, each may take twenty
_LONGEST_LINE = 1000
_SECONDS, _SECONDS_PER_CHARACTER = 0.1, 2e-5

LinkTo = Callable[[str, Hit], str | None]
"""A function of a file's path in the indexed folder and a hit in the file; returns the hit's web address, or None."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a question at one exit, and the time that it took."""

    answer: Answer
    exit_layer: int  # the exit whose embeddings were searched; a deeper exit may have re-ranked the hits
    milliseconds: float  # wall-clock time to embed the question, search and re-rank, without cached embeddings


def results_html(reply: Reply, other: Reply | None, folder: str, link_to: LinkTo) -> str:
    """Return HTML of the hits of `reply`, each with its path relative to `folder` and its rank in the reply `other`."""
    asked = f"exit {reply.exit_layer}"
    if reply.answer.reranked:
        asked += f", re-ranked by exit {max(hit.exit_layer or 0 for hit in reply.answer.hits)}"
    head = f'<p class="mose-asked"><b>{asked}</b> · this question took {reply.milliseconds:,.0f} ms</p>'
    if not reply.answer.hits:
        return head + message_html("Nothing was found. Choose more languages or more files.")
    hits = []
    best = max(hit.score for hit in reply.answer.hits)
    for rank, hit in enumerate(reply.answer.hits, 1):
        badge = "" if other is None else _badge(rank, hit, other)
        path = os.path.relpath(hit.path, folder).replace(os.sep, "/")
        share = max(hit.score / best, 0.0) if best > 0 else 0.0
        hits.append(_hit_html(rank, hit, path, link_to(path, hit), badge, share))
    return head + "".join(hits)


def message_html(text: str, *, error: bool = False) -> str:
    """Return HTML with `text` as a note or, if `error`, as an error message; screen readers announce both."""
    kind, role = ("mose-error", "alert") if error else ("mose-note", "status")
    return f'<p class="{kind}" role="{role}">{escape(printable(text))}</p>'


def highlighted(text: str, language: str, formatter: HtmlFormatter) -> str:
    """Return code as HTML, coloured by `formatter`. After a time limit, the rest stays uncoloured."""
    text += "\n"  # some lexers need the end of the last line
    end = time.thread_time() + _SECONDS + _SECONDS_PER_CHARACTER * len(text)
    options = {"startinline": True} if language == "php" else {}
    try:
        lexer = get_lexer_by_name(language, stripnl=False, **options)
    except ClassNotFound:
        lexer = TextLexer(stripnl=False)

    def tokens() -> Iterator[tuple[_TokenType, str]]:
        for place, kind, value in lexer.get_tokens_unprocessed(text):
            if time.thread_time() > end:
                yield Text, text[place:]
                return
            yield kind, value

    return str(format(tokens(), formatter))


def code_html(text: str, language: str) -> str:
    """Return HTML of highlighted code, without a `<pre>` around it. A � replaces each unprintable character."""
    # `splitlines` would also split at some unprintable characters, which `printable` must replace.
    lines = [printable(line)[:_LONGEST_LINE] for line in text.replace("\r\n", "\n").split("\n")]
    return highlighted("\n".join(lines), language, HtmlFormatter(nowrap=True)).rstrip("\n")


def code_styles() -> str:
    """Return the CSS rules that colour the HTML of `code_html`, on light and dark pages."""
    light = HtmlFormatter(style="default").get_style_defs(".mose-code")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".dark .mose-code")
    return f"{light}\n{dark}"


def _hit_html(rank: int, hit: Hit, path: str, address: str | None, badge: str, share: float) -> str:
    place = escape(printable(f"{path}:{hit.line}"))
    if address is not None:
        place = f'<a href="{escape(address)}" target="_blank" rel="noopener noreferrer">{place}</a>'
    name = escape(printable(hit.name)) or "lines"
    return (
        f'<article class="mose-hit"><header><span class="mose-rank">{rank}</span><b class="mose-name">{name}</b>'
        f'{badge}<span class="mose-score" title="score; a full bar is the best hit">'
        f'<span class="mose-bar"><i style="width:{100 * share:.1f}%"></i></span>{hit.score:.3f}</span></header>'
        f'<div class="mose-place">{place} · {escape(printable(hit.language))}</div>{_code_block(hit)}</article>'
    )


def _code_block(hit: Hit) -> str:
    text = hit.text[:MOST_CHARACTERS].rstrip()
    lines = code_html(text, hit.language).split("\n")  # Pygments closes its tags at the end of each line
    first = "\n".join(lines[:FIRST_LINES])
    block = f'<pre class="mose-code">{first}</pre>'
    if len(lines) <= FIRST_LINES:
        return block
    whole = "\n".join(lines) + ("\n… more in the file" if len(hit.text) > MOST_CHARACTERS else "")
    hidden = len(lines) - FIRST_LINES
    more = f"{hidden:,} more line{'s' if hidden > 1 else ''}"
    return f'<details><summary>{block}<span>{more}</span></summary><pre class="mose-code">{whole}</pre></details>'


def _badge(rank: int, hit: Hit, other: Reply) -> str:
    """Return HTML with the rank that a hit has in the reply `other`; its colour shows if that differs from `rank`."""
    place = attrgetter("path", "line", "last_line", "name")
    places = [place(one) for one in other.answer.hits]
    if place(hit) not in places:
        return f'<span class="mose-badge mose-new">not among the {len(places)} found at exit {other.exit_layer}</span>'
    other_rank = places.index(place(hit)) + 1
    kind = "mose-same" if other_rank == rank else "mose-moved"
    return f'<span class="mose-badge {kind}">#{other_rank} at exit {other.exit_layer}</span>'


def build_blocks(page: SearchPage) -> Any:
    """Return the page as `gradio.Blocks`; its components call methods of `page`. ImportError if Gradio is missing."""
    gradio = import_gradio()
    with gradio.Blocks(title="mose search", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML(page.header())
        with gradio.Row(elem_classes="mose-ask"):
            options = {"label": "Question", "placeholder": _ASK, "max_lines": 1, "max_length": LONGEST_QUESTION}
            question = gradio.Textbox(scale=6, elem_id="question", **options)
            button = gradio.Button("Search", variant="primary", scale=0, min_width=120, elem_id="search")
        with gradio.Row():
            known = list(page.index.settings.languages)
            languages = gradio.Dropdown(known, multiselect=True, label="Languages (all if none is chosen)")
            options = {"label": "Files", "placeholder": "all, or a pattern: *.py or src/**", "max_lines": 1}
            path = gradio.Textbox(max_length=LONGEST_PATH, **options)
            deeper = page.rerank_exit_layers
            choices = [("no", 0), *((f"by exit {one}", one) for one in deeper)]
            rerank = gradio.Dropdown(choices, value=0, label="Re-rank the best", visible=bool(deeper))
        with gradio.Row(equal_height=False, elem_classes="mose-sides"):
            sliders, results = zip(*(_side(gradio, page, side) for side in range(page.sides)), strict=True)
        gradio.HTML(page.footer())
        inputs = [question, languages, path, rerank, *sliders]
        options = {"inputs": inputs, "outputs": [*results], "concurrency_id": "search", "concurrency_limit": 1}
        # The page's functions are not an API: programs use `mose search --json`.
        options |= {"api_visibility": "private", "show_progress": "minimal"}
        gradio.on([button.click, question.submit], page.answer, **options)
        changes = [languages.change, path.submit, rerank.change, *(slider.change for slider in sliders)]
        gradio.on(changes, page.answer, trigger_mode="always_last", **options)
    # The queue limits how many questions wait; without it, clients could ask any number at once.
    blocks.queue(max_size=MOST_WAITING, api_open=False)
    blocks.preprocess_data = _without_tracebacks(blocks.preprocess_data, gradio.Error)
    return blocks


def _without_tracebacks(read_values: Callable[..., Any], gradio_error: Callable[..., Exception]) -> Callable[..., Any]:
    """Wrap the function with which Gradio reads a request's values, so that invalid values print no traceback."""

    async def read(*arguments: Any, **options: Any) -> Any:
        try:
            return await read_values(*arguments, **options)
        except Exception as error:
            raise gradio_error(BAD_REQUEST, print_exception=False) from error

    return read


def _side(gradio: Any, page: SearchPage, side: int) -> tuple[Any, Any]:
    """Add the column number `side` (0 or 1), which shows one exit, to the page; return its slider and its hits."""
    last = len(page.exit_layers) - 1
    position = last if side == 1 else 0
    with gradio.Column(min_width=420, elem_classes="mose-side"):
        with gradio.Column(elem_classes="mose-exit", elem_id=f"exit-{side + 1}"):
            label = ("Exit", "Compared with exit")[side]
            options: dict[str, Any] = {"step": 1, "label": label, "interactive": last > 0, "buttons": []}
            slider = gradio.Slider(0, max(last, 1), value=position, **options)
            ticks = "".join(f"<span>{one}</span>" for one in page.exit_layers)
            gradio.HTML(f'<div class="mose-ticks" aria-hidden="true">{ticks}</div>')
            costs = gradio.HTML(page.costs_at(position), elem_classes="mose-costs")
        result = gradio.HTML(message_html(_ASK) if side == 0 else "", elem_id=f"results-{side + 1}")
        options = {"trigger_mode": "always_last", "api_visibility": "private", "show_progress": "hidden"}
        slider.change(page.costs_at, slider, costs, **options)
    return slider, result


def import_gradio() -> Any:
    """Import and return `gradio` without its analytics; if it is not installed, the ImportError names the extra."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio also reads it at import
    with naming_extra():
        import gradio
    return gradio
