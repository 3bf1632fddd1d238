"""Code-like texts, near-duplicates of known similarity among them, and similarity by Python sets."""

import random

WORDS = [
    *("load", "save", "parse", "build", "merge", "split", "index", "count", "table", "column", "buffer", "stream"),
    *("größe", "значение", "数据", "café", "self", "return", "raise", "if", "else", "for", "not", "None", "range"),
]


def shingle_set(text):
    """Character 5-grams; a shorter text is one, a blank text none."""
    if not text.strip():
        return set()
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def true_jaccard(first, second):
    a, b = shingle_set(first), shingle_set(second)
    return len(a & b) / len(a | b) if a and b else 0.0


def code(rng, lines=12):
    def name():
        return rng.choice(WORDS) + rng.choice(("", f"_{rng.randrange(1000)}"))

    return "\n".join(
        " " * rng.choice((0, 4, 8)) + " ".join(name() for _ in range(rng.randint(2, 8))) for _ in range(lines)
    )


def mutated(text, similarity, rng):
    """A text whose similarity to `text` is the given one, or just below it."""
    characters = list(text)
    # Each replaced character takes at most five shingles away and brings five others.
    at_once = int(len(shingle_set(text)) * (1 - similarity) / (1 + similarity) / 5)
    while True:
        for place in rng.sample(range(len(characters)), at_once):
            characters[place] = chr(rng.randrange(0x4E00, 0x9FFF))
        if true_jaccard(text, "".join(characters)) <= similarity:
            return "".join(characters)
        at_once = 1


def rows_with_near_duplicates(count, seed=0):
    """Texts of which every third is a near-duplicate of an earlier one, of a similarity from 0.5 to 1."""
    rng = random.Random(seed)
    texts = []
    while len(texts) < count:
        if texts and rng.random() < 1 / 3:
            texts.append(mutated(rng.choice(texts), rng.uniform(0.5, 1), rng))
        else:
            texts.append(code(rng, rng.randint(3, 20)))
    return texts


def sliding_windows(count, lines=40, step=3, seed=0):
    """Windows over one long text: neighbours are near-duplicates, those far apart have nothing in common."""
    rng = random.Random(seed)
    text = code(rng, lines + step * count).split("\n")
    return ["\n".join(text[step * i : step * i + lines]) for i in range(count)]
