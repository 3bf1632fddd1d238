"""The command line. This module has options of several commands, and argparse types, which check and parse values."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress

from modular_star_encoder.inference import check_checkpoint, is_repository

CHECKPOINT_HELP = "a checkpoint: a folder, a Hub repository, or mose-code, the model in this package"


def number_list(text: str) -> tuple[int, ...]:
    """Parse integers separated by commas: `"4,9"` → (4, 9)."""
    try:
        return tuple(at_least(0)(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not a list of numbers such as 4,9") from None


def exit_list(text: str) -> tuple[int, ...] | None:
    """Parse a list of exits: `"4,9"` → (4, 9), and `"all"` → None (all exits)."""
    return None if text == "all" else number_list(text)


def name_list(text: str) -> list[str]:
    """Parse names separated by commas: `"bm25,tfidf"` → ["bm25", "tfidf"]."""
    return [name for part in text.split(",") if (name := part.strip())]


def at_least(lowest: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers of at least `lowest` and at most nine digits."""

    def number(text: str) -> int:
        if re.fullmatch(r"\s*-?\d{1,9}\s*", text) and int(text) >= lowest:
            return int(text)
        raise argparse.ArgumentTypeError(f"{shortened(text)} must be a whole number from {lowest} to 999999999")

    return number


def positive(text: str) -> float:
    """Argparse type: return a finite number above 0."""
    with suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{shortened(text)} must be a number above 0")


def shortened(text: str) -> str:
    """Return `text` for an error message: in quotation marks, and cut to at most 100 characters."""
    return repr(text if len(text) <= 100 else f"{text[:99]}…")


def existing(text: str) -> str:
    """Argparse type: return the path of a file or folder unchanged; FileNotFoundError if it does not exist."""
    if os.path.exists(os.path.expanduser(text)):
        return text
    raise FileNotFoundError(f"The file or folder {text} does not exist.")


def of_form(form: str, pattern: str) -> Callable[[str], tuple[str, ...]]:
    """Return an argparse type that gives the groups of the regex `pattern`; errors show `form`, such as NAME=FILE."""

    def groups(text: str) -> tuple[str, ...]:
        if match := re.fullmatch(pattern, text):
            return match.groups()
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not of the form {form}")

    return groups


def checkpoint(text: str) -> str:
    """Argparse type: return a checkpoint's name unchanged; OSError if there is no such folder or Hub repository.

    If the Hub can't be reached, but the Hub's cache has the repository, this process works offline (`HF_HUB_OFFLINE`).
    """
    check_checkpoint(text)
    if is_repository(text):
        from modular_star_encoder.utils.http import check_hub

        try:
            check_hub()
        except OSError as error:
            try:
                from huggingface_hub import constants, try_to_load_from_cache
            except ValueError:  # HF_ENDPOINT is wrong, as `error` says
                raise error from None
            if not isinstance(try_to_load_from_cache(text, "config.json"), str):
                raise OSError(f"{text} is neither a local folder nor in the Hub's cache, and {error}") from None
            constants.HF_HUB_OFFLINE = True
            os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that this one starts
    return text


def add_recipe_options(parser: argparse.ArgumentParser, recipe: str, setting: str, out: str) -> None:
    """Add RECIPE, KEY=VALUE and --out to a command. `recipe` and `out` are help texts; `setting` is a KEY=VALUE."""
    parser.add_argument("recipe", metavar="RECIPE", help=recipe)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=f"settings to change, such as {setting}")
    parser.add_argument("--out", metavar="FOLDER", required=True, help=out)
    parser.set_defaults(example=setting, resumes=True)
