"""The commands that measure exits: `mose evaluate` measures retrieval quality, `mose profile` measures cost."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from modular_star_encoder.cli import (
    CHECKPOINT_HELP,
    add_command,
    at_least,
    checkpoint,
    existing,
    exit_list,
    name_list,
    number_list,
    of_form,
)
from modular_star_encoder.inference import profile_path
from modular_star_encoder.utils.files import check_writable, write_json
from modular_star_encoder.utils.reports import printable

# The names in `evaluation.benchmarks`, copied because importing it takes seconds; a test compares both.
BENCHMARK_NAMES = (
    *(f"codesearchnet-{part}" for part in ("999", "999-leaky", "full")),
    *("translation", "translation-masked", "poj104", "bigclonebench", "advtest", "cosqa"),
    *("exercism-text", "exercism-text-masked", "exercism-code", "exercism-code-masked", "folder", "all"),
)


def _benchmarks(text: str) -> list[str]:
    names = name_list(text)
    if unknown := [name for name in names if name not in BENCHMARK_NAMES] or ([] if names else [text]):
        raise argparse.ArgumentTypeError(f"unknown benchmark {unknown[0]!r}; available: {', '.join(BENCHMARK_NAMES)}")
    return names


def _data(text: str) -> str:
    return text if text == "hub" or text.startswith("hub:") else existing(text)


def _model(text: str) -> str:
    """Argparse type: return `text` if it names an endpoint (`openai:…`) or an existing model; OSError otherwise."""
    is_other = text.startswith("openai:") or os.path.isfile(os.path.join(os.path.expanduser(text), "modules.json"))
    return text if is_other else checkpoint(text)


def add_evaluate_commands(commands: Any) -> None:
    """Add `mose evaluate` and `mose profile` to the subparsers of `mose`."""
    about = "measure every exit on benchmarks, or on a folder of code"
    add = add_command(commands, "evaluate", run_evaluate, about, resumes=True).add_argument
    add("checkpoint", metavar="MODEL", type=_model, help=CHECKPOINT_HELP)
    names = f"benchmarks, separated by commas (default: folder): {', '.join(BENCHMARK_NAMES)}"
    add("--benchmark", metavar="NAMES", type=_benchmarks, default=["folder"], help=names)
    data = "a folder of source code or benchmark files, a Hub dataset hub:OWNER/NAME, or hub for the authors' datasets"
    add("--data", metavar="FOLDER", type=_data, required=True, help=data)
    exits = "exits of the checkpoint to measure: all (the default), or a list such as 4,9"
    add("--exit-layers", metavar="LIST", type=exit_list, help=exits)
    add("--json", metavar="FILE", help="also write the results to FILE")
    add("--out", metavar="FOLDER", help="folder for reports and plots; an interrupted run is continued")
    baselines = "also measure other retrievers, separated by commas: bm25, tfidf, models, openai:MODEL@URL"
    add("--baselines", metavar="NAMES", type=name_list, help=baselines)
    add("--allow-subset", action="store_true", help="accept benchmark files that lack rows; the report then says so")
    add("--cache", metavar="FOLDER", help="folder to cache embeddings in (default: OUT/embeddings)")

    add = add_command(commands, "profile", run_profile, "measure the cost of every exit on this machine").add_argument
    add("checkpoint", metavar="CHECKPOINT", type=checkpoint, help=CHECKPOINT_HELP)
    add("--exit-layers", metavar="LIST", type=exit_list, help=exits)
    add("--batch-sizes", metavar="LIST", type=number_list, default=(1, 8), help="batch sizes (default: 1,8)")
    lengths = "text lengths in tokens (default: 128,512)"
    add("--lengths", metavar="LIST", type=number_list, default=(128, 512), help=lengths)
    rounds = "number of timed runs per exit, batch size and length (default: 30)"
    add("--rounds", metavar="N", type=at_least(1), default=30, help=rounds)
    add("--device", metavar="NAME", help="device to measure on: cpu or cuda (default: a GPU if there is one)")
    add("--dtype", metavar="NAME", help="number format: float32, bfloat16 or float16 (default: the checkpoint's)")
    add("--out", metavar="FILE", help="file to write (default: exit_profile.json in the checkpoint's folder)")
    quality = "measure no costs; add scores on benchmark NAME from FILE, a report of mose evaluate, to the profile"
    add("--quality", metavar="NAME=FILE", type=of_form("NAME=FILE", "([^=]+)=(.+)"), help=quality)


def run_evaluate(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.evaluation.run import run_benchmarks

    options = {name: getattr(arguments, name) for name in ("exit_layers", "baselines", "cache", "allow_subset")}
    options["command"] = shlex.join(["mose", *sys.argv[1:]])
    report = run_benchmarks(arguments.checkpoint, arguments.benchmark, arguments.data, arguments.out, **options)
    if arguments.json:
        write_json(arguments.json, report.to_dict())
    print(report.to_markdown(), end="")


def run_profile(arguments: argparse.Namespace) -> None:
    path = profile_path(arguments.checkpoint, arguments.out)
    check_writable(path)  # before the slow imports
    from modular_star_encoder.evaluation.report import add_quality
    from modular_star_encoder.inference.profile import ProfilePlan, format_profile, profile_to_file

    if arguments.quality:
        profile = add_quality(path, *arguments.quality)
    else:
        plan = ProfilePlan(arguments.batch_sizes, arguments.lengths, arguments.rounds)
        options = {name: getattr(arguments, name) for name in ("out", "exit_layers", "device", "dtype")}
        profile, path = profile_to_file(arguments.checkpoint, plan, **options)
    # A stranger's profile may have any text.
    print(*map(printable, format_profile(profile).split("\n")), "", path, sep="\n")
