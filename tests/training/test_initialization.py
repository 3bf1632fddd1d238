"""Initial weights made from the tokenizer and the corpus."""

import pytest
import torch

from modular_star_encoder.data.tokenizer import token_spellings
from modular_star_encoder.training.starting_points import start_from_spellings, start_from_unigrams
from tests.errors import raises
from tests.tiny import VOCAB_SIZE, tiny_tokenizer


def test_starting_from_unigrams_predicts_the_tokens_frequencies():
    decoder = torch.nn.Linear(8, VOCAB_SIZE)
    counts = torch.arange(VOCAB_SIZE)
    start_from_unigrams(decoder, counts)
    torch.testing.assert_close(decoder(torch.zeros(8)).softmax(-1), (counts + 1) / (counts + 1).sum())


def test_tokens_with_one_spelling_start_out_similar_and_others_do_not():
    embedding = torch.nn.Embedding(4, 4096, padding_idx=0)
    start_from_spellings(embedding, ["<pad>", "parse", "parse", "format"], shared=0.8, std=0.1)
    vectors = embedding.weight.detach()
    correlations = torch.corrcoef(vectors[1:])
    assert correlations[0, 1].item() == pytest.approx(0.8, abs=0.03)
    assert correlations[0, 2].item() == pytest.approx(0, abs=0.06)
    assert vectors[1:].std().item() == pytest.approx(0.1, abs=0.005)
    assert not vectors[0].any()


def test_the_same_seed_gives_the_same_vectors():
    first, second, other = (torch.nn.Embedding(3, 8) for _ in range(3))
    for embedding, seed in ((first, 1), (second, 1), (other, 2)):
        start_from_spellings(embedding, ["a", "a", "b"], seed=seed)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize(("spellings", "shared"), [(["a"], 0.5), (["a", "b"], 1.5)])
def test_bad_arguments_are_refused(spellings, shared):
    with raises("training.spellings", shared):
        start_from_spellings(torch.nn.Embedding(2, 4), spellings, shared=shared)


def test_every_token_has_a_spelling_that_ignores_case_spaces_and_underscores():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Return", " return", "_RETURN"])
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    spellings = dict(zip(tokens, token_spellings(tokenizer), strict=True))
    assert spellings["Return"] == spellings[" return"] == spellings["_RETURN"] == "return"
    assert spellings["("] != spellings[")"]
    assert spellings["<sep>"] != spellings["<cls>"]
