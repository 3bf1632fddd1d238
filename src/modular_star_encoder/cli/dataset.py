"""The commands of `mose dataset`: `build`, `dedup`, `stats`, `push` and `corpus`."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from modular_star_encoder.cli import add_command, add_recipe_options, at_least, existing, note, of_form
from modular_star_encoder.training import find_recipe
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import write_json
from modular_star_encoder.utils.reports import printable


def add_dataset_commands(commands: Any) -> None:
    """Add `mose dataset` and its commands to the subparsers of `mose`."""
    dataset = commands.add_parser("dataset", help="make, deduplicate and publish datasets of functions")
    commands = dataset.add_subparsers(required=True, metavar="COMMAND")

    about = "build a dataset: extract functions, translate them, drop near-duplicates, split the rows"
    build = add_command(commands, "build", run_dataset_build, about)
    recipe, folder = "a YAML file, or synthconl, a packaged recipe", "folder to write; a stopped build is continued"
    add_recipe_options(build, recipe, "corpus.folder=~/code", folder)

    about = "copy parquet files without near-duplicate rows"
    add = add_command(commands, "dedup", run_dataset_dedup, about, resumes=True).add_argument
    add("source", metavar="SOURCE", type=existing, help="a folder of parquet files")
    add("--out", metavar="FOLDER", required=True, help="folder to write; a stopped run is continued")
    add("--columns", metavar="LIST", default="func1_CSN,func2", help="columns to compare, separated by commas")
    match = "either (default): rows with one similar column are near-duplicates; both: both columns must be similar"
    add("--match", choices=("either", "both"), default="either", help=match)
    ids = "column of ids: of near-duplicate rows, the one with the smallest id is kept (default: the first row)"
    add("--id-column", metavar="NAME", help=ids)
    threshold = "lowest Jaccard similarity at which texts are similar (default: 0.7)"
    add("--threshold", metavar="JACCARD", type=float, default=0.7, help=threshold)
    recall = "high: compare more pairs of rows, to miss fewer near-duplicates"
    add("--recall", choices=("default", "high"), default="default", help=recall)
    near = "also drop rows similar to a text in COLUMN of SOURCE, a parquet or JSON Lines file or a Hub dataset"
    pairs = of_form("SOURCE:COLUMN", "(.+):(.+)")
    add("--against", metavar="SOURCE:COLUMN", type=pairs, action="append", default=[], help=near)

    about = "print the number of samples and their mean lengths for each language of a dataset"
    add = add_command(commands, "stats", run_dataset_stats, about).add_argument
    add("source", metavar="SOURCE", help="folder, parquet or JSON Lines file, or dataset of the Hub")
    add("--split", default="train", help="split to read (default: train)")
    add("--json", metavar="FILE", help="also write the statistics to FILE")

    about = "list what would be uploaded to the Hub; with --upload, upload it"
    add = add_command(commands, "push", run_dataset_push, about).add_argument
    add("folder", metavar="FOLDER", help="the folder of a finished build")
    add("repository", metavar="OWNER/NAME", help="dataset repository on the Hub")
    add("--upload", action="store_true", help="upload the files (default: only list the files)")
    add("--public", action="store_true", help="make a new repository public (default: private)")

    corpus = commands.add_parser("corpus", help="build a corpus of functions from packages of Debian, npm and PyPI")
    commands = corpus.add_subparsers(required=True, metavar="COMMAND")
    about = "download those packages of a corpus that are not in FOLDER yet"
    add = add_command(commands, "fetch", run_corpus_fetch, about, resumes=True).add_argument
    packages = "YAML file with packages, such as a copy of mose-code/corpus (`mose recipes copy`)"
    add("corpus", metavar="FILE", type=existing, help=packages)
    add("--out", metavar="FOLDER", required=True, help="folder to write, which gets a folder for each package")

    about = "extract functions of packages, drop duplicates, and hold out packages for validation"
    add = add_command(commands, "build", run_corpus_build, about, resumes=True).add_argument
    add("corpus", metavar="FILE", type=existing, help=packages)
    add("--packages", metavar="FOLDER", type=existing, required=True, help="folder of `mose dataset corpus fetch`")
    add("--out", metavar="FOLDER", required=True, help="folder to write; a stopped build is continued")
    processes = "number of processes that extract functions (default: 2)"
    add("--processes", metavar="N", type=at_least(0), default=2, help=processes)

    about = "list texts of a corpus that equal or resemble texts in evaluation sets"
    check = add_command(commands, "check", run_corpus_check, about)
    # argparse would show --against first, where it would take each FILE for ROWS.
    check.usage = "%(prog)s [-h] FILE [FILE ...] --against ROWS [ROWS ...] [--drop FOLDER] [--json FILE]"
    add = check.add_argument
    written = "file that `mose dataset corpus build` wrote, such as pairs.jsonl.gz"
    add("files", metavar="FILE", type=existing, nargs="+", help=written)
    against = "evaluation sets: JSON Lines or JSON files, or folders of such files"
    add("--against", metavar="ROWS", type=existing, nargs="+", required=True, help=against)
    add("--drop", metavar="FOLDER", help="copy the files to FOLDER without the rows that are in evaluation sets")
    add("--json", metavar="FILE", help="also write the numbers of rows that are in evaluation sets to FILE")


def run_dataset_build(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.synthconl.build import DatasetRecipe, build_dataset
    from modular_star_encoder.utils.settings import load_settings

    recipe = find_recipe(arguments.recipe, "dataset build")
    print(build_dataset(load_settings(DatasetRecipe, recipe, arguments.overrides), arguments.out))


def run_dataset_dedup(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.data.sources.dataset_rows import open_texts
    from modular_star_encoder.synthconl.near_duplicate_job import drop_near_duplicates
    from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings

    report = drop_near_duplicates(
        arguments.source,
        arguments.out,
        columns=arguments.columns.split(","),
        id_column=arguments.id_column,
        against={f"{source}:{column}": open_texts(source, column) for source, column in arguments.against},
        settings=DuplicateSettings(threshold=arguments.threshold, match=arguments.match, recall=arguments.recall),
    )
    for reason, count in report["counts"].items():
        print(f"{count:>12,}  {printable(reason)}")


def run_dataset_stats(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.data.pairs import open_triplets
    from modular_star_encoder.synthconl.publishing import dataset_statistics

    triplets = open_triplets(arguments.source, split=arguments.split)
    statistics = dataset_statistics(triplets)
    for reason, count in triplets.skipped.most_common():
        note(f"{count} rows left out ({reason}), such as {triplets.examples[reason][0]}")
    if not statistics.rows:
        raise UserError("data.source.empty", f"{arguments.source} has no row with a description, code and translation.")
    if arguments.json:
        write_json(arguments.json, asdict(statistics))
    print(statistics.to_markdown())


def run_dataset_push(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.synthconl.publishing import push_dataset

    private = not arguments.public
    pushed = push_dataset(arguments.folder, arguments.repository, upload=arguments.upload, private=private)
    print(replace(pushed, files=tuple((printable(name), size) for name, size in pushed.files)))


def run_corpus_fetch(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.synthconl.corpus import fetch_packages, read_packages

    for outcome, packages in fetch_packages(read_packages(arguments.corpus), arguments.out).items():
        print(f"{len(packages):>8,}  {outcome}")
        for package in packages if not outcome.startswith("fetched") else ():
            note(f"{outcome}: {package.registry} {package.name} {package.version}")


def run_corpus_build(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.synthconl.corpus import build_corpus, read_packages

    packages = read_packages(arguments.corpus)
    stats = build_corpus(packages, arguments.packages, arguments.out, arguments.processes)
    for name in ("packages", "pairs", "pairs_valid", "texts"):
        print(f"{stats[name]:>12,}  {name}")
    for rule, count in stats["dropped"].items():
        print(f"{count:>12,}  dropped: {rule}")


def run_corpus_check(arguments: argparse.Namespace) -> None:
    """Print the texts of a corpus that are in evaluation sets. UserError if there are some, unless --drop is given."""
    from modular_star_encoder.synthconl.corpus import EvaluationTexts, check_corpus

    report, hits = check_corpus(arguments.files, EvaluationTexts(arguments.against), arguments.drop)
    for hit in hits:
        print(printable(hit))
    if arguments.json:
        write_json(arguments.json, report)
    for name, counts in report["files"].items():
        print(printable(f"{name}: {counts['rows_found']:,} of {counts['rows']:,} rows are in an evaluation set"))
    if hits and not arguments.drop:
        message = f"{len(hits)} texts are in evaluation sets. To copy the files without them, add --drop FOLDER."
        raise UserError("cli.dataset.corpus", message)
