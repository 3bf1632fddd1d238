"""Data, checkpoints and recipes of fine-tuning, small enough to run in every test."""

import json

import yaml

from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from modular_star_encoder.training.recipes import FinetuningRecipe
from tests.tiny import tiny_model, tiny_tokenizer

WORDS = ("file", "table", "index", "buffer", "stream", "record", "window", "socket", "thread", "vector")
VERBS = ("open", "close", "merge", "split", "count", "clear")


def write_triplets(folder):
    """Sixty triplets of twelve repositories: every verb with every noun."""
    rows = [
        {
            "repository_name": f"repository{(10 * i + j) % 12}",
            "func_documentation_string": f"{verb} the {word} and return it",
            "func1_CSN": f"def {verb}_{word}(value):\n    {word} = {verb}(value)\n    return {word}",
            "language1_CSN": "python",
            "func2": f"int {verb}_{word}(int value) {{ int {word} = {verb}(value); return {word}; }}",
            "language2": "C",
        }
        for i, verb in enumerate(VERBS)
        for j, word in enumerate(WORDS)
    ]
    (folder / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "triplets.jsonl"


def write_checkpoint(folder, model_class=ModularStarEncoderForPreTraining, **changes):
    """A checkpoint with its tokenizer."""
    tiny_model(model_class, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def finetuning_settings(checkpoint, triplets):
    """A recipe of six steps."""
    return {
        "model": str(checkpoint),
        "data": {"triplets": str(triplets)},
        "max_steps": 6,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "max_text_tokens": 96,
        "max_code_tokens": 96,
        "eval_fraction": 0.2,
        "eval_pairs": 8,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 2,
    }


def write_recipe(file, settings):
    """A recipe as a file."""
    file.write_text(yaml.safe_dump(settings))
    return file


def finetuning_recipe(checkpoint, triplets, **changes):
    """The same as an object."""
    return FinetuningRecipe(**(finetuning_settings(checkpoint, triplets) | changes))
