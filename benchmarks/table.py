"""The table in README.md of this folder, made from the results: no figure there is typed by hand.

python benchmarks/table.py            # after a benchmark has written new results
python benchmarks/table.py --check    # status 1 if README.md differs from what would be written
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ratios import describe, figure, is_met, target_of
from report import COMMITTED

from modular_star_encoder.utils.reports import markdown_table

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- made by table.py -->", "<!-- end -->"
Row = dict[str, Any]

# Beginning of a row's name → why its target is missed where it is.
REASONS = {
    "pre-training step of five exits, vocabulary 8192 / plain": "the deepest exit's loss alone misses it",
    "equal dimensions": "equal within the interval (few rounds)",
    "1B layers": "stock runs at 52 to 72 % of the matrix product's peak, compiled at 60 to 83 % ([profile](NOTES.md))",
    "bfloat16: largest difference": "numbers of 8 bits, pooled and rounded in another order",
    "bfloat16: texts/s / sentence-transformers": "layers this narrow gain little from packing ([profile](NOTES.md))",
}


def loading(figures: list[Row]) -> Iterator[Row]:
    """Loading at an exit, converted to float32."""
    ours, other = (
        next(row for row in figures if row["dtype"] == "float32" and row["contender"] == name)
        for name in ("at the exit", "all, then cut")
    )
    name = "loading exit 9 in float32"
    yield figure(f"{name} / loading all and cutting", {"value": ours["seconds"] / other["seconds"]}, most=0.35)
    memory = {"value": ours["peak_bytes"] / ours["kept_bytes"]}
    yield figure(f"{name}: anonymous memory / bytes kept", memory, most=1.1)


def pretraining(figures: list[Row]) -> Iterator[Row]:
    """Five exits' losses in one step against the deepest alone and against the plain version."""
    paper = figures[0]["shape"] == "paper"
    times, memory = ({49156: 1.25} if paper else {8192: 1.25, 49156: 2.0}), 1.1
    plain = {8192: 0.5, 49156: 0.25}
    for vocabulary in filter({row["vocabulary"] for row in figures}.__contains__, times):
        by_name = {row["contender"]: row for row in figures if row["vocabulary"] == vocabulary}
        ours, deepest = by_name["five exits"], by_name["deepest exit"]
        model = "12 layers of the 1B configuration" if paper else f"vocabulary {vocabulary}"
        name = f"pre-training step of five exits, {model}"
        of_deepest = {"value": ours["seconds"] / deepest["seconds"]}
        yield figure(f"{name} / deepest alone", of_deepest, most=times[vocabulary])
        peak = {"value": ours["peak_bytes"] / deepest["peak_bytes"]}
        yield figure(f"{name}: memory / deepest alone", peak, most=memory)
        if "plain" in by_name:
            of_plain = {"value": ours["seconds"] / by_name["plain"]["seconds"]}
            yield figure(f"{name} / plain", of_plain, most=plain[vocabulary])


def near_duplicates(figures: Row) -> Iterator[Row]:
    """Recall, and texts per second against other libraries end to end."""
    recall = {"value": figures["recall"]["default"]["mean_recall_0.8_to_0.95"]}
    yield figure("near-duplicates: recall at Jaccard 0.8 to 0.95", recall, least=0.97, unit="")
    for name, speed in figures["speed"]["end_to_end"].items():
        if not name.startswith("ours"):
            yield figure(f"near-duplicates: texts/s / {name}", {"value": speed["ours_is_times_as_fast"]["median"]})


def contrastive(figures: Row) -> Iterator[Row]:
    """Our cached step: its speed against sentence-transformers' at the largest batch that ran in both; its memory."""
    ran = [row for row in figures["steps"] if row["outcome"] == "ran"]
    for kind in dict.fromkeys(row["kind"] for row in ran):
        name = f"contrastive step of {figures['settings']['shape']}, {kind} pairs"
        seconds = {(row["contender"], row["batch_size"]): row["seconds"] for row in ran if row["kind"] == kind}
        both = [size for who, size in seconds if who == "adaptive" and ("cached", size) in seconds]
        if both:
            speed = {"value": seconds["adaptive", max(both)] / seconds["cached", max(both)]}
            least = 1.25 if kind == "mixed" else None
            yield figure(f"{name}: steps/s at batch {max(both)} / AdaptiveLayerLoss", speed, least=least)
        memory = {
            row["batch_size"]: row["peak_bytes"] for row in ran if (row["kind"], row["contender"]) == (kind, "cached")
        }
        if {64, 2048} <= set(memory):
            yield figure(f"{name}: memory at batch 2048 / at 64", {"value": memory[2048] / memory[64]}, most=1.3)


def cascade(figures: Row) -> Iterator[Row]:
    """MRR that each cascade from the shallowest exit to the deepest loses against the deepest alone."""
    first, last = min(figures["exit_layers"]), max(figures["exit_layers"])
    alone = next(w["mrr"] for w in figures["ways"] if w["exit_layer"] == last and w["rerank_exit_layer"] is None)
    for way in figures["ways"]:
        if (way["exit_layer"], way["rerank_exit_layer"]) == (first, last) and "margins" not in way:
            name = f"cascade {first} → {last}, {way['candidates']} candidates: points of MRR lost"
            yield figure(name, {"value": 100 * (alone - way["mrr"])}, most=1, unit="points")


def vector_index(figures: Row) -> Iterator[Row]:
    """Recall and latency of single questions, and disk."""
    name = f"search among {figures['rows']:,} rows of width {figures['width']}"
    yield figure(f"{name}: recall@10", {"value": figures["recall_at_10"]}, least=0.95, unit="")
    yield figure(f"{name}: 95th percentile of latency", {"value": figures["p95_ms"]}, most=50, unit="ms")
    yield figure(f"{name}: disk", {"value": figures["disk_mb"] / 1000}, most=1.2, unit="GB")
    yield figure(f"{name}: 95th percentile, three words", {"value": figures["words_p95_ms"]}, unit="ms")


def listed(figures: Row) -> Iterator[Row]:
    """Results that are rows already."""
    yield from figures["rows"]


# In the order of the table: results file → how its rows are made.
SOURCES: dict[str, Callable[[Any], Iterator[Row]]] = {
    "exit_latency": listed,
    "forward": listed,
    "encode": listed,
    "contenders": listed,
    "cascade_quickstart": cascade,
    "vector_index": vector_index,
    "loading_at_an_exit": loading,
    "pretraining_step_small": pretraining,
    "pretraining_step_paper": pretraining,
    "contrastive_step_small": contrastive,
    "contrastive_step_mini": contrastive,
    "distillation_step": listed,
    "near_duplicates": near_duplicates,
    "import_time": listed,
}


def main() -> int:
    """Write the table into README.md, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = with_table(old, results_table(COMMITTED))
    if arguments.check:
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


def with_table(text: str, table: str) -> str:
    """`text` with what lies between the two marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def results_table(folder: Path) -> str:
    """A line for each figure, then how each results file was made."""
    lines = [("measured", "figure", "target", "met", "results")]
    origins = [("results", "command", "machine", "torch", "transformers")]
    for name, rows_of in SOURCES.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            lines.append((name, "not measured yet", "", "", ""))
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        link, machine, versions = f"[{name}](results/{name}.json)", results["machine"], results["versions"]
        kind = f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores"
        origins.append((link, f"`{results['command']}`", kind, versions["torch"], versions["transformers"]))
        for row in rows_of(results["figures"]):
            lines.append((row["name"], describe(row), target_of(row), verdict(row), link))
    return "\n".join([*markdown_table(lines), "", *markdown_table(origins)])


def verdict(row: Row) -> str:
    """Whether the target is met, and if not why."""
    met = is_met(row)
    if met is not False:
        return "yes" if met else ""
    reason = next((text for start, text in REASONS.items() if row["name"].startswith(start)), "")
    return f"no: {reason}" if reason else "no"


if __name__ == "__main__":
    sys.exit(main())
