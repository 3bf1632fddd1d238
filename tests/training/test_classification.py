import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from modular_star_encoder.cli.main import main
from modular_star_encoder.data.collators import ClassificationCollator
from modular_star_encoder.data.finetuning_rows import ClassificationRows
from modular_star_encoder.data.pairs import read_labelled_pairs
from modular_star_encoder.evaluation.run import classification_scores
from modular_star_encoder.training.finetuning import finetune_classifier, load_finetuning
from tests.errors import raises
from tests.tiny import EXIT_LAYERS
from tests.training.retrieval_runs import WORDS, interrupt, write_checkpoint, write_recipe


def write_bigclonebench(folder, pairs=60):
    """Functions in two spellings; a pair is a clone if it is about one word."""
    folder.mkdir(exist_ok=True)
    codes = [f"int {form}_{word}() {{ return {word}; }}" for word in WORDS for form in ("get", "fetch")]
    rows = [{"func": code, "idx": str(100 + number)} for number, code in enumerate(codes)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    generator = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        lines = []
        for _ in range(pairs):
            first = int(generator.integers(20))
            second = first ^ 1 if generator.random() < 0.5 else int(generator.integers(20))
            lines.append(f"{100 + first}\t{100 + second}\t{int(first // 2 == second // 2)}")
        (folder / f"{split}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification")
    model, data = write_checkpoint(folder / "checkpoint", residual_dropout=0.1), write_bigclonebench(folder / "data")
    settings = {"task": "classification", "model": str(model), "data": {"bigclonebench": str(data)}, "max_steps": 6}
    settings |= {"batch_size": 8, "learning_rate": 3e-3, "max_tokens": 96, "max_eval_samples": 20}
    settings |= {"logging_steps": 1, "eval_steps": 3, "save_steps": 4}
    return write_recipe(folder / "recipe.yaml", settings)


def run(recipe_file, out, *overrides):
    recipe, finetune = load_finetuning(recipe_file, overrides)
    assert finetune is finetune_classifier
    return finetune(recipe, out, progress=False)


@pytest.mark.slow
def test_a_run_is_not_continued_on_other_rows(recipe_file, tmp_path, monkeypatch):
    data = write_bigclonebench(tmp_path / "data")
    overrides = [f"data.bigclonebench={data}", "save_steps=2"]
    for step in (1, 3):  # before the first checkpoint, rows may change
        write_bigclonebench(data, pairs=60 - step)
        with interrupt(monkeypatch, step):
            run(recipe_file, tmp_path / "run", *overrides)
    lines = (data / "train.txt").read_text().splitlines()
    (data / "train.txt").write_text("\n".join(line[:-1] + str(1 - int(line[-1])) for line in lines))
    with raises("training.run.other_settings", "other values of data_checksum;"):
        run(recipe_file, tmp_path / "run", *overrides)


SHORT, LONG = "a b", "x = 1; " * 50


def test_a_row_is_both_snippets_in_the_published_template(tokenizer, tmp_path):
    pairs = read_labelled_pairs({"bigclonebench": write_bigclonebench(tmp_path / "data")})["train"]
    rows = ClassificationRows(pairs, tokenizer, max_tokens=128, progress=False)
    texts = [pairs.codes[place] for place in pairs.pairs[3]]
    assert rows[3]["input_ids"].tolist() == tokenizer(*texts)["input_ids"]
    assert rows[3]["labels"] == pairs.labels[3]


@pytest.mark.parametrize(
    ("first", "second", "lengths"), [(LONG, SHORT, (44, 3)), (SHORT, LONG, (3, 44)), (LONG, LONG, (24, 23))]
)
def test_truncation_leaves_the_short_snippet_whole(tokenizer, tmp_path, first, second, lengths):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"first": first, "second": second, "label": 1}))
    pairs = read_labelled_pairs(dict.fromkeys(("train", "valid"), tmp_path / "pairs.jsonl"))["train"]
    ids = ClassificationRows(pairs, tokenizer, max_tokens=50, progress=False)[0]["input_ids"].tolist()
    second_sep = ids.index(1, 1)
    assert (len(ids), ids[0], ids[-1]) == (50, 1, 2)
    assert abs(second_sep - 1 - lengths[0]) <= 1
    assert abs(48 - second_sep - lengths[1]) <= 1


@pytest.mark.parametrize(
    ("file", "text", "key", "value"),
    [
        ("train.txt", "100 101 2", "data.row", "train.txt, line 1"),
        ("valid.txt", "100 999 1", "data.row", "valid.txt, line 1"),
        ("train.txt", "", "data.source.empty", "train.txt"),
        ("data.jsonl", '{"idx": 3, "func": "int \\ud800;"}', "data.row", "ids of data.jsonl"),
        ("pairs.jsonl", '{"first": "a", "second": " ", "label": 1}', "data.row", "line 1"),
        ("pairs.jsonl", '{"first": "a", "second": "b", "label": [1]}', "data.row", "line 1"),
        ("pairs.jsonl", '{"first": "a", "second": "b"}', "data.row", "line 1"),
        ("pairs.jsonl", "[1]", "data.row", "line 1"),
    ],
)
def test_damaged_files_are_refused_by_line(tmp_path, file, text, key, value):
    folder = write_bigclonebench(tmp_path / "data")
    (folder / file).write_text(text)
    pairs = dict.fromkeys(("train", "valid"), folder / file)
    with raises(key, value):
        read_labelled_pairs(pairs if file == "pairs.jsonl" else {"bigclonebench": folder})
    for settings, shown in (({"pairs": "x"}, "not pairs"), ({"bigclonebench": None}, "not bigclonebench=None")):
        with raises("data.pairs.settings", shown):
            read_labelled_pairs(settings)


def test_f1_is_that_of_the_positive_class():
    class Given(torch.nn.Linear):
        """Decides as its input says at exit 1, and always for 0 at exit 2."""

        config = SimpleNamespace(exit_layers=(1, 2))

        def forward(self, input_ids, exit_layers):
            logits = torch.stack([torch.tensor([0.5, 0.0]).expand(len(input_ids), 2), torch.eye(2)[input_ids]])
            return SimpleNamespace(exit_logits=logits.flip(0))

    batch = {"input_ids": torch.tensor([1, 1, 1, 0, 0]), "labels": torch.tensor([1, 1, 0, 1, 0])}
    scores = classification_scores(Given(1, 1), [batch], progress=False)
    assert scores[1] == {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    assert scores[2] == {"accuracy": 2 / 5, "precision": 0, "recall": 0, "f1": 0}


@pytest.mark.slow
def test_a_classifier_is_trained_at_every_exit_and_saved_with_its_scores(recipe_file, tmp_path, tokenizer):
    log = run(recipe_file, tmp_path / "run", "max_steps=40", "max_train_samples=16", "eval_steps=40", "save_steps=40")
    training = [entry for entry in log["log_history"] if "loss" in entry]
    first, last = (sum(entry["loss_exit_4"] for entry in part) / 5 for part in (training[:5], training[-5:]))
    assert last < 0.8 * first
    assert log["pairs"] == {"train": 16, "valid": 20, "test": 20}
    assert set(log["scores"]) == {"valid", "test"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    pairs = read_labelled_pairs(log["recipe"]["data"])["valid"].sample(20, seed=0)
    rows = ClassificationRows(pairs, tokenizer, max_tokens=96, progress=False)
    again = classification_scores(model, [ClassificationCollator(tokenizer)([rows[i] for i in range(20)])])
    assert again == {int(exit_layer): scores for exit_layer, scores in log["scores"]["valid"].items()}
    assert set(again) == set(EXIT_LAYERS)


@pytest.mark.slow
def test_a_classifier_is_trained_at_one_exit_with_lora_and_its_head_is_kept(recipe_file, tmp_path):
    log = run(recipe_file, tmp_path / "run", "exit_layer=2", "lora={}", "batch_size=4", "pairs_per_device=2")
    assert list(log["scores"]["valid"]) == [2]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_hidden_layers == 2
    assert not model.config.unpad_inputs
    adapter_file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    adapter = load_file(adapter_file)
    assert adapter_file.stat().st_mode == (tmp_path / "run" / "model" / "config.json").stat().st_mode
    (name,) = [name for name in adapter if name.endswith("classifier.weight")]
    assert torch.equal(model.classifier.weight, adapter[name])
    assert json.loads((tmp_path / "run" / "model" / "training_log.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("max_tokens=512", "training.length.too_long", "max_tokens=512"),
        ("pairs_per_device=3", "training.batch_size.multiple", "3 × 1"),
        ("task=regression", "training.task", "'regression'"),
        ("task=retrieval", "settings.unknown", "max_eval_samples"),
        ("max_train_samples=-1", "settings.value", "max_train_samples"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(recipe_file, tmp_path, override, key, value):
    with raises(key, value):
        recipe, finetune = load_finetuning(recipe_file, [override])
        finetune(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_command_prints_rows_labels_and_scores(recipe_file, tmp_path, capsys):
    settings = ("max_steps=1", "eval_steps=1", "save_steps=1", "max_train_samples=16")
    assert main(["finetune", str(recipe_file), "--out", str(tmp_path / "run"), *settings]) == 0
    printed = capsys.readouterr().out
    labels = read_labelled_pairs({"bigclonebench": recipe_file.parent / "data"})["train"].sample(16, seed=0).labels
    train = f"train: 16 rows, of which {sum(labels)} have label 1, 44 left out (beyond max_train_samples=16)"
    assert train in printed.splitlines()
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("| test")] == ["test"]
