"""Data, checkpoints and recipes of fine-tuning, small enough to run in every test."""

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial, partialmethod

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from modular_star_encoder.training.runs import last_checkpoint
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
    settings = {"model": str(checkpoint), "data": {"triplets": str(triplets)}, "max_steps": 6, "batch_size": 8}
    settings |= {"learning_rate": 3e-3, "max_text_tokens": 96, "max_code_tokens": 96, "eval_fraction": 0.2}
    return settings | {"eval_pairs": 8, "logging_steps": 1, "eval_steps": 3, "save_steps": 2}


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

    with monkeypatch.context() as patch:
        patch.setattr(MultiExitTrainer, "__init__", partialmethod(MultiExitTrainer.__init__, callbacks=[Interrupt()]))
        with pytest.raises(KeyboardInterrupt):
            yield


def end_by_signals(command, recipe, folder):
    """Run a command through, and again, killed when it has begun, then killed and terminated at a later checkpoint.

    The weights must be equal, and SIGTERM must give status 130.
    """
    words = [sys.executable, "-m", "modular_star_encoder.cli.main", command, str(recipe), "--out"]
    subprocess.run([*words, str(folder / "straight")], check=True, capture_output=True)
    out, generator = folder / "ended", random.Random(command)
    begun, newest = (out / "recipe.json").exists, partial(last_checkpoint, out / "checkpoints")
    for number, progress in ((signal.SIGKILL, begun), (signal.SIGKILL, newest), (signal.SIGTERM, newest)):
        before = progress()
        process = subprocess.Popen([*words, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while progress() == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.2))
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (-number if number == signal.SIGKILL else 130), errors.decode()[-2000:]
        assert b"Traceback" not in errors
    resumed = subprocess.run([*words, str(out)], check=True, capture_output=True)
    assert b"Traceback" not in resumed.stderr
    expected, found = (load_file(one / "model" / "model.safetensors") for one in (folder / "straight", out))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    log = json.loads((out / "model" / "training_log.json").read_text())
    assert log["resumed_from"]
    assert f"continues after step {log['resumed_from']} of {log['steps']}\n".encode() in resumed.stdout
    assert not [path for path in out.rglob(".*") if path.is_dir()]
