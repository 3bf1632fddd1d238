"""The command `mose demo` of `modular_star_encoder.cli.main`; like it, quick to import."""

from __future__ import annotations

import argparse
from typing import Any


def add_demo_command(commands: Any) -> None:
    """Add the command to the subparsers of `mose`."""
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


def run_demo(arguments: argparse.Namespace) -> None:
    """`mose demo`."""
    from modular_star_encoder.demo.serving import serve
    from modular_star_encoder.search.index import CodeIndex, find_index

    index = CodeIndex.open(arguments.index or find_index())
    serve(index, checkpoint=arguments.model, host=arguments.host, port=arguments.port, source=arguments.source)
