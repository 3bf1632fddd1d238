import json
import time
from collections import Counter
from dataclasses import replace
from textwrap import indent

import pytest

from modular_star_encoder.data.languages.parsing import check_syntax
from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.synthconl import row_files, translation
from modular_star_encoder.synthconl.extraction import REASONS, clean_translation
from modular_star_encoder.synthconl.row_files import read_rows
from modular_star_encoder.synthconl.translation import MAX_ANSWER_CHARACTERS, Completion, target_language, translate
from tests.errors import raises
from tests.synthconl.openai_server import OpenAIServer
from tests.synthconl.samples import FUNCTION_SCHEMA, echo, endpoint_settings, function_rows

ROWS = 30
SEED = 5


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "ROWS_PER_FILE", 7)
    for name in ("functions", "out"):
        (tmp_path / name).mkdir()
    row_files.write_rows(tmp_path / "functions", function_rows(ROWS), FUNCTION_SCHEMA)
    return tmp_path / "functions", tmp_path / "out"


def run(folders, server, **changes):
    return translate(*folders, endpoint_settings(server, **changes), seed=SEED, progress=False)


def prompt_of(row):
    source = row["language1_CSN"]
    target = target_language(row["id"], source, seed=SEED)
    return translation.translation_request(row["id"], row["func1_CSN"], source, target).prompt


def assert_complete(folder):
    """Check that each function's completion is its own, and is stored once and in the order of the functions."""
    expected = [(row["id"], f"<{prompt_of(row)}>") for row in function_rows(ROWS)]
    assert [(row["id"], row["text"]) for row in read_rows(folder)] == expected
    assert {path.suffix for path in folder.iterdir()} == {".parquet", ".json"}


def test_the_target_is_one_of_the_other_seven_and_a_function_of_seed_and_id():
    ids = [f"id{i}" for i in range(7000)]
    drawn = {one: target_language(one, "go", seed=0) for one in ids}
    assert set(drawn.values()) == set(LANGUAGES) - {"go"}
    assert all(880 < count < 1120 for count in Counter(drawn.values()).values())
    assert drawn == {one: target_language(one, "go", seed=0) for one in reversed(ids)}
    assert any(target_language(one, "go", seed=1) != drawn[one] for one in ids[:9])
    assert target_language("id0", "go", seed=0, targets=("go", "c")) == "c"
    with raises("synthconl.targets", "go"):
        target_language("id0", "go", seed=0, targets=("go",))


def test_a_prompt_has_instruction_both_languages_and_the_code_as_it_is():
    prompt = translation.translation_request("id", "{x} = %s {code}", "javascript", "cpp").prompt
    instruction, _, rest = prompt.partition("\n\n")
    assert "Translate" in instruction
    assert rest == "Source language: JavaScript\nTarget language: C++\nCode:\n{x} = %s {code}\n"
    assert set(translation.LANGUAGE_NAMES) == set(LANGUAGES)


def test_every_function_gets_its_own_completion_once(folders):
    prices = {"prompt_price": 2.0, "completion_price": 10.0}
    with OpenAIServer(echo) as server:
        report = run(folders, server, **prices)
        assert run(folders, server, **prices) == report
        assert len(server.prompts) == len(server.bodies) == ROWS
        assert {body["temperature"] for body in server.bodies} == {0}
    assert_complete(folders[1])
    assert len({prompt_of(row) for row in function_rows(ROWS)}) < ROWS
    assert (report["completions"], report["errors"]) == (ROWS, 0)
    assert (report["prompt_tokens"], report["completion_tokens"]) == (10 * ROWS, 2 * ROWS)
    assert report["cost"] == pytest.approx((10 * ROWS * 2 + 2 * ROWS * 10) / 1e6)
    assert report["completions_per_second"] == pytest.approx(ROWS / report["seconds"], rel=0.01)
    assert report["backends"] == [{"backend": "openai", "model": "model", "revision": None, "served": ["model"]}]


@pytest.mark.parametrize("answered", [0, 7, 20])
def test_an_endpoint_that_stops_answering_loses_nothing(folders, answered):
    def out_of_credit(number, *_):
        return (401, {"error": {"message": "No more credit."}}, {}) if number >= answered else None

    with OpenAIServer(echo, out_of_credit) as server:
        with raises("http.status", "No more credit"):
            run(folders, server)
        assert len(server.prompts) == answered
        server.fault = None
        report = run(folders, server)
        assert len(server.prompts) == ROWS
    assert_complete(folders[1])
    assert report["completions"] == ROWS
    sessions = json.loads((folders[1] / "sessions.json").read_text())
    assert sum(session["completions"] for session in sessions) == ROWS


@pytest.fixture
def interrupted(folders):
    """The server of a run that failed after 5 answers, and the journal with these answers."""
    with OpenAIServer(echo, lambda number, *_: (401, {}, {}) if number >= 5 else None) as server:
        with raises("http.status"):
            run(folders, server)
        server.fault = None
        yield server, folders[1] / "rows-00000.parquet.journal"


def test_a_line_that_was_cut_short_is_asked_again_and_a_changed_journal_is_refused(folders, interrupted):
    server, journal = interrupted
    changes = [('{"id": "id', one) for one in ('{"di": "id', 'x{"id": "id', '{"id": "another')]
    for old, new in (*changes, ('"text": "', '"text": "\\ud800'), ('_tokens": ', f'_tokens": {10**30}')):
        before = journal.read_text()
        assert old in before
        journal.write_text(before.replace(old, new, 1))
        with raises("synthconl.journal", "Line 1", journal):
            run(folders, server)
        journal.write_text(before)
    journal.write_bytes(journal.read_bytes()[:-3])
    run(folders, server)
    assert len(server.prompts) == ROWS + 1
    assert_complete(folders[1])


def test_any_number_of_prompts_may_be_too_long_but_they_do_not_excuse_errors(folders):
    def answer(prompt):
        return Completion("", "", "too_long" if "function 27" not in prompt else "error", error="No such model.")

    with OpenAIServer(answer) as server:
        with raises("synthconl.backend.errors", "last 3 requests", "status 400, No such model"):
            run(folders, server)
        server.answer = echo
        run(folders, server)
        assert len(server.bodies) == ROWS + 3
    assert [row["finish_reason"] for row in read_rows(folders[1])] == ["too_long"] * (ROWS - 3) + ["stop"] * 3


def test_errors_are_recorded_once_others_are_answered_and_every_text_fits_into_a_file(folders):
    def answer(prompt):
        if "function 27" in prompt:  # the last ones
            return Completion("", "", "error", error="half: \ud83d.")
        return replace(echo(prompt), text="a\udc80b\0")

    with OpenAIServer(answer) as server:
        assert run(folders, server)["errors"] == 3
        assert len(server.bodies) == ROWS
    rows = {(row["finish_reason"], row["text"], row["error"]) for row in read_rows(folders[1])}
    assert rows == {("stop", "a?b\0", ""), ("error", "", "status 400, half: ?")}


def test_a_file_of_the_longest_answers_can_be_read_again_and_longer_answers_are_cut(tmp_path):
    (tmp_path / "functions").mkdir()
    (tmp_path / "out").mkdir()
    row_files.write_rows(tmp_path / "functions", function_rows(row_files.ROWS_PER_FILE), FUNCTION_SCHEMA)
    texts = {"stop": " " * MAX_ANSWER_CHARACTERS, "length": "\u3000" * (MAX_ANSWER_CHARACTERS // 2)}

    def answer(prompt):
        return replace(echo(prompt), text=texts["length" if "function 2" in prompt else "stop"])

    with OpenAIServer(answer) as server:
        run((tmp_path / "functions", tmp_path / "out"), server)
    rows = list(read_rows(tmp_path / "out"))
    assert {row["finish_reason"]: len(row["text"]) for row in rows} == {"stop": MAX_ANSWER_CHARACTERS, "length": 1000}


SOURCE = "def add(a, b):\n    return a + b"
GO = "func add(a int, b int) int {\n\treturn a + b\n}"


def clean(text, finish_reason="stop", target="go", **options):
    languages = {"source": SOURCE, "source_language": "python", "target_language": target}
    return clean_translation(text, finish_reason, **languages | options)


@pytest.mark.parametrize(
    "text",
    [
        GO,
        f"```golang title=add.go\n{GO}\n```\n",
        f"Here's the function in Go:\n\n```go\n{GO}\n```\n\nIt uses `int`, as Python's are unbounded.",
        f"```\n{GO}",
        f"The Python function\n```python\n{SOURCE}\n```\nbecomes\n```go\n{GO}\n```",
        f"```go\nimport x\n```\nand\n```go\n{GO}\n```",
        f"Sure! Here is the translated code:\n{GO}",
        f"{GO}\n\nNote that Go has no operators of one's own.\n\nLet me know if anything is unclear.",
    ],
)
def test_the_code_is_taken_out_of_fences_and_chatter(text):
    for one in (text, text.replace("\n", "\r\n")):
        assert (clean(one).code, clean(one).rejected) == (GO, "")


DOCSTRING = 'def add(a, b):\n    """Adds.\n\n    ```python\n    add(1, 2)\n    ```\n    """\n    return a + b'


@pytest.mark.parametrize(
    "text",
    [
        DOCSTRING,
        f"Sure! Here is the translated code:\n{DOCSTRING}",
        f"```python\n{DOCSTRING}",
        f"```python\n{DOCSTRING}```\nDone.",
        f"Draft:\n```python\npass```\nAnswer:\n```python\n{DOCSTRING}\n```",
        f"~~~~ python\n{DOCSTRING}\n~~~~",
        indent(f"\n```python\n{DOCSTRING}\n```", "    "),
        "1. " + indent(f"```python\n{DOCSTRING}\n```", "   ").lstrip(),
        f"```python\n{indent(DOCSTRING, '  ')}\n  ```",
    ],
)
def test_fences_inside_the_code_belong_to_the_code_and_indentation_of_the_block_does_not(text):
    assert clean(text, source=GO, source_language="go", target="python").code == DOCSTRING


@pytest.mark.parametrize("text", ["```py\n", "    ```\n", "Sure: . ", "\n \n", "a", "~"])
def test_the_longest_answer_is_cleaned_in_seconds(text):
    many = text * ((MAX_ANSWER_CHARACTERS - 10) // len(text))
    for answer in (many, f"```go\n{many}", f"```{many}`", f"{many}`"):
        start = time.process_time()
        clean(answer)
        assert time.process_time() - start < 10
    assert clean(many + "x" * 99).rejected == "no function"


@pytest.mark.parametrize("reasoning", ["<think>\n{}\n</think>\n\n", "<think>{} Good.</think>", "Well, {}\n</think>\n"])
@pytest.mark.parametrize("answer", [GO, f"```go\n{GO}\n```"])
def test_a_draft_in_the_reasoning_is_not_the_answer(reasoning, answer):
    draft = "```go\nfunc add(a int, b int) int {\n\treturn a - b // subtracts, which is longer and wrong\n}\n```"
    assert clean(reasoning.format(draft) + answer).code == GO
    assert clean(reasoning.format(draft)).rejected == "empty"
    assert clean(f"<think>\n{draft}").rejected == "empty"


def test_what_is_inside_the_code_is_left_as_it_is():
    code = 'func add() {\n\n\tnote := "```"\n\n\tthis.code = note  \n\n// Note: done\n}'
    assert clean(code).code == code
    assert clean(f"```go\n{code}\n```").code == code
    assert clean(f"```go\n    {GO}\n```").code == f"    {GO}"
    tag = 'func strip(text string) string {\n\treturn cut(text, "</think>")\n}'
    assert clean(f"```go\n{tag}\n```").code == tag
    php, javascript = "function add() {}", "function add() { return '<?php ?>'; }"
    assert clean(f"```php\n<?php\n\n{php}\n?>\n```", target="php").code == php
    assert clean(javascript, target="javascript").code == javascript


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        (GO, "error", "not answered"),
        (GO, "length", "truncated"),
        ("", "content_filter", "refused"),
        ("I'm sorry, but I can't help with that.", "stop", "refused"),
        ("```go\n```\nThere is nothing to translate.", "stop", "empty"),
        (f"```go\n{SOURCE}\n```", "stop", "same as the source"),
        (SOURCE.replace("    ", "\t"), "stop", "same as the source"),
        (f"```java\n{GO}\n```", "stop", "not the target language"),
        ("def plus(x, y):\n    return x + y", "stop", "not the target language"),
        ("Adding is easy: it's what + does, isn't it?", "stop", "unparsable"),
        ("package main\n\nvar sum = 3", "stop", "no function"),
    ],
)
def test_an_answer_without_a_translation_is_rejected_with_its_reason(text, finish_reason, reason):
    cleaned = clean(text, finish_reason)
    assert (cleaned.code, cleaned.rejected) == ("", reason)
    assert reason in REASONS


def test_a_few_errors_are_accepted_unless_the_source_language_has_none_and_syntax_may_be_ignored():
    few = GO.replace("b\n", "b @\n")
    share = check_syntax(few, "go")[0]
    assert 0 < share < check_syntax(few, "python")[0]
    assert clean(few, max_error_share=share).code == few
    assert clean(few, max_error_share=0.9 * share).rejected == "unparsable"
    java = "int run(List<Name> a) {\n    boolean done = a instanceof Set;\n    use(a, done);\n    return 1;\n}"
    options = {"target": "c", "max_error_share": 0.2}
    assert clean(java, **options).rejected == ""
    assert clean(java, **options, source_language="java").rejected == "not the target language"
    assert clean("Adding is easy", max_error_share=1.0).code == "Adding is easy"
    assert clean("", max_error_share=1.0).rejected == "empty"
