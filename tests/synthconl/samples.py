"""Rows, texts of known similarity, a corpus, a model that translates it, and processes that are killed."""

import hashlib
import os
import random
import re
import signal
from pathlib import Path

import pyarrow as pa

from modular_star_encoder.data.languages.registry import LANGUAGES
from modular_star_encoder.synthconl import row_files
from modular_star_encoder.synthconl.build import DatasetRecipe, build_dataset
from modular_star_encoder.synthconl.near_duplicate_job import drop_near_duplicates
from modular_star_encoder.synthconl.translation import LANGUAGE_NAMES, Completion, TranslationSettings
from tests.data.samples import WORDS

FUNCTION_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "language1_CSN", "func1_CSN")])


def function_rows(count):
    """Functions in all languages. The code contains the function's number; some functions occur two or three times."""
    numbers = [number - max(number % 5 - 2, 0) for number in range(count)]
    return [
        {"id": f"id{row}", "language1_CSN": LANGUAGES[number % len(LANGUAGES)], "func1_CSN": f"function {number}"}
        for row, number in enumerate(numbers)
    ]


def echo(prompt):
    """An answer that contains its prompt."""
    return Completion("", f"<{prompt}>", "stop", 10, 2)


def endpoint_settings(server, **changes):
    """Settings of a back end that asks `server`."""
    options = {"base_url": server.base_url, "concurrency": 4, "pause": 0.01} | changes.pop("options", {})
    return TranslationSettings(backend="openai", model="model", options=options, **changes)


TRANSLATIONS = {
    "python": ("def run(a):", "    a = a + {0}", "    return a"),
    "javascript": ("function run(a) {{", "  a = a + {0};", "  return a;\n}}"),
    "go": ("func run(a int) int {{", "\ta = a + {0}", "\treturn a\n}}"),
    "java": ("int run(int a) {{", "    a = a + {0};", "    return a;\n}}"),
    "php": ("function run($a) {{", "    $a = $a + ${0};", "    return $a;\n}}"),
    "ruby": ("def run(a)", "  a = a + {0}", "  a\nend"),
    "c": ("int run(int a) {{", "    a = a + {0};", "    return a;\n}}"),
    "cpp": ("auto run(std::vector<int> a) -> int {{", "    a = a + {0};", "    return a;\n}}"),
}


CARD = {"name": "Mine | ours", "corpus": "Functions of six repositories.", "license_link": "https://example.org/terms"}


def _names(rng, count):
    return [f"{rng.choice(WORDS)}_{rng.randrange(10**6)}" for _ in range(count)]


def write_corpus(folder, repositories=6, functions=5):
    """Repositories of Python files. Except in the first, the last function is nearly one of the repository before."""
    last = ""
    for r in range(repositories):
        rng = random.Random(r)
        path = Path(folder, f"repository{r}", "module.py")
        path.parent.mkdir(parents=True)
        texts = []
        for f in range(functions):
            body = "\n".join(f"    {name} = value" for name in _names(rng, 8))
            description = f"Returns the {' '.join(_names(rng, 3))} of the value."
            texts.append(f'def f{r}_{f}(value):\n    """{description}"""\n{body}\n    return value\n')
        if last:
            texts.append(last.replace("def f", "def g"))
        last = texts[0]
        path.write_text("\n\n".join(texts))
    return folder


def marker(code):
    """A word that depends on the code of a function."""
    return "m" + hashlib.sha256(code.encode()).hexdigest()[:12]


def translation(prompt):
    """An answer in the target language with the function's marker; a sixth of the answers refuse, a sixth are cut."""
    (language,) = re.findall(r"^Target language: (.*)$", prompt, re.MULTILINE)
    code = prompt.partition("\nCode:\n")[2].removesuffix("\n")
    target = next(name for name in LANGUAGES if LANGUAGE_NAMES[name] == language)
    rng = random.Random(prompt)
    head, line, end = TRANSLATIONS[target]
    lines = [line.format(name) for name in (marker(code), *_names(rng, 8))]
    text = "\n".join([head.format(), *lines, end.format()])
    chance = rng.random()
    if chance < 1 / 6:
        return Completion("", "I'm sorry, I can't do that.", "stop", 10, 5)
    return Completion("", f"Sure:\n\n```{target}\n{text}\n```", "length" if chance < 2 / 6 else "stop", 10, 5)


def small_recipe(corpus, base_url, **changes):
    """A recipe that asks the endpoint at `base_url`."""
    options = {"base_url": base_url, "concurrency": 4, "pause": 0.01, "body": {"seed": 7}, "revision": "a1b2c3"}
    options |= changes.pop("options", {})
    settings = {
        "corpus": {"folder": str(corpus)},
        "card": CARD,
        "translation": {"backend": "openai", "model": "model", "options": options, **changes.pop("translation", {})},
        "validation_rows": 5,
        "max_repository_share": 0.5,
        "processes": 0,
        "seed": 3,
    }
    return DatasetRecipe(**settings | changes)


def die_before_renaming(number):
    """Send SIGKILL to this process just before its renaming number `number`, counted from 1."""
    count = 0

    def deadly(real):
        def rename(*arguments, **options):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments, **options)

        return rename

    os.replace, os.rename = deadly(os.replace), deadly(os.rename)


def build_and_die(corpus, base_url, out, renames, rows_per_file=1000, **changes):
    row_files.ROWS_PER_FILE = rows_per_file
    die_before_renaming(renames)
    build_dataset(small_recipe(corpus, base_url, **changes), out, progress=False)


def drop_and_die(source, out, against, renames):
    die_before_renaming(renames)
    drop_near_duplicates(source, out, columns=["code", "translation"], id_column="id", against=against, progress=False)


CODE_WORDS = [
    *(*WORDS, "größe", "значение", "数据", "café"),
    *("self", "return", "raise", "if", "else", "for", "not", "None", "range"),
]


def shingle_set(text):
    """The character 5-grams of a text; a shorter text is its only shingle, and a blank text has none."""
    if not text.strip():
        return set()
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def true_jaccard(first, second):
    a, b = shingle_set(first), shingle_set(second)
    return len(a & b) / len(a | b) if a and b else 0.0


def code(rng, lines=12):
    def name():
        return rng.choice(CODE_WORDS) + rng.choice(("", f"_{rng.randrange(1000)}"))

    return "\n".join(
        " " * rng.choice((0, 4, 8)) + " ".join(name() for _ in range(rng.randint(2, 8))) for _ in range(lines)
    )


def mutated(text, similarity, rng):
    """`text` with replaced characters, so that its similarity to `text` is `similarity` or just below."""
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
    """Windows over one long text: neighbours are near-duplicates, and distant windows share nothing."""
    rng = random.Random(seed)
    text = code(rng, lines + step * count).split("\n")
    return ["\n".join(text[step * i : step * i + lines]) for i in range(count)]
