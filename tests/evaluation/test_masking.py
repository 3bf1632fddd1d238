import re

import pytest

from modular_star_encoder.evaluation.benchmarks.codexglue import mask_names
from tests.errors import raises

SNIPPETS = {
    "python": (
        "import heapq\n\n# largest first\ndef pick_largest(items, *, limit):\n    '''Pick them.'''\n"
        "    if limit is None: return len(items)\n"
        "    return [heapq.nlargest(limit, items) for item in items if not item]\n",
        "import def if is None return for in not len",
    ),
    "java": (
        "/** Picks. */\npublic class Picker {\n  private final int limit;\n  int pickLargest(List<String> items) {"
        " return this.limit == 0 ? null : items.size(); }\n}\n",
        "public class private final int return this null",
    ),
    "go": (
        "package picker\n\n// PickLargest picks.\nfunc PickLargest(items []string) (int, error) {\n"
        "\tfor i := range items { return i, nil }\n\treturn len(items), nil\n}\n",
        "package func string int for range return nil len",
    ),
    "php": (
        "<?php\nclass Picker {\n  public function pickLargest($items) { foreach ($items as $item) {"
        " return $this->limit; } }\n}\n",
        "class public function foreach as return this",
    ),
    "ruby": (
        "class Picker\n  attr_reader :limit\n  def pick_largest(items)\n"
        "    return nil unless items.any? && @limit\n  end\nend\n",
        "class def return nil unless end",
    ),
    "typescript": (
        "export function pickLargest(items: string[]): number { const limit = 1; return limit; }\n",
        "export function string number const return",
    ),
    "c": (
        '#include <stdio.h>\n#include "picker.h"\n#define LIMIT 3\n'
        "static int pick_largest(char *items) { while (1) return LIMIT; }\n",
        "include stdio define static int char while return",
    ),
    "c#": (
        "public static class Picker { public static int PickLargest(string[] items) => items.Length; }\n",
        "public static class int string",
    ),
    "rust": (
        "pub fn pick_largest(items: &str) -> Option<usize> { let mut limit = 0; None }\n",
        "pub fn str usize let mut",
    ),
}


@pytest.mark.parametrize("language", SNIPPETS)
def test_names_go_whatever_they_are_and_keywords_stay(language):
    code, keywords = SNIPPETS[language]
    masked = mask_names(code, language)
    words = re.findall(r"\w+", masked)
    assert not re.search(r"pick|largest|item|limit", masked, re.IGNORECASE)
    assert set(keywords.split()) <= set(words)
    assert "name1" in words
    renamed = re.sub(r"\bitems\b", "zebras", code)
    assert renamed != code
    assert mask_names(renamed, language) == masked


def test_two_names_that_are_confused_give_other_code():
    codes = [f"def f(a, b):\n    return {difference}\n" for difference in ("a - b", "b - a")]
    assert len({mask_names(code, "python") for code in codes}) == 2


def test_comments_and_docstrings_go_and_strings_stay():
    masked = mask_names(SNIPPETS["python"][0] + 'print("items left")  # done\n', "python")
    assert "largest first" not in masked
    assert "done" not in masked
    assert '"items left"' in masked


def test_an_unknown_language_is_an_error():
    with raises("benchmark.masking.language", "'klingon'"):
        mask_names("x", "klingon")
