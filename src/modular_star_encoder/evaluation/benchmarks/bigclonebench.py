"""BigCloneBench: do two Java functions do the same? F1 of the positive class.

Protocol: pairs are positive where the cosine of their embeddings reaches a threshold, the one with the highest F1 on
the validation pairs: the benchmark itself says nothing of thresholds, since it scores fine-tuned classifiers. Precision
and recall are reported beside F1.

Source: Svajlenko et al. 2014, Wang et al. 2020; github.com/microsoft/CodeXGLUE,
Code-Code/Clone-detection-BigCloneBench: `data.jsonl` (`func`, `idx`), `valid.txt` and `test.txt` (two ids and a label a
line). Flaws: the same functions occur in training and test pairs; figures before 2021-09-13 are macro F1; smaller sets
of the same name circulate, which are refused by their size.
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
from modular_star_encoder.evaluation.tasks import PairTask, Text

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
    (valid, valid_labels, notes), (test, labels, more) = (_read(path, places, allow_subset) for path in paths[1:])
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


def _read(path: Path, places: dict[str, int], allow_subset: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
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
