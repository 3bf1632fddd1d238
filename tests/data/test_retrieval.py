import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from modular_star_encoder.data.collators import RetrievalCollator
from modular_star_encoder.data.finetuning_rows import RetrievalBatches, RetrievalTexts, rename_frequent_words
from modular_star_encoder.data.pairs import RetrievalExample, Snippet, described
from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.data.splits import BatchPlan, PairGroups
from tests.data.samples import function, small_tokenizer
from tests.errors import raises


def functions(count=6):
    return [
        function(description=f"Load table number {i}." * (i + 1), code=f"def f{i}():\n    return {i}\n" * (i + 1))
        for i in range(count)
    ]


def make(tokenizer, rows=None, **options):
    return RetrievalTexts(described(rows or functions()), tokenizer, progress=False, **options)


def test_rows_are_what_the_tokenizer_makes_of_prompt_and_text(tokenizer):
    rows = [*functions(), replace(function(), language="go", code="func f() {}")]
    for row, one in zip(make(tokenizer, rows, max_code_tokens=1000, max_text_tokens=1000), rows, strict=True):
        assert row["query_ids"].tolist() == tokenizer(text_prompt() + one.description)["input_ids"]
        assert row["document_ids"].tolist() == tokenizer(code_prompt(one.language) + one.code)["input_ids"]


def test_the_prompt_is_never_cut_and_can_be_left_out(tokenizer):
    row = make(tokenizer, prompts=False)[0]
    assert row["query_ids"].tolist() == tokenizer("Load table number 0.")["input_ids"]
    # The limit cuts the text and keeps its frame.
    frame = tokenizer(text_prompt())["input_ids"]
    content = tokenizer(functions()[5].description, add_special_tokens=False)["input_ids"]
    ids = make(tokenizer, max_text_tokens=len(frame) + 3)[5]["query_ids"].tolist()
    assert ids == [*frame[:-1], *content[:3], 2]
    assert len(content) > 3
    for limit in ("max_text_tokens", "max_code_tokens"):
        with raises("data.retrieval.max_tokens", limit):
            make(tokenizer, **{limit: 5})
    bare = small_tokenizer()
    bare.cls_token = "<other>"
    with raises("data.tokenizer.template", "cls_token"):
        make(bare)


def parallel_texts(count=12):
    """Triplets whose snippets have a word to rename."""
    python = "def table{0}():\n    column = {0}\n    return column + column"
    codes = {"python": python, "cpp": "int table{0}() {{ int column = {0}; return column + column; }}"}
    return [
        RetrievalExample(f"Load table number {i}.", tuple(Snippet(name, codes[name].format(i)) for name in codes))
        for i in range(count)
    ]


def tokenized(tokenizer, rows, **options):
    return RetrievalTexts(rows, tokenizer, progress=False, **{"max_code_tokens": 128} | options)


def batches(tokenizer, steps=6, seed=0, **options):
    rows = parallel_texts()
    return RetrievalBatches(tokenized(tokenizer, rows), BatchPlan(PairGroups(rows), 4, seed), steps, **options)


def test_batches_alternate_text_to_code_and_code_to_code_with_their_prompts(tokenizer):
    dataset, rows = batches(tokenizer), parallel_texts()
    assert len(dataset) == 24
    frames = {name: tokenizer(code_prompt(name))["input_ids"][:-1] for name in ("python", "cpp")}
    assert "this c++ code snippet" in tokenizer.decode(frames["cpp"])
    frames["text"] = tokenizer(text_prompt())["input_ids"][:-1]
    seen = []
    for i in range(24):
        row = dataset[i]
        kinds = []
        for side in ("query_ids", "document_ids"):
            ids = row[side].tolist()
            kinds += [name for name, frame in frames.items() if ids[: len(frame)] == frame]
        seen.append(tuple(kinds))
        number = {n for n in range(12) for side in row.values() if f"table{n}(" in tokenizer.decode(side)}
        assert len(number) == 1
    assert set(seen[::2]) == {("text", "python")}
    assert set(seen[1::2]) == {("python", "cpp"), ("cpp", "python")}
    (number,) = number
    code = tokenizer(rows[number].snippets[0].code, add_special_tokens=False)["input_ids"]
    assert any(dataset[23][side].tolist()[-len(code) - 1 : -1] == code for side in ("query_ids", "document_ids"))


def test_a_share_of_the_snippets_is_renamed_and_no_description(tokenizer):
    plain, renamed = (batches(tokenizer, steps=60, identifier_rename_prob=share) for share in (0.0, 0.3))
    changed = {"text": 0, "code": 0}
    for i in range(240):
        for side in ("query_ids", "document_ids"):
            kind = "text" if i % 2 == 0 and side == "query_ids" else "code"
            changed[kind] += plain[i][side].tolist() != renamed[i][side].tolist()
    assert changed["text"] == 0
    assert 0.2 < changed["code"] / 360 < 0.4
    everything = batches(tokenizer, identifier_rename_prob=1.0)
    assert "column" not in "".join(tokenizer.decode(side) for i in range(24) for side in everything[i].values())


def test_hard_negatives_are_a_third_side_framed_and_renamed_as_code_is(tokenizer):
    rows = parallel_texts()
    rows = [replace(row, negative=rows[(i + 1) % 12].snippets[1]) for i, row in enumerate(rows)]
    texts = tokenized(tokenizer, rows)
    plan = BatchPlan(PairGroups(rows), 4, 0)
    plain, renamed = (RetrievalBatches(texts, plan, 60, identifier_rename_prob=share) for share in (0.0, 0.3))
    frame = tokenizer(code_prompt("cpp"))["input_ids"][:-1]
    changed = 0
    for i in range(240):
        ids = plain[i]["negative_ids"].tolist()
        number = plan.batch(i // 4)[i % 4].negative
        assert ids[: len(frame)] == frame
        assert f"table{(number + 1) % 12}(" in tokenizer.decode(ids)
        changed += ids != renamed[i]["negative_ids"].tolist()
    assert 0.2 < changed / 240 < 0.4
    batch = RetrievalCollator(tokenizer)([plain[i] for i in range(4)])
    assert list(batch) == ["query", "document", "negative"]
    with pytest.raises(IndexError):
        tokenized(tokenizer, parallel_texts()).tokens(3, -1)


def test_a_row_is_a_function_of_seed_and_place_in_any_order_of_access(tokenizer):
    options = {"steps": 9, "identifier_rename_prob": 0.5}
    forwards, backwards = batches(tokenizer, **options), batches(tokenizer, **options)
    rows = [forwards[i] for i in range(36)]
    again = [backwards[i] for i in reversed(range(36))][::-1]
    for one, other in zip(rows, again, strict=True):
        assert all(torch.equal(one[side], other[side]) for side in one)
    reseeded = batches(tokenizer, seed=1, **options)
    assert any(not torch.equal(reseeded[i]["query_ids"], rows[i]["query_ids"]) for i in range(36))
    with pytest.raises(IndexError):
        forwards[36]


def test_mean_tokens_count_what_the_encoder_reads(tokenizer):
    rows = parallel_texts(4)
    texts = tokenized(tokenizer, rows, max_code_tokens=40, prompts=False)
    lengths = [[len(texts.tokens(row, number)) for number in range(2)] for row in range(4)]
    assert max(map(max, lengths)) <= 40
    assert texts.mean_tokens()[1] == sum(map(sum, lengths)) / 8
    assert texts.mean_tokens()[0] == sum(len(texts.tokens(row, None)) for row in range(4)) / 4


CODE = "def total(values, start):\n    # values, values\n    x = start\n    for value in values:\n        x += value"


@pytest.mark.parametrize(
    ("code", "pattern"),
    [
        (CODE, re.escape(CODE).replace("values", "(NEW)", 1).replace("values", r"\1")),
        ("ab ab ab; twice twice; abc abc abc; 100 100 100", r"ab ab ab; twice twice; (NEW) \1 \1; 100 100 100"),
        ("0xFFFF | 0xFFFF | 0xFFFF; 100ULL, 100ULL, 100ULL", r"0xFFFF \| 0xFFFF \| 0xFFFF; 100ULL, 100ULL, 100ULL"),
        ("name name name name_of rename names", r"(NEW) \1 \1 name_of rename names"),
    ],
)
def test_all_occurrences_of_a_word_of_three_characters_that_occurs_three_times_get_one_new_name(code, pattern):
    renamed = rename_frequent_words(code, np.random.default_rng(0))
    match = re.fullmatch(pattern.replace("NEW", "[a-z]{3,8}"), renamed)
    assert match
    assert not set(match.groups()) & set(re.findall(r"\w+", code))


def test_two_words_never_get_one_name():
    words = [f"word{number}" for number in range(300)]
    renamed = rename_frequent_words(" ".join(words * 3), np.random.default_rng(0)).split()
    assert len(set(renamed)) == 300
    assert renamed[:300] == renamed[300:600] == renamed[600:]
