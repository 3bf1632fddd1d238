"""The hits of a search as HTML for the demo page."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from operator import attrgetter

from pygments import format
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import PhpLexer, TextLexer, get_lexer_by_name
from pygments.token import Text, _TokenType
from pygments.util import ClassNotFound

from modular_star_encoder.search.hits import Answer, Hit, printable

FIRST_LINES = 9
MOST_CHARACTERS = 10_000
"""Maximum number of characters shown of a hit's code; in HTML, each may take twenty."""
_LONGEST_LINE = 1000
_SECONDS, _SECONDS_PER_CHARACTER = 0.1, 2e-5

LinkTo = Callable[[str, Hit], str | None]
"""Maps a file's path in the indexed folder and a hit in this file to the web address of the hit, or to None."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a question at one exit, and the time that it took."""

    answer: Answer
    exit_layer: int  # the exit whose embeddings were searched; a deeper exit may have re-ranked the hits
    milliseconds: float  # wall-clock time to embed the question, search and re-rank, without cached embeddings


def results_html(reply: Reply, other: Reply | None, folder: str, link_to: LinkTo) -> str:
    """Return HTML with the hits of `reply`; with `other`, another exit's reply, also show each hit's rank there.

    `folder` is the indexed folder; the HTML shows paths relative to this folder.
    """
    asked = f"exit {reply.exit_layer}"
    if reply.answer.reranked:
        asked += f", re-ranked by exit {max(hit.exit_layer or 0 for hit in reply.answer.hits)}"
    head = f'<p class="mose-asked"><b>{asked}</b> · this question took {reply.milliseconds:,.0f} ms</p>'
    if not reply.answer.hits:
        return head + message_html("Nothing was found. Choose more languages or more files.")
    hits = []
    for rank, hit in enumerate(reply.answer.hits, 1):
        badge = "" if other is None else _badge(rank, hit, other)
        path = os.path.relpath(hit.path, folder).replace(os.sep, "/")
        hits.append(_hit_html(rank, hit, path, link_to(path, hit), badge))
    return head + "".join(hits)


def message_html(text: str, *, error: bool = False) -> str:
    """Return HTML with `text` as a note or, if `error`, as an error message; screen readers announce both."""
    kind, role = ("mose-error", "alert") if error else ("mose-note", "status")
    return f'<p class="{kind}" role="{role}">{escape(printable(text))}</p>'


def lexer_for(language: str) -> Lexer:
    """Return the Pygments lexer of a language, or that of plain text if Pygments does not know the language."""
    if language == "php":
        return PhpLexer(startinline=True, stripnl=False)
    try:
        return get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return TextLexer(stripnl=False)


def highlighted(text: str, language: str, formatter: HtmlFormatter) -> str:
    """Return code as HTML, coloured by `formatter`; without colours from the point at which the time limit passes.

    Without a limit, some lexers would take a time that grows with the square of a hostile text's length.
    """
    text += "\n"  # some lexers need the end of the last line
    end = time.thread_time() + _SECONDS + _SECONDS_PER_CHARACTER * len(text)

    def tokens() -> Iterator[tuple[_TokenType, str]]:
        for place, kind, value in lexer_for(language).get_tokens_unprocessed(text):
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
    """Return HTML with the rank of a hit in the reply `other`."""
    place = attrgetter("path", "line", "last_line", "name")
    places = [place(one) for one in other.answer.hits]
    if place(hit) not in places:
        return f'<span class="mose-badge mose-new">not among the {len(places)} found at exit {other.exit_layer}</span>'
    other_rank = places.index(place(hit)) + 1
    kind = "mose-same" if other_rank == rank else "mose-moved"
    return f'<span class="mose-badge {kind}">#{other_rank} at exit {other.exit_layer}</span>'
