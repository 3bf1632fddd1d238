import base64
import json
import os

import numpy as np
import pytest
from transformers import AutoTokenizer

from modular_star_encoder.data import tokenizer as tokenizer_module
from modular_star_encoder.data import tokenizer_files
from modular_star_encoder.data.prompts import LANGUAGES, code_prompt, sentence_transformer_prompts, text_prompt
from modular_star_encoder.data.tokenizer import encode_content, load_tokenizer, train_tokenizer, with_template
from tests.errors import raises
from tests.published.stand_in import write_tokenizer

TEXT = "def añb(x):\n\treturn x1234  # 漢字 🙂\r\n"


def test_special_tokens_have_the_first_ids_and_frame_texts_and_pairs_also_if_they_are_cut(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<sep>", "<cls>", "<mask>"]) == [0, 1, 2, 3]
    assert [getattr(tokenizer, f"{role}_token_id") for role in ("pad", "sep", "cls", "mask")] == [0, 1, 2, 3]
    batch = tokenizer(["a", "a b c d e f"], padding=True)
    assert batch["input_ids"][0][0] == 0  # on the left
    assert batch["attention_mask"][0][-1] == 1
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("load x", "save y"))
    assert a
    assert tokenizer("load x")["input_ids"] == [1, *a, 2]
    assert tokenizer("load x", "save y")["input_ids"] == [1, *a, 1, *b, 2]
    single = tokenizer("load x" * 50, truncation=True)["input_ids"]
    pair = tokenizer("load x" * 50, "save y" * 50, truncation=True, max_length=20)["input_ids"]
    assert (len(single), single[0], single[-1]) == (tokenizer.model_max_length, 1, 2)
    assert (len(pair), pair[0], pair[-1], pair.count(1)) == (20, 1, 2, 2)


def test_every_text_comes_back_from_its_ids_and_digits_stand_alone(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == TEXT
    years = train_tokenizer(["1234 years"] * 50, 300, progress=False)
    ids = years("1234 years", add_special_tokens=False)["input_ids"]
    assert [years.decode(i) for i in ids[:4]] == list("1234")
    assert len(ids) < len("1234 years")


def test_a_reloaded_tokenizer_gives_identical_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    name = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert name in {"PreTrainedTokenizerFast", "TokenizersBackend"}
    for texts in [(TEXT,), (TEXT, "load"), (code_prompt() + TEXT,), ("",)]:
        assert reloaded(*texts)["input_ids"] == tokenizer(*texts)["input_ids"]
    assert (reloaded.padding_side, reloaded.model_max_length) == ("left", 128)
    # A tokenizer that names GPT-2's class still splits digits.
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    assert "Digits" in str(load_tokenizer(tmp_path).backend_tokenizer.pre_tokenizer)
    assert "Digits" not in str(AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.pre_tokenizer)


def test_rows_of_content_equal_the_tokenizers_ids_without_special_tokens_and_are_small(tokenizer):
    text = "x = '<sep><cls><mask><pad>'"
    assert set(tokenizer(text, add_special_tokens=False)["input_ids"]) & {0, 1, 2, 3}
    (row,) = encode_content(tokenizer, [text], progress=False)
    assert not set(row.tolist()) & {0, 1, 2, 3}
    assert tokenizer.decode(row) == text
    assert not tokenizer.backend_tokenizer.encode_special_tokens  # the tokenizer itself is as before
    texts = [f"{TEXT}{i}" * (i % 3) for i in range(600)]
    rows = encode_content(tokenizer, texts, progress=False)
    assert [row.tolist() for row in rows] == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert rows[1].dtype == np.uint16
    assert len(rows[0]) == 0
    with pytest.raises(IndexError):
        rows[600]


def test_the_work_for_spellings_and_settings_grows_in_proportion_to_them(tokenizer, monkeypatch):
    calls, ids = [], tokenizer.all_special_ids
    monkeypatch.setattr(type(tokenizer), "all_special_ids", property(lambda _: calls.append(1) or ids))
    assert len(tokenizer_module.token_spellings(tokenizer)) == len(tokenizer)
    assert len(calls) == 1
    nested = []
    for _ in range(5000):  # one generator within another would take time proportional to the depth for each value
        nested = [nested]
    assert len(list(tokenizer_files._values(nested))) == 5001


def test_bad_arguments_and_tokenizers_without_the_tokens_are_refused_and_ours_stays(tokenizer, tmp_path):
    assert with_template(tokenizer) is tokenizer
    bare = write_tokenizer(tmp_path, max_length=64)
    bare.add_tokens(["<sep>"])
    with raises("data.tokenizer.spelling"):
        with_template(bare)
    bare.cls_token = None
    with raises("data.tokenizer.token_missing", "cls_token"):
        with_template(bare)
    with raises("data.tokenizer.sizes", "vocab_size", 260):
        train_tokenizer(["a"], 259)
    with raises("data.tokenizer.sizes", "max_length", 4):
        train_tokenizer(["a"], 300, max_length=3)
    with raises("data.tokenizer.no_text"):
        train_tokenizer([], 300, progress=False)
    assert len(train_tokenizer(["a"], 260, progress=False)) == 260


def test_a_tokenizer_without_template_gets_ours_and_keeps_every_id(tmp_path):
    published = write_tokenizer(tmp_path, max_length=64)
    ours = with_template(published)
    assert len(ours) == len(published)
    prompt = ours(code_prompt("go") + TEXT)["input_ids"]
    sep = published.sep_token
    written = f"{sep}{code_prompt('go').removesuffix('<sep>')}{sep}{TEXT}{published.cls_token}"
    assert prompt == published(written)["input_ids"]
    assert (sep, ours.sep_token) == ("<SEP>", "<sep>")
    names = ("sep_token_id", "cls_token_id", "mask_token_id", "pad_token_id", "padding_side", "model_max_length")
    assert [getattr(ours, name) for name in names] == [getattr(published, name) for name in names]
    ours.save_pretrained(tmp_path / "ours")
    for again in (load_tokenizer(tmp_path / "ours"), AutoTokenizer.from_pretrained(tmp_path / "ours")):
        assert again(code_prompt("go") + TEXT)["input_ids"] == prompt


def test_prompts_are_worded_as_published_and_end_with_the_inner_separator():
    assert code_prompt("Python") == "Represent this python code snippet for retrieval:<sep>"
    assert code_prompt("cpp") == code_prompt("C++") == "Represent this c++ code snippet for retrieval:<sep>"
    assert code_prompt() == code_prompt("") == "Represent this code snippet for retrieval:<sep>"
    assert text_prompt() == "Represent this code description for retrieving supporting snippets of code:<sep>"
    for language in ("  ", "python<sep>"):
        with raises("data.prompt.language"):
            code_prompt(language)
    expected = {f"document_{language}": code_prompt(language) for language in LANGUAGES}
    expected |= {"query": text_prompt(), "document": code_prompt()}
    assert sentence_transformer_prompts() == expected
    assert sentence_transformer_prompts(instructions=False) == dict.fromkeys(expected, "")
    assert text_prompt(instructions=False) == code_prompt("python", instructions=False) == ""


def sequence(steps, *, name="normalizers"):
    return {"type": "Sequence", name: steps}


def replaces(new, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": new}


def splits(pattern):
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return sequence([step, {"type": "ByteLevel"}], name="pretokenizers")


def template(names, ids=(1,)):
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}} if name else {"Sequence": {"id": "A"}} for name in names]
    special = {"<s>": {"id": "<s>", "ids": list(ids), "tokens": ["<s>"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": special}


def charsmap(text, *units):
    """Return the step that T5 and XLM-R begin with, its map with one text and a trie that begins with `units`."""
    trie = np.array([*units, *[0] * (256 - len(units))], "<u4").tobytes()
    content = len(trie).to_bytes(4, "little") + trie + text.encode() + bytes(1)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def unigram(words, unk_id):
    return {"type": "Unigram", "unk_id": unk_id, "vocab": [[word, -1.0] for word in words]}


def bpe(merges):
    return {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": merges}


SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+"
)
PUBLISHED = {  # what published tokenizers have
    "bert": {"normalizer": {"type": "BertNormalizer"}, "post_processor": template(["<s>", "", "<s>"])},
    "minilm": {
        "padding": {"strategy": {"Fixed": 128}, "pad_to_multiple_of": None, "pad_token": "[PAD]"},
        "truncation": {"max_length": 128, "strategy": "LongestFirst", "stride": 0},
    },
    "llama-2": {"normalizer": sequence([{"type": "Prepend", "prepend": "▁"}, replaces("▁", String=" ")])},
    "llama-3, qwen": {"pre_tokenizer": splits(LLAMA_3)},
    "o200k": {"pre_tokenizer": splits(O200K)},
    "deepseek": {"pre_tokenizer": splits(DEEPSEEK)},
    **{
        name: {"pre_tokenizer": splits(pattern)}
        for name, pattern in {
            "gpt-2's pattern": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*" + SPACES,
            "qwen-2": LLAMA_3.replace("{1,3}", ""),
            "deepseek coder": r"\s?\p{P}+|[\r\n]|\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+|[一-龥ࠀ-一가-퟿]+",
            "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
            "lines": r"(?:\r\n|\n)+",
            "white space": r"\s+(?!\S)",
        }.items()
    },
    "albert": {
        "normalizer": sequence(
            [replaces('"', String="``"), {"type": "NFKD"}, charsmap("صلى الله عليه وسلم"), replaces(" ", Regex=" {2,}")]
        ),
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    },
    "gpt-2": {"model": bpe([]) | {"unk_token": None}},
    "t5": {"model": unigram(["<pad>", "</s>", "<unk>"], unk_id=2), "post_processor": template(["", "<s>"])},
    "starcoder": {"model": bpe([]) | {"vocab": {"a": 0, "Ġ" * 1024: 1}}},
    "without post-processor": {"post_processor": None},
}
HOSTILE = {
    "a million tokens": {"post_processor": template(["<s>"] * 1000, [1] * 1000)},
    "a text 1,000 times": {"post_processor": template([""] * 1000)},
    "a long content": {"normalizer": replaces("x" * 5000, String="a")},
    "a megabyte before": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "no type": {"normalizer": {"prepend": "x" * 5000}},
    "doubled 30 times": {"normalizer": sequence([replaces("aa", String="a")] * 30)},
    "doubled by bytes": {"pre_tokenizer": sequence([{"type": "ByteLevel"}] * 30, name="pretokenizers")},
    "doubled when decoded": {"decoder": sequence([replaces("aa", String="a")] * 30, name="decoders")},
    "a long entry": {"normalizer": charsmap("x" * 5000)},
    "thousands of steps": {"normalizer": sequence([{"type": "NFC"}] * 5000)},
    "nested repetition": {"pre_tokenizer": splits("(a+)+$")},
    "same alternatives": {"pre_tokenizer": splits("(a|a)*c")},
    **{
        f"alternatives {pattern}": {"pre_tokenizer": splits(pattern)}
        for pattern in (r"(?:\r\n|\r|\n)*x", r"(?:\n|\s)+x", r"(?:\n|)+x", r"(?:\n?\r|\t)+x", r"(?:\n+|\t)+x")
    },
    "three runs": {"normalizer": replaces("", Regex="a*a*a*c")},
    "many options": {"normalizer": replaces("", Regex="a?" * 30 + "b")},
    "a backward reference": {"pre_tokenizer": splits(r"(a+)\1+")},
    "padded to a billion": {"padding": {"strategy": {"Fixed": 10**9}}},
    "padded to a multiple": {"padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 2**40}},
    "a stride without progress": {"truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 5}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a large id": {"added_tokens": [{"id": 2**24, "content": "a"}]},
    "many added tokens": {"added_tokens": [{"id": 1, "content": "a"}] * 20_000},
    "words of any length": {"model": {"vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 10**9}},
    "a map beyond its end": {"normalizer": charsmap("a", 256 << 10)},
    "a map to no text": {"normalizer": charsmap("a", 1 << 8, 2**31 + 9)},
    "a map to the middle of a character": {"normalizer": charsmap("é", 1 << 8 | 1 << 10, 2**31 + 1)},
    "a map of another size": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAA"}},
    "a map of no words": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BQAAAAAAAAAA"}},
    "a map without a trie": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
    "a short map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA=="}},
    "a map in no base64": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAA*"}},
    "no map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": None}},
    "spaces around signs": {"normalizer": sequence([{"type": "BertNormalizer", "handle_chinese_chars": True}] * 900)},
    "a long token": {"model": {"type": "WordLevel", "vocab": {"a": 0, "b" * 5000: 1}, "unk_token": "a"}},
    "a long piece": {"model": unigram(["a" * 300], unk_id=0)},
    "long tokens": {"model": unigram([f"{n}" * 50 for n in range(2000)], unk_id=0)},
    "long added tokens": {"added_tokens": [{"id": n, "content": "a" * 1500} for n in range(100)]},
    "a long added token": {"added_tokens": [{"id": 1, "content": "a" * 3000}]},
    "a long merge": {"model": bpe([["a", "b" * 5000]])},
    "a long merge in a text": {"model": bpe(["a " + "b" * 5000])},
    "many merges": {"model": bpe([""] * 70_000)},
    "many words": {"model": unigram([""] * 70_000, unk_id=0)},
    "a large file of settings": {"tokenizer_config.json": " " * 2**20},
    "a long special token": {"tokenizer_config.json": {"bos_token": "a" * 3000}},
    "a long special token in a map": {"special_tokens_map.json": {"bos_token": {"content": "a" * 3000}}},
    "a long token in a list": {"tokenizer_config.json": {"extra_special_tokens": ["a" * 3000]}},
    "a long token of another file": {"added_tokens.json": {"a" * 3000: 1}},
    "long tokens of another file": {"added_tokens.json": {f"{n}" * 400: n for n in range(200)}},
    "nothing for unknown text": {"model": unigram(["a"], unk_id=None)},
    "an unknown id for unknown text": {"model": unigram(["a"], unk_id=1)},
    "an unknown token for unknown text": {"model": bpe([]) | {"unk_token": "c"}},
    "an unknown word for unknown text": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "c"}},
    "an unknown id in the template": {"post_processor": template(["<s>", ""], [2**20])},
    "an unknown id at the end": {"post_processor": {"type": "BertProcessing", "sep": ["a", 2**20], "cls": ["a", 0]}},
    "another type": {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": 5}},
    "another version's file": {"tokenizer_config.json": {"fast_tokenizer_files": ["tokenizer.1.0.json"]}},
    "half a surrogate pair": {"tokenizer_config.json": {"note": "\ud800"}},
    "many special tokens": {"tokenizer_config.json": {"extra_special_tokens": [f"<{n}>" for n in range(5000)]}},
    "a large template": {"chat_template.jinja": " " * 2**21},
    "brackets": {"tokenizer_config.json": "[" * 10**5},
    "a pipe": {"special_tokens_map.json": os.mkfifo},
    "a folder": {"added_tokens.json": os.mkdir},
}


def write_changed(folder, tokenizer, changes):
    tokenizer.save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    for name, value in changes.items():
        if "." not in name:
            state[name] = value
        elif callable(value):
            value(folder / name)
        else:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    (folder / "tokenizer.json").write_text(json.dumps(state))


@pytest.mark.parametrize("changes", PUBLISHED.values(), ids=PUBLISHED)
def test_what_published_tokenizers_have_is_allowed(tokenizer, tmp_path, changes):
    write_changed(tmp_path, tokenizer, changes | {"tokenizer_config.json": {"model_max_length": int(1e30)}})
    assert tokenizer_files.check_tokenizer(tmp_path)


def test_a_file_in_the_place_of_a_folder_is_not_sought_on_the_hub(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in ("/dev/null", tmp_path / "tokenizer.json"):
        with raises("checkpoint.tokenizer", f"{path} has no tokenizer.json"):
            load_tokenizer(path)


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_files_that_cost_more_than_a_sentence_are_refused_unread(tokenizer, tmp_path, monkeypatch, changes):
    smaller = {"BYTES": 2**20, "SETTINGS_BYTES": 2**19, "TOKENS": 2**17, "SETTINGS": 2**17, "ENTRIES": 2**16}
    for name, value in smaller.items():
        monkeypatch.setattr(tokenizer_files, f"_MAX_{name}", value)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", None)
    write_changed(tmp_path, tokenizer, changes)
    with raises("checkpoint.tokenizer", tmp_path):
        load_tokenizer(tmp_path)
