"""Replies as HTML. Code and names of files are anybody's: all text is escaped, and what steers a display replaced."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import PhpLexer, TextLexer, get_lexer_by_name
from pygments.util import ClassNotFound

from modular_star_encoder.demo.session import Reply, SearchSession
from modular_star_encoder.search.display import printable
from modular_star_encoder.search.hits import Hit

FIRST_LINES = 9
MOST_LINES = 200
_LONGEST_LINE = 1000

LinkTo = Callable[[str, Hit], str | None]
"""From a hit's path and the hit to the address of its file, or None where there is none."""


def results_html(session: SearchSession, reply: Reply, other: Reply | None, link_to: LinkTo) -> str:
    """The hits of one exit.

    Args:
        session: knows the paths.
        reply: what to show.
        other: the reply of the exit on the other side, whose ranks are named; None if there is no other side.
        link_to: makes links.
    """
    asked = f"exit {reply.exit_layer}"
    if reply.answer.reranked:
        asked += f", re-ranked by exit {max(hit.exit_layer or 0 for hit in reply.answer.hits)}"
    head = f'<p class="mose-asked"><b>{asked}</b> · this question took {reply.milliseconds:,.0f} ms</p>'
    if not reply.answer.hits:
        return head + message_html("Nothing was found: allow more languages, or a wider path pattern.")
    ranks = {} if other is None else {_place(hit): rank for rank, hit in enumerate(other.answer.hits, 1)}
    hits = []
    for rank, hit in enumerate(reply.answer.hits, 1):
        badge = "" if other is None else _badge(rank, ranks.get(_place(hit)), other)
        path = session.path_of(hit)
        hits.append(_hit_html(rank, hit, path, link_to(path, hit), badge))
    return head + "".join(hits)


def message_html(text: str, *, error: bool = False) -> str:
    """One sentence."""
    kind, role = ("mose-error", "alert") if error else ("mose-note", "status")
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>'


def lexer_for(language: str) -> Lexer:
    """The lexer of one of our languages; plain text for any other."""
    if language == "php":
        return PhpLexer(startinline=True)
    try:
        return get_lexer_by_name(language)
    except ClassNotFound:
        return TextLexer()


def code_html(text: str, language: str) -> str:
    """Highlighted code, without its surroundings; characters that can't be printed are replaced."""
    # Lines end only where the files' lines do; the rest of what `splitlines` knows is not printable.
    lines = [printable(line)[:_LONGEST_LINE] for line in text.replace("\r\n", "\n").split("\n")]
    return highlight("\n".join(lines), _unstripped(lexer_for(language)), HtmlFormatter(nowrap=True)).rstrip("\n")


def code_styles() -> str:
    """CSS of the highlighting, for light and dark pages."""
    light = HtmlFormatter(style="friendly").get_style_defs(".mose-code")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".dark .mose-code")
    return f"{light}\n{dark}"


def _unstripped(lexer: Lexer) -> Lexer:
    lexer.stripnl = False
    return lexer


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
    """The first lines, and the others on demand."""
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
    """Where the exit on the other side ranked the same hit."""
    if other_rank is None:
        count = len(other.answer.hits)
        return f'<span class="mose-badge mose-new">not among the {count} of exit {other.exit_layer}</span>'
    kind = "mose-same" if other_rank == rank else "mose-moved"
    return f'<span class="mose-badge {kind}">#{other_rank} at exit {other.exit_layer}</span>'


def _place(hit: Hit) -> tuple[str, int, int, str]:
    return hit.path, hit.line, hit.last_line, hit.name
