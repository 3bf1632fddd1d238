import pytest

from modular_star_encoder.dataset.cleaning import REASONS, clean_translation

SOURCE = "def add(a, b):\n    return a + b"
GO = "func add(a int, b int) int {\n\treturn a + b\n}"
MARKS = {"python": "def ", "go": "func ", "php": "function ", "javascript": "const ", "ruby": "end"}


def error_share(code, language):
    """A grammar that knows one word of each language; `@` is an error in all of them."""
    errors = code.count("@") / len(code)
    return errors if MARKS.get(language, "no language has this") in code else max(errors, 0.5)


def clean(text, finish_reason="stop", target="go", **options):
    return clean_translation(
        text,
        finish_reason,
        source=SOURCE,
        source_language="python",
        target_language=target,
        error_share=error_share,
        **options,
    )


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


def test_what_stands_inside_the_code_is_left_as_it_is():
    code = 'func add() {\n\n\tnote := "```"\n\n\tthis.code = note  \n\n// Note: done\n}'
    assert clean(code).code == code
    assert clean(f"```go\n{code}\n```").code == code
    assert clean(f"```go\n    {GO}\n```").code == f"    {GO}"


def test_tags_of_php_are_left_out_of_php_alone():
    assert clean("```php\n<?php\n\nfunction add() {}\n?>\n```", target="php").code == "function add() {}"
    assert clean("const a = '<?php ?>'", target="javascript").code == "const a = '<?php ?>'"


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        (GO, "error", "not answered"),
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
        ("adding is easy", "stop", "unparsable"),
        ("func " + "@" * 20, "stop", "unparsable"),
    ],
)
def test_what_is_no_translation_is_rejected_with_its_reason(text, finish_reason, reason):
    cleaned = clean(text, finish_reason)
    assert (cleaned.code, cleaned.rejected) == ("", reason)
    assert reason in REASONS


def test_a_few_errors_are_accepted_unless_the_source_language_has_none():
    few = GO + " @"
    assert clean(few).code == few
    assert clean(few, max_error_share=0.0).rejected == "unparsable"
    assert clean("func " + "@" * 20, max_error_share=1.0).rejected == ""

    def better_as_python(code, language):
        return 0.0 if language == "python" else 0.01

    cleaned = clean_translation(
        GO,
        "stop",
        source=SOURCE,
        source_language="python",
        target_language="go",
        error_share=better_as_python,
        max_error_share=1.0,
    )
    assert cleaned.rejected == "not the target language"
