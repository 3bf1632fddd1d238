"""Data, checkpoints and recipes of fine-tuning, small enough to run in every test."""

import json
from contextlib import contextmanager

import pytest
import yaml
from transformers import TrainerCallback

from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from modular_star_encoder.training.trainer import MultiExitTrainer
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
    file.write_text(yaml.safe_dump(settings))
    return file


@contextmanager
def interrupt(monkeypatch, step):
    """Ctrl-C after a step of every training inside."""

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    original = MultiExitTrainer.__init__

    def with_interrupt(self, *args, **kwargs):
        original(self, *args, callbacks=[Interrupt()], **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MultiExitTrainer, "__init__", with_interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield


def saved_figures(monkeypatch):
    """The list that gets every figure that is saved."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **keys: figures.append(self) or save(self, *args, **keys)
    )
    return figures
