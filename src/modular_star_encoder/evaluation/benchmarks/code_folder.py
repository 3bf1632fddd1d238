"""The documented functions of a folder of anyone's repositories: description → code among 999 distractors, MRR.

The descriptions are the first paragraphs of docstrings and comments, which are cut out of the code. The functions pass
the filters of `data.functions`; those of all repositories are in one pool.
"""

from __future__ import annotations

from pathlib import Path

from modular_star_encoder.data.functions import collect_functions
from modular_star_encoder.data.repositories import folder_repositories
from modular_star_encoder.evaluation.exits import RetrievalRow, pairs_task
from modular_star_encoder.evaluation.tasks import RetrievalTask

POOL = 1000


def read_code_folder(folder: str | Path) -> list[RetrievalRow]:
    """The pairs of a folder.

    Raises:
        ValueError: there is no such folder, or fewer than two documented functions in it.
    """
    functions = collect_functions(folder_repositories(folder)).functions
    if len(functions) < 2:
        raise ValueError(
            f"{folder} holds {len(functions)} documented functions that pass the filters: too few to rank."
        )
    return [RetrievalRow(function.description, function.code, function.language) for function in functions]


def load_code_folder(folder: Path, *, seed: int = 0) -> list[RetrievalTask]:
    """The one task."""
    rows = read_code_folder(folder)
    notes = (f"only {len(rows)} documented functions, so fewer than 999 distractors",) if len(rows) < POOL else ()
    return [pairs_task("folder", "all", rows, size=POOL, seed=seed, notes=notes)]
