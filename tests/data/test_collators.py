import pytest
import torch

from modular_star_encoder.data import collators
from modular_star_encoder.data.collators import PackingCollator, PaddingCollator
from modular_star_encoder.data.in_context import InContextPairs
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining
from tests.data.samples import WORDS, corpus_of
from tests.errors import raises
from tests.tiny import NO_DROPOUT, tiny_model


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Of many lengths."""
    texts = {
        f"repo{r}": [" ".join(WORDS[(r + i + j) % len(WORDS)] for j in range(6 + 4 * i)) for i in range(8)]
        for r in range(4)
    }
    return list(InContextPairs(corpus_of(texts, tokenizer), tokenizer, length=8, max_tokens=100, seed=0))


def test_rows_follow_one_another_within_their_bounds(tokenizer, rows):
    batch = PackingCollator(tokenizer)(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(set(lengths)) > 3
    bounds = batch["cu_seq_lens_q"].tolist()
    assert bounds == [sum(lengths[:i]) for i in range(len(rows) + 1)]
    for i, row in enumerate(rows):
        place = slice(bounds[i], bounds[i + 1])
        assert torch.equal(batch["input_ids"][0, place], row["input_ids"])
        assert torch.equal(batch["labels"][0, place], row["labels"])
        assert batch["position_ids"][0, place].tolist() == list(range(lengths[i]))
        assert batch["icc_labels"][i] == row["icc_label"]
    for name, shape in (("input_ids", (1, sum(lengths))), ("labels", (1, sum(lengths))), ("icc_labels", (len(rows),))):
        assert (batch[name].shape, batch[name].dtype) == (shape, torch.int64)
    assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
    assert torch.equal(batch["cu_seq_lens_k"], batch["cu_seq_lens_q"])
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    assert type(batch["max_length_q"]) is type(batch["max_length_k"]) is int
    with raises("data.packing.unfinished"):
        PackingCollator(tokenizer)([rows[0] | {name: rows[0][name][:-1] for name in ("input_ids", "labels")}])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_losses_and_gradients_are_those_of_the_padded_batch(tokenizer, rows, backend):
    results = []
    for collator in (PaddingCollator(tokenizer), PackingCollator(tokenizer)):
        model = tiny_model(ModularStarEncoderForPreTraining, vocab_size=len(tokenizer), **NO_DROPOUT).train()
        model.set_attn_implementation(backend)
        output = model(**collator(rows))
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (padded, expected), (packed, gradients) = results
    for name in ("loss", "mlm_losses", "icc_losses", "icc_logits"):
        torch.testing.assert_close(getattr(packed, name), getattr(padded, name), atol=1e-5, rtol=1e-5)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["Padding", "Packing", "Retrieval", "Classification"])
def test_rows_without_the_columns_of_a_collator_are_refused_with_the_names_of_both(tokenizer, kind):
    collator = getattr(collators, f"{kind}Collator")(tokenizer)
    names = ("query_ids", "document_ids") if kind == "Retrieval" else ("input_ids", "labels", "icc_label")
    wrong = [(dict.fromkeys(names, value), kind) for value, kind in ((None, "NoneType"), ([1], "list"))]
    wrong += [({**dict.fromkeys(names, torch.ones(2).long()), names[0]: torch.rand(2)}, "float32")]
    for row, shown in (({"text": "x"}, "text"), ({}, "nothing"), (None, "nothing"), *wrong):
        with raises("data.collator.columns", names[0], shown):
            collator([] if row is None else [row])
    assert collator.tokenizer is tokenizer
