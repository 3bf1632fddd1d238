"""The benchmarks by name, and where each one's files lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modular_star_encoder.evaluation.benchmarks.code_to_code import (
    load_bigclonebench,
    load_exercism,
    load_poj104,
    load_translation,
)
from modular_star_encoder.evaluation.benchmarks.codesearchnet import (
    load_distractors,
    load_full_pool,
    load_human,
    load_mteb,
)
from modular_star_encoder.evaluation.benchmarks.text_to_code import load_advtest, load_code_folder, load_cosqa
from modular_star_encoder.evaluation.tasks import Task


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How to find and read a benchmark.

    Attributes:
        title: the heading of its table.
        folder: where its files lie below a folder of several benchmarks.
        load: reads that folder.
        hub: the dataset repository of the Hub that holds the same files; empty where there is none.
        sized: whether `load` takes `allow_subset`.
    """

    title: str
    folder: str
    load: Callable[..., Sequence[Task]]
    hub: str = ""
    sized: bool = True


_CODESEARCHNET = "code-search-net/code_search_net"

BENCHMARKS = {
    "codesearchnet-999": Benchmark("CodeSearchNet, 999 distractors", "codesearchnet", load_distractors, _CODESEARCHNET),
    "codesearchnet-999-leaky": Benchmark(
        "CodeSearchNet, 999 distractors, docstrings in Python code",
        "codesearchnet",
        partial(load_distractors, leaky=True),
        _CODESEARCHNET,
    ),
    "codesearchnet-mteb": Benchmark(
        "CodeSearchNet, MTEB's 1000 × 1000", "codesearchnet-mteb", load_mteb, "mteb/CodeSearchNetRetrieval"
    ),
    "codesearchnet-full": Benchmark("CodeSearchNet, filtered, full pool", "codesearchnet-full", load_full_pool),
    "codesearchnet-human": Benchmark("CodeSearchNet, human judgements", "codesearchnet-human", load_human),
    "translation": Benchmark("Code translation as retrieval", "code-to-code-trans", load_translation),
    "translation-masked": Benchmark(
        "Code translation as retrieval, names masked", "code-to-code-trans", partial(load_translation, masked=True)
    ),
    "poj104": Benchmark("POJ-104", "poj104", load_poj104),
    "bigclonebench": Benchmark("BigCloneBench", "bigclonebench", load_bigclonebench),
    "advtest": Benchmark("AdvTest", "advtest", load_advtest),
    "cosqa": Benchmark("CoSQA", "cosqa", load_cosqa),
    "exercism-text": Benchmark("Exercism, text → code", "exercism", load_exercism, sized=False),
    "exercism-text-masked": Benchmark(
        "Exercism, text → code, names masked", "exercism", partial(load_exercism, masked=True), sized=False
    ),
    "exercism-code": Benchmark(
        "Exercism, code → code", "exercism", partial(load_exercism, from_code=True), sized=False
    ),
    "exercism-code-masked": Benchmark(
        "Exercism, code → code, names masked",
        "exercism",
        partial(load_exercism, from_code=True, masked=True),
        sized=False,
    ),
    "folder": Benchmark("Functions of a folder", "", load_code_folder, sized=False),
}

ALL = "all"
WITH_CANDIDATES = ("codesearchnet-999", "codesearchnet-999-leaky")
"""Those whose candidates are drawn, and can be read from the lists of an earlier run."""

_NOT_IN_ALL = {"folder", "codesearchnet-999-leaky"}


def choose_benchmarks(names: Sequence[str], data: str | Path) -> list[str]:
    """The names, each once; `all` stands for those whose folder lies below `data`.

    Raises:
        ValueError: a name that there is not, or `all` where no benchmark's folder is.
    """
    chosen: list[str] = []
    for name in names:
        if name == ALL:
            if _is_on_hub(data):
                raise ValueError(f"{ALL} stands for the benchmarks in a folder: of the Hub, name them.")
            there = [key for key, benchmark in BENCHMARKS.items() if key not in _NOT_IN_ALL]
            found = [key for key in there if (Path(data).expanduser() / BENCHMARKS[key].folder).is_dir()]
            if not found:
                folders = sorted({BENCHMARKS[key].folder for key in there})
                raise ValueError(f"{data} holds no benchmark: expected one of the folders {', '.join(folders)}.")
            chosen += found
        elif name in BENCHMARKS:
            chosen.append(name)
        else:
            raise ValueError(f"There is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}, and {ALL}.")
    return list(dict.fromkeys(chosen))


def load_benchmark(
    name: str, data: str | Path, *, allow_subset: bool = False, candidates: str | Path | None = None
) -> list[Task]:
    """The tasks of a benchmark.

    Args:
        data: its folder, a folder that holds it under its usual name, `hub` for the repository of its authors on the
            Hub, or `hub:OWNER/NAME` for another one with the same files.
        allow_subset: take partial files, and say so in the notes.
        candidates: for CodeSearchNet with distractors, the folder of the lists of an earlier run.

    Raises:
        ValueError: a damaged or partial file, with its name, the line, and what was expected.
        OSError: no such folder or file, or the Hub can't be reached.
    """
    benchmark = BENCHMARKS[name]
    if _is_on_hub(data):
        folder = _download(name, str(data).removeprefix("hub").removeprefix(":") or benchmark.hub)
    else:
        inside = Path(data).expanduser() / benchmark.folder
        folder = inside if inside.is_dir() else Path(data).expanduser()
    options = {"allow_subset": allow_subset} if benchmark.sized else {}
    if candidates is not None:
        if name not in WITH_CANDIDATES:
            raise ValueError(f"{name} has no lists of candidates: every document is one.")
        options["candidates"] = Path(candidates)
    return list(benchmark.load(folder, **options))


def _is_on_hub(data: str | Path) -> bool:
    return str(data) == "hub" or str(data).startswith("hub:")


def _download(name: str, repository: str) -> Path:
    from huggingface_hub import snapshot_download

    if not repository:
        raise ValueError(f"{name} isn't on the Hub as its authors publish it: name a folder, or hub:OWNER/NAME.")
    ignored = ["*train*", "*validation*"]
    return Path(snapshot_download(repository, repo_type="dataset", ignore_patterns=ignored))
