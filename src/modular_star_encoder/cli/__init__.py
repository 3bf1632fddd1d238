"""The command line, and the option types that several commands share; argparse reports values that do not fit."""

from __future__ import annotations

import argparse


def number_list(text: str) -> tuple[int, ...]:
    """`"4,9"` → (4, 9)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 4,9") from None


def exit_list(text: str) -> tuple[int, ...] | None:
    """`"4,9"` → (4, 9), and `"all"` → None."""
    if text == "all":
        return None
    try:
        return number_list(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor a list of numbers such as 4,9") from None


def name_list(text: str) -> list[str]:
    """`"bm25,tfidf"` → ["bm25", "tfidf"]."""
    return [name for part in text.split(",") if (name := part.strip())]


def named_file(text: str) -> tuple[str, str]:
    """`"name=file"` → ("name", "file")."""
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=FILE")
    return name, file


def add_recipe_options(parser: argparse.ArgumentParser, recipe: str, setting: str, out: str) -> None:
    """Add RECIPE, KEY=VALUE and --out to a command; `recipe` and `setting` are examples, `out` is the help of --out."""
    parser.add_argument("recipe", metavar="RECIPE", help=f"a YAML file, for example {recipe}")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=f"other settings: {setting}")
    parser.add_argument("--out", metavar="FOLDER", required=True, help=out)
