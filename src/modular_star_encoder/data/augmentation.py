"""Augmentation of code: frequent words of a snippet become random strings.

So that a model cannot rest on names that a snippet shares with its description or its translation. Source: the MoSE
paper (arXiv 2503.03008, fine-tuning): in 30 % of the code snippets, words that occur more than twice and have at least
three characters.
"""

import re
import string
from collections import Counter

import numpy as np

MIN_OCCURRENCES, MIN_CHARACTERS = 3, 3
SHORTEST_NAME, LONGEST_NAME = 3, 8

_WORD = re.compile(r"\b[^\W\d]\w*")
_LETTERS = np.array(list(string.ascii_lowercase))


def rename_frequent_words(code: str, generator: np.random.Generator) -> str:
    """Replace each word of `code` that occurs at least three times and has at least three characters.

    A word is a run of letters, digits and underscores that does not begin with a digit. The paper says "words", so
    reserved words, and words in comments and strings, are replaced like any other. Every occurrence gets the same new
    name: 3 to 8 random lower-case letters, different from every other word of the result.

    Args:
        code: A snippet.
        generator: Draws the names; as many draws for the same snippet, so that equal generators give equal results.
    """
    counts = Counter(_WORD.findall(code))
    taken = set(counts)
    names: dict[str, str] = {}
    for word, count in counts.items():
        if count >= MIN_OCCURRENCES and len(word) >= MIN_CHARACTERS:
            names[word] = _new_name(taken, generator)
            taken.add(names[word])
    return _WORD.sub(lambda match: names.get(match[0], match[0]), code) if names else code


def _new_name(taken: set[str], generator: np.random.Generator) -> str:
    while True:
        length = generator.integers(SHORTEST_NAME, LONGEST_NAME + 1)
        name = "".join(generator.choice(_LETTERS, size=length))
        if name not in taken:
            return name
