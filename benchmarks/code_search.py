"""How well `mose search` ranks: file-level NDCG@10 on a code-search benchmark, by model, cascade and rule.

    python benchmarks/code_search.py TREES [--out benchmarks/results] [--cascades 4 6]

TREES holds one folder for each repository of `$MOSE_DATA/semble` (repos.tsv says which commit; its README how to get
them). Every system ranks pieces (a second piece of a file takes a place) or files (folded into their first place), as
that README defines both. Weights are the same for all repositories and languages; they were chosen on this half, and
another half is kept back.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modular_star_encoder.search import ranking
from modular_star_encoder.search.hits import Answer
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.local_store import LocalStore
from modular_star_encoder.search.ranking import Cascade
from modular_star_encoder.utils.files import write_json, write_text
from modular_star_encoder.utils.reports import library_versions, markdown_table, processor_model

Span = tuple[int, int] | None
RULES: dict[str, Mapping[str, Any]] = {
    "no definitions": {"DEFINITION": 0.0},
    "no paths": {"PATH": 0.0},
    "no good files": {"GOOD_FILE": 0.0},
    "tests and re-exports as any file": {"SIDE_FILES": 1.0, "INITIAL_FILES": 1.0, "DECLARATIONS": 1.0},
    "no diversity": {"FURTHER_PIECE": 1.0},
}
NONE = {name: value for rule in RULES.values() for name, value in rule.items()}


def main() -> None:
    """Run every system and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--cascades", type=int, nargs="*", default=[], metavar="K", help="deeper exits that re-rank: slow"
    )
    arguments = parser.parse_args()
    if "MOSE_DATA" not in os.environ:
        parser.error("MOSE_DATA must name the folder that holds semble/annotations")
    annotations = Path(os.environ["MOSE_DATA"]) / "semble" / "annotations"
    systems: dict[str, tuple[dict[str, Any], Mapping[str, Any]]] = {
        "words, no rules": ({"method": "lexical"}, NONE),
        "words": ({"method": "lexical"}, {}),
        "exit 0 alone": ({"method": "vector"}, {}),
        "exit 0 + words, no rules": ({}, NONE),
        "exit 0 + words": ({}, {}),
        **{f"exit 0 + words, {name}": ({}, changes) for name, changes in RULES.items()},
    }
    for exit_layer in arguments.cascades:
        systems[f"exit 0 + words, re-ranked by exit {exit_layer}"] = ({"cascade": Cascade(exit_layer)}, {})
    gains: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    pieces, seconds = 0, 0.0
    for path in sorted(annotations.glob("*.json")):
        questions = json.loads(path.read_text(encoding="utf-8"))
        start = time.perf_counter()
        index = CodeIndex.build(arguments.trees / path.stem, LocalStore(), progress=False)
        seconds += time.perf_counter() - start
        pieces += index.report.rows
        for name, (options, changes) in systems.items():
            asked = partial(index.search, [one["query"] for one in questions], **options)
            answers = with_rules(changes, asked)
            root = Path(index.folder)
            gains[name] += [score(answer, one, root) for answer, one in zip(answers, questions, strict=True)]
        print(path.stem, index.report.rows, flush=True)
    rows = [["system", "NDCG@10, pieces", "NDCG@10, files"]]
    for name, values in gains.items():
        rows.append([name, *(f"{sum(one[side] for one in values) / len(values):.4f}" for side in (0, 1))])
    figures = {
        "questions": len(next(iter(gains.values()))),
        "pieces": pieces,
        "seconds_to_index": round(seconds, 1),
        "processor": processor_model(),
        "versions": library_versions(("numpy", "tokenizers", "tree-sitter-language-pack", "modular-star-encoder")),
        "results": {row[0]: {"pieces": float(row[1]), "files": float(row[2])} for row in rows[1:]},
    }
    write_json(arguments.out / "code_search.json", figures)
    write_text(arguments.out / "code_search.md", "\n".join(markdown_table(rows)) + "\n")


def with_rules(changes: Mapping[str, Any], run: Callable[[], list[Answer]]) -> list[Answer]:
    """What `run` gives while rules have other weights."""
    before = {name: getattr(ranking, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(ranking, name, value)
        return run()
    finally:
        for name, value in before.items():
            setattr(ranking, name, value)


def score(answer: Answer, question: Mapping[str, Any], root: Path) -> tuple[float, float]:
    """NDCG@10 of an answer, by pieces and by files."""
    targets = [target_of(one) for one in [*question["relevant"], *question.get("secondary", [])]]
    places = [(os.path.relpath(hit.path, root), (hit.line, hit.last_line)) for hit in answer.hits]
    files: dict[str, Span] = {}
    for path, _ in places:
        files.setdefault(path, None)
    return ndcg(places, targets), ndcg(list(files.items()), targets)


def target_of(one: Any) -> tuple[str, Span]:
    """(path, lines) of what answers a question."""
    if isinstance(one, str):
        return one, None
    return one["path"], (one["start_line"], one["end_line"]) if one.get("start_line") else None


def ndcg(places: Sequence[tuple[str, Span]], targets: Sequence[tuple[str, Span]], depth: int = 10) -> float:
    """Binary gains at the first place that meets each target."""
    gained = set()
    for path, span in targets:
        for rank, (found, lines) in enumerate(places[:depth], start=1):
            same = found == path or found.endswith(f"/{path}") or path.endswith(f"/{found}")
            if same and (span is None or lines is None or (lines[0] <= span[1] and span[0] <= lines[1])):
                gained.add(rank)
                break
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(depth, len(targets)) + 1))
    return sum(1 / math.log2(rank + 1) for rank in gained) / best if targets else 0.0


if __name__ == "__main__":
    main()
