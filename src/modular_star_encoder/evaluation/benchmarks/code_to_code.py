"""Parallel exercises: the same problem solved in many languages; text → code and code → code, MRR.

Protocol: for a pair of languages (or the description and a language), the exercises that both have; of one side's text,
find the other side's among all of them. Figures are per pair; tables average over the languages that one starts from.

Source: JSON lines with `slug`, `description` (Markdown) and `code` ({language: solution}); Exercism's tracks
(github.com/exercism, MIT) hold such. Flaws: pools are small (71 to 146), and solutions share the names that the
exercise prescribes: TF-IDF gets 81 from descriptions and 88 from code. The variant with masked names shows what is
left.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from modular_star_encoder.evaluation.benchmarks.rows import (
    check_size,
    check_unique,
    read_jsonl,
    read_lines,
    refuse,
    require_files,
)
from modular_star_encoder.evaluation.lexical import mask_names
from modular_star_encoder.evaluation.tasks import Judgements, PairTask, RetrievalTask, full_pool
from modular_star_encoder.inference.encoders import Text

PROMPT_NAMES = {"cpp": "c++", "csharp": "c#"}
"""Where the files' name of a language differs from the one in prompts."""

DESCRIPTION = "text"

Exercises = dict[str, dict[str, Text]]
"""{slug: {language or `DESCRIPTION`: text}}"""


def load_exercism(folder: Path, *, from_code: bool = False, masked: bool = False) -> list[RetrievalTask]:
    """Text → code: a task for each language. Code → code: one for each ordered pair of languages.

    Args:
        from_code: code → code.
        masked: replace names in code (see `masking`).

    Raises:
        ValueError: a damaged file, a slug that comes twice, or a solution that is no text.
        FileNotFoundError: there is no `exercises.jsonl`.
    """
    (path, *_) = require_files(folder, ("exercises.jsonl.gz", "exercises.jsonl"))
    exercises = _read_exercism(path, masked)
    languages = sorted({language for texts in exercises.values() for language in texts} - {DESCRIPTION})
    pairs = [(source, target) for target in languages for source in languages if source != target]
    if not from_code:
        pairs = [(DESCRIPTION, language) for language in languages]
    name = f"exercism-{'code' if from_code else 'text'}{'-masked' if masked else ''}"
    tasks = [task for pair in pairs if (task := _task(name, exercises, *pair))]
    return tasks or refuse(path, None, "two exercises that are solved in the same languages")


def _task(name: str, exercises: Exercises, source: str, target: str) -> RetrievalTask | None:
    shared = [slug for slug, texts in exercises.items() if source in texts and target in texts]
    if len(shared) < 2:
        return None
    return RetrievalTask(
        benchmark=name,
        name=f"{source} → {target}",
        queries=[exercises[slug][source] for slug in shared],
        documents=[exercises[slug][target] for slug in shared],
        query_ids=shared,
        judgements=Judgements.one_each(range(len(shared))),
        pools=full_pool(len(shared), len(shared)),
        column=f"→ {target}",
    )


def _read_exercism(path: Path, masked: bool) -> Exercises:
    rows = read_jsonl(path, {"slug": str, "description": str, "code": dict})
    check_unique(path, [row["slug"] for row in rows], "slug")
    exercises: Exercises = {}
    for number, row in enumerate(rows, start=1):
        texts = {DESCRIPTION: Text(row["description"])}
        for language, code in row["code"].items():
            if not isinstance(code, str) or not code.strip():
                refuse(path, number, f"a solution in {language}", "none")
            known_as = PROMPT_NAMES.get(language, language)
            texts[language] = Text(mask_names(code, known_as) if masked else code, known_as)
        exercises[row["slug"]] = texts
    return exercises


PAIRS = 415_416


def load_bigclonebench(folder: Path, *, allow_subset: bool = False) -> list[PairTask]:
    """The one task.

    Raises:
        ValueError: a damaged or partial file, or a pair with a function that `data.jsonl` lacks.
        FileNotFoundError: one of the three files is missing.
    """
    paths = [require_files(folder, [name])[0] for name in ("data.jsonl", "valid.txt", "test.txt")]
    rows = read_jsonl(paths[0], {"func": str, "idx": (str, int)})
    places = check_unique(paths[0], [str(row["idx"]) for row in rows], "idx")
    (valid, valid_labels, notes), (test, labels, more) = (
        _read_bigclonebench(path, places, allow_subset) for path in paths[1:]
    )
    return [
        PairTask(
            benchmark="bigclonebench",
            name="test",
            documents=[Text(row["func"], "java") for row in rows],
            valid_pairs=valid,
            valid_labels=valid_labels,
            pairs=test,
            labels=labels,
            notes=("threshold chosen on the validation pairs", *notes, *more),
        )
    ]


def _read_bigclonebench(
    path: Path, places: dict[str, int], allow_subset: bool
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Pairs (P, 2), labels (P,) and notes; of a pair that comes twice the last label counts, as for the authors."""
    labels: dict[tuple[int, int], int] = {}
    number = 0
    for number, line in read_lines(path):
        parts = line.split()
        if len(parts) != 3 or parts[2] not in ("0", "1"):
            refuse(path, number, "two ids and a label 0 or 1", repr(line[:40]))
        if missing := [name for name in parts[:2] if name not in places]:
            refuse(path, number, "ids of functions in data.jsonl", missing[0])
        labels[places[parts[0]], places[parts[1]]] = int(parts[2])
    notes = check_size(path, number, PAIRS, "pairs", allow_subset=allow_subset)
    values = np.array(list(labels.values()))
    if len(np.unique(values)) != 2:
        refuse(path, None, "pairs of both labels")
    return np.array(list(labels)), values, notes


PROBLEMS = range(81, 105)
PROGRAMS_PER_PROBLEM = 500
LANGUAGE = "c++"


def load_poj104(folder: Path, *, allow_subset: bool = False) -> list[RetrievalTask]:
    """The one task.

    Raises:
        ValueError: a damaged or partial file, an index that comes twice, or a problem with a single program.
        FileNotFoundError: neither file nor folder.
    """
    (path, *_) = require_files(folder, ("test.jsonl", f"ProgramData/{PROBLEMS[0]}/*.txt"))
    if path.name == "test.jsonl":
        rows = read_jsonl(path, {"label": str, "index": str, "code": str})
        labels, names, codes = ([row[field] for row in rows] for field in ("label", "index", "code"))
        check_unique(path, names, "index")
    else:
        path = folder / "ProgramData"
        labels, names, codes = _read_programs(path)
    sizes = {label: labels.count(label) for label in dict.fromkeys(labels)}
    if unknown := [label for label in sizes if label not in map(str, PROBLEMS)]:
        refuse(path, labels.index(unknown[0]) + 1, f"a label from {PROBLEMS[0]} to {PROBLEMS[-1]}", repr(unknown[0]))
    expected = len(PROBLEMS) * PROGRAMS_PER_PROBLEM
    notes = check_size(path, len(labels), expected, "programs", allow_subset=allow_subset)
    if len(set(sizes.values())) > 1 or min(sizes.values()) < 2 or len(sizes) < 2:
        refuse(path, None, "as many programs, two or more, of each of several problems", f"{sizes}")
    return [
        RetrievalTask(
            benchmark="poj104",
            name="test",
            queries=(texts := [Text(code, LANGUAGE) for code in codes]),
            documents=texts,
            query_ids=names,
            judgements=same_label(labels),
            pools=full_pool(len(texts), len(texts)),
            metrics=("map@r", "mrr", "recall@10"),
            exclude_self=True,
            notes=notes,
        )
    ]


def same_label(labels: list[str]) -> Judgements:
    """Every other text with the same label is relevant."""
    _, numbers = np.unique(labels, return_inverse=True)
    members = [np.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]
    documents = [members[number][members[number] != row] for row, number in enumerate(numbers)]
    query = np.repeat(np.arange(len(labels)), [len(found) for found in documents])
    return Judgements(query, np.concatenate(documents), np.ones(len(query)))


def _read_programs(folder: Path) -> tuple[list[str], list[str], list[str]]:
    labels, names, codes = [], [], []
    for problem in PROBLEMS:
        for path in sorted((folder / str(problem)).glob("*.txt")):
            code = "\n".join(line for _, line in read_lines(path, encoding="latin-1"))
            if not code.strip():
                refuse(path, 1, "a program", "an empty file")
            labels.append(str(problem))
            names.append(f"{problem}/{path.name}")
            codes.append(code)
    return labels, names, codes


SIZE = 1_000
LANGUAGES = {"java": "java", "cs": "c#"}


def load_translation(folder: Path, *, masked: bool = False, allow_subset: bool = False) -> list[RetrievalTask]:
    """Java → C# and C# → Java.

    Args:
        masked: replace names (see `masking`).

    Raises:
        ValueError: a partial file, an empty line, or files of different lengths.
        FileNotFoundError: one of the two files is missing.
    """
    (first, *_), (second, *_) = (require_files(folder, [f"test.java-cs.txt.{ending}"]) for ending in LANGUAGES)
    texts = {"java": _read_translation(first, "java", masked), "c#": _read_translation(second, "c#", masked)}
    notes = check_size(first, len(texts["java"]), SIZE, "lines", allow_subset=allow_subset)
    if len(texts["java"]) != len(texts["c#"]):
        refuse(second, None, f"{len(texts['java']):,} lines, as in {first.name}", f"{len(texts['c#']):,}")
    size = len(texts["java"])
    return [
        RetrievalTask(
            benchmark="translation-masked" if masked else "translation",
            name=f"{source} → {target}",
            queries=texts[source],
            documents=texts[target],
            query_ids=[f"line {number}" for number in range(1, size + 1)],
            judgements=Judgements.one_each(range(size)),
            pools=full_pool(size, size),
            notes=notes,
        )
        for source, target in (("java", "c#"), ("c#", "java"))
    ]


def _read_translation(path: Path, language: str, masked: bool) -> list[Text]:
    texts = []
    for number, line in read_lines(path):
        if not line.strip():
            refuse(path, number, "a function", "an empty line")
        texts.append(Text(mask_names(line, language) if masked else line, language))
    return texts or refuse(path, 1, "a function", "an empty file")
