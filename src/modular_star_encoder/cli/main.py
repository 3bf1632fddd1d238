"""The command `mose`: its parser, what it does with errors, and its exit status.

The commands import the package when they run, so that `mose --help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from modular_star_encoder.cli.dataset import add_dataset_commands
from modular_star_encoder.cli.evaluate import add_evaluate_commands
from modular_star_encoder.cli.publish import add_publish_commands
from modular_star_encoder.cli.search import add_search_commands
from modular_star_encoder.cli.train import add_train_commands
from modular_star_encoder.utils.errors import missing_extra

EXPECTED_ERRORS = (ValueError, OSError)


class _Version(argparse.Action):
    """Prints the version, and reads it only when asked: reading takes half as long as a search."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"mose {version('modular-star-encoder')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 after an error that the user can fix, or 130 after Ctrl-C or SIGTERM.

    Results go to stdout; progress, and errors as one line each, go to stderr. argparse reports wrong usage (status 2).
    """
    keep_few_compiled_operations()
    if threading.current_thread() is threading.main_thread():  # SIGTERM ends a command as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        arguments = parse(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("mose: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; without this, Python reports the closed pipe again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (*EXPECTED_ERRORS, ImportError) as error:
        shown: Exception | None = error
        if isinstance(error, ImportError) and error.name:  # a module fails to import: a missing extra, or a bug
            shown = missing_extra(error) if isinstance(error, ModuleNotFoundError) else None
        if shown is None:
            raise
        sentence = " ".join(str(shown).split())
        if len(sentence) > 2000:  # a long value
            sentence = f"{sentence[:1500]} … {sentence[-400:]}"
        print(f"mose: error: {sentence}", file=sys.stderr)
        return 2
    return 0


def keep_few_compiled_operations() -> None:
    """Limit the caches of compiled operations to what one batch needs, unless the environment sets their size.

    By default oneDNN and PyTorch each cache 1,024 operations on a CPU, one per shape of a bfloat16 matrix, and each
    batch without padding has a new shape (benchmarks/NOTES.md). Call this before the first such operation.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


class _Parser(argparse.ArgumentParser):
    """A parser whose error names the option that a misspelt one resembles."""

    def parse_known_args(self, *words: Any, **options: Any) -> Any:
        arguments, rest = super().parse_known_args(*words, **options)
        for unknown in (text for text in rest if text.startswith("-")):
            from difflib import get_close_matches

            near = get_close_matches(unknown.partition("=")[0], self._option_string_actions, 1)
            self.error(f"unrecognized argument: {unknown}" + (f" (did you mean {near[0]}?)" if near else ""))
        return arguments, rest


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; settings (`key=value`) and the folder to search may also follow options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    is_search, has_settings = hasattr(arguments, "questions"), hasattr(arguments, "overrides")
    if rest and not is_search and not (has_settings and all("=" in text for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        (arguments.questions if is_search else arguments.overrides).extend(rest)
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their options."""
    parser = _Parser(prog="mose", description="Multi-exit code encoders: pre-train, evaluate, slice, search.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_search_commands(commands)
    add_evaluate_commands(commands)
    add_publish_commands(commands)
    add_train_commands(commands)
    add_dataset_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
