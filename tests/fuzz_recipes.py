"""Changes the packaged recipes at random and loads them up to where data and weights would be opened.

    HF_HUB_OFFLINE=1 python -m tests.fuzz_recipes --count 3000 --seed 0

Input `n` is a function of (--seed, n). A recipe loads, or its error is one that `mose` prints as a sentence.
"""

import argparse
import random
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import yaml

from modular_star_encoder.cli.main import EXPECTED_ERRORS
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from modular_star_encoder.training import packaged_recipes
from modular_star_encoder.training.ablation import AblationRecipe
from modular_star_encoder.training.finetuning import check_recipe, load_finetuning
from modular_star_encoder.training.pretraining import model_config
from modular_star_encoder.training.recipes import FinetuningRecipe, PretrainingRecipe, check_length, load_recipe
from modular_star_encoder.training.starting_points import starting_config

SECONDS = 10
RAW = f".nan .inf -.inf 1e999 1e-400 -1 0.5 2001-01-01 1:1:1 0x{'f' * 90} {'9' * 99} {'[' * 500 + ']' * 500}".split()
RAW += [
    "[&a[x,x],&b[*a,*a],&c[*b,*b]]",
    "!!binary|eA==",
    "!!set{a:null}",
    "!!timestamp|x",
    "!!python/name:os.system",
    "{1:2}",
]
RAW += ["{a:{b:{c:1}}}", "{null:1}", "{}", "[]", "null", "true", "no", "~", "*", "&a", "''", "\\ud800"]
VALUES = [None, True, -1, 0, 2**63, 10**30, 0.5, "", "x", "1e5", "x" * 5000, {}, [[]], [1, "a", None], "a/b"]
KEYS = [3, None, "config", "lora", "trainer", "pairs"]
PIECES = ["\x00", "\t", "{", ": ", "&a ", "*a", "\n- ", "!!", "%YAML 9", "\n---\n", "\ufeff"]


def change(text: str, draw: random.Random) -> str:
    """Return a recipe with one or two changes: values, keys, nesting, or its text."""
    content = yaml.safe_load(text)
    if draw.random() < 0.6 and "model" in content:
        content["model"] = "small"
    for _ in range(draw.randint(1, 2)):
        places = [(content, key) for key in content]
        for parent, key in places:
            if isinstance(inner := parent[key], dict | list):
                places += [(inner, one) for one in (inner if isinstance(inner, dict) else range(len(inner)))]
        parent, key = draw.choice(places or [({"": 0}, "")])
        kind, nested = draw.random(), draw.choice([{"a": parent[key]}, [parent[key]]])
        if kind < 0.75:
            parent[key] = draw.choice([draw.choice(VALUES), f"RAW{draw.randrange(len(RAW))}.", nested])
        else:
            value = parent.pop(key)
            if kind < 0.9 and isinstance(parent, dict):
                parent[draw.choice([str(key)[:-1], *KEYS])] = value
    text = yaml.safe_dump(content, allow_unicode=True)
    for number, raw in enumerate(RAW):
        text = text.replace(f"RAW{number}.", raw.replace("|", " "))
    place = draw.randrange(len(text))
    return text[:place] + draw.choice(PIECES) + text[place:] if draw.random() < 0.1 else text


def load(command: str, path: Path) -> None:
    """Load a recipe and make all checks that need no data and no weights."""
    out = path.parent / "out"
    if command == "finetune":
        recipe, _ = load_finetuning(path)
        if isinstance(recipe, FinetuningRecipe):
            check_recipe(recipe, out, 1, False)
        else:
            check_length(starting_config(recipe), max_tokens=recipe.max_tokens)
            recipe.arguments(out, recipe.accumulation(1)[0], progress=False)
    elif command == "pretrain":
        recipe = load_recipe(PretrainingRecipe, path)
        steps = {"gradient_accumulation_steps": recipe.accumulation(1)}
        recipe.arguments(out, recipe.rows_per_device, progress=False, **steps)
        with torch.device("meta"):
            ModularStarEncoderForPreTraining(model_config(recipe))
    else:
        load_recipe(AblationRecipe, path).cells((1, 2, 4))


def fuzz(count: int, seed: int = 0) -> Counter[str]:
    """Load `count` changed recipes; return the numbers of outcomes, and print each bad one with its number."""
    warnings.simplefilter("ignore")
    recipes, outcomes = packaged_recipes(), Counter()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            chosen = draw.choice(recipes)
            path.write_text(change(chosen.path.read_text(encoding="utf-8"), draw), encoding="utf-8", errors="replace")
            signal.alarm(SECONDS)
            try:
                load(chosen.command, path)
                outcome = "loads"
            except (*EXPECTED_ERRORS, ImportError):  # ImportError: an extra is missing
                outcome = "sentence"
            except BaseException as error:  # KeyboardInterrupt: over SECONDS
                outcome = f"bad: {type(error).__name__}"
                print(number, chosen.name, *traceback.format_exception(error)[-3:])
            signal.alarm(0)
            outcomes[outcome] += 1
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    print(dict(fuzz(**vars(parser.parse_args()))))
