import re

import pytest
import torch
from transformers import AddedToken

from modular_star_encoder.data.collators import PaddingCollator
from modular_star_encoder.data.in_context import InContextPairs
from tests.data.samples import corpus_of, repository_texts, small_tokenizer
from tests.errors import raises


def make(tokenizer, texts=None, **changes):
    arguments = {"length": 2000, "max_tokens": 96, "seed": 0} | changes
    return InContextPairs(corpus_of(texts or repository_texts(), tokenizer), tokenizer, **arguments)


@pytest.fixture(scope="module")
def rows(tokenizer):
    dataset = make(tokenizer)
    return [dataset[i] for i in range(len(dataset))]


def original(row):
    return torch.where(row["labels"] >= 0, row["labels"], row["input_ids"]).tolist()


def snippets(row):
    ids = original(row)
    middle = ids.index(1, 1)
    return ids[1:middle], ids[middle + 1 : -1]


def test_a_row_depends_on_the_seed_and_its_index_only(tokenizer):
    one, same, other = make(tokenizer), make(tokenizer, length=7), make(tokenizer, seed=1)
    one[3]
    for name in ("input_ids", "labels", "icc_label"):
        assert torch.equal(one[5][name], same[5][name])
    assert not torch.equal(one[5]["input_ids"], other[5]["input_ids"])
    assert not torch.equal(one[5]["input_ids"], one[6]["input_ids"])


def test_rows_are_framed_like_the_tokenizers_pairs_and_fill_the_room(tokenizer, rows):
    for row in rows[:200]:
        first, second = snippets(row)
        assert original(row) == [1, *first, 1, *second, 2]
        assert len(row["input_ids"]) == 96
        assert abs(len(first) - len(second)) <= 1
        assert not {0, 1, 2, 3} & set(first + second)
    small = make(tokenizer, max_tokens=4000)[0]
    assert [len(s) for s in snippets(small)] > [46, 46]


def test_windows_come_from_all_over_a_text(tokenizer):
    text = "\n".join(f"line {i} of this text" for i in range(500))
    dataset = make(tokenizer, {"a": [text] * 2, "b": [text] * 2}, length=60)
    numbers = [int(re.search(r"line (\d+) of", tokenizer.decode(snippets(dataset[i])[0]))[1]) for i in range(60)]
    assert min(numbers) < 120
    assert max(numbers) > 380


def test_masking_follows_bert(tokenizer, rows):
    labels = torch.cat([row["labels"] for row in rows])
    inputs = torch.cat([row["input_ids"] for row in rows])
    chosen = labels >= 0
    assert 0.14 < chosen.sum() / (len(labels) - 3 * len(rows)) < 0.16
    assert 0.78 < (inputs[chosen] == 3).float().mean() < 0.82
    assert 0.09 < (inputs[chosen] == labels[chosen]).float().mean() < 0.12
    random = chosen & (inputs != 3) & (inputs != labels)
    assert random.sum() > 1000
    assert inputs[random].min() >= 4
    assert not (inputs[~chosen] == 3).any()
    assert labels[chosen].min() >= 4
    assert set(labels[~chosen].tolist()) == {-100}
    assert [int((row["labels"] >= 0).sum()) for row in make(tokenizer, mlm_probability=1e-9, length=20)] == [1] * 20


def test_texts_that_cannot_form_pairs_are_left_out_and_bad_input_is_refused(tokenizer):
    texts = repository_texts(repositories=2) | {"single": ["long enough " * 30], "short": ["x", "y"]}
    dataset = make(tokenizer, texts)
    assert dataset.repositories == ("repo0", "repo1")
    assert dataset.dropped_texts == 3
    with raises("data.in_context.too_few_repositories", "of 2 repositories"):
        make(tokenizer, repository_texts(repositories=1) | {"short": ["x", "y"]})
    with raises("data.in_context.arguments", "max_tokens", 35):
        make(tokenizer, max_tokens=34)
    bare = small_tokenizer()
    bare.mask_token = None
    with raises("data.tokenizer.token_missing", "mask_token"):
        make(bare)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_follows_the_tokenizer_and_is_ignored(tokenizer, side):
    padded_tokenizer = small_tokenizer()
    padded_tokenizer.padding_side = side
    texts = {name: ["x = 1 # " * 4, "z = 3 # " * 4, "y = 2 # " * 12] for name in "ab"}
    rows = [make(tokenizer, texts)[i] for i in range(8)]
    batch = PaddingCollator(padded_tokenizer)(rows)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert (batch["attention_mask"] == 0).any()
    assert batch["icc_labels"].tolist() == [int(row["icc_label"]) for row in rows]
    for i, row in enumerate(rows):
        real = batch["attention_mask"][i].bool()
        for name, padding in (("input_ids", 0), ("labels", -100)):
            assert torch.equal(batch[name][i][real], row[name])
            assert set(batch[name][i][~real].tolist()) <= {padding}
        assert real[-1 if side == "left" else 0]


def test_special_tokens_without_a_role_are_never_drawn():
    """Such as StarCoder2's `<fim_prefix>`: marked as special, and none of the tokenizer's own."""
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<extra{i}>", special=True) for i in range(400)])
    extra = {tokenizer.convert_tokens_to_ids(f"<extra{i}>") for i in range(400)}
    dataset = make(tokenizer, {name: ["<extra1> x = 1 " * 20] * 2 for name in "ab"}, length=200)
    rows = [dataset[i] for i in range(200)]
    assert not extra & {token for row in rows for token in row["input_ids"].tolist()}
    drawn = {t for row in rows for t in row["input_ids"][(row["labels"] >= 0) & (row["input_ids"] != 3)].tolist()}
    assert len(drawn) > 100
