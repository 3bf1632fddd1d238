"""The list of benchmarks, and how to load each. To add one, write its `load` function and list it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub

from modular_star_encoder.evaluation.benchmarks.codesearchnet import (
    load_code_folder,
    load_full_pool,
    load_human,
    load_mteb,
    load_with_candidates,
)
from modular_star_encoder.evaluation.benchmarks.codexglue import (
    load_advtest,
    load_bigclonebench,
    load_cosqa,
    load_exercism,
    load_poj104,
    load_translation,
)
from modular_star_encoder.evaluation.tasks import Task
from modular_star_encoder.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where the files of a benchmark are, and how to read them."""

    name: str  # name on the command line
    title: str  # the heading of its table
    folder: str  # name of its folder inside a folder of several benchmarks
    # Reads the folder; raises UserError for a damaged or partial file, and FileNotFoundError for a missing file.
    load: Callable[..., Sequence[Task]]
    hub: str = ""  # the dataset repository on the Hub with the same files
    sized: bool = True  # whether `load` has the argument `allow_subset`
    with_candidates: bool = False  # whether candidates are random: `load` has the argument `candidates`
    in_all: bool = True  # whether "all" includes it


_DRAWN: dict[str, Any] = {"hub": "code-search-net/code_search_net", "with_candidates": True}
_load_leaky = partial(load_with_candidates, leaky=True)
_LEAKY = "CodeSearchNet, 999 distractors, docstrings in Python code"
_MTEB = "CodeSearchNet, MTEB's 1000 × 1000"
_MASKED = "Code translation as retrieval, names masked"

_BENCHMARKS = [
    Benchmark("codesearchnet-999", "CodeSearchNet, 999 distractors", "codesearchnet", load_with_candidates, **_DRAWN),
    Benchmark("codesearchnet-999-leaky", _LEAKY, "codesearchnet", _load_leaky, **_DRAWN, in_all=False),
    Benchmark("codesearchnet-mteb", _MTEB, "codesearchnet-mteb", load_mteb, hub="mteb/CodeSearchNetRetrieval"),
    Benchmark("codesearchnet-full", "CodeSearchNet, filtered, full pool", "codesearchnet-full", load_full_pool),
    Benchmark("codesearchnet-human", "CodeSearchNet, human judgements", "codesearchnet-human", load_human),
    Benchmark("translation", "Code translation as retrieval", "code-to-code-trans", load_translation),
    Benchmark("translation-masked", _MASKED, "code-to-code-trans", partial(load_translation, masked=True)),
    Benchmark("poj104", "POJ-104", "poj104", load_poj104),
    Benchmark("bigclonebench", "BigCloneBench", "bigclonebench", load_bigclonebench),
    Benchmark("advtest", "AdvTest", "advtest", load_advtest),
    Benchmark("cosqa", "CoSQA", "cosqa", load_cosqa),
    *(
        Benchmark(
            f"exercism-{query}{'-masked' if masked else ''}",
            f"Exercism, {query} → code{', names masked' if masked else ''}",
            "exercism",
            partial(load_exercism, from_code=query == "code", masked=masked),
            sized=False,
        )
        for query in ("text", "code")
        for masked in (False, True)
    ),
    Benchmark("folder", "Functions of a folder", "", load_code_folder, sized=False, in_all=False),
]

BENCHMARKS = {benchmark.name: benchmark for benchmark in _BENCHMARKS}

ALL = "all"
WITH_CANDIDATES = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.with_candidates)


def choose_benchmarks(names: Sequence[str], data: str | Path) -> list[str]:
    """The names of benchmarks without repetitions; replaces `all` by all benchmarks whose folders are in `data`."""
    available = ", ".join([*BENCHMARKS, ALL])
    if not names:
        raise UserError("benchmark.missing", f"Name a benchmark: {available}.")
    if unknown := [name for name in names if name not in (*BENCHMARKS, ALL)]:
        raise UserError("benchmark.unknown", f"Unknown benchmark {unknown[0]!r}. Available: {available}.")
    if ALL not in names:
        return list(dict.fromkeys(names))
    if _is_on_hub(data):
        raise UserError("benchmark.all.on_hub", f"`{ALL}` needs a folder; on the Hub, name each benchmark.")
    possible = [one for one in _BENCHMARKS if one.in_all]
    found = [one.name for one in possible if (Path(data).expanduser() / one.folder).is_dir()]
    if not found:
        folders = ", ".join(sorted({one.folder for one in possible}))
        raise UserError("benchmark.all.none", f"{data} holds no benchmark: expected one of the folders {folders}.")
    return list(dict.fromkeys(one for name in names for one in (found if name == ALL else [name])))


def load_benchmark(
    name: str, data: str | Path, *, allow_subset: bool = False, candidates: str | Path | None = None
) -> list[Task]:
    """Load the tasks of a benchmark.

    Args:
        data: the folder of the benchmark, or its parent folder; `hub` for the repository of its authors on the Hub; or
            `hub:OWNER/NAME` for another repository with the same files.
        allow_subset: accept partial files, and add a note to the tasks.
        candidates: folder with the lists of candidates from an earlier run, for benchmarks with random candidates.
    """
    benchmark = BENCHMARKS[name]
    if _is_on_hub(data):
        repository = str(data).removeprefix("hub").removeprefix(":") or benchmark.hub
        if not repository:
            raise UserError("benchmark.not_on_hub", f"{name} is not on the Hub: give a folder or hub:OWNER/NAME.")
        ignored = ["*train*", "*validation*"]
        folder = Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", ignore_patterns=ignored))
    else:
        inside = Path(data).expanduser() / benchmark.folder
        folder = inside if inside.is_dir() else Path(data).expanduser()
    options: dict[str, object] = {"allow_subset": allow_subset} if benchmark.sized else {}
    if candidates is not None and benchmark.with_candidates:
        options["candidates"] = Path(candidates)
    return list(benchmark.load(folder, **options))


def _is_on_hub(data: str | Path) -> bool:
    return str(data) == "hub" or str(data).startswith("hub:")
