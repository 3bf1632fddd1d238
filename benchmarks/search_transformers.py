"""Index the installed transformers and ask it ten questions whose answers were written down beforehand.

    python benchmarks/search_transformers.py                                          # the shipped model at exit 0
    python benchmarks/search_transformers.py --model CHECKPOINT --exit-layers 1,2,4 --index runs/transformers-index

A copy of the distribution's Python files is indexed by `mose index`, at one exit or several from one pass; the index is
asked by words, and at each exit by vectors and by the rules over both. Last, one file gets one more function and `mose
index` runs again. An index that is kept (--index) is completed if a run was stopped; its time is that of the last part.

Hits at 10 are questions with a right answer among the first ten; MRR is the mean of 1 / rank of the first one, 0 below
the first hundred. Ten questions tell whether it works, not which of two exits is better.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from report import write

from modular_star_encoder.search.hits import Answer
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.vector_store import DEFAULT_CHECKPOINT
from modular_star_encoder.utils.reports import library_versions, markdown_table, percent

QUESTIONS = Path(__file__).parent.parent / "examples" / "search" / "questions.jsonl"
DISTRIBUTION = "transformers"
TOUCHED = "trainer_utils.py"
DEPTH = 100


def main() -> None:
    """Parse, index, ask, touch, index again, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="retrieval checkpoint (default: %(default)s)")
    parser.add_argument("--exit-layers", help="such as 1,2,4, or all (default: that of the model)")
    parser.add_argument("--index", type=Path, help="folder for code and index (default: a temporary one)")
    parser.add_argument("--label", help="what the results call the checkpoint (default: the folder's name)")
    parser.add_argument("--name", default="search_transformers", help="of the results (default: %(default)s)")
    arguments = parser.parse_args()
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.index or Path(temporary)
        code = copy_distribution(folder / DISTRIBUTION)
        command = [sys.executable, "-m", "modular_star_encoder.cli.main", "index", str(code), "--vendored", "--json"]
        command += ["--out", str(folder / "index"), "--model", arguments.model]
        command += ["--exit-layers", arguments.exit_layers] if arguments.exit_layers else []
        first = run(command)
        index = CodeIndex.open(folder / "index", checkpoint=arguments.model)
        rankings = ask(index, questions)
        second = touch(code / TOUCHED, command)
    exits = list(index.settings.exit_layers)
    figures = {
        "checkpoint": arguments.label or Path(arguments.model).name,
        "distribution": library_versions((DISTRIBUTION,)),
        "exit_layers": exits,
        "index": {**first, "complete_run": first["embedded_files"] == first["files"]},
        "rankings": rankings,
        "after_touching_one_file": second,
    }
    table = markdown_table([("", "hits at 10", "MRR"), *(row(name, one) for name, one in rankings.items())])
    text = "\n".join([*table, "", sentence(figures)])
    print(f"{text}\n\n{write(arguments.name, figures, text)}")


def copy_distribution(target: Path) -> Path:
    """The installed package's Python files, in a folder that may be changed."""
    found = metadata.distribution(DISTRIBUTION)
    source = Path(str(found.locate_file(DISTRIBUTION)))
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.rglob("*.py")):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return target


def run(command: list[str]) -> dict[str, Any]:
    """What `mose index --json` reports, but for where the index is."""
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report = json.loads(output)
    del report["index"]
    return {**report, "seconds": round(report["seconds"], 1)}


def ask(index: CodeIndex, questions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ranks of the first right answer to each question, and their summary, for every way of ranking."""
    texts = [question["question"] for question in questions]
    answers = {"words": index.search(texts, top_k=DEPTH, method="lexical")}
    for exit_layer in index.settings.exit_layers:
        vectors = index.search(texts, top_k=DEPTH, exit_layer=exit_layer, method="vector")
        answers[f"exit {exit_layer}, vectors alone"] = vectors
        answers[f"exit {exit_layer} and words"] = index.search(texts, top_k=DEPTH, exit_layer=exit_layer)
    return {name: summary(index.folder, questions, found) for name, found in answers.items()}


def summary(folder: str, questions: list[dict[str, Any]], answers: list[Answer]) -> dict[str, Any]:
    """Hits at 10, MRR, and the rank of each question's first right answer (None below the first hundred)."""
    ranks = [first_rank(folder, question["answers"], one) for question, one in zip(questions, answers, strict=True)]
    reciprocal = [0.0 if rank is None else 1 / rank for rank in ranks]
    hits = sum(rank is not None and rank <= 10 for rank in ranks)
    return {"hits_at_10": hits, "questions": len(ranks), "mrr": sum(reciprocal) / len(ranks), "ranks": ranks}


def first_rank(folder: str, right: list[list[str]], answer: Answer) -> int | None:
    """The rank of the first hit that is one of the right (path, name)."""
    wanted = {(str(Path(folder, path)), name) for path, name in right}
    for rank, hit in enumerate(answer.hits, start=1):
        if (str(Path(hit.path).absolute()), hit.name) in wanted:
            return rank
    return None


def touch(path: Path, command: list[str]) -> dict[str, Any]:
    """Add a function to a file, index again, and put the file back."""
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(before + "\n\ndef touched_by_the_benchmark():\n    return 1\n", encoding="utf-8")
        return run(command)
    finally:
        path.write_text(before, encoding="utf-8")


def row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    """Of the table."""
    return name, f"{one['hits_at_10']} of {one['questions']}", percent(one["mrr"])


def sentence(figures: dict[str, Any]) -> str:
    """What was indexed, and what the second run did."""
    first, second, version = figures["index"], figures["after_touching_one_file"], figures["distribution"][DISTRIBUTION]
    part = "" if first["complete_run"] else " (a run that went on with an earlier one)"
    return (
        f"{figures['checkpoint']}; transformers {version}: {first['rows']:,} pieces of "
        f"{first['files']:,} files, indexed in {first['seconds']:.0f} s{part}. After one file was changed, a second "
        f"run embedded {second['embedded_files']} file ({second['embedded_rows']} rows) and took "
        f"{second['seconds']:.0f} s."
    )


if __name__ == "__main__":
    main()
