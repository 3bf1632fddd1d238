"""The commands that write and publish checkpoints: `mose slice`, `grow`, `card`, `publish` and `export`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from modular_star_encoder.cli import CHECKPOINT_HELP, add_command, at_least, checkpoint, note
from modular_star_encoder.inference import resolve_checkpoint
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import read_json
from modular_star_encoder.utils.reports import printable


def add_publish_commands(commands: Any) -> None:
    """Add `mose slice`, `mose grow`, `mose card`, `mose publish` and `mose export` to the subparsers of `mose`."""
    about = "write the first layers of a checkpoint as a checkpoint of its own"
    add = add_command(commands, "slice", run_slice, about).add_argument
    add("checkpoint", metavar="CHECKPOINT", type=checkpoint, help=CHECKPOINT_HELP)
    add("--exit-layer", metavar="K", type=at_least(0), required=True, help="exit to keep, as a number of layers")
    add("out", metavar="OUT", help="folder to write; it must be empty or not exist")

    about = "add untrained layers to a checkpoint that has only exit 0"
    grow = add_command(commands, "grow", run_grow, about)
    # argparse would show the option first, where it would take CHECKPOINT and OUT for exits.
    grow.usage, add = "%(prog)s [-h] CHECKPOINT OUT --exit-layers K [K ...]", grow.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=checkpoint, help="a checkpoint that has only exit 0")
    exits = "exits of the new checkpoint, such as 0 1 2 4 6; write this option last"
    add("--exit-layers", metavar="K", type=at_least(0), nargs="+", required=True, help=exits)
    add("out", metavar="OUT", help="folder to write; it must be empty or not exist")

    about = "print the model card of a checkpoint: usage and measurements"
    add = add_command(commands, "card", run_card, about).add_argument
    add("folder", metavar="FOLDER", help="a checkpoint's folder, or a manifest (a YAML file), for its first repository")
    _add_folder_options(add, required=True)
    add("--out", metavar="FOLDER", help="write README.md and the figure to FOLDER, not to stdout")

    about = "prepare and verify model repositories, and list what --upload would change on the Hub"
    add = add_command(commands, "publish", run_publish, about).add_argument
    source = "a manifest (YAML file), such as a copy of small/publish (`mose recipes copy`), or a checkpoint's folder"
    add("source", metavar="MANIFEST", help=source)
    add("overrides", metavar="KEY=VALUE", nargs="*", help="settings of the manifest to change, such as namespace=NAME")
    _add_folder_options(add)
    add("--upload", action="store_true", help="upload each repository that differs from the Hub's, in one commit each")
    add("--public", action="store_true", help="make new repositories public (default: private)")
    add("--out", metavar="FOLDER", help="keep the prepared repositories in this new or empty folder")

    about = "write one exit as an ONNX folder, or exit 0 as an embedding table"
    add = add_command(commands, "export", run_export, about).add_argument
    add("checkpoint", metavar="CHECKPOINT", type=checkpoint, help=CHECKPOINT_HELP)
    format = "onnx (default); or exit 0 as a table: static, for sentence-transformers' StaticEmbedding, or model2vec"
    add("--format", choices=("onnx", "static", "model2vec"), default="onnx", help=format)
    add("--exit-layer", metavar="K", type=at_least(0), help="exit to export (default: the deepest)")
    add("--out", metavar="FOLDER", help="new or empty folder to write (default: CHECKPOINT-K-FORMAT)")
    add("--int8", action="store_true", help="also write 8-bit weights, and measure their quality on --data")
    data = "source code or benchmark files, on which to compare the export with the checkpoint"
    add("--data", metavar="FOLDER", help=data)
    name = "benchmark whose files are in --data (default: folder, for source code)"
    add("--benchmark", metavar="NAME", default="folder", help=name)
    add("--allow-subset", action="store_true", help="accept benchmark files that lack rows")


def _add_folder_options(add: Callable[..., Any], *, required: bool = False) -> None:
    add("--repository", metavar="OWNER/NAME", required=required, help="for a folder: Hub repository to publish it to")
    license = "for a folder: its licence, as the Hub names it (default: the one in its card, or of the parent model)"
    add("--license", metavar="NAME", help=license)
    results = "for a folder: FILE of mose evaluate --json with results to show in the card; may be repeated"
    add("--evaluation", metavar="FILE", action="append", default=[], help=results)


def run_slice(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.inference.checkpoints import slice_checkpoint

    slice_checkpoint(arguments.checkpoint, arguments.exit_layer, arguments.out)
    print(arguments.out)


def run_grow(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.training.starting_points import grow_checkpoint

    print(grow_checkpoint(arguments.checkpoint, arguments.exit_layers, arguments.out))


def run_card(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.hub.publishing import write_folder_card

    manifest = _folder_manifest(arguments, arguments.folder)
    _warn_without_license(manifest)
    text = "\n".join(map(printable, write_folder_card(manifest, arguments.out).split("\n")))
    print(text if arguments.out is None else os.path.join(arguments.out, "README.md"), end="\n" * bool(arguments.out))


def run_publish(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.hub.manifest import load_manifest

    source, overrides = arguments.source, arguments.overrides
    options = [f"--{name}" for name in ("repository", "license", "evaluation") if getattr(arguments, name)]
    is_folder = os.path.isdir(resolve_checkpoint(source))
    if misplaced := overrides if is_folder else options:
        kind = "is a folder" if is_folder else "is a manifest" if os.path.exists(source) else "does not exist"
        forms = "KEY=VALUE is for manifests; --repository, --license and --evaluation are for folders"
        message = f"{source} {kind}, so remove {misplaced[0]}: {forms}."
        raise UserError(f"cli.publish.{'folder' if is_folder else 'manifest'}", message)
    manifest = _folder_manifest(arguments, source) if is_folder else load_manifest(source, overrides)
    if is_folder and os.path.isfile(os.path.join(resolve_checkpoint(source), "README.md")):
        note("a new card replaces README.md of the folder; to add your own text, use `sections` in a manifest")
    if arguments.upload:  # before torch is imported and the repositories are verified
        from huggingface_hub import get_token

        from modular_star_encoder.utils.http import LOG_IN, check_hub

        check_hub()
        token = get_token() or ""
        if not (token and token.isascii() and token.isprintable()):
            fault = "The Hub's token has characters other than printable ASCII. " if token else ""
            raise UserError("cli.publish.token", fault + LOG_IN)
    else:
        _warn_without_license(manifest)
    from modular_star_encoder.hub.publishing import publish

    publications = publish(manifest, upload=arguments.upload, private=not arguments.public, staging=arguments.out)
    for number, one in enumerate(publications):  # paths and revisions may be a stranger's
        changes = tuple(change._replace(path=printable(change.path)) for change in one.changes)
        print("\n" * bool(number) + str(replace(one, changes=changes, revision=printable(str(one.revision)))))


def run_export(arguments: argparse.Namespace) -> None:
    checkpoint, format, fault = arguments.checkpoint, arguments.format, ""
    needs_data = arguments.int8 or arguments.allow_subset or arguments.benchmark != "folder"
    if format != "onnx" and (arguments.exit_layer or arguments.int8 or arguments.data):
        fault = f"--format {format} writes exit 0 as float32 only: remove --exit-layer, --int8 and --data."
    elif format == "onnx" and needs_data and not arguments.data:
        fault = "--int8, --benchmark and --allow-subset need --data FOLDER, with source code or a benchmark's files."
    if fault:
        raise UserError("cli.export.options", fault)
    from modular_star_encoder.hub.onnx_export import EXPORT_REPORT, QUANTIZED_FILE, default_folder, export_onnx_folder
    from modular_star_encoder.inference.exit_zero import export_static

    if format == "onnx":
        tasks = _ranking_tasks(arguments) if arguments.data else []
        written = export_onnx_folder(checkpoint, arguments.exit_layer, arguments.out, int8=arguments.int8, tasks=tasks)
        if written.report:
            print(written.report.to_markdown())
        folder, facts = written.folder, read_json(written.folder / EXPORT_REPORT)
        kind, exit_layer, sizes = "ONNX", facts["exit_layer"], facts["bytes"]
        load = f'SentenceTransformer("{folder}", backend="onnx") in an environment with optimum-onnx (see the FAQ)'
        load += f', for int8 with model_kwargs={{"file_name": "{QUANTIZED_FILE}"}}' * arguments.int8
    else:
        is_model2vec, out = format == "model2vec", arguments.out or default_folder(checkpoint, 0, format)
        folder = export_static(checkpoint, out, format="model2vec" if is_model2vec else "sentence-transformers")
        kind, exit_layer, sizes = f"{format} table", 0, {"float32": (folder / "model.safetensors").stat().st_size}
        load = f'{"model2vec.StaticModel.from_pretrained" if is_model2vec else "SentenceTransformer"}("{folder}")'
    print(folder)
    shown = ", ".join(f"{dtype} {size / 1e6:,.0f} MB" for dtype, size in sizes.items())
    note(f"exit {exit_layer} as {kind}: {shown}; load it with {load}")


def _ranking_tasks(arguments: argparse.Namespace) -> list[Any]:
    from modular_star_encoder.evaluation.benchmarks import choose_benchmarks, load_benchmark
    from modular_star_encoder.evaluation.tasks import RetrievalTask

    tasks = []
    for name in choose_benchmarks([arguments.benchmark], arguments.data):
        tasks += load_benchmark(name, arguments.data, allow_subset=arguments.allow_subset)
        if not all(isinstance(task, RetrievalTask) for task in tasks):
            message = f"--benchmark {name} ranks no documents, so it can't compare exports. Name another benchmark."
            raise UserError("cli.export.benchmark", message)
    return tasks


def _folder_manifest(arguments: argparse.Namespace, folder: str) -> Any:
    from modular_star_encoder.hub.manifest import folder_manifest, load_manifest

    repository, license = arguments.repository, arguments.license
    if not repository:
        raise UserError("cli.publish.repository", f"Name the Hub repository for {folder}: --repository OWNER/NAME.")
    if os.path.isfile(folder):
        return load_manifest(folder, [f"namespace={repository.partition('/')[0]}"])
    manifest = folder_manifest(folder, repository, license=license, evaluation=arguments.evaluation)
    if manifest.license and not license:
        found = f"license: {manifest.license}, from the card in {folder} or, without one, from its parent model's"
        note(f"{found}; add --license NAME to set another")
    return manifest


def _warn_without_license(manifest: Any) -> None:
    if manifest.license is None:
        note("the card names no licence; --upload needs --license NAME, or `license:` in the manifest")
