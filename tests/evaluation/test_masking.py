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
    "c": (
        '#include <stdio.h>\n#include "picker.h"\n#define LIMIT 3\n'
        "static int pick_largest(char *items) { while (1) return LIMIT; }\n",
        "include stdio define static int char while return",
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


def test_comments_go_strings_stay_and_confused_names_give_other_code():
    masked = mask_names(SNIPPETS["python"][0] + 'print("items left")  # done\n', "python")
    assert "largest first" not in masked
    assert "done" not in masked
    assert '"items left"' in masked
    assert mask_names("return a - b", "python") != mask_names("return b - b", "python")
    with raises("benchmark.masking.language", "'klingon'"):
        mask_names("x", "klingon")
