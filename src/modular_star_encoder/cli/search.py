"""The commands that search code: `mose index`, `mose search`, `mose related`, `mose mcp`, `mose demo`."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from modular_star_encoder.cli import add_command, at_least, checkpoint, exit_list, name_list, note, of_form, positive
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.reports import printable

if TYPE_CHECKING:
    from modular_star_encoder.search.index import CodeIndex
    from modular_star_encoder.search.vector_store import VectorStore

_DEFAULTS: dict[str, Any] = {"exit_layers": (), "docs": False, "tests": True, "vendored": False, "rebuild": False}
_DEFAULTS |= dict.fromkeys(("model", "exit_layer", "latency_ms", "memory_mb", "dimension", "languages"))
"""Defaults of the options of `mose index` that are settings of a new index."""

_RELATED = """Find code that resembles the code at a line. mose searches the index in the file's folder or in a folder
above. Without an index there, it searches the nearest folder above that has .git or a cached index. If there is no such
folder either, it searches the working folder if the file is in it, and otherwise the file's folder."""


def add_search_commands(commands: Any) -> None:
    """Add `mose index`, `search`, `related`, `mcp` and `demo` to the subparsers of `mose`."""
    add = add_command(commands, "index", run_index, "index a code folder, or bring its index up to date").add_argument
    add("folder", metavar="FOLDER", help="a folder of source code")
    add("--out", metavar="INDEX", help="index: a folder or qdrant:NAME@URL (default: .mose in FOLDER)")
    _add_checkpoint_options(add, "mose-code, which is built in")
    add("--exit-layers", metavar="LIST", type=exit_list, default=(), help="exits to embed at, such as 4,9, or all")
    add("--dimension", metavar="D", type=at_least(1), help="number of components to keep of a vector (default: all)")
    add("--languages", metavar="LIST", type=name_list, help="languages to read, separated by commas (default: all)")
    add("--docs", action="store_true", help="also read Markdown files, split at headings")
    add("--tests", action=argparse.BooleanOptionalAction, default=True, help="read test code")
    add("--vendored", action="store_true", help="also read vendored libraries and generated code")
    _add_show_skipped(add)
    add("--rebuild", action="store_true", help="replace an existing index, even one with other settings")
    add("--json", action="store_true", help="print the report as JSON")

    search = add_command(commands, "search", run_search, "find functions of a code folder by questions in prose")
    add, where = search.add_argument, search.add_mutually_exclusive_group()
    question = 'question, such as "parse an HTTP header"; the last word may be the folder to search'
    add("questions", metavar="QUESTION", nargs="+", help=question)
    _add_index(where.add_argument)
    where.add_argument("--folder", metavar="FOLDER", help="folder to search, if you do not give it after the questions")
    _add_checkpoint_options(add, "the index's, or mose-code for a new index")
    add("--languages", metavar="LIST", type=name_list, help="search only these languages, separated by commas")
    add("--path", metavar="PATTERN", help="search only files whose path in FOLDER fits a pattern: '*.py', 'src/**'")
    method = "hybrid (default): vectors, words and ranking rules; vector: vectors alone; lexical: no model"
    add("--method", choices=("hybrid", "vector", "lexical"), default="hybrid", help=method)
    add("--rerank-exit-layer", metavar="K", type=at_least(1), help="rank the best hits again at this deeper exit")
    add("--candidates", metavar="N", type=at_least(2), help="number of hits to rank again (default: 20)")
    margin = "rank again only if the two best similarities differ by less than X"
    add("--margin", metavar="X", type=float, help=margin)
    _add_show_skipped(add)
    add("--no-refresh", action="store_false", dest="refresh", help="search the index without updating it first")
    add("--explain", action="store_true", help="show what each ranking rule adds to the score of a hit")
    _add_output_options(add)

    related = add_command(commands, "related", run_related, "find code that resembles the code at a line")
    related.description, add = _RELATED, related.add_argument
    place = of_form("FILE:LINE", r"(.+):(\d{1,9})")
    add("place", metavar="FILE:LINE", type=place, help="a line of code, such as src/app.py:120")
    _add_index(add)
    _add_output_options(add)

    about = "serve an index to agents (Model Context Protocol, stdin and stdout)"
    add = add_command(commands, "mcp", run_mcp, about).add_argument
    add("folder", metavar="FOLDER", nargs="?", default=".", help="code folder (default: this folder)")

    about = "search an index on a page in the browser, two exits side by side"
    add = add_command(commands, "demo", run_demo, about).add_argument
    _add_index(add)
    add("--model", metavar="CHECKPOINT", help="new folder or repository of the index's checkpoint, if it has moved")
    add("--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1, only for this machine)")
    add("--port", metavar="N", type=at_least(0), help="port to serve on (default: the first free port from 7860 on)")
    source = "web address of the indexed folder, to link hits to: https://github.com/OWNER/NAME/blob/REVISION/src"
    add("--source", metavar="URL", help=source)


def _add_checkpoint_options(add: Callable[..., Any], default: str) -> None:
    what = f"checkpoint to embed with: a folder or Hub repository (default: {default})"
    add("--model", metavar="CHECKPOINT", type=checkpoint, help=what)
    exit_layer = "exit to embed at (default: 0 if the checkpoint has it, else the deepest)"
    add("--exit-layer", metavar="K", type=at_least(0), help=exit_layer)
    add("--latency-ms", metavar="MS", type=positive, help="use the best exit that embeds within MS milliseconds")
    add("--memory-mb", metavar="MB", type=positive, help="use the best exit with a peak memory of at most MB megabytes")
    profile = "file of `mose profile` with the costs of the exits (default: exit_profile.json of the checkpoint)"
    add("--profile", metavar="FILE", help=profile)


def _add_index(add: Callable[..., Any]) -> None:
    add("--index", metavar="INDEX", help="index to search (default: .mose in this folder or in a folder above)")


def _add_output_options(add: Callable[..., Any]) -> None:
    add("--top-k", metavar="N", type=at_least(1), default=5, help="number of hits (default: 5)")
    add("--lines", metavar="N", type=at_least(0), default=3, help="number of lines to show of each hit (default: 3)")
    add("--json", action="store_true", help="print the hits as JSON")


def _add_show_skipped(add: Callable[..., Any]) -> None:
    add("--show-skipped", action="store_true", help="list the files that are not indexed, with the reasons")


def run_index(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.search.index import CodeIndex, open_store
    from modular_star_encoder.search.vector_store import INDEX_FOLDER, readable_path

    folder = os.path.expanduser(arguments.folder)
    store = open_store(arguments.out or os.path.join(folder, INDEX_FOLDER))
    names_settings = any(getattr(arguments, name) != default for name, default in _DEFAULTS.items())
    if not names_settings and store.settings() is not None:  # update an existing index with its own settings
        index = CodeIndex.open(store)
        index.settings.refuse_others(replace(index.settings, folder=os.path.realpath(folder)), store.location)
        index.update()
    else:
        index = _built(arguments, store)
    report = index.report
    if arguments.json:
        values = {"index": readable_path(index.store.location), **report.to_dict()}
        if arguments.show_skipped:
            values["skipped_files"] = dict(report.notes())
        print(json.dumps(values, indent=2))
    else:
        exits = ", ".join(map(str, index.settings.exit_layers))
        print(
            f"{printable(index.store.location)}: {report.rows:,} pieces of {report.files:,} files at exit {exits}; "
            f"embedded {report.embedded_files:,} files ({report.embedded_rows:,} pieces), removed "
            f"{report.removed_files:,} files, in {report.seconds:.1f} s"
        )
        for line in report.lines(arguments.show_skipped):
            print(line, file=sys.stdout if arguments.show_skipped else sys.stderr)
    index.refuse_empty()


def _built(arguments: argparse.Namespace, store: VectorStore) -> CodeIndex:
    from modular_star_encoder.data.languages.registry import SEARCH_LANGUAGES
    from modular_star_encoder.search.embedder import Embedder
    from modular_star_encoder.search.index import CodeIndex
    from modular_star_encoder.search.vector_store import DEFAULT_CHECKPOINT

    budget, embedder = _budget(arguments), Embedder(arguments.model or DEFAULT_CHECKPOINT)
    if arguments.docs:
        arguments.languages = (*(arguments.languages or SEARCH_LANGUAGES), "markdown")
    options = {name: getattr(arguments, name) for name in ("dimension", "languages", "tests", "vendored", "rebuild")}
    several = embedder.trained_exits if arguments.exit_layers is None else arguments.exit_layers
    exits = embedder.exits(arguments.exit_layer, several or None, budget)
    return CodeIndex.build(arguments.folder, store, checkpoint=embedder, exit_layers=exits, **options)


def _budget(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the budget for `Embedder.exits` from the options; UserError if options contradict each other."""
    given = {name: getattr(arguments, name) for name in ("latency_ms", "memory_mb", "profile")}
    budget = {name: value for name, value in given.items() if value is not None}
    has_limit, fault = bool(budget.keys() - {"profile"}), ""
    if has_limit and (arguments.exit_layer is not None or getattr(arguments, "exit_layers", ()) != ()):
        fault = "Give an exit (--exit-layer, --exit-layers) or a budget (--latency-ms, --memory-mb), not both."
    elif budget and not has_limit:
        fault = "--profile needs --latency-ms MS or --memory-mb MB."
    elif getattr(arguments, "rerank_exit_layer", 0) is None and {arguments.candidates, arguments.margin} != {None}:
        fault = "--candidates and --margin need --rerank-exit-layer K."
    if fault:
        raise UserError("cli.search.options", fault)
    return budget


def run_search(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.search.hits import format_answer
    from modular_star_encoder.search.index import SECONDS_TO_REFRESH, check_search, open_for_search
    from modular_star_encoder.search.ranking import Cascade
    from modular_star_encoder.search.vector_store import DEFAULT_CHECKPOINT

    budget, cascade = _budget(arguments), None
    if arguments.rerank_exit_layer is not None:
        chosen = {"candidates": arguments.candidates, "margin": arguments.margin}
        cascade = Cascade(arguments.rerank_exit_layer, **{k: v for k, v in chosen.items() if v is not None})
    _take_folder(arguments)
    options = {name: getattr(arguments, name) for name in ("top_k", "method", "languages", "path")}
    check_search(arguments.questions, **options)  # checked before a first search indexes the folder, which takes long
    index, exit_layer = open_for_search(
        arguments.folder,
        arguments.index,
        checkpoint=arguments.model,
        exit_layer=arguments.exit_layer,
        budget=budget,
        cascade=cascade,
        languages=arguments.languages,
        refresh=arguments.refresh,
        seconds=None if arguments.show_skipped else SECONDS_TO_REFRESH,
        questions=() if arguments.path else arguments.questions,  # with a pattern, all files that fit it must be read
    )
    for line in index.report.news(arguments.show_skipped):
        print(line, file=sys.stderr)
    index.refuse_empty()
    if cascade and cascade.exit_layer not in index.settings.exit_layers and sys.stderr and sys.stderr.isatty():
        note(f"embedding up to {cascade.candidates} hits at exit {cascade.exit_layer} …")
    answers = index.search(arguments.questions, exit_layer=exit_layer, cascade=cascade, **options)
    if not any(answer.hits for answer in answers):
        index.check_filter(arguments.languages, arguments.path)
    if arguments.json:
        print(json.dumps([answer.to_dict(explain=arguments.explain) for answer in answers], indent=2))
    else:
        for answer in answers:
            if len(answers) > 1:
                print(printable(f"# {answer.question}"))
            print(format_answer(answer, lines=arguments.lines, explain=arguments.explain))
    model = index.settings.checkpoint
    exits = sorted({hit.exit_layer for answer in answers for hit in answer.hits if hit.exit_layer is not None})
    if exits and arguments.model is None and model != DEFAULT_CHECKPOINT:
        note(f"exit {', '.join(map(str, exits))} of {model}, the index's own model, ranked the hits")
    if cascade is not None and not arguments.json:
        deep = f"{sum(answer.reranked for answer in answers)} of {len(answers)}"
        note(f"exit {cascade.exit_layer} ranked the best hits again for {deep} questions")


def _take_folder(arguments: argparse.Namespace) -> None:
    """Move the last question to `arguments.folder` if it is a folder; UserError if a question looks like a path."""
    *questions, last = arguments.questions
    if arguments.index is not None or arguments.folder is not None:
        return
    path = os.path.expanduser(last)
    is_path, is_folder = re.match(r"(~|\.{0,2})/\S*$", last), os.path.isdir(path)
    others = questions[1:] if is_folder else questions
    folders = [one for one in others if os.path.isdir(os.path.expanduser(one))]
    key, fault, write = "folder", "", 'Write: mose search "QUESTION" FOLDER'
    if questions and is_folder and folders:
        key, fault = "folders", f"{folders[0]!r} and {last!r} are folders, and one command searches one folder."
        write = f'Write: mose search "QUESTION" {last}. If {folders[0]!r} is a question, add --folder before {last}.'
    elif questions and is_folder:
        arguments.questions, arguments.folder = questions, last
    elif folders:
        fault = f"The folder {folders[0]!r} must come after the question."
    elif (is_path or questions) and os.path.isfile(path):
        fault = f"{last!r} is a file, and only a folder can be searched; --path PATTERN selects its files."
    elif is_path and is_folder:
        fault = f"A question is missing before the folder {last!r}."
    elif questions and (near := get_close_matches(last, _names_here(), 1, 0.8)):
        fault = f"There is no folder {last!r}. Did you mean {near[0]!r}?"
    elif is_path or (questions and len(last.split()) == 1):
        advice = "" if "/" in last else " If it belongs to the question, put quotes around the question."
        fault = f"There is no folder {last!r}.{advice}"
    elif is_folder:
        note(f"searching for {last!r} in this folder; to search in the folder {last!r}: mose search QUESTION {last!r}")
    if fault:
        raise UserError(f"cli.search.{key}", f"{fault} {write}")


def _names_here() -> list[str]:
    """Return the names of the folders in the current folder; none if it can't be read."""
    with suppress(OSError), os.scandir() as entries:
        return [one.name for one in entries if one.is_dir()]
    return []


def run_related(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.search.hits import Answer, format_answer
    from modular_star_encoder.search.index import find_index, folder_of, open_for_search
    from modular_star_encoder.search.vector_store import readable_path

    path, number = arguments.place
    if not os.path.isfile(path):
        raise UserError("cli.related.file", f"{path!r} is not a file. Name a file and a line, such as src/app.py:120.")
    location = arguments.index or find_index(os.path.dirname(os.path.realpath(path)))
    index, _ = open_for_search(folder_of(path), location, seconds=None)  # the file may not have been read yet
    for line in index.report.news():
        print(line, file=sys.stderr)
    inside = os.path.relpath(os.path.realpath(path), os.path.realpath(index.folder)).replace(os.sep, "/")
    hits = index.related(inside, int(number), top_k=arguments.top_k)
    answer = Answer(readable_path(f"{path}:{number}"), hits, method="vector")
    print(json.dumps(answer.to_dict(), indent=2) if arguments.json else format_answer(answer, lines=arguments.lines))


def run_mcp(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.search.index import open_for_search
    from modular_star_encoder.search.mcp_server import serve

    index, _ = open_for_search(arguments.folder, progress=False)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {one: handler for one in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(one))}
    try:
        for number in before:  # Python would wait at exit for the thread that reads stdin
            signal.signal(number, _end)
        serve(index)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
    """Signal handler: end the process at once. An update that it ends loses nothing, as if the process were killed."""
    with suppress(OSError):
        os.write(2, b"mose: interrupted\n")
    os._exit(130)


def run_demo(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.demo.serving import serve
    from modular_star_encoder.search.index import CodeIndex, find_index
    from modular_star_encoder.search.vector_store import INDEX_FOLDER

    index = CodeIndex.open(arguments.index or find_index() or INDEX_FOLDER)
    serve(index, checkpoint=arguments.model, host=arguments.host, port=arguments.port, source=arguments.source)
