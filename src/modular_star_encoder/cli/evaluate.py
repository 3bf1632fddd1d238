"""The commands that measure exits: `mose evaluate` measures retrieval quality, `mose profile` measures cost."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from modular_star_encoder.cli import (
    CHECKPOINT_HELP,
    at_least,
    checkpoint,
    existing,
    exit_list,
    name_list,
    number_list,
    of_form,
)
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


def add_evaluate_commands(commands: Any) -> None:
    """Add `mose evaluate` and `mose profile` to the subparsers of `mose`."""
    evaluate = commands.add_parser("evaluate", help="measure every exit on benchmarks, or on a folder of code")
    evaluate.add_argument("checkpoint", metavar="MODEL", type=_model, help=CHECKPOINT_HELP)
    names = f"benchmarks, separated by commas (default: folder): {', '.join(BENCHMARK_NAMES)}"
    evaluate.add_argument("--benchmark", metavar="NAMES", type=_benchmarks, default=["folder"], help=names)
    data = "a folder of source code or benchmark files, a Hub dataset hub:OWNER/NAME, or hub for the authors' datasets"
    evaluate.add_argument("--data", metavar="FOLDER", type=_data, required=True, help=data)
    exits = "exits of CHECKPOINT to measure: all (the default), or a list such as 4,9"
    evaluate.add_argument("--exit-layers", metavar="LIST", type=exit_list, help=exits)
    evaluate.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    evaluate.add_argument(
        "--out", metavar="FOLDER", help="folder for reports and plots; an interrupted run is continued"
    )
    baselines = "also measure these: bm25, tfidf, other models, openai:MODEL@URL; separated by commas"
    evaluate.add_argument("--baselines", metavar="NAMES", type=name_list, help=baselines)
    subset = "accept benchmark files that lack rows; the report says so"
    evaluate.add_argument("--allow-subset", action="store_true", help=subset)
    evaluate.add_argument("--cache", metavar="FOLDER", help="folder for embeddings (default: OUT/embeddings)")
    evaluate.set_defaults(run=run_evaluate, resumes=True)

    profile = commands.add_parser("profile", help="measure the cost of every exit on this machine")
    profile.add_argument("checkpoint", metavar="CHECKPOINT", type=checkpoint, help=CHECKPOINT_HELP)
    profile.add_argument("--exit-layers", metavar="LIST", type=exit_list, help=exits)
    sizes, lengths = "batch sizes to measure (default: 1,8)", "text lengths to measure, in tokens (default: 128,512)"
    profile.add_argument("--batch-sizes", metavar="LIST", type=number_list, default=(1, 8), help=sizes)
    profile.add_argument("--lengths", metavar="LIST", type=number_list, default=(128, 512), help=lengths)
    rounds = "timed runs per exit, batch size and length (default: 30)"
    profile.add_argument("--rounds", metavar="N", type=at_least(1), default=30, help=rounds)
    profile.add_argument("--device", metavar="NAME", help="cpu or cuda (default: a GPU if there is one)")
    profile.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    written = "file to write (default: exit_profile.json in the checkpoint's folder)"
    profile.add_argument("--out", metavar="FILE", help=written)
    profile.add_argument(
        "--quality",
        metavar="NAME=FILE",
        type=of_form("NAME=FILE", "([^=]+)=(.+)"),
        help="measure nothing; add scores on benchmark NAME to the profile, from FILE, a report of mose evaluate",
    )
    profile.set_defaults(run=run_profile)


def _model(text: str) -> str:
    """Argparse type: return `text` unchanged if it names a model; otherwise OSError.

    A model is `openai:…` (an endpoint), a SentenceTransformer folder or a checkpoint.
    """
    is_other = text.startswith("openai:") or os.path.isfile(os.path.join(os.path.expanduser(text), "modules.json"))
    return text if is_other else checkpoint(text)


def run_evaluate(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.evaluation.run import run_benchmarks
    from modular_star_encoder.utils.files import write_json

    options = {name: getattr(arguments, name) for name in ("exit_layers", "baselines", "cache")}
    options |= {"allow_subset": arguments.allow_subset, "command": shlex.join(["mose", *sys.argv[1:]])}
    report = run_benchmarks(arguments.checkpoint, arguments.benchmark, arguments.data, arguments.out, **options)
    if arguments.json:
        write_json(arguments.json, report.to_dict())
    print(report.to_markdown(), end="")


def run_profile(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.inference import profile_path
    from modular_star_encoder.utils.files import check_writable

    path = profile_path(arguments.checkpoint, arguments.out)
    check_writable(path)
    from modular_star_encoder.evaluation.report import read_quality
    from modular_star_encoder.inference.exit_profile import ExitProfile
    from modular_star_encoder.inference.profile import ProfilePlan, format_profile, profile_to_file

    if arguments.quality:
        name, results = arguments.quality
        profile = ExitProfile.load(path)
        profile = profile.with_quality(name, read_quality(results, checkpoint=profile.checkpoint, benchmark=name))
        profile.save(path)
    else:
        plan = ProfilePlan(arguments.batch_sizes, arguments.lengths, arguments.rounds)
        options = {name: getattr(arguments, name) for name in ("out", "exit_layers", "device", "dtype")}
        profile, path = profile_to_file(arguments.checkpoint, plan, **options)
    # A stranger's profile may have any text.
    print(*map(printable, format_profile(profile).split("\n")), "", path, sep="\n")
