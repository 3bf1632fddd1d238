import pytest

from modular_star_encoder.data.languages.parsing import syntax_error_share
from modular_star_encoder.synthconl.extraction import REASONS, clean_translation

SOURCE = "def add(a, b):\n    return a + b"
GO = "func add(a int, b int) int {\n\treturn a + b\n}"


def clean(text, finish_reason="stop", target="go", **options):
    languages = {"source_language": "python", "target_language": target}
    return clean_translation(text, finish_reason, source=SOURCE, **languages | options)


@pytest.mark.parametrize(
    "text",
    [
        GO,
        f"\n\n{GO}\n\n",
        f"```go\n{GO}\n```",
        f"```golang title=add.go\n{GO}\n```\n",
        f"~~~~\n{GO}\n~~~~",
        f"Here's the function in Go:\n\n```go\n{GO}\n```\n\nIt uses `int`, as Python's are unbounded.",
        f"```\n{GO}",
        f"  ```go\n{GO}\n  ```",
        f"The Python function\n```python\n{SOURCE}\n```\nbecomes\n```go\n{GO}\n```",
        f"```go\nimport x\n```\nand\n```go\n{GO}\n```",
        f"Sure! Here is the translated code:\n{GO}",
        f"{GO}\n\nNote that Go has no operators of one's own.\n\nLet me know if anything is unclear.",
        f"{GO}\n\nThis function adds two numbers.",
    ],
)
def test_the_code_is_taken_out_of_fences_and_chatter(text):
    cleaned = clean(text)
    assert (cleaned.code, cleaned.rejected) == (GO, "")


@pytest.mark.parametrize("reasoning", ["<think>\n{}\n</think>\n\n", "<think>{} Good.</think>", "Well, {}\n</think>\n"])
@pytest.mark.parametrize("answer", [GO, f"```go\n{GO}\n```"])
def test_a_draft_in_the_reasoning_is_not_the_answer(reasoning, answer):
    draft = "```go\nfunc add(a int, b int) int {\n\treturn a - b // subtracts, which is longer and wrong\n}\n```"
    assert clean(reasoning.format(draft) + answer).code == GO
    assert clean(reasoning.format(draft)).rejected == "empty"
    assert clean(f"<think>\n{draft}").rejected == "empty"


def test_a_tag_of_reasoning_inside_code_is_code():
    code = 'func strip(text string) string {\n\treturn cut(text, "</think>")\n}'
    assert clean(f"```go\n{code}\n```").code == code


def test_answers_with_the_line_ends_of_windows_are_read_alike():
    text = f"Here it is:\n```go\n{GO}\n```\nIt adds two numbers."
    assert clean(text.replace("\n", "\r\n")) == clean(text)
    assert clean(text).code == GO


def test_what_stands_inside_the_code_is_left_as_it_is():
    code = 'func add() {\n\n\tnote := "```"\n\n\tthis.code = note  \n\n// Note: done\n}'
    assert clean(code).code == code
    assert clean(f"```go\n{code}\n```").code == code
    assert clean(f"```go\n    {GO}\n```").code == f"    {GO}"


def test_tags_of_php_are_left_out_of_php_alone():
    php, javascript = "function add() {}", "function add() { return '<?php ?>'; }"
    assert clean(f"```php\n<?php\n\n{php}\n?>\n```", target="php").code == php
    assert clean(javascript, target="javascript").code == javascript


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        (GO, "error", "not answered"),
        (GO, "too_long", "prompt too long"),
        (GO, "length", "truncated"),
        ("", "content_filter", "refused"),
        ("I'm sorry, but I can't help with that.", "stop", "refused"),
        ("I cannot translate this function.", "stop", "refused"),
        ("Unfortunately, Go has no generators.", "stop", "refused"),
        ("", "stop", "empty"),
        (" \n\n\t\n", "stop", "empty"),
        ("```go\n\n```", "stop", "empty"),
        ("```go\n```\nThere is nothing to translate.", "stop", "empty"),
        (f"```go\n{SOURCE}\n```", "stop", "same as the source"),
        (SOURCE.replace("    ", "\t"), "stop", "same as the source"),
        (f"```java\n{GO}\n```", "stop", "not the target language"),
        ("def plus(x, y):\n    return x + y", "stop", "not the target language"),
        ("const plus = (x, y) => x + y", "stop", "not the target language"),
        ("Adding is easy: it's what + does, isn't it?", "stop", "unparsable"),
        ("func add(a int { return )", "stop", "unparsable"),
        ("package main\n\nvar sum = 3", "stop", "no function"),
    ],
)
def test_what_is_no_translation_is_rejected_with_its_reason(text, finish_reason, reason):
    cleaned = clean(text, finish_reason)
    assert (cleaned.code, cleaned.rejected) == ("", reason)
    assert reason in REASONS


def test_a_few_errors_are_accepted():
    few = GO.replace("b\n", "b @\n")
    share = syntax_error_share(few, "go")
    assert 0 < share < syntax_error_share(few, "python")
    assert clean(few, max_error_share=share).code == few
    assert clean(few, max_error_share=0.9 * share).rejected == "unparsable"


def test_few_errors_are_too_many_where_the_source_language_has_none():
    java = "int run(List<Name> a) {\n    boolean done = a instanceof Set;\n    use(a, done);\n    return 1;\n}"
    assert 0 < syntax_error_share(java, "c") < 0.2
    options = {"target": "c", "max_error_share": 0.2}
    assert clean(java, **options).rejected == ""
    assert clean(java, **options, source_language="java").rejected == "not the target language"


def test_syntax_need_not_be_looked_at():
    assert clean("Adding is easy", max_error_share=1.0).code == "Adding is easy"
    assert clean("", max_error_share=1.0).rejected == "empty"
