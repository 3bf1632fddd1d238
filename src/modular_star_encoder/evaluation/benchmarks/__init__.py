"""Find and load the benchmarks. To add a benchmark, write a function that loads it, and add it to `_BENCHMARKS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub

from modular_star_encoder.evaluation.benchmarks import codesearchnet, codexglue
from modular_star_encoder.evaluation.tasks import Task
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import user_path


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The name and title of a benchmark, the folder of its files, and the function that loads them."""

    name: str  # name on the command line
    title: str  # the heading of its table
    folder: str  # name of its folder in a folder that holds several benchmarks
    # Reads the folder; raises UserError for a damaged or partial file, and FileNotFoundError for a missing file.
    load: Callable[..., Sequence[Task]]
    hub: str = ""  # the dataset repository on the Hub with the same files
    sized: bool = True  # whether `load` has the argument `allow_subset`
    in_all: bool = True  # whether "all" includes it


_HUB = "code-search-net/code_search_net"
_load_drawn, _load_translation = codesearchnet.load_with_candidates, codexglue.load_translation
_load_leaky, _load_masked = partial(_load_drawn, leaky=True), partial(_load_translation, masked=True)
_LEAKY = "CodeSearchNet, 999 distractors, docstrings in Python code"
_FULL = "CodeSearchNet, filtered, full pool"
_MASKED = "Code translation as retrieval, names masked"


def _exercism(query: str, masked: bool) -> Benchmark:
    name, title = f"exercism-{query}", f"Exercism, {query} → code"
    load = partial(codexglue.load_exercism, from_code=query == "code", masked=masked)
    own = (f"{name}-masked", f"{title}, names masked") if masked else (name, title)
    return Benchmark(*own, "exercism", load, sized=False)


_BENCHMARKS = [
    Benchmark("codesearchnet-999", "CodeSearchNet, 999 distractors", "codesearchnet", _load_drawn, _HUB),
    Benchmark("codesearchnet-999-leaky", _LEAKY, "codesearchnet", _load_leaky, _HUB, in_all=False),
    Benchmark("codesearchnet-full", _FULL, "codesearchnet-full", codesearchnet.load_full_pool),
    Benchmark("translation", "Code translation as retrieval", "code-to-code-trans", _load_translation),
    Benchmark("translation-masked", _MASKED, "code-to-code-trans", _load_masked),
    Benchmark("poj104", "POJ-104", "poj104", codexglue.load_poj104),
    Benchmark("bigclonebench", "BigCloneBench", "bigclonebench", codexglue.load_bigclonebench),
    Benchmark("advtest", "AdvTest", "advtest", codexglue.load_advtest),
    Benchmark("cosqa", "CoSQA", "cosqa", codexglue.load_cosqa),
    *(_exercism(query, masked) for query in ("text", "code") for masked in (False, True)),
    Benchmark("folder", "Functions of a folder", "", codesearchnet.load_code_folder, sized=False, in_all=False),
]

BENCHMARKS = {benchmark.name: benchmark for benchmark in _BENCHMARKS}

ALL = "all"


def choose_benchmarks(names: Sequence[str], data: str | Path) -> list[str]:
    """Return benchmark names without repetitions; "all" means all benchmarks that have a folder in `data`."""
    unknown = [name for name in names if name not in (*BENCHMARKS, ALL)]
    possible = [one for one in _BENCHMARKS if one.in_all]
    found = [one.name for one in possible if not _is_on_hub(data) and user_path(data, one.folder).is_dir()]
    if unknown or not names:
        key, what = ("unknown", f"Unknown benchmark {unknown[0]!r}") if names else ("missing", "Name a benchmark")
        raise UserError(f"benchmark.{key}", f"{what}. Available: {', '.join([*BENCHMARKS, ALL])}.")
    if ALL in names and not found:
        folders = ", ".join(sorted({one.folder for one in possible}))
        message = f"`{ALL}` needs a local folder that contains one or more of {folders}; {data} contains none of them."
        raise UserError("benchmark.all.none", message)
    return list(dict.fromkeys(one for name in names for one in (found if name == ALL else [name])))


def load_benchmark(name: str, data: str | Path, *, allow_subset: bool = False) -> list[Task]:
    """Load the tasks of the benchmark `name`.

    `data` is the folder of the benchmark or the folder above it; or "hub" for the authors' repository on the Hub; or
    "hub:OWNER/NAME" for a copy of that repository. With `allow_subset`, files may have fewer rows than published; the
    tasks then have a note that says so.
    """
    benchmark = BENCHMARKS[name]
    if _is_on_hub(data):
        repository = str(data).removeprefix("hub").removeprefix(":") or benchmark.hub
        if not repository:
            message = f"The authors of {name} have no Hub repository: give a local folder, or a copy as hub:OWNER/NAME."
            raise UserError("benchmark.not_on_hub", message)
        ignored = ["*train*", "*validation*"]
        folder = Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", ignore_patterns=ignored))
    else:
        inside = user_path(data) / benchmark.folder
        folder = inside if inside.is_dir() else user_path(data)
    return list(benchmark.load(folder, allow_subset=allow_subset) if benchmark.sized else benchmark.load(folder))


def _is_on_hub(data: str | Path) -> bool:
    return str(data) == "hub" or str(data).startswith("hub:")
