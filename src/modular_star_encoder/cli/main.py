"""The command `mose`: parses, calls one function of a room, prints what it returns.

It lies outside the package, and imports it only in the commands, so that `mose --help` doesn't wait for torch.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version

from modular_star_encoder.cli.demo import add_demo_command
from modular_star_encoder.cli.export import add_export_command
from modular_star_encoder.cli.hub import add_hub_commands
from modular_star_encoder.cli.search import add_search_commands

EXPECTED_ERRORS = (ValueError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 2 after an error that the user can mend, 130 after Ctrl-C.

    Results go to stdout; progress and errors, one line each, to stderr. Wrong usage leaves through argparse (status 2).
    """
    arguments = parse(argv)
    keep_few_compiled_operations()
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("mose: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; without this, Python complains once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (*EXPECTED_ERRORS, ImportError) as error:
        # An import that failed names a module; one that we refuse says what to install.
        if isinstance(error, ImportError) and error.name:
            raise
        print(f"mose: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def keep_few_compiled_operations() -> None:
    """Keep as many as the layers of one batch need, unless the environment says otherwise.

    oneDNN, and PyTorch's binding to it, each keep 1,024 by default, one for every shape that a bfloat16 matrix on a CPU
    has had; batches without padding have a new shape each (benchmarks/NOTES.md). To be called before the first one.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; settings (`key=value`) may also stand after options, where argparse itself takes no more of them."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        if not hasattr(arguments, "overrides") or any(text.startswith("-") or "=" not in text for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="mose", description="Multi-exit code encoders: pre-train, evaluate, slice, search."
    )
    parser.add_argument("--version", action="version", version=f"mose {version('modular-star-encoder')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_search_commands(commands, exit_list, name_list)
    add_demo_command(commands)

    evaluate = commands.add_parser("evaluate", help="measure every exit on benchmarks, or on a folder of code")
    evaluate.add_argument("checkpoint", metavar="MODEL", help="folder or Hub repository")
    evaluate.add_argument(
        "--benchmark", metavar="NAMES", type=name_list, default=["folder"], help="a list, or all (default: folder)"
    )
    evaluate.add_argument("--data", metavar="FOLDER", required=True, help="source code, or files of benchmarks; or hub")
    evaluate.add_argument("--exit-layers", metavar="LIST", type=exit_list, help="all (the default), or a list: 4,9")
    evaluate.add_argument("--untrained", action="store_true", help="also measure the same model with fresh weights")
    evaluate.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    evaluate.add_argument("--out", metavar="FOLDER", help="reports and figures; an interrupted run is continued there")
    evaluate.add_argument(
        "--baselines", metavar="NAMES", type=name_list, help="bm25, tfidf, other models, openai:MODEL@URL"
    )
    evaluate.add_argument("--allow-subset", action="store_true", help="accept partial benchmark files, and say so")
    evaluate.add_argument("--candidates", metavar="FOLDER", help="lists of distractors that an earlier run wrote")
    evaluate.add_argument("--cache", metavar="FOLDER", help="where embeddings are kept (default: OUT/embeddings)")
    evaluate.set_defaults(run=run_evaluate)

    profile = commands.add_parser("profile", help="measure what every exit costs on this machine")
    profile.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub repository")
    profile.add_argument("--exit-layers", metavar="LIST", type=exit_list, help="all (the default), or a list: 4,9")
    profile.add_argument("--batch-sizes", metavar="LIST", type=number_list, default=(1, 8), help="default: 1,8")
    profile.add_argument(
        "--lengths", metavar="LIST", type=number_list, default=(128, 512), help="default: 128,512 tokens"
    )
    profile.add_argument(
        "--rounds", metavar="N", type=int, default=30, help="timings of each exit and shape (default: 30)"
    )
    profile.add_argument("--device", metavar="NAME", help="cpu or cuda (default: a GPU if there is one)")
    profile.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    profile.add_argument("--out", metavar="FILE", help="default: exit_profile.json in the checkpoint's folder")
    profile.add_argument(
        "--quality",
        metavar="NAME=FILE",
        type=named_file,
        help="measure nothing; add to the profile the quality of each exit from FILE, written by mose evaluate",
    )
    profile.set_defaults(run=run_profile)

    add_hub_commands(commands)

    add_export_command(commands)

    pretrain = commands.add_parser("pretrain", help="pre-train a model on repositories, as a recipe says")
    pretrain.add_argument("recipe", metavar="RECIPE", help="a YAML file, for example hub_configs/small/recipe.yaml")
    pretrain.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="other settings: corpus.folder=~/code")
    pretrain.add_argument("--out", metavar="FOLDER", required=True, help="where the run is; an old one is continued")
    pretrain.set_defaults(run=run_pretrain)
    end_help_with_keys(pretrain)

    add_dataset_commands(commands.add_parser("dataset", help="build a dataset of translated functions, and publish it"))

    finetune = commands.add_parser("finetune", help="fine-tune a model on pairs, as a recipe says")
    finetune.add_argument("recipe", metavar="RECIPE", help="a YAML file, for example hub_configs/small/finetune.yaml")
    finetune.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="other settings: max_steps=500")
    finetune.add_argument("--out", metavar="FOLDER", required=True, help="where the run is; an old one is continued")
    finetune.set_defaults(run=run_finetune)
    end_help_with_keys(finetune)

    ablate = commands.add_parser("ablate", help="exits trained together against exits trained alone, and other options")
    ablate.add_argument("recipe", metavar="RECIPE", help="a YAML file, for example hub_configs/small/ablation.yaml")
    ablate.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="other settings: finetuning.max_steps=500")
    ablate.add_argument("--out", metavar="FOLDER", required=True, help="cells and reports; an old one is continued")
    ablate.set_defaults(run=run_ablate)
    end_help_with_keys(ablate)
    return parser


def end_help_with_keys(parser: argparse.ArgumentParser) -> None:
    """Let `--help` of a training command end with every key of its recipe; only that imports torch."""
    plain = parser.format_help

    def format_help() -> str:
        from modular_star_encoder.training.ablation import recipe_reference

        return f"{plain()}\n{recipe_reference(parser.prog.split()[-1])}"

    parser.format_help = format_help  # type: ignore[method-assign]


def add_dataset_commands(dataset: argparse.ArgumentParser) -> None:
    """The commands of `mose dataset`."""
    commands = dataset.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="extract, translate, near-deduplicate and split, as a recipe says")
    build.add_argument("recipe", metavar="RECIPE", help="a YAML file, for example examples/dataset/recipe.yaml")
    build.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="other settings: corpus.folder=~/code")
    build.add_argument("--out", metavar="FOLDER", required=True, help="where the build is; an old one is continued")
    build.set_defaults(run=run_dataset_build)

    dedup = commands.add_parser("dedup", help="drop the near-duplicates of parquet files")
    dedup.add_argument("source", metavar="SOURCE", help="a folder of parquet files")
    dedup.add_argument("--out", metavar="FOLDER", required=True, help="where to write; an old run is continued")
    dedup.add_argument("--columns", metavar="LIST", default="func1_CSN,func2", help="columns to compare, with commas")
    dedup.add_argument("--match", choices=("either", "both"), default="either", help="how many columns must be near")
    dedup.add_argument("--id-column", metavar="NAME", help="column of ids; the smallest of a cluster stays")
    dedup.add_argument("--threshold", metavar="JACCARD", type=float, default=0.7, help="smallest similarity (0.7)")
    dedup.add_argument("--recall", choices=("default", "high"), default="default", help="how many pairs are compared")
    dedup.add_argument(
        "--against",
        metavar="SOURCE:COLUMN",
        action="append",
        default=[],
        help="texts that no row may be near, such as those of a benchmark: parquet, JSON Lines or a dataset of the Hub",
    )
    dedup.set_defaults(run=run_dataset_dedup)

    stats = commands.add_parser("stats", help="print samples and average lengths by language")
    stats.add_argument("source", metavar="SOURCE", help="folder, parquet or JSON Lines file, or dataset of the Hub")
    stats.add_argument("--split", default="train", help="train (the default), validation or another one")
    stats.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    stats.set_defaults(run=run_dataset_stats)

    push = commands.add_parser("push", help="say what would be uploaded to the Hub; with --upload, upload it")
    push.add_argument("folder", metavar="FOLDER", help="the folder of a finished build")
    push.add_argument("repository", metavar="OWNER/NAME", help="dataset repository on the Hub")
    push.add_argument("--upload", action="store_true", help="upload")
    push.add_argument("--public", action="store_true", help="make a new repository public")
    push.set_defaults(run=run_dataset_push)


def exit_list(text: str) -> tuple[int, ...] | None:
    """`"4,9"` → (4, 9), and `"all"` → None; argparse reports anything else."""
    if text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor a list of numbers such as 4,9") from None


def number_list(text: str) -> tuple[int, ...]:
    """`"4,9"` → (4, 9); argparse reports anything else."""
    if text == "all":
        raise argparse.ArgumentTypeError("'all' is not a list of numbers such as 4,9")
    return exit_list(text)


def named_file(text: str) -> tuple[str, str]:
    """`"name=file"` → ("name", "file"); argparse reports anything else."""
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=FILE")
    return name, file


def name_list(text: str) -> list[str]:
    """`"bm25,tfidf"` → ["bm25", "tfidf"]."""
    return [name for part in text.split(",") if (name := part.strip())]


def run_evaluate(arguments: argparse.Namespace) -> None:
    """`mose evaluate`."""
    from modular_star_encoder.evaluation.run import run_benchmarks
    from modular_star_encoder.utils.files import check_writable, write_json

    if arguments.json:
        check_writable(arguments.json)
    report = run_benchmarks(
        arguments.checkpoint,
        arguments.benchmark,
        arguments.data,
        arguments.out,
        exit_layers=arguments.exit_layers,
        baselines=arguments.baselines,
        untrained=arguments.untrained,
        allow_subset=arguments.allow_subset,
        candidates=arguments.candidates,
        cache=arguments.cache,
        command=shlex.join(["mose", *sys.argv[1:]]),
    )
    if arguments.json:
        write_json(arguments.json, report.to_dict())
    print(report.to_markdown(), end="")


def run_profile(arguments: argparse.Namespace) -> None:
    """`mose profile`."""
    from modular_star_encoder.inference.exit_profile import ExitProfile, quality_from_results
    from modular_star_encoder.inference.profile import ProfilePlan, format_profile, profile_path, profile_to_file

    if arguments.quality:
        name, results = arguments.quality
        path = profile_path(arguments.checkpoint, arguments.out)
        profile = ExitProfile.load(path)
        profile = profile.with_quality(name, quality_from_results(results, checkpoint=profile.checkpoint))
        profile.save(path)
    else:
        plan = ProfilePlan(arguments.batch_sizes, arguments.lengths, arguments.rounds)
        options = {name: getattr(arguments, name) for name in ("out", "exit_layers", "device", "dtype")}
        profile, path = profile_to_file(arguments.checkpoint, plan, **options)
    print(format_profile(profile), path, sep="\n\n")


def run_pretrain(arguments: argparse.Namespace) -> None:
    """`mose pretrain`."""
    from modular_star_encoder.training.pretraining import pretrain
    from modular_star_encoder.training.recipes import PretrainingRecipe, load_recipe

    log = pretrain(load_recipe(PretrainingRecipe, arguments.recipe, arguments.overrides), arguments.out)
    print(f"{log['steps']} steps; result in {os.path.join(arguments.out, 'model')}")


def run_dataset_build(arguments: argparse.Namespace) -> None:
    """`mose dataset build`."""
    from modular_star_encoder.synthconl.build import build_dataset
    from modular_star_encoder.synthconl.recipe import load_dataset_recipe

    print(build_dataset(load_dataset_recipe(arguments.recipe, arguments.overrides), arguments.out))


def run_dataset_dedup(arguments: argparse.Namespace) -> None:
    """`mose dataset dedup`."""
    from modular_star_encoder.data.sources.dataset_rows import open_texts
    from modular_star_encoder.synthconl.near_duplicates.fingerprints import DuplicateSettings
    from modular_star_encoder.synthconl.near_duplicates.job import drop_near_duplicates

    against = {}
    for name in arguments.against:
        source, colon, column = name.rpartition(":")
        if not colon:
            raise ValueError(f"--against must have the form SOURCE:COLUMN, not {name!r}.")
        against[name] = open_texts(source, column)
    report = drop_near_duplicates(
        arguments.source,
        arguments.out,
        columns=arguments.columns.split(","),
        id_column=arguments.id_column,
        against=against,
        settings=DuplicateSettings(threshold=arguments.threshold, match=arguments.match, recall=arguments.recall),
    )
    for reason, count in report.counts.items():
        print(f"{count:>12,}  {reason}")


def run_dataset_stats(arguments: argparse.Namespace) -> None:
    """`mose dataset stats`."""
    from modular_star_encoder.data.pairs import open_triplets
    from modular_star_encoder.synthconl.card import dataset_statistics
    from modular_star_encoder.utils.files import check_writable, write_json

    if arguments.json:
        check_writable(arguments.json)
    triplets = open_triplets(arguments.source, split=arguments.split)
    statistics = dataset_statistics(triplets)
    for reason, count in triplets.skipped.most_common():
        print(f"mose: note: {count} rows left out ({reason}), such as {triplets.examples[reason]}", file=sys.stderr)
    if arguments.json:
        write_json(arguments.json, statistics.to_dict())
    print(statistics.to_markdown())


def run_dataset_push(arguments: argparse.Namespace) -> None:
    """`mose dataset push`."""
    from modular_star_encoder.synthconl.publishing import push_dataset

    private = not arguments.public
    print(push_dataset(arguments.folder, arguments.repository, upload=arguments.upload, private=private))


def run_finetune(arguments: argparse.Namespace) -> None:
    """`mose finetune`."""
    from modular_star_encoder.training.finetuning import load_finetuning

    recipe, finetune = load_finetuning(arguments.recipe, arguments.overrides)
    log = finetune(recipe, arguments.out)
    print(f"{log['steps']} steps; result in {os.path.join(arguments.out, 'model')}")


def run_ablate(arguments: argparse.Namespace) -> None:
    """`mose ablate`."""
    from modular_star_encoder.training.ablation import AblationRecipe, ablate
    from modular_star_encoder.training.recipes import load_recipe

    recipe = load_recipe(AblationRecipe, arguments.recipe, arguments.overrides)
    if ablate(recipe, arguments.out, command=shlex.join(["mose", *sys.argv[1:]])):
        with open(os.path.join(arguments.out, "ablation.md"), encoding="utf-8") as report:
            print(report.read(), end="")


if __name__ == "__main__":
    sys.exit(main())
