"""The commands of `mose dataset`: build, dedup, stats, push and corpus."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from modular_star_encoder.cli import add_recipe_options, at_least, existing, of_form
from modular_star_encoder.utils.errors import UserError


def add_dataset_commands(commands: Any) -> None:
    """Add `mose dataset` and its commands to the subparsers of `mose`."""
    dataset = commands.add_parser("dataset", help="make datasets of functions, drop near-duplicates, and publish them")
    commands = dataset.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="extract functions, translate them, drop near-duplicates, and split")
    recipe, folder = "a YAML file, or synthconl, the packaged recipe", "folder to write; a stopped build is continued"
    add_recipe_options(build, recipe, "corpus.folder=~/code", folder)
    build.set_defaults(run=run_dataset_build)

    dedup = commands.add_parser("dedup", help="copy parquet files without near-duplicate rows")
    dedup.add_argument("source", metavar="SOURCE", type=existing, help="a folder of parquet files")
    dedup.add_argument("--out", metavar="FOLDER", required=True, help="folder to write; a stopped run is continued")
    dedup.add_argument("--columns", metavar="LIST", default="func1_CSN,func2", help="columns to compare: NAME,NAME")
    match = "two rows are near-duplicates if one of their columns is similar (either, the default), or if both are"
    dedup.add_argument("--match", choices=("either", "both"), default="either", help=match)
    ids = "column of ids; of near-duplicates, the row with the smallest id is kept (default: the first row)"
    dedup.add_argument("--id-column", metavar="NAME", help=ids)
    threshold = "lowest Jaccard similarity at which texts are similar (default: 0.7)"
    dedup.add_argument("--threshold", metavar="JACCARD", type=float, default=0.7, help=threshold)
    recall = "high: compare more pairs of rows, and miss fewer near-duplicates"
    dedup.add_argument("--recall", choices=("default", "high"), default="default", help=recall)
    near = "also drop rows similar to a text in COLUMN of SOURCE, a parquet or JSON Lines file or a Hub dataset"
    form = "SOURCE:COLUMN"
    pairs = of_form(form, "(.+):(.+)")
    dedup.add_argument("--against", metavar=form, type=pairs, action="append", default=[], help=near)
    dedup.set_defaults(run=run_dataset_dedup, resumes=True)

    stats = commands.add_parser("stats", help="print a dataset's number of samples and mean lengths by language")
    stats.add_argument("source", metavar="SOURCE", help="folder, parquet or JSON Lines file, or dataset of the Hub")
    stats.add_argument("--split", default="train", help="split to read (default: train)")
    stats.add_argument("--json", metavar="FILE", help="also write the statistics to FILE")
    stats.set_defaults(run=run_dataset_stats)

    push = commands.add_parser("push", help="list what would be uploaded to the Hub; with --upload, upload it")
    push.add_argument("folder", metavar="FOLDER", help="the folder of a finished build")
    push.add_argument("repository", metavar="OWNER/NAME", help="dataset repository on the Hub")
    push.add_argument("--upload", action="store_true", help="upload the files (default: only list them)")
    push.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    push.set_defaults(run=run_dataset_push)

    corpus = commands.add_parser("corpus", help="build a corpus of functions from packages of Debian, npm and PyPI")
    commands = corpus.add_subparsers(required=True, metavar="COMMAND")
    fetch = commands.add_parser("fetch", help="download those packages of a corpus that are not in FOLDER yet")
    packages = "list of packages, such as a copy of mose-code/corpus (`mose recipes copy`)"
    fetch.add_argument("corpus", metavar="FILE", type=existing, help=packages)
    fetch.add_argument("--out", metavar="FOLDER", required=True, help="folder to write, with a folder for each package")
    fetch.set_defaults(run=run_corpus_fetch, resumes=True)

    pairs = commands.add_parser("build", help="extract functions of packages, drop duplicates, and split by packages")
    pairs.add_argument("corpus", metavar="FILE", type=existing, help=packages)
    fetched = "folder that `mose dataset corpus fetch` wrote"
    pairs.add_argument("--packages", metavar="FOLDER", type=existing, required=True, help=fetched)
    pairs.add_argument("--out", metavar="FOLDER", required=True, help="folder to write; a stopped build is continued")
    processes = "number of processes that extract functions (default: 2)"
    pairs.add_argument("--processes", metavar="N", type=at_least(0), default=2, help=processes)
    pairs.set_defaults(run=run_corpus_build, resumes=True)

    check = commands.add_parser("check", help="list texts of a corpus that equal or resemble texts in evaluation sets")
    written = "file that `mose dataset corpus build` wrote, such as pairs.jsonl.gz"
    check.add_argument("files", metavar="FILE", type=existing, nargs="+", help=written)
    against = "evaluation sets: JSON Lines or JSON files, or folders of such files"
    check.add_argument("--against", metavar="ROWS", type=existing, nargs="+", required=True, help=against)
    check.add_argument("--drop", metavar="FOLDER", help="copy the files to FOLDER without rows in evaluation sets")
    check.add_argument("--json", metavar="FILE", help="also write the numbers of rows in evaluation sets to FILE")
    check.set_defaults(run=run_corpus_check)


def run_dataset_build(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.synthconl.build import DatasetRecipe, build_dataset
    from modular_star_encoder.training import find_recipe
    from modular_star_encoder.utils.settings import load_settings

    recipe = find_recipe(arguments.recipe, "dataset build")
    print(build_dataset(load_settings(DatasetRecipe, recipe, arguments.overrides), arguments.out))


def run_dataset_dedup(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.data.sources.dataset_rows import open_texts
    from modular_star_encoder.synthconl.near_duplicate_job import drop_near_duplicates
    from modular_star_encoder.synthconl.near_duplicates import DuplicateSettings
    from modular_star_encoder.utils.reports import printable

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
    from dataclasses import asdict

    from modular_star_encoder.data.pairs import open_triplets
    from modular_star_encoder.synthconl.publishing import dataset_statistics
    from modular_star_encoder.utils.files import write_json
    from modular_star_encoder.utils.reports import printable

    triplets = open_triplets(arguments.source, split=arguments.split)
    statistics = dataset_statistics(triplets)
    for reason, count in triplets.skipped.most_common():
        note = f"mose: note: {count} rows left out ({reason}), such as {triplets.examples[reason][0]}"
        print(printable(note), file=sys.stderr)
    if not statistics.rows:
        raise UserError("data.source.empty", f"{arguments.source} has no row with a description, code and translation.")
    if arguments.json:
        write_json(arguments.json, asdict(statistics))
    print(statistics.to_markdown())


def run_dataset_push(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from modular_star_encoder.synthconl.publishing import push_dataset
    from modular_star_encoder.utils.reports import printable

    private = not arguments.public
    pushed = push_dataset(arguments.folder, arguments.repository, upload=arguments.upload, private=private)
    print(replace(pushed, files=tuple((printable(name), size) for name, size in pushed.files)))


def run_corpus_fetch(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.synthconl.corpus import fetch_packages, read_packages

    for outcome, packages in fetch_packages(read_packages(arguments.corpus), arguments.out).items():
        print(f"{len(packages):>8,}  {outcome}")
        for package in packages if not outcome.startswith("fetched") else ():
            print(f"mose: note: {outcome}: {package.registry} {package.name} {package.version}", file=sys.stderr)


def run_corpus_build(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.synthconl.corpus import build_corpus, read_packages

    packages = read_packages(arguments.corpus)
    stats = build_corpus(packages, arguments.packages, arguments.out, arguments.processes)
    for name in ("packages", "pairs", "pairs_valid", "texts"):
        print(f"{stats[name]:>12,}  {name}")
    for rule, count in stats["dropped"].items():
        print(f"{count:>12,}  dropped: {rule}")


def run_corpus_check(arguments: argparse.Namespace) -> None:
    """Print the texts of a corpus that are in evaluation sets. UserError if there are such texts and no --drop."""
    from modular_star_encoder.synthconl.corpus import EvaluationTexts, check_corpus
    from modular_star_encoder.utils.files import write_json
    from modular_star_encoder.utils.reports import printable

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
