"""The command line, and argparse types for options of several commands; argparse reports values that do not fit."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable

from modular_star_encoder.inference import check_checkpoint, is_repository

CHECKPOINT_HELP = "folder, Hub repository or mose-code"


def number_list(text: str) -> tuple[int, ...]:
    """Parse integers with commas: `"4,9"` → (4, 9)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 4,9") from None


def exit_list(text: str) -> tuple[int, ...] | None:
    """Parse a list of exits: `"4,9"` → (4, 9), and `"all"` → None."""
    return None if text == "all" else number_list(text)


def name_list(text: str) -> list[str]:
    """Parse names with commas: `"bm25,tfidf"` → ["bm25", "tfidf"]."""
    return [name for part in text.split(",") if (name := part.strip())]


def at_least(lowest: int) -> Callable[[str], int]:
    """Return an argparse type for integers from `lowest` on."""

    def number(text: str) -> int:
        if text.strip().removeprefix("-").isdecimal() and int(text) >= lowest:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {lowest}")

    return number


def existing(text: str) -> str:
    """Return the path of a file or folder as it is; raise FileNotFoundError at once if it does not exist."""
    if os.path.exists(os.path.expanduser(text)):
        return text
    raise FileNotFoundError(f"The file or folder {text} does not exist.")


def of_form(form: str, pattern: str) -> Callable[[str], tuple[str, ...]]:
    """Return an argparse type for a form such as `NAME=FILE`: it returns what the groups of `pattern` match."""

    def groups(text: str) -> tuple[str, ...]:
        if match := re.fullmatch(pattern, text):
            return match.groups()
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form {form}")

    return groups


def checkpoint(text: str) -> str:
    """Return a checkpoint's name as it is; raise OSError at once if its folder is missing or the Hub can't be reached.

    Without a connection to the Hub, a repository in its cache is used as it is there.
    """
    check_checkpoint(text)
    if is_repository(text):
        from modular_star_encoder.utils.http import check_hub

        try:
            check_hub()
        except OSError as error:
            from huggingface_hub import constants, try_to_load_from_cache

            if not isinstance(try_to_load_from_cache(text, "config.json"), str):
                raise OSError(f"{text} is neither a local folder nor in the Hub's cache, and {error}") from None
            constants.HF_HUB_OFFLINE = True
            os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that this one starts
    return text


def add_recipe_options(parser: argparse.ArgumentParser, recipe: str, setting: str, out: str) -> None:
    """Add RECIPE, KEY=VALUE and --out to a command; `recipe` and `setting` are examples, `out` is the help of --out."""
    parser.add_argument("recipe", metavar="RECIPE", help=f"a YAML file or a packaged recipe, such as {recipe}")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=f"other settings: {setting}")
    parser.add_argument("--out", metavar="FOLDER", required=True, help=out)
