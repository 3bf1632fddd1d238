"""POJ-104: of a program, find the others that solve the same problem; MAP@R.

Protocol: the programs of problems 81 to 104, 500 of each; each is a query, all others are candidates, R = 499; average
precision over the first R, divided by R and not by the number found.

Source: Mou et al. 2016; Lu et al. 2021, github.com/microsoft/CodeXGLUE, Code-Code/Clone-detection-POJ-104: `test.jsonl`
of its preprocess.py (`label`, `index`, `code`), or the archive's folder `ProgramData/{problem}/{number}.txt` (latin-1).
Flaws: the programs' names and layout give much away (TF-IDF over words 30.9, over 1- to 3-grams 44.4), and zero-shot
"code to code" figures of UniXcoder and CodeSage are another measure on another set (CodeNet, MAP over the full
ranking).
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
from modular_star_encoder.evaluation.tasks import Judgements, RetrievalTask, Text, full_pool

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
