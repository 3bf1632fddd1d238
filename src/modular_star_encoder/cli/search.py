"""The commands that search code: `mose index`, `mose search`, `mose demo`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from modular_star_encoder.cli.options import exit_list, margin_or_fit, name_list

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
"""Options of `mose index` as they are unless they are given."""


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
    index.add_argument("--rebuild", action="store_true", help="begin anew, with other settings if need be")
    index.add_argument("--json", action="store_true", help="print JSON")
    index.set_defaults(run=run_index)

    search = commands.add_parser("search", help="find functions of a code folder by questions in prose")
    search.add_argument("questions", metavar="QUESTION", nargs="+", help='for example "parse an HTTP header"')
    search.add_argument("--index", metavar="INDEX", help="what mose index wrote (default: .mose here or above)")
    search.add_argument("--folder", metavar="FOLDER", help="search a folder without an index, keeping nothing")
    _add_checkpoint_options(search, "the one of the index; with --folder the quickstart's")
    search.add_argument("--top-k", metavar="N", type=int, default=5, help="hits per question (default: 5)")
    search.add_argument("--languages", metavar="LIST", type=name_list, help="only these languages")
    search.add_argument("--path", metavar="PATTERN", help="only these files, such as '*.py' or 'src/**'")
    search.add_argument("--fuse", action="store_true", help="fuse with the ranking of BM25")
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


def _updated(arguments: argparse.Namespace) -> Any:
    """The index that is there, brought up to date as it was made; None if there is none, or an option says how."""
    if any(getattr(arguments, name) != default for name, default in _HOW_AN_INDEX_IS_MADE.items()):
        return None
    from modular_star_encoder.search.index import CodeIndex
    from modular_star_encoder.search.settings import INDEX_FOLDER
    from modular_star_encoder.search.vector_store import open_store

    folder = os.path.expanduser(arguments.folder)
    store = open_store(arguments.out or os.path.join(folder, INDEX_FOLDER))
    if store.settings() is None:
        return None
    index = CodeIndex.open(store)
    index.settings.refuse_others(replace(index.settings, folder=os.path.realpath(folder)), store.location)
    index.update()
    return index


def _built(arguments: argparse.Namespace) -> Any:
    from modular_star_encoder.inference.load import load_config
    from modular_star_encoder.search.index import CodeIndex
    from modular_star_encoder.search.settings import DEFAULT_CHECKPOINT

    checkpoint = arguments.model or DEFAULT_CHECKPOINT
    if arguments.exit_layers is None:
        arguments.exit_layers = load_config(checkpoint).exit_layers
    if arguments.exit_layers and _has_budget(arguments):
        raise ValueError("--exit-layers names the exits, so --latency-ms and --memory-mb have none to choose.")
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
    from modular_star_encoder.search.display import format_answer

    if arguments.lines < 0:
        raise ValueError(f"--lines must not be negative, but is {arguments.lines}.")
    _hide_loading_bars()
    answers = _search_folder(arguments) if arguments.folder is not None else _search_index(arguments)
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


def _search_folder(arguments: argparse.Namespace) -> Sequence[Any]:
    from modular_star_encoder.inference.load import load_checkpoint
    from modular_star_encoder.search.folder import search_folder
    from modular_star_encoder.search.hits import Answer
    from modular_star_encoder.search.settings import DEFAULT_CHECKPOINT

    needs_index = ("index", "languages", "path", "fuse", "rerank_exit_layer", "candidates", "margin")
    for name in needs_index:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} needs an index, and --folder searches without one.")
    checkpoint = arguments.model or DEFAULT_CHECKPOINT
    model, tokenizer = load_checkpoint(checkpoint, _exit_by_budget(arguments, checkpoint))
    results = search_folder(arguments.folder, arguments.questions, model, tokenizer, top_k=arguments.top_k)
    return [Answer(question, hits) for question, hits in zip(arguments.questions, results, strict=True)]


def _search_index(arguments: argparse.Namespace) -> Sequence[Any]:
    from modular_star_encoder.search.index import CodeIndex, find_index

    if arguments.rerank_exit_layer is None:
        for name in ("candidates", "margin"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} needs --rerank-exit-layer.")
    index = CodeIndex.open(arguments.index or find_index(), checkpoint=arguments.model)
    exit_layer = _exit_by_budget(arguments, arguments.model or index.settings.checkpoint, index.settings.exit_layers)
    return index.search(
        arguments.questions,
        top_k=arguments.top_k,
        exit_layer=exit_layer,
        method="fused" if arguments.fuse else "vector",
        cascade=_cascade(arguments, index, exit_layer),
        languages=arguments.languages,
        path=arguments.path,
    )


def _cascade(arguments: argparse.Namespace, index: Any, exit_layer: int | None) -> Any:
    """The cascade that was asked for, its margin fitted if it is to be; None without re-ranking."""
    from modular_star_encoder.search.cascade import Cascade
    from modular_star_encoder.search.margins import fitted_margin

    if arguments.rerank_exit_layer is None:
        return None
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
    """Weights are read in a moment, and transformers' bar would break ours; downloads keep theirs."""
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
    """The exit named, or the best of `exit_layers` (all of the profile if None) that keeps the budgets, if any."""
    if not _has_budget(arguments):
        return arguments.exit_layer
    if arguments.exit_layer is not None:
        raise ValueError("--exit-layer names an exit, so --latency-ms and --memory-mb have none to choose.")
    from modular_star_encoder.inference.exit_profile import checkpoint_profile, select_exit

    profile = checkpoint_profile(checkpoint)
    if exit_layers is not None:
        exits = {exit_layer: one for exit_layer, one in profile.exits.items() if exit_layer in exit_layers}
        if not exits:
            raise ValueError(f"The exit profile of {checkpoint} knows none of the index's exits.")
        profile = replace(profile, exits=exits)
    return select_exit(profile, latency_ms=arguments.latency_ms, memory_mb=arguments.memory_mb)
