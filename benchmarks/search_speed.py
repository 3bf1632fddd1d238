"""Seconds of processors and of the clock to index a folder at exit 0, to refresh its index, and to answer a question.

    python benchmarks/search_speed.py FOLDER [--rounds 5] [--out FILE.json]

The questions are those of `$MOSE_DATA/semble`, asked of FOLDER one at a time; each figure is the median over the rounds
(of a question: over all questions and rounds). Other programs slow the clock more than the processors' time. `--out`
also keeps the hits, so that two versions can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modular_star_encoder.search.index import CodeIndex

QUESTIONS = 100


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    annotations = sorted((Path(os.environ["MOSE_DATA"]) / "semble" / "annotations").glob("*.json"))
    questions = [one["query"] for path in annotations for one in json.loads(path.read_text(encoding="utf-8"))]
    questions = questions[:: max(len(questions) // QUESTIONS, 1)]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as location:
        built, *seconds = timed(lambda: CodeIndex.build(arguments.folder, location, progress=False))
        figures["pieces"], figures["index, s (processors, clock)"] = built.report.rows, seconds
        refresh = getattr(built, "refresh", None) or (lambda: built.update(progress=False))
        figures["refresh of an unchanged folder, ms"] = medians([timed(refresh)[1:] for _ in range(arguments.rounds)])
        index = CodeIndex.open(location)
        hits = {}
        for method in ("hybrid", "vector", "lexical"):
            index.search(questions[:1], method=method)
            spent = []
            for _ in range(arguments.rounds):
                for question in questions:
                    (answer,), *both = timed(lambda one=question, how=method: index.search([one], method=how))
                    spent.append(both)
                    hits[f"{method}: {question}"] = [(hit.path, hit.line, hit.last_line) for hit in answer.hits]
            figures[f"question, {method}, ms"] = medians(spent)
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps({"figures": figures, "hits": hits}), encoding="utf-8")


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `run` gives, the seconds of processors (of ended child processes too), and those of the clock."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    before = [resource.getrusage(kind) for kind in kinds]
    start = time.perf_counter()
    result = run()
    clock = time.perf_counter() - start
    after = [resource.getrusage(kind) for kind in kinds]
    spent = sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))
    return result, spent, clock


def medians(seconds: list[Any]) -> list[float]:
    """The medians of (processors, clock) in milliseconds."""
    return [round(1000 * statistics.median(one), 2) for one in zip(*seconds, strict=True)]


if __name__ == "__main__":
    main()
