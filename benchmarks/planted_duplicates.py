"""Real functions, near-duplicates of known similarity planted among them, and larger corpora made of their parts."""

import gzip
import json
import keyword
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SIMILARITIES = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
TOLERANCE = 0.01
_WORD = re.compile(r"(\w+)")


@dataclass(frozen=True, slots=True)
class Planted:
    """A pair of rows and its true similarity; `level` is the one that was aimed at."""

    first: int
    second: int
    level: float
    jaccard: float


def shingles(text: str) -> set[str]:
    """Character 5-grams; a shorter text is one."""
    return {text[start : start + 5] for start in range(max(1, len(text) - 4))}


def jaccard(first: set[str], second: set[str]) -> float:
    """Similarity of two sets."""
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def real_functions(count: int, seed: int = 0) -> tuple[list[str], dict[str, int]]:
    """Different functions, at random from the installed packages and, where MOSE_DATA names them, CodeSearchNet's.

    Returns:
        The functions, and how many there are of each language.
    """
    from modular_star_encoder.data.functions import collect_functions
    from modular_star_encoder.data.sources.repositories import installed_repositories

    collected, _ = collect_functions(installed_repositories(exclude=()), processes=1)
    found = [(function.language, function.code) for function in collected]
    if "MOSE_DATA" in os.environ:
        for path in sorted(Path(os.environ["MOSE_DATA"], "codesearchnet").glob("*.jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                found += [(row["language"], row["func_code_string"]) for row in map(json.loads, lines)]
    found = list({code: (language, code) for language, code in found}.values())
    if len(found) < count:
        raise SystemExit(f"Only {len(found)} functions are installed here; ask for fewer with --rows.")
    chosen = random.Random(seed).sample(found, count)
    return [code for _, code in chosen], dict(Counter(language for language, _ in chosen).most_common())


def planted_rows(texts: Sequence[str], per_level: int, seed: int = 0) -> tuple[list[str], list[Planted]]:
    """`texts` with edited copies of some of them, `per_level` at each of `SIMILARITIES`, shuffled."""
    rng = random.Random(seed)
    bases = rng.sample([row for row, text in enumerate(texts) if len(text) >= 200], per_level * len(SIMILARITIES))
    lines = [line for text in rng.sample(list(texts), 500) for line in text.split("\n")]
    rows = list(texts)
    pairs = []
    for number, base in enumerate(bases):
        level = SIMILARITIES[number % len(SIMILARITIES)]
        text, similarity = _edited(texts[base], level, lines, rng)
        pairs.append((base, len(rows), level, similarity))
        rows.append(text)
    order = list(range(len(rows)))
    rng.shuffle(order)
    place = {row: new for new, row in enumerate(order)}
    return [rows[row] for row in order], [Planted(place[a], place[b], *rest) for a, b, *rest in pairs]


def _edited(text: str, level: float, lines: Sequence[str], rng: random.Random) -> tuple[str, float]:
    """A copy of `text` whose similarity to it is `level`, by edits as people make them."""
    original = shingles(text)
    edited, similarity = text, 1.0
    while similarity > level + TOLERANCE:
        trial = _edit(edited, lines, rng)
        its_similarity = jaccard(original, shingles(trial))
        if its_similarity >= level - TOLERANCE:
            edited, similarity = trial, its_similarity
    return edited, similarity


def _edit(text: str, lines: Sequence[str], rng: random.Random) -> str:
    """Rename a word at one place or everywhere, or drop, add or replace a line."""
    kind = rng.random()
    if kind < 0.6:
        words = _WORD.findall(text) or [text]
        word, other = rng.choice(words), rng.choice(_WORD.findall(rng.choice(lines)) or ["x"])
        return re.sub(rf"\b{re.escape(word)}\b", other, text, count=1 if kind < 0.4 else 0)
    own = text.split("\n")
    place = rng.randrange(len(own))
    own[place : place + (kind < 0.9)] = [] if kind < 0.7 else [rng.choice(lines)]
    return "\n".join(own)


def synthetic_rows(texts: Sequence[str], count: int, near: float = 0.25, seed: int = 0) -> Iterator[str]:
    """`count` texts in the shape of real functions: most with other names, a share `near` an edit of the one before."""
    rng = random.Random(seed)
    pieces = [_WORD.split(text) for text in texts]
    names = [word for parts in pieces for word in parts[1::2] if not keyword.iskeyword(word)]
    lines = [line for text in texts[:500] for line in text.split("\n")]
    text = ""
    for _ in range(count):
        if text and rng.random() < near:
            text = _edit(text, lines, rng)
        else:
            parts = rng.choice(pieces)
            others: dict[str, str] = {word: rng.choice(names) for word in parts[1::2] if rng.random() < 0.7}
            text = "".join(others.get(part, part) for part in parts)
        yield text
