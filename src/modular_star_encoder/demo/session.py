"""Search an index for the demo page, with the time that it takes, and format the hits as HTML."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import PhpLexer, TextLexer, get_lexer_by_name
from pygments.util import ClassNotFound

from modular_star_encoder.search.hits import Answer, Hit, printable
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.ranking import Cascade
from modular_star_encoder.search.vector_store import readable_path
from modular_star_encoder.utils.errors import UserError

TOP_K = 5
CANDIDATES = 50
LONGEST_QUESTION = 2000
EXPECTED_ERRORS = (ValueError, OSError, ImportError)
"""Errors that a user can fix: the page shows one sentence instead of a traceback."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a question at one exit, and the time that it took.

    Attributes:
        answer: the hits.
        exit_layer: the exit that was searched, before any re-ranking.
        milliseconds: wall-clock time to embed the question and to rank; no cached embeddings are used.
    """

    answer: Answer
    exit_layer: int
    milliseconds: float


class SearchSession:
    """Answers questions from an open index, and lists the exits that can search it and re-rank the hits.

    Attributes:
        index: the index to search.
        checkpoint: folder or Hub id of the index's checkpoint.
        exit_layers: exits of the index, ascending.
        rerank_exit_layers: exits of the checkpoint deeper than the index's shallowest exit; empty if the checkpoint
            can't be used.
        problem: one sentence that says why the checkpoint can't be used; None if it can be used.

    Args:
        index: an index from `CodeIndex.open`; its checkpoint is opened here.
        checkpoint: folder or Hub id of the index's checkpoint, if it was moved.
    """

    def __init__(self, index: CodeIndex, checkpoint: str | None = None) -> None:
        self.index = index
        self.checkpoint = checkpoint or index.settings.checkpoint
        self.exit_layers = index.settings.exit_layers
        self.rerank_exit_layers: tuple[int, ...] = ()
        self.problem: str | None = None
        try:
            if checkpoint is not None:
                self.index = CodeIndex.open(index.store, checkpoint=checkpoint)
            exits = self.index.embedder.config.exit_layers
            # Load the layers of the deepest exit now, so that no question's time includes loading.
            self.index.search(["warm up"], top_k=1, exit_layer=self.exit_layers[-1])
        except EXPECTED_ERRORS as error:
            self.problem = one_sentence(error)
        else:
            self.rerank_exit_layers = tuple(one for one in exits if one > self.exit_layers[0])

    def ask(
        self,
        question: str,
        exit_layer: int,
        *,
        languages: Sequence[str] = (),
        path: str = "",
        rerank_exit_layer: int | None = None,
    ) -> Reply:
        """Search the index for a question at one exit.

        Args:
            question: a question in prose, at most 2000 characters.
            exit_layer: one of `exit_layers`.
            languages: search only these languages; all if empty.
            path: search only files that match this pattern; all if blank.
            rerank_exit_layer: a deeper exit that ranks the best hits again; ignored if it is not deeper.

        Raises:
            UserError: an argument is invalid, or the checkpoint can't be used.
            OSError, ImportError: as in `CodeIndex.search`.
        """
        if not question.strip() or len(question) > LONGEST_QUESTION:
            message = f"Type what the code should do, in at most {LONGEST_QUESTION:,} characters."
            raise UserError("demo.question", message)
        if self.problem:
            raise UserError("demo.checkpoint", self.problem)
        cascade = None
        if rerank_exit_layer is not None and rerank_exit_layer > exit_layer:
            cascade = Cascade(rerank_exit_layer, CANDIDATES)
        self.index.embedder.forget()  # else a repeated question would re-rank in no time
        start = time.perf_counter()
        (answer,) = self.index.search(
            [question],
            top_k=TOP_K,
            exit_layer=exit_layer,
            cascade=cascade,
            languages=languages or None,
            path=path if path.strip() else None,
        )
        return Reply(answer, exit_layer, 1000 * (time.perf_counter() - start))

    def path_of(self, hit: Hit) -> str:
        """Return a hit's path relative to the indexed folder, with forward slashes."""
        return os.path.relpath(hit.path, readable_path(self.index.folder)).replace(os.sep, "/")


def one_sentence(error: BaseException) -> str:
    """Return the message of an error as one line, or the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


FIRST_LINES = 9
MOST_LINES = 200
_LONGEST_LINE = 1000

LinkTo = Callable[[str, Hit], str | None]
"""Takes a hit's path and the hit; returns the web address of its file, or None."""


def results_html(session: SearchSession, reply: Reply, other: Reply | None, link_to: LinkTo) -> str:
    """Return HTML with the hits of a reply; if there is an `other` reply, each hit also shows its rank in that one."""
    asked = f"exit {reply.exit_layer}"
    if reply.answer.reranked:
        asked += f", re-ranked by exit {max(hit.exit_layer or 0 for hit in reply.answer.hits)}"
    head = f'<p class="mose-asked"><b>{asked}</b> · this question took {reply.milliseconds:,.0f} ms</p>'
    if not reply.answer.hits:
        return head + message_html("Nothing was found: allow more languages or more files.")
    ranks = {} if other is None else {_place(hit): rank for rank, hit in enumerate(other.answer.hits, 1)}
    hits = []
    for rank, hit in enumerate(reply.answer.hits, 1):
        badge = "" if other is None else _badge(rank, ranks.get(_place(hit)), other)
        path = session.path_of(hit)
        hits.append(_hit_html(rank, hit, path, link_to(path, hit), badge))
    return head + "".join(hits)


def message_html(text: str, *, error: bool = False) -> str:
    """Return HTML of a note or, with `error`, of an error message that screen readers announce."""
    kind, role = ("mose-error", "alert") if error else ("mose-note", "status")
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>'


def lexer_for(language: str) -> Lexer:
    """Return the Pygments lexer of a language; the lexer of plain text if Pygments does not know it."""
    if language == "php":
        return PhpLexer(startinline=True, stripnl=False)
    try:
        return get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return TextLexer(stripnl=False)


def code_html(text: str, language: str) -> str:
    """Return HTML of highlighted code, without a `<pre>` around it; unprintable characters are replaced."""
    # Split only at line feeds, as files do: `splitlines` also splits at characters that are to be replaced.
    lines = [printable(line)[:_LONGEST_LINE] for line in text.replace("\r\n", "\n").split("\n")]
    return highlight("\n".join(lines), lexer_for(language), HtmlFormatter(nowrap=True)).rstrip("\n")


def code_styles() -> str:
    """Return the CSS that colours highlighted code, for light and dark pages."""
    light = HtmlFormatter(style="friendly").get_style_defs(".mose-code")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".dark .mose-code")
    return f"{light}\n{dark}"


def _hit_html(rank: int, hit: Hit, path: str, address: str | None, badge: str) -> str:
    place = escape(printable(f"{path}:{hit.line}"))
    if address is not None:
        place = f'<a href="{escape(address)}" target="_blank" rel="noopener noreferrer">{place}</a>'
    name = escape(printable(hit.name)) or "lines"
    share = min(max(hit.score, 0.0), 1.0)
    return (
        f'<article class="mose-hit"><header><span class="mose-rank">{rank}</span><b class="mose-name">{name}</b>'
        f'{badge}<span class="mose-score" title="cosine similarity"><span class="mose-bar">'
        f'<i style="width:{100 * share:.1f}%"></i></span>{hit.score:.3f}</span></header>'
        f'<div class="mose-place">{place} · {escape(hit.language)}</div>{_code_block(hit)}</article>'
    )


def _code_block(hit: Hit) -> str:
    """Return HTML with the first lines of a hit; a click opens up to 200 lines."""
    lines = hit.text.rstrip().split("\n")
    first = code_html("\n".join(lines[:FIRST_LINES]), hit.language)
    block = f'<pre class="mose-code">{first}</pre>'
    if len(lines) <= FIRST_LINES:
        return block
    whole = code_html("\n".join(lines[:MOST_LINES]), hit.language)
    if len(lines) > MOST_LINES:
        whole += f"\n… {len(lines) - MOST_LINES:,} more lines in the file"
    hidden = len(lines) - FIRST_LINES
    more = f"{hidden:,} more line{'s' if hidden > 1 else ''}"
    return f'<details><summary>{block}<span>{more}</span></summary><pre class="mose-code">{whole}</pre></details>'


def _badge(rank: int, other_rank: int | None, other: Reply) -> str:
    """Return HTML with the rank of the same hit in the other reply, or a note that it is missing there."""
    if other_rank is None:
        count = len(other.answer.hits)
        return f'<span class="mose-badge mose-new">not among the {count} found at exit {other.exit_layer}</span>'
    kind = "mose-same" if other_rank == rank else "mose-moved"
    return f'<span class="mose-badge {kind}">#{other_rank} at exit {other.exit_layer}</span>'


def _place(hit: Hit) -> tuple[str, int, int, str]:
    return hit.path, hit.line, hit.last_line, hit.name
