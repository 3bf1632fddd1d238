"""The commands that train with a recipe (`mose pretrain`, `mose finetune`, `mose ablate`), and `mose recipes`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from modular_star_encoder.cli import add_command, add_recipe_options, note
from modular_star_encoder.training import find_recipe, packaged_recipes, starting_source
from modular_star_encoder.utils.errors import UserError, missing_extra
from modular_star_encoder.utils.files import check_writable, write_text
from modular_star_encoder.utils.reports import markdown_table, percent, printable


def add_train_commands(commands: Any) -> None:
    """Add the training commands and `mose recipes` to the subparsers of `mose`."""
    recipe, run_folder = "a YAML file or a packaged recipe, such as", "folder of the run; a stopped run is continued"

    pretrain = add_command(commands, "pretrain", run_pretrain, "pre-train a model on code repositories, with a recipe")
    add_recipe_options(pretrain, f"{recipe} small", "corpus.folder=~/code", run_folder)

    finetune = add_command(commands, "finetune", run_finetune, "fine-tune a model on pairs of texts, with a recipe")
    add_recipe_options(finetune, f"{recipe} mose-code", "data.pairs=pairs.csv", run_folder)

    ablate = add_command(commands, "ablate", run_ablate, "compare exits trained together with exits trained alone")
    folder = "folder for runs and reports; an unfinished ablation is continued"
    add_recipe_options(ablate, f"{recipe} small", "finetuning.data.functions.folder=~/code", folder)

    recipes = add_command(commands, "recipes", run_recipes, "list, print or copy recipes", name=None, file=None)
    actions = recipes.add_subparsers(metavar="ACTION")
    actions.add_parser("list", help="list all recipes")
    name = "name, such as small/finetune or mose-code/corpus; small alone is the first recipe in the folder small"
    show, copy = actions.add_parser("show", help="print a recipe"), actions.add_parser("copy", help="copy a recipe")
    for parser in (show, copy):
        parser.add_argument("name", metavar="NAME", help=name)
    copy.add_argument("file", metavar="FILE", help="YAML file to write; it must not exist")

    for parser in (pretrain, finetune, ablate):
        _end_help_with_keys(parser)


def _end_help_with_keys(parser: argparse.ArgumentParser) -> None:
    """Append the list of recipe keys to a command's `--help`; torch is imported only when this help is printed."""
    plain = parser.format_help

    def format_help() -> str:
        try:
            from modular_star_encoder.training.ablation import recipe_reference
        except ModuleNotFoundError as error:
            return f"{plain()}\nThe list of all keys is not available: {missing_extra(error, 'train') or error}\n"
        return f"{plain()}\n{recipe_reference(parser.prog.split()[-1])}"

    parser.format_help = format_help  # type: ignore[method-assign]


def run_recipes(arguments: argparse.Namespace) -> None:
    if arguments.name is None:
        recipes = packaged_recipes()
        width = max(len(one.name) for one in recipes)
        for one in recipes:
            print(f"mose {one.command:13} {one.name:{width}}  {one.summary}")
        print("\nThe part before / is enough: `mose finetune mose-code` takes the first finetune recipe of mose-code.")
        return
    path = find_recipe(arguments.name)
    in_folder = [one for one in packaged_recipes() if one.name.startswith(f"{arguments.name}/")]
    if len(in_folder) > 1:
        shown, *others = [f"{one.name} (mose {one.command})" for one in in_folder]
        note(f"this is the recipe {shown}; other recipes: {', '.join(others)}")
    text = path.read_text(encoding="utf-8")
    if arguments.file is None:
        print(*map(printable, text.split("\n")), sep="\n", end="")  # it may be a stranger's
        return
    check_writable(arguments.file)
    if os.path.exists(arguments.file):
        raise UserError("files.exists", f"{arguments.file} already exists; name a new file.")
    write_text(arguments.file, text)
    print(f"The recipe {path.parent.name}/{path.stem} is now in {arguments.file}")


def _check_early(arguments: argparse.Namespace, command: str) -> None:
    """Check recipe, KEY=VALUE, the model's name and files of pairs before the slow import of torch."""
    from modular_star_encoder.data.pairs import check_sources
    from modular_star_encoder.utils.settings import read_mapping

    content = read_mapping(find_recipe(arguments.recipe, command), arguments.overrides)
    finetuning = content.get("finetuning") if command == "ablate" else content
    settings = finetuning if isinstance(finetuning, dict) else {}
    if isinstance(model := settings.get("model"), str) and not os.path.exists(arguments.out):
        starting_source(model)
    data = settings.get("data")
    # A continued run may have stored its rows already; it then no longer needs their source.
    if isinstance(data, dict) and not os.path.exists(os.path.join(arguments.out, "data")):
        check_sources(data)


def run_pretrain(arguments: argparse.Namespace) -> None:
    _check_early(arguments, "pretrain")
    from modular_star_encoder.training.pretraining import exit_report, pretrain
    from modular_star_encoder.training.recipes import PretrainingRecipe, load_recipe

    recipe = load_recipe(PretrainingRecipe, arguments.recipe, arguments.overrides)
    log = pretrain(recipe, arguments.out)
    print("", exit_report(log), sep="\n", end="")
    losses = [loss for name, loss in log["evaluation"].items() if name.startswith("eval_mlm_loss_exit_")]
    entropy = log["unigram_entropy"]
    if (best := min(losses, default=entropy)) > 0.9 * entropy:
        better = "much better" if best < entropy else "better"
        print(f"No exit's MLM loss is {better} than the guess: train on more repositories, or longer in another --out.")
    model = os.path.join(arguments.out, "model")
    print(f"The model is in {model}, and the table above in report.md. To fine-tune the model for search,")
    print("run one of these (1,000 steps, hours on a CPU; add max_steps=100 warmup_steps=10 for a trial):")
    command = ["mose", "finetune", "small", "--out", f"{os.path.normpath(arguments.out)}-retrieval", f"model={model}"]
    for data in (f"data.functions.folder={recipe.corpus.get('folder', 'FOLDER')}", "data.pairs=pairs.csv"):
        print(f"    {shlex.join([*command, data])}")


def run_finetune(arguments: argparse.Namespace) -> None:
    _check_early(arguments, "finetune")
    from modular_star_encoder.training.finetuning import load_finetuning
    from modular_star_encoder.training.runs import REPORT

    recipe, finetune = load_finetuning(arguments.recipe, arguments.overrides)
    log = finetune(recipe, arguments.out)
    report, also = Path(arguments.out, REPORT), ""
    if report.is_file():  # not for classifiers
        print(f"\n{report.read_text(encoding='utf-8')}")
        also = f", and the tables above in {report}"
    for split, scores in log.get("scores", {}).items():  # only for classifiers
        header = [f"{split} (%), exit", *next(iter(scores.values()))]
        rows = [[str(exit_layer), *map(percent, values.values())] for exit_layer, values in scores.items()]
        print("", *markdown_table([header, *rows]), sep="\n")
    model = os.path.join(arguments.out, "model")
    print(f"{log['steps']} steps; the model is in {model}{also}")
    if report.is_file():
        print(f"search with the model: mose search QUESTION FOLDER --model {shlex.quote(model)}")
        print(f"in Python: import modular_star_encoder, sentence_transformers as st; st.SentenceTransformer({model!r})")


def run_ablate(arguments: argparse.Namespace) -> None:
    _check_early(arguments, "ablate")
    from modular_star_encoder.training.ablation import AblationRecipe, ablate
    from modular_star_encoder.training.recipes import load_recipe

    recipe = load_recipe(AblationRecipe, arguments.recipe, arguments.overrides)
    if ablate(recipe, arguments.out, command=shlex.join(["mose", *sys.argv[1:]])):
        with open(os.path.join(arguments.out, "ablation.md"), encoding="utf-8") as report:
            print(report.read(), end="")
