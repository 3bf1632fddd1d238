"""One source text for each language, with what makes spans hard: other alphabets, tabs, decorators, nesting, heredocs.

In `LANGUAGE.txt`, `⟦` and `⟧` enclose every function to find; `marked` removes them and returns where they were.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
# Language → name → description of every function.
NAMES = json.loads((FOLDER / "descriptions.json").read_text(encoding="utf-8"))
MARKED = {language: (FOLDER / f"{language}.txt").read_text(encoding="utf-8") for language in NAMES}


def marked(text):
    """Return (text without marks, [(first byte, byte after the last)] in the order of the first bytes)."""
    plain, spans, opened = "", [], []
    for character in text:
        if character == "⟦":
            opened.append(len(spans))
            spans.append([len(plain.encode()), None])
        elif character == "⟧":
            spans[opened.pop()][1] = len(plain.encode())
        else:
            plain += character
    return plain, [tuple(span) for span in spans]


SOURCES = {language: marked(text)[0] for language, text in MARKED.items()}
