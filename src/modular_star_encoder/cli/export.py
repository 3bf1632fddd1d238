"""The command `mose export`."""

from __future__ import annotations

import argparse
from typing import Any


def add_export_command(commands: Any) -> None:
    """Add the command to the subparsers of `mose`."""
    export = commands.add_parser("export", help="write one exit as an ONNX folder for serving")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub repository")
    export.add_argument("--exit-layer", metavar="K", type=int, help="default: the deepest")
    export.add_argument("--out", metavar="FOLDER", help="must not exist; default: CHECKPOINT-K-onnx")
    export.add_argument("--int8", action="store_true", help="also write 8-bit weights, measured on --data")
    export.add_argument("--data", metavar="FOLDER", help="source code, or a benchmark: compare rankings on it")
    export.add_argument("--benchmark", metavar="NAME", default="folder", help="what --data holds (default: folder)")
    export.add_argument("--allow-subset", action="store_true", help="accept partial benchmark files")
    export.set_defaults(run=run_export)


def run_export(arguments: argparse.Namespace) -> None:
    """`mose export`."""
    if not arguments.data and (arguments.int8 or arguments.allow_subset or arguments.benchmark != "folder"):
        raise ValueError("--int8, --benchmark and --allow-subset need --data: source code, or a benchmark's files.")
    from modular_star_encoder.evaluation.benchmarks import choose_benchmarks, load_benchmark
    from modular_star_encoder.evaluation.tasks import RetrievalTask
    from modular_star_encoder.hub.onnx_folder import export_onnx_folder, format_rankings

    tasks = []
    for name in choose_benchmarks([arguments.benchmark], arguments.data) if arguments.data else ():
        tasks += load_benchmark(name, arguments.data, allow_subset=arguments.allow_subset)
    if not all(isinstance(task, RetrievalTask) for task in tasks):
        raise ValueError(f"{arguments.benchmark} is about pairs, and an export is measured by rankings.")
    written = export_onnx_folder(
        arguments.checkpoint, arguments.exit_layer, arguments.out, int8=arguments.int8, tasks=tasks
    )
    if tasks:
        print(format_rankings(written.rankings), end="\n\n")
    print(written.folder)
