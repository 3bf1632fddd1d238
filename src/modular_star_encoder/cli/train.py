"""The commands that train as a recipe says: `mose pretrain`, `mose finetune`, `mose ablate`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from modular_star_encoder.cli import add_recipe_options


def add_train_commands(commands: Any) -> None:
    """Add the training commands to the subparsers of `mose`; their `--help` ends with all keys of their recipe."""
    run_folder = "folder of the run; an existing run continues"

    pretrain = commands.add_parser("pretrain", help="pre-train a model on repositories, as a recipe says")
    add_recipe_options(pretrain, "hub_configs/small/recipe.yaml", "corpus.folder=~/code", run_folder)
    pretrain.set_defaults(run=run_pretrain)

    finetune = commands.add_parser("finetune", help="fine-tune a model on pairs, as a recipe says")
    add_recipe_options(finetune, "hub_configs/small/finetune.yaml", "max_steps=500", run_folder)
    finetune.set_defaults(run=run_finetune)

    ablate = commands.add_parser("ablate", help="compare exits trained together and alone, and other options")
    folder = "folder of the runs and reports; existing runs continue"
    add_recipe_options(ablate, "hub_configs/small/ablation.yaml", "finetuning.max_steps=500", folder)
    ablate.set_defaults(run=run_ablate)

    for parser in (pretrain, finetune, ablate):
        _end_help_with_keys(parser)


def _end_help_with_keys(parser: argparse.ArgumentParser) -> None:
    """Append the recipe's keys to `--help`; only then is torch imported."""
    plain = parser.format_help

    def format_help() -> str:
        from modular_star_encoder.training.ablation import recipe_reference

        return f"{plain()}\n{recipe_reference(parser.prog.split()[-1])}"

    parser.format_help = format_help  # type: ignore[method-assign]


def run_pretrain(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.training.pretraining import pretrain
    from modular_star_encoder.training.recipes import PretrainingRecipe, load_recipe

    log = pretrain(load_recipe(PretrainingRecipe, arguments.recipe, arguments.overrides), arguments.out)
    print(f"{log['steps']} steps; result in {os.path.join(arguments.out, 'model')}")


def run_finetune(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.training.finetuning import load_finetuning

    file, overrides, out = arguments.recipe, arguments.overrides, arguments.out
    recipe, finetune = load_finetuning(file, overrides)
    log = finetune(recipe, out)
    print(f"{log['steps']} steps; result in {os.path.join(out, 'model')}")


def run_ablate(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.training.ablation import AblationRecipe, ablate
    from modular_star_encoder.training.recipes import load_recipe

    recipe = load_recipe(AblationRecipe, arguments.recipe, arguments.overrides)
    if ablate(recipe, arguments.out, command=shlex.join(["mose", *sys.argv[1:]])):
        with open(os.path.join(arguments.out, "ablation.md"), encoding="utf-8") as report:
            print(report.read(), end="")
