"""The model that comes with the package."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

FOLDER = Path(__file__).parent.parent / "hub_configs" / "mose-code"
PAIRS = (
    ("read a json file", "def load(path):\n    with open(path) as file:\n        return json.load(file)"),
    ("largest common divisor", "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a"),
    ("send an http request and retry", "def fetch(url, attempts=3):\n    for _ in range(attempts):\n        get(url)"),
)


def test_it_fits_into_the_wheel():
    assert (FOLDER / "model.safetensors").stat().st_size <= 32e6
    assert json.loads((FOLDER / "config.json").read_text())["exit_layers"] == [0, 1, 2, 4, 6]


@pytest.mark.parametrize("exit_layer", [0, 1, 2, 4, 6])
def test_every_exit_finds_the_function_of_a_description(exit_layer):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModel.from_pretrained(FOLDER, exit_layer=exit_layer).eval()
    assert model.config.num_hidden_layers == exit_layer
    with torch.no_grad():
        queries, functions = (
            model(**tokenizer(list(side), padding=True, return_tensors="pt")).sentence_embedding
            for side in zip(*PAIRS, strict=True)
        )
    assert (queries @ functions.T).argmax(dim=1).tolist() == [0, 1, 2]


def test_words_of_special_tokens_in_a_text_stay_text():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert not {tokenizer.pad_token_id, tokenizer.mask_token_id} & set(tokenizer("a <pad> b <mask>")["input_ids"])
