"""CodeSearchNet among 999 distractors (CodeBERT's variant of the authors' protocol), query → code, MRR.

Protocol: of each language the test functions are shuffled with seed 0 and cut into batches of 1000, the incomplete last
one is dropped; the query is the first paragraph of the documentation; a function's rank is among the batch's; MRR is
the mean over all queries (see `distractors`). Figures compare only on the same candidates: `write_candidates` writes
their urls, and a later run reads them back instead of shuffling.

Source: github.com/github/CodeSearchNet (src/model_test.py ranks queries for each code), github.com/microsoft/CodeBERT
(codesearch ranks code for each query, as here). Flaws: see `codesearchnet`; a subset from few repositories is harder,
because distractors of the same repository resemble the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modular_star_encoder.data.files import write_json
from modular_star_encoder.evaluation.benchmarks.codesearchnet import (
    LANGUAGES,
    TEST_SIZES,
    language_patterns,
    read_functions,
)
from modular_star_encoder.evaluation.benchmarks.rows import (
    check_rows,
    check_size,
    find_files,
    read_json,
    refuse,
    require_files,
)
from modular_star_encoder.evaluation.exits import pairs_task
from modular_star_encoder.evaluation.tasks import Pool, RetrievalTask

POOL = 1000


def load_distractors(
    folder: Path,
    *,
    leaky: bool = False,
    candidates: Path | None = None,
    allow_subset: bool = False,
    seed: int = 0,
) -> list[RetrievalTask]:
    """One task for each language whose test file is there.

    Args:
        folder: holds `{language}_test.jsonl.gz`, or the languages' folders of the Hub or of the authors' archives.
        leaky: only Python, with its docstrings in the code, to compare with published figures.
        candidates: folder of the lists that `write_candidates` wrote; rows that they don't name are left out.
        allow_subset: take files with fewer rows than the official split.
        seed: of the shuffle, without lists.

    Raises:
        ValueError: a damaged or partial file, or a list that names a function which isn't there.
        FileNotFoundError: no test file of any language, or no list for one.
    """
    languages = ("python",) if leaky else LANGUAGES
    require_files(folder, [pattern for language in languages for pattern in language_patterns("test", language)])
    tasks = []
    for language in languages:
        if not (paths := find_files(folder, language_patterns("test", language))):
            continue
        rows = read_functions(paths, language, leaky=leaky)
        name = "codesearchnet-999-leaky" if leaky else "codesearchnet-999"
        notes: tuple[str, ...] = ("docstrings are in the code",) if leaky else ()
        if candidates is None:
            size = TEST_SIZES[language]
            notes += check_size(paths[0], len(rows), size, "functions", allow_subset=allow_subset)
        if len(rows) < 2:
            refuse(paths[0], None, "at least two functions", str(len(rows)))
        task = pairs_task(name, language, list(rows.values()), ids=list(rows), size=POOL, seed=seed, notes=notes)
        if candidates is not None:
            task = replace(task, pools=_read_candidates(candidates / f"{language}.json", list(rows)))
        tasks.append(task)
    return tasks


def write_candidates(task: RetrievalTask, folder: Path) -> Path:
    """Write who is ranked against whom, as ids, to `folder/{language}.json`, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}.json"
    pools = [[task.query_ids[row] for row in pool.queries] for pool in task.pools]
    write_json(path, {"benchmark": task.benchmark, "task": task.name, "pools": pools})
    return path


def _read_candidates(path: Path, urls: Sequence[str]) -> tuple[Pool, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no list of candidates {path}.")
    data: Any = read_json(path)
    (data,) = check_rows(path, [data], {"pools": list})
    places = {url: place for place, url in enumerate(urls)}
    pools = []
    for number, pool in enumerate(data["pools"], start=1):
        if not isinstance(pool, list) or len(pool) < 2 or len(set(pool)) < len(pool):
            refuse(path, None, f"at least two different urls in pool {number}")
        if missing := [url for url in pool if url not in places]:
            refuse(path, None, f"urls of functions that the data holds in pool {number}", missing[0])
        rows = np.array([places[url] for url in pool])
        pools.append(Pool(rows, rows))
    return tuple(pools) or refuse(path, None, "at least one pool")
