from dataclasses import replace

import pytest
import torch

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.data.retrieval import RetrievalCollator, RetrievalPairs
from tests.data.samples import function, small_tokenizer


def functions(count=6):
    return [
        function(description=f"Load table number {i}." * (i + 1), code=f"def f{i}():\n    return {i}\n" * (i + 1))
        for i in range(count)
    ]


def make(tokenizer, rows=None, **options):
    return RetrievalPairs(functions() if rows is None else rows, tokenizer, progress=False, **options)


def test_rows_are_what_the_tokenizer_makes_of_prompt_and_text(tokenizer):
    dataset = make(tokenizer, max_document_tokens=1000, max_query_tokens=1000)
    assert len(dataset) == 6
    for row, one in zip(dataset, functions(), strict=True):
        assert row["query_ids"].tolist() == tokenizer(text_prompt() + one.description)["input_ids"]
        assert row["document_ids"].tolist() == tokenizer(code_prompt("python") + one.code)["input_ids"]


def test_the_prompt_names_the_language_of_the_row(tokenizer):
    rows = [function(), replace(function(), language="go", description="Other words here.", code="func f() {}")]
    dataset = make(tokenizer, rows)
    assert [
        f"this {language} code" in tokenizer.decode(dataset[i]["document_ids"])
        for i, language in enumerate(["python", "go"])
    ] == [True, True]


def test_prompts_can_be_left_out(tokenizer):
    row = make(tokenizer, prompts=False)[0]
    assert row["query_ids"].tolist() == tokenizer("Load table number 0.")["input_ids"]


def test_truncation_takes_from_the_text_and_keeps_its_frame(tokenizer):
    frame = tokenizer(text_prompt())["input_ids"]
    limit = len(frame) + 3
    ids = make(tokenizer, max_query_tokens=limit)[5]["query_ids"].tolist()
    content = tokenizer(functions()[5].description, add_special_tokens=False)["input_ids"]
    assert ids == [*frame[:-1], *content[:3], 2]
    assert len(content) > 3


def test_special_tokens_written_in_a_text_stay_characters(tokenizer):
    row = make(tokenizer, [function(description="Split at <sep> and <cls>.", code="x = '<sep><mask>'")])[0]
    assert row["query_ids"].tolist().count(1) == row["document_ids"].tolist().count(1) == 2
    assert 3 not in row["document_ids"]


def test_rows_that_repeat_a_description_or_a_code_are_dropped_and_counted(tokenizer):
    first = function()
    rows = [
        first,
        replace(first, code="def other(): ..."),
        replace(first, description="Another one here."),
        functions()[0],
    ]
    dataset = make(tokenizer, rows)
    assert dataset.functions == [first, functions()[0]]
    assert dataset.dropped == {"same description as an earlier row": 1, "same code as an earlier row": 1}


def test_bad_input_is_refused_in_one_sentence(tokenizer):
    with pytest.raises(ValueError, match="at least one documented function"):
        make(tokenizer, [])
    with pytest.raises(ValueError, match="max_query_tokens must be above"):
        make(tokenizer, max_query_tokens=5)
    with pytest.raises(ValueError, match="max_document_tokens must be above"):
        make(tokenizer, max_document_tokens=5)
    bare = small_tokenizer()
    bare.cls_token = "<other>"
    with pytest.raises(ValueError, match="template must end with its cls_token"):
        make(bare)


def test_batches_are_padded_on_the_left_and_keep_the_order(tokenizer):
    dataset = make(tokenizer)
    rows = [dataset[i] for i in range(6)]
    batch = RetrievalCollator(tokenizer)(rows)
    assert set(batch) == {"query", "document"}
    for side, inputs in batch.items():
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert (inputs["attention_mask"] == 0).any()
        for row, ids, mask in zip(rows, inputs["input_ids"], inputs["attention_mask"], strict=True):
            assert torch.equal(ids[mask.bool()], row[f"{side}_ids"])
            assert ids[-1] == 2
            assert set(ids[~mask.bool()].tolist()) <= {0}
