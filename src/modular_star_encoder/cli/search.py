"""The commands that search code: `mose index`, `mose search`, `mose demo`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modular_star_encoder.cli.options import exit_list, margin_or_fit, name_list
from modular_star_encoder.utils.errors import UserError

if TYPE_CHECKING:
    from modular_star_encoder.search.index import CodeIndex
    from modular_star_encoder.search.ranking import Cascade

_HOW_AN_INDEX_IS_MADE = {
    "model": None,
    "exit_layer": None,
    "exit_layers": (),
    "latency_ms": None,
    "memory_mb": None,
    "dimension": None,
    "languages": None,
    "keep_states": False,
    "tests": False,
    "vendored": False,
    "rebuild": False,
}
"""Defaults of the options of `mose index` that are settings of the index."""


def add_search_commands(commands: Any) -> None:
    """Add the commands to the subparsers of `mose`."""
    index = commands.add_parser("index", help="index a code folder, or bring its index up to date")
    index.add_argument("folder", metavar="FOLDER", help="a folder of source code")
    index.add_argument("--out", metavar="INDEX", help="a folder, s3://…, or qdrant:NAME@URL (default: .mose in FOLDER)")
    _add_checkpoint_options(index, "the quickstart's")
    index.add_argument("--exit-layers", metavar="LIST", type=exit_list, default=(), help="several exits: 4,9 or all")
    index.add_argument("--dimension", metavar="D", type=int, help="components to keep (default: all)")
    index.add_argument("--languages", metavar="LIST", type=name_list, help="languages to read (default: all eight)")
    index.add_argument("--keep-states", action="store_true", help="keep states for quicker re-ranking; large")
    index.add_argument("--tests", action="store_true", help="also read test code")
    index.add_argument("--vendored", action="store_true", help="also read copies of other projects")
    index.add_argument("--rebuild", action="store_true", help="replace the index, also with other settings")
    index.add_argument("--json", action="store_true", help="print JSON")
    index.set_defaults(run=run_index)

    search = commands.add_parser("search", help="find functions of a code folder by questions in prose")
    search.add_argument("questions", metavar="QUESTION", nargs="+", help='for example "parse an HTTP header"')
    where = search.add_mutually_exclusive_group()
    where.add_argument("--index", metavar="INDEX", help="what mose index wrote (default: .mose here or above)")
    where.add_argument("--folder", metavar="FOLDER", help="search a folder without an index, keeping nothing")
    _add_checkpoint_options(search, "the one of the index; with --folder the quickstart's")
    search.add_argument("--top-k", metavar="N", type=int, default=5, help="hits per question (default: 5)")
    search.add_argument("--languages", metavar="LIST", type=name_list, help="only these languages")
    search.add_argument("--path", metavar="PATTERN", help="only these files, such as '*.py' or 'src/**'")
    search.add_argument("--hybrid", action="store_true", help="combine with the ranking of words by BM25")
    search.add_argument("--fuse", action="store_true", help=argparse.SUPPRESS)  # the old name of --hybrid
    search.add_argument("--rerank-exit-layer", metavar="K", type=int, help="deeper exit that ranks the best again")
    search.add_argument("--candidates", metavar="N", type=int, help="how many of them (default: 200)")
    search.add_argument(
        "--margin",
        metavar="X",
        type=margin_or_fit,
        help="re-rank only where the best leads by less than X; fit finds X with descriptions of the index",
    )
    search.add_argument("--lines", metavar="N", type=int, default=3, help="lines of code to show (default: 3)")
    search.add_argument("--json", action="store_true", help="print JSON")
    search.set_defaults(run=run_search)

    demo = commands.add_parser("demo", help="search an index on a page in the browser, two exits side by side")
    demo.add_argument("--index", metavar="INDEX", help="what mose index wrote (default: .mose here or above)")
    demo.add_argument("--model", metavar="CHECKPOINT", help="where the index's checkpoint is now, if it was moved")
    demo.add_argument(
        "--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1, this machine alone)"
    )
    demo.add_argument("--port", metavar="N", type=int, help="default: the first free one from 7860 on")
    demo.add_argument(
        "--source",
        metavar="URL",
        help="the indexed folder in a repository on the web, for links: https://github.com/OWNER/NAME/blob/REVISION/src",
    )
    demo.set_defaults(run=run_demo)


def _add_checkpoint_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--model", metavar="CHECKPOINT", help=f"folder or Hub repository (default: {default})")
    parser.add_argument("--exit-layer", metavar="K", type=int, help="exit to embed at (default: the deepest)")
    parser.add_argument("--latency-ms", metavar="MS", type=float, help="choose the exit by its exit profile")
    parser.add_argument("--memory-mb", metavar="MB", type=float, help="the same by its peak memory")


def run_index(arguments: argparse.Namespace) -> None:
    """`mose index`."""
    _hide_loading_bars()
    index = _updated(arguments) or _built(arguments)
    report = index.report
    if arguments.json:
        print(json.dumps({"index": index.store.location, **report.to_dict()}, indent=2, ensure_ascii=False))
        return
    exits = ", ".join(map(str, index.settings.exit_layers))
    print(
        f"{index.store.location}: {report.rows:,} functions and windows of {report.files:,} files at exit {exits}; "
        f"embedded {report.embedded_files:,} files ({report.embedded_rows:,} rows), removed {report.removed_files:,}, "
        f"in {report.seconds:.1f} s"
    )
    for reason, count in report.skipped.most_common():
        print(f"mose: note: {count} files left out ({reason})", file=sys.stderr)


def _updated(arguments: argparse.Namespace) -> CodeIndex | None:
    """The existing index, updated with its own settings; None if there is none, or an option names settings."""
    if any(getattr(arguments, name) != default for name, default in _HOW_AN_INDEX_IS_MADE.items()):
        return None
    from modular_star_encoder.search.index import CodeIndex, open_store
    from modular_star_encoder.search.vector_store import INDEX_FOLDER

    folder = os.path.expanduser(arguments.folder)
    store = open_store(arguments.out or os.path.join(folder, INDEX_FOLDER))
    if store.settings() is None:
        return None
    index = CodeIndex.open(store)
    index.settings.refuse_others(replace(index.settings, folder=os.path.realpath(folder)), store.location)
    index.update()
    return index


def _built(arguments: argparse.Namespace) -> CodeIndex:
    """The index with the settings of the options."""
    from modular_star_encoder.inference.checkpoints import load_config
    from modular_star_encoder.search.index import CodeIndex
    from modular_star_encoder.search.settings import DEFAULT_CHECKPOINT

    checkpoint = arguments.model or DEFAULT_CHECKPOINT
    if arguments.exit_layers is None:
        arguments.exit_layers = load_config(checkpoint).exit_layers
    if arguments.exit_layers and _has_budget(arguments):
        raise UserError(
            "cli.search.budget", "--exit-layers names the exits, so --latency-ms and --memory-mb have none to choose."
        )
    return CodeIndex.build(
        arguments.folder,
        arguments.out,
        checkpoint=checkpoint,
        exit_layer=_exit_by_budget(arguments, checkpoint),
        exit_layers=arguments.exit_layers or None,
        dimension=arguments.dimension,
        languages=arguments.languages,
        states=arguments.keep_states,
        tests=arguments.tests,
        vendored=arguments.vendored,
        rebuild=arguments.rebuild,
    )


def run_search(arguments: argparse.Namespace) -> None:
    """`mose search`."""
    from modular_star_encoder.search.hits import format_answer

    if arguments.fuse:
        warnings.warn("--fuse is now called --hybrid.", FutureWarning, stacklevel=2)
    _check_search(arguments)
    _hide_loading_bars()
    index, exit_layer = _open_index(arguments) if arguments.folder is None else _index_in_memory(arguments)
    answers = index.search(
        arguments.questions,
        top_k=arguments.top_k,
        exit_layer=exit_layer,
        method="hybrid" if arguments.hybrid or arguments.fuse else "vector",
        cascade=_cascade(arguments, index, exit_layer),
        languages=arguments.languages,
        path=arguments.path,
    )
    if arguments.json:
        print(json.dumps([answer.to_dict() for answer in answers], indent=2, ensure_ascii=False))
        return
    for answer in answers:
        if len(answers) > 1:
            print(f"# {answer.question}")
        print(format_answer(answer, lines=arguments.lines))
    if arguments.rerank_exit_layer is not None:
        deep = sum(answer.reranked for answer in answers)
        exit_layer = arguments.rerank_exit_layer
        print(f"mose: note: exit {exit_layer} ranked {deep} of {len(answers)} questions", file=sys.stderr)


def _check_search(arguments: argparse.Namespace) -> None:
    """Refuse what would only fail after the model is loaded."""
    if arguments.lines < 0:
        raise UserError("cli.search.lines", f"--lines must not be negative, but is {arguments.lines}.")
    for name in ("candidates", "margin"):
        if arguments.rerank_exit_layer is None and getattr(arguments, name) is not None:
            raise UserError("cli.search.rerank", f"--{name} needs --rerank-exit-layer.")


def _open_index(arguments: argparse.Namespace) -> tuple[CodeIndex, int | None]:
    """The index on disk or on a server, and the exit to ask; None for the index's default."""
    from modular_star_encoder.search.index import CodeIndex, find_index

    index = CodeIndex.open(arguments.index or find_index(), checkpoint=arguments.model)
    checkpoint = arguments.model or index.settings.checkpoint
    return index, _exit_by_budget(arguments, checkpoint, index.settings.exit_layers)


def _index_in_memory(arguments: argparse.Namespace) -> tuple[CodeIndex, int | None]:
    """An index of --folder that ends with the command, and its exit."""
    from modular_star_encoder.inference.checkpoints import load_config
    from modular_star_encoder.search.index import CodeIndex
    from modular_star_encoder.search.settings import DEFAULT_CHECKPOINT
    from modular_star_encoder.search.vector_store import MemoryStore

    checkpoint = arguments.model or DEFAULT_CHECKPOINT
    exit_layer = _exit_by_budget(arguments, checkpoint)
    if exit_layer is None and arguments.rerank_exit_layer is not None:
        exit_layer = load_config(checkpoint).exit_layers[0]
    options = {"exit_layer": exit_layer, "languages": arguments.languages}
    index = CodeIndex.build(arguments.folder, MemoryStore(), checkpoint=checkpoint, **options)
    if not index.store.count():
        raise UserError(
            "search.folder.empty",
            f"{arguments.folder!r} holds no source code in {', '.join(index.settings.languages)}.",
        )
    return index, exit_layer


def _cascade(arguments: argparse.Namespace, index: CodeIndex, exit_layer: int | None) -> Cascade | None:
    """The cascade of the options, with its margin fitted for `--margin fit`; None without re-ranking."""
    if arguments.rerank_exit_layer is None:
        return None
    from modular_star_encoder.search.cascade import fitted_margin
    from modular_star_encoder.search.ranking import Cascade

    cascade = Cascade(arguments.rerank_exit_layer)
    if arguments.candidates is not None:
        cascade = replace(cascade, candidates=arguments.candidates)
    if arguments.margin != "fit":
        return replace(cascade, margin=arguments.margin)
    fitted = fitted_margin(index, cascade, exit_layer=exit_layer)
    print(
        f"mose: note: margin {fitted.margin:.4f}, fitted on {fitted.queries} descriptions of the index: "
        f"{fitted.share:.0%} of them needed exit {cascade.exit_layer}",
        file=sys.stderr,
    )
    return replace(cascade, margin=fitted.margin)


def run_demo(arguments: argparse.Namespace) -> None:
    """`mose demo`."""
    from modular_star_encoder.demo.serving import serve
    from modular_star_encoder.search.index import CodeIndex, find_index

    index = CodeIndex.open(arguments.index or find_index())
    serve(index, checkpoint=arguments.model, host=arguments.host, port=arguments.port, source=arguments.source)


def _hide_loading_bars() -> None:
    """Hide the bar of transformers, which would break ours; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads_hidden = are_progress_bars_disabled()
    logging.disable_progress_bar()
    if not downloads_hidden:
        enable_progress_bars()


def _has_budget(arguments: argparse.Namespace) -> bool:
    return arguments.latency_ms is not None or arguments.memory_mb is not None


def _exit_by_budget(
    arguments: argparse.Namespace, checkpoint: str, exit_layers: Sequence[int] | None = None
) -> int | None:
    """--exit-layer, or with a budget the best exit that keeps it; `exit_layers` limits the choice."""
    if not _has_budget(arguments):
        return arguments.exit_layer
    if arguments.exit_layer is not None:
        raise UserError(
            "cli.search.budget", "--exit-layer names an exit, so --latency-ms and --memory-mb have none to choose."
        )
    from modular_star_encoder.inference.exit_profile import checkpoint_profile, select_exit

    profile = checkpoint_profile(checkpoint)
    if exit_layers is not None:
        exits = {exit_layer: one for exit_layer, one in profile.exits.items() if exit_layer in exit_layers}
        if not exits:
            raise UserError(
                "search.profile.exits",
                f"The exit profile of {checkpoint} has none of the exits {exit_layers} of the index.",
            )
        profile = replace(profile, exits=exits)
    return select_exit(profile, latency_ms=arguments.latency_ms, memory_mb=arguments.memory_mb)
