"""The commands of `mose dataset`: build, dedup, stats, push."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from modular_star_encoder.cli import add_recipe_options, of_form


def add_dataset_commands(commands: Any) -> None:
    """Add `mose dataset` and its commands to the subparsers of `mose`."""
    dataset = commands.add_parser("dataset", help="build a dataset of translated functions, and publish it")
    commands = dataset.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="extract, translate, near-deduplicate and split, as a recipe says")
    add_recipe_options(
        build, "examples/dataset/recipe.yaml", "corpus.folder=~/code", "where the build is; an old one is continued"
    )
    build.set_defaults(run=run_dataset_build)

    dedup = commands.add_parser("dedup", help="drop the near-duplicates of parquet files")
    dedup.add_argument("source", metavar="SOURCE", help="a folder of parquet files")
    dedup.add_argument("--out", metavar="FOLDER", required=True, help="where to write; an old run is continued")
    dedup.add_argument("--columns", metavar="LIST", default="func1_CSN,func2", help="columns to compare, with commas")
    dedup.add_argument("--match", choices=("either", "both"), default="either", help="columns that must be near")
    dedup.add_argument("--id-column", metavar="NAME", help="column of ids; the smallest of a cluster stays")
    dedup.add_argument("--threshold", metavar="JACCARD", type=float, default=0.7, help="smallest similarity (0.7)")
    dedup.add_argument("--recall", choices=("default", "high"), default="default", help="how many pairs are compared")
    dedup.add_argument(
        "--against",
        metavar="SOURCE:COLUMN",
        type=of_form("SOURCE:COLUMN", "(.+):(.+)"),
        action="append",
        default=[],
        help="drop rows near these texts, such as a benchmark's: parquet, JSON Lines or a dataset of the Hub",
    )
    dedup.set_defaults(run=run_dataset_dedup)

    stats = commands.add_parser("stats", help="print samples and average lengths by language")
    stats.add_argument("source", metavar="SOURCE", help="folder, parquet or JSON Lines file, or dataset of the Hub")
    stats.add_argument("--split", default="train", help="train (the default), validation or another one")
    stats.add_argument("--json", metavar="FILE", help="also write the statistics to FILE")
    stats.set_defaults(run=run_dataset_stats)

    push = commands.add_parser("push", help="say what would be uploaded to the Hub; with --upload, upload it")
    push.add_argument("folder", metavar="FOLDER", help="the folder of a finished build")
    push.add_argument("repository", metavar="OWNER/NAME", help="dataset repository on the Hub")
    push.add_argument("--upload", action="store_true", help="upload")
    push.add_argument("--public", action="store_true", help="make a new repository public")
    push.set_defaults(run=run_dataset_push)


def run_dataset_build(arguments: argparse.Namespace) -> None:
    """Run `mose dataset build`."""
    from modular_star_encoder.synthconl.build import build_dataset, load_dataset_recipe

    print(build_dataset(load_dataset_recipe(arguments.recipe, arguments.overrides), arguments.out))


def run_dataset_dedup(arguments: argparse.Namespace) -> None:
    """Run `mose dataset dedup`."""
    from modular_star_encoder.data.sources.dataset_rows import open_texts
    from modular_star_encoder.synthconl.minhash import DuplicateSettings
    from modular_star_encoder.synthconl.near_duplicate_job import prepare_job

    job = prepare_job(
        arguments.source,
        arguments.out,
        columns=arguments.columns.split(","),
        id_column=arguments.id_column,
        against={f"{source}:{column}": open_texts(source, column) for source, column in arguments.against},
        settings=DuplicateSettings(threshold=arguments.threshold, match=arguments.match, recall=arguments.recall),
    )
    for reason, count in job.run().counts.items():
        print(f"{count:>12,}  {reason}")


def run_dataset_stats(arguments: argparse.Namespace) -> None:
    """Run `mose dataset stats`."""
    from dataclasses import asdict

    from modular_star_encoder.data.pairs import open_triplets
    from modular_star_encoder.synthconl.publishing import dataset_statistics
    from modular_star_encoder.utils.files import check_writable, write_json

    if arguments.json:
        check_writable(arguments.json)
    triplets = open_triplets(arguments.source, split=arguments.split)
    statistics = dataset_statistics(triplets)
    for reason, count in triplets.skipped.most_common():
        print(f"mose: note: {count} rows left out ({reason}), such as {triplets.examples[reason]}", file=sys.stderr)
    if arguments.json:
        write_json(arguments.json, asdict(statistics))
    print(statistics.to_markdown())


def run_dataset_push(arguments: argparse.Namespace) -> None:
    """Run `mose dataset push`."""
    from modular_star_encoder.synthconl.publishing import push_dataset

    private = not arguments.public
    print(push_dataset(arguments.folder, arguments.repository, upload=arguments.upload, private=private))
