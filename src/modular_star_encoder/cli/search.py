"""The commands that search code: `mose index`, `mose search`, `mose related`, `mose mcp`, `mose demo`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modular_star_encoder.cli import checkpoint, exit_list, name_list, of_form
from modular_star_encoder.utils.errors import UserError

if TYPE_CHECKING:
    from modular_star_encoder.search.index import CodeIndex
    from modular_star_encoder.search.vector_store import VectorStore

_DEFAULTS: dict[str, Any] = {"exit_layers": (), "docs": False, "tests": True, "vendored": False, "rebuild": False}
_DEFAULTS |= dict.fromkeys(("model", "exit_layer", "latency_ms", "memory_mb", "dimension", "languages"))
"""Defaults of those options of `mose index` that are settings of the index."""


def add_search_commands(commands: Any) -> None:
    """Add the commands to the subparsers of `mose`."""
    index = commands.add_parser("index", help="index a code folder, or bring its index up to date")
    index.add_argument("folder", metavar="FOLDER", help="a folder of source code")
    index.add_argument("--out", metavar="INDEX", help="a folder, or qdrant:NAME@URL (default: .mose in FOLDER)")
    _add_checkpoint_options(index, "mose-code, which is built in")
    index.add_argument("--exit-layers", metavar="LIST", type=exit_list, default=(), help="several exits: 4,9 or all")
    index.add_argument("--dimension", metavar="D", type=int, help="components to keep (default: all)")
    index.add_argument("--languages", metavar="LIST", type=name_list, help="languages to read (default: all)")
    index.add_argument("--docs", action="store_true", help="also read Markdown, in pieces by heading")
    index.add_argument("--tests", action=argparse.BooleanOptionalAction, default=True, help="read test code")
    index.add_argument("--vendored", action="store_true", help="also read copied and generated code")
    _add_show_skipped(index)
    index.add_argument("--rebuild", action="store_true", help="replace the index, also with other settings")
    index.add_argument("--json", action="store_true", help="print JSON")
    index.set_defaults(run=run_index)

    search = commands.add_parser("search", help="find functions of a code folder by questions in prose")
    question = 'for example "parse an HTTP header"; the last may be the folder to search'
    search.add_argument("questions", metavar="QUESTION", nargs="+", help=question)
    where = search.add_mutually_exclusive_group()
    where.add_argument("--index", metavar="INDEX", help="what mose index wrote (default: .mose here or above)")
    where.add_argument("--folder", metavar="FOLDER", help="search a folder without an index of its own")
    _add_checkpoint_options(search, "the one of the index, else mose-code")
    search.add_argument("--top-k", metavar="N", type=int, default=5, help="hits per question (default: 5)")
    search.add_argument("--languages", metavar="LIST", type=name_list, help="only these languages")
    search.add_argument("--path", metavar="PATTERN", help="only these files, such as '*.py' or 'src/**'")
    search.add_argument(
        "--method",
        choices=("hybrid", "vector", "lexical"),
        default="hybrid",
        help="hybrid: similarity, words and ranking rules (default); lexical: no model; vector: similarity alone",
    )
    for old in ("--hybrid", "--fuse"):  # old names for the method that is now the default
        search.add_argument(old, action="store_true", dest="hybrid", help=argparse.SUPPRESS)
    search.add_argument("--rerank-exit-layer", metavar="K", type=int, help="deeper exit that ranks the best hits again")
    search.add_argument("--candidates", metavar="N", type=int, help="number of hits to rank again (default: 20)")
    margin = "re-rank only if the best similarity exceeds the second by less than X"
    search.add_argument("--margin", metavar="X", type=float, help=margin)
    _add_show_skipped(search)
    stale = "search the index as it is: re-read no changed files"
    search.add_argument("--no-refresh", action="store_false", dest="refresh", help=stale)
    search.add_argument("--explain", action="store_true", help="show what each ranking rule added")
    search.add_argument("--lines", metavar="N", type=int, default=3, help="lines of code to show (default: 3)")
    search.add_argument("--json", action="store_true", help="print JSON")
    search.set_defaults(run=run_search)

    related = commands.add_parser("related", help="find code that resembles the code at a line")
    place = of_form("FILE:LINE", r"(.+):(\d+)")
    related.add_argument("place", metavar="FILE:LINE", type=place, help="for example src/app.py:120")
    related.add_argument("--index", metavar="INDEX", help="what mose index wrote (default: .mose here or above)")
    related.add_argument("--top-k", metavar="N", type=int, default=5, help="hits (default: 5)")
    related.add_argument("--lines", metavar="N", type=int, default=3, help="lines of code to show (default: 3)")
    related.add_argument("--json", action="store_true", help="print JSON")
    related.set_defaults(run=run_related)

    mcp = commands.add_parser("mcp", help="serve an index to agents (Model Context Protocol, stdin and stdout)")
    mcp.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="what to serve (default: this folder)")
    mcp.set_defaults(run=run_mcp)

    demo = commands.add_parser("demo", help="search an index on a page in the browser, two exits side by side")
    demo.add_argument("--index", metavar="INDEX", help="what mose index wrote (default: .mose here or above)")
    demo.add_argument("--model", metavar="CHECKPOINT", help="where the index's checkpoint is now, if it was moved")
    host = "127.0.0.1"
    demo.add_argument("--host", default=host, help="address to serve on (default: 127.0.0.1, this machine alone)")
    demo.add_argument("--port", metavar="N", type=int, help="default: the first free one from 7860 on")
    source = "web address of the indexed folder, for links: https://github.com/OWNER/NAME/blob/REVISION/src"
    demo.add_argument("--source", metavar="URL", help=source)
    demo.set_defaults(run=run_demo)


def _add_checkpoint_options(parser: argparse.ArgumentParser, default: str) -> None:
    what = f"folder or Hub repository (default: {default})"
    parser.add_argument("--model", metavar="CHECKPOINT", type=checkpoint, help=what)
    parser.add_argument(
        "--exit-layer", metavar="K", type=int, help="exit to embed at (default: 0 for mose-code, else the deepest)"
    )
    parser.add_argument("--latency-ms", metavar="MS", type=float, help="choose the exit by its exit profile")
    parser.add_argument("--memory-mb", metavar="MB", type=float, help="choose the exit by its peak memory")


def _add_show_skipped(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--show-skipped", action="store_true", help="list the files that are left out, and why")


def run_index(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.search.hits import printable
    from modular_star_encoder.search.index import CodeIndex, open_store
    from modular_star_encoder.search.vector_store import INDEX_FOLDER

    folder = os.path.expanduser(arguments.folder)
    store = open_store(arguments.out or os.path.join(folder, INDEX_FOLDER))
    names_settings = any(getattr(arguments, name) != default for name, default in _DEFAULTS.items())
    if not names_settings and store.settings() is not None:  # an index keeps its settings
        index = CodeIndex.open(store)
        index.settings.refuse_others(replace(index.settings, folder=os.path.realpath(folder)), store.location)
        index.update()
    else:
        index = _built(arguments, store)
    report = index.report
    if arguments.json:
        values = {"index": index.store.location, **report.to_dict()}
        if arguments.show_skipped:
            values["skipped_files"] = dict(report.notes())
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return
    exits = ", ".join(map(str, index.settings.exit_layers))
    print(
        f"{index.store.location}: {report.rows:,} pieces of {report.files:,} files at exit {exits}; "
        f"embedded {report.embedded_files:,} files ({report.embedded_rows:,} rows), removed {report.removed_files:,}, "
        f"in {report.seconds:.1f} s"
    )
    for line in report.lines(arguments.show_skipped):
        print(printable(line), file=sys.stdout if arguments.show_skipped else sys.stderr)


def _built(arguments: argparse.Namespace, store: VectorStore) -> CodeIndex:
    from modular_star_encoder.data.languages.registry import SEARCH_LANGUAGES
    from modular_star_encoder.search.index import CodeIndex
    from modular_star_encoder.search.vector_store import DEFAULT_CHECKPOINT

    checkpoint = arguments.model or DEFAULT_CHECKPOINT
    if arguments.docs:
        arguments.languages = (*(arguments.languages or SEARCH_LANGUAGES), "markdown")
    if arguments.exit_layers is None:
        arguments.exit_layers = _trained_exits(checkpoint)
    options = {name: getattr(arguments, name) for name in ("dimension", "languages", "tests", "vendored", "rebuild")}
    options |= {"exit_layer": _exit_by_budget(arguments, checkpoint), "exit_layers": arguments.exit_layers or None}
    return CodeIndex.build(arguments.folder, store, checkpoint=checkpoint, **options)


def _trained_exits(checkpoint: str) -> tuple[int, ...]:
    from modular_star_encoder.inference.checkpoints import load_config

    return load_config(checkpoint).exit_layers


def run_search(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.search.hits import format_answer, printable
    from modular_star_encoder.search.index import SECONDS_TO_REFRESH
    from modular_star_encoder.search.ranking import Cascade

    if arguments.hybrid:
        warnings.warn("--hybrid is the default now.", FutureWarning, stacklevel=2)
    if arguments.lines < 0:
        raise UserError("cli.search.lines", f"--lines must not be negative, but is {arguments.lines}.")
    if arguments.rerank_exit_layer is None and (arguments.candidates, arguments.margin) != (None, None):
        raise UserError("cli.search.rerank", "--candidates and --margin need --rerank-exit-layer.")
    cascade = None
    if arguments.rerank_exit_layer is not None:
        chosen = {"candidates": arguments.candidates, "margin": arguments.margin}
        cascade = Cascade(arguments.rerank_exit_layer, **{k: v for k, v in chosen.items() if v is not None})
    index, exit_layer = _opened(arguments)
    if arguments.refresh and not index.report.files:
        index.refresh(None if arguments.show_skipped else SECONDS_TO_REFRESH)
    if arguments.show_skipped or index.report.embedded_files or index.report.postponed_files:
        for line in index.report.lines(arguments.show_skipped):
            print(printable(line), file=sys.stderr)
    answers = index.search(
        arguments.questions,
        top_k=arguments.top_k,
        exit_layer=exit_layer,
        method=arguments.method,
        cascade=cascade,
        languages=arguments.languages,
        path=arguments.path,
    )
    if arguments.json:
        print(json.dumps([answer.to_dict() for answer in answers], indent=2, ensure_ascii=False))
        return
    for answer in answers:
        if len(answers) > 1:
            print(f"# {answer.question}")
        print(format_answer(answer, lines=arguments.lines, explain=arguments.explain))
    if cascade is not None:
        deep = sum(answer.reranked for answer in answers)
        print(f"mose: note: exit {cascade.exit_layer} re-ranked {deep} of {len(answers)} answers", file=sys.stderr)


def _opened(arguments: argparse.Namespace) -> tuple[CodeIndex, int | None]:
    """Open the named index, else one found in this folder or above, else a cached one; return it and its exit layer."""
    from modular_star_encoder.search.index import CodeIndex, cached_index, find_index
    from modular_star_encoder.search.vector_store import DEFAULT_CHECKPOINT

    *questions, last = arguments.questions
    if arguments.index is None and arguments.folder is None:
        if questions and os.path.isdir(last):
            arguments.questions, arguments.folder = questions, last
        elif re.match(r"(~|\.{0,2})/\S*$", last) or (questions and os.path.isfile(last)):
            message = f'{last!r} is no folder with a question before it. Write: mose search "QUESTION" FOLDER'
            raise UserError("cli.search.folder", message)
    location = arguments.index or (find_index() if arguments.folder is None else None)
    if location is not None:
        index = CodeIndex.open(location, checkpoint=arguments.model)
        checkpoint = arguments.model or index.settings.checkpoint
        return index, _exit_by_budget(arguments, checkpoint, index.settings.exit_layers)
    checkpoint = arguments.model or DEFAULT_CHECKPOINT
    exit_layer = _exit_by_budget(arguments, checkpoint)
    if exit_layer is None and arguments.rerank_exit_layer is not None:
        exit_layer = _trained_exits(checkpoint)[0]
    options = {"checkpoint": checkpoint, "exit_layer": exit_layer, "languages": arguments.languages}
    return cached_index(arguments.folder or ".", **options), exit_layer


def run_related(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.search.hits import Answer, format_answer

    path, line = arguments.place
    index = _found_index(arguments.index)
    inside = os.path.relpath(os.path.realpath(path), os.path.realpath(index.folder)).replace(os.sep, "/")
    answer = Answer(f"{path}:{line}", index.related(inside, int(line), top_k=arguments.top_k), method="vector")
    if arguments.json:
        print(json.dumps(answer.to_dict(), indent=2, ensure_ascii=False))
    else:
        print(format_answer(answer, lines=arguments.lines))


def run_mcp(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.search.index import CodeIndex, open_store
    from modular_star_encoder.search.mcp_server import build_server
    from modular_star_encoder.search.vector_store import INDEX_FOLDER

    store = open_store(os.path.join(os.path.expanduser(arguments.folder), INDEX_FOLDER))
    has_index = store.settings() is not None  # an index keeps its settings
    index = CodeIndex.open(store) if has_index else CodeIndex.build(arguments.folder, store, progress=False)
    build_server(index).run("stdio")


def run_demo(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.demo.serving import serve

    index = _found_index(arguments.index)
    serve(index, checkpoint=arguments.model, host=arguments.host, port=arguments.port, source=arguments.source)


def _found_index(location: str | None) -> CodeIndex:
    """Open the named index, else the index of this folder or of its nearest parent with one."""
    from modular_star_encoder.search.index import CodeIndex, find_index
    from modular_star_encoder.search.vector_store import INDEX_FOLDER

    return CodeIndex.open(location or find_index() or INDEX_FOLDER)


def _exit_by_budget(
    arguments: argparse.Namespace, checkpoint: str, exit_layers: Sequence[int] | None = None
) -> int | None:
    """Return --exit-layer or, with a budget, the best exit (of `exit_layers`) within --latency-ms and --memory-mb."""
    if arguments.latency_ms is None and arguments.memory_mb is None:
        return arguments.exit_layer
    if arguments.exit_layer is not None or getattr(arguments, "exit_layers", None):
        message = "Give an exit (--exit-layer, --exit-layers) or a budget (--latency-ms, --memory-mb), not both."
        raise UserError("cli.search.budget", message)
    from modular_star_encoder.inference.exit_profile import checkpoint_profile, select_exit

    profile = checkpoint_profile(checkpoint)
    if exit_layers is not None:
        exits = {exit_layer: one for exit_layer, one in profile.exits.items() if exit_layer in exit_layers}
        if not exits:
            message = f"The exit profile of {checkpoint} lacks the index's exits {exit_layers}. Run `mose profile`."
            raise UserError("search.profile.exits", message)
        profile = replace(profile, exits=exits)
    return select_exit(profile, latency_ms=arguments.latency_ms, memory_mb=arguments.memory_mb)
