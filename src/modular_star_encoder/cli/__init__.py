"""The command line. This module has options of several commands, and argparse types to check and parse values."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from modular_star_encoder.inference import check_checkpoint, is_repository
from modular_star_encoder.utils.reports import printable

CHECKPOINT_HELP = "a checkpoint: a folder, a Hub repository, or mose-code, the model in this package"


def note(text: str) -> None:
    """Print a note on stderr; replace characters that could control the terminal."""
    print(printable(f"mose: note: {text}"), file=sys.stderr)


def argument_type(what: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argparse type that calls `read`. If this gives None or ValueError, the error says "must be `what`"."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if (found := read(text)) is not None:
                return found
        shown = repr(text if len(text) <= 100 else f"{text[:99]}…")
        raise argparse.ArgumentTypeError(f"{shown} must be {what}")

    return parse


def at_least(lowest: int) -> Callable[[str], Any]:
    """Return an argparse type for whole numbers of at least `lowest` and at most nine digits."""
    form, what = re.compile(r"\s*-?\d{1,9}\s*"), f"a whole number from {lowest} to 999999999"
    return argument_type(what, lambda text: int(text) if form.fullmatch(text) and int(text) >= lowest else None)


def of_form(form: str, pattern: str) -> Callable[[str], Any]:
    """Return an argparse type that gives the groups of the regex `pattern`; errors show `form`, such as NAME=FILE."""
    return argument_type(f"of the form {form}", lambda text: (match := re.fullmatch(pattern, text)) and match.groups())


_NUMBERS = re.compile(r"(\s*\d{1,9}\s*,)*\s*\d{1,9}\s*")
number_list = argument_type(
    "a list of numbers such as 4,9", lambda text: tuple(map(int, text.split(","))) if _NUMBERS.fullmatch(text) else None
)
positive = argument_type("a number above 0", lambda text: number if 0 < (number := float(text)) < math.inf else None)


def existing(text: str) -> str:
    """Argparse type: return the path of a file or folder unchanged; FileNotFoundError if it does not exist."""
    if os.path.exists(os.path.expanduser(text)):
        return text
    raise FileNotFoundError(f"The file or folder {text} does not exist.")  # one sentence, without the usage


def exit_list(text: str) -> tuple[int, ...] | None:
    """Parse a list of exits: `"4,9"` → (4, 9), and `"all"` → None (all exits)."""
    return None if text == "all" else number_list(text)


def name_list(text: str) -> list[str]:
    """Parse names separated by commas: `"bm25,tfidf"` → ["bm25", "tfidf"]."""
    return [name for part in text.split(",") if (name := part.strip())]


def checkpoint(text: str) -> str:
    """Argparse type: return a checkpoint's name unchanged; OSError if no folder or Hub repository has this name.

    If the Hub can't be reached, but the Hub's cache has the repository, this process works offline (`HF_HUB_OFFLINE`).
    """
    check_checkpoint(text)
    if is_repository(text):
        from modular_star_encoder.utils.http import check_hub

        try:
            check_hub()
        except OSError as error:
            cached = None
            with suppress(ValueError):  # HF_ENDPOINT is wrong, as `error` says
                from huggingface_hub import try_to_load_from_cache

                cached = try_to_load_from_cache(text, "config.json")
            if not isinstance(cached, str):
                raise OSError(f"{text} is neither a local folder nor in the Hub's cache, and {error}") from None
            from huggingface_hub import constants

            constants.HF_HUB_OFFLINE = True
            os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that this one starts
    return text


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, /, **defaults: Any
) -> argparse.ArgumentParser:
    """Add a command to the subparsers `commands`; return its parser. `run` gets what it parses, plus `defaults`."""
    parser = commands.add_parser(name, help=help)
    parser.set_defaults(run=run, **defaults)
    return parser


def add_recipe_options(parser: argparse.ArgumentParser, recipe: str, setting: str, out: str) -> None:
    """Add RECIPE, KEY=VALUE and --out to a command. `recipe` and `out`: help texts; `setting`: example of KEY=VALUE."""
    parser.add_argument("recipe", metavar="RECIPE", help=recipe)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=f"settings to change, such as {setting}")
    parser.add_argument("--out", metavar="FOLDER", required=True, help=out)
    parser.set_defaults(example=setting, resumes=True)
