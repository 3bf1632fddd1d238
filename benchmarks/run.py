"""All benchmarks, one after the other, each in its own process; one that fails is named at the end and stops nothing.

    make bench          # python benchmarks/run.py; hours: run it on a quiet machine
    make bench-quick    # python benchmarks/run.py --quick; minutes: small shapes, results in runs/bench-quick/
    make bench-quick ARGS=--accept    # keep what was measured as results/quick.json, which later runs compare with

Not here, because they need trained checkpoints: `contenders.py MODEL …`, `cascade.py CHECKPOINT`,
`search_transformers.py`.
Those that need rows of CodeSearchNet are skipped unless MOSE_DATA names a folder with codesearchnet/*_test.jsonl.gz.
The exit status is 1 if a benchmark did not run to its end, or if a ratio of a quick run is more than TOLERANCE times
worse than in results/quick.json, even at the better end of its interval. Other figures decide nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import table
from report import COMMITTED, write

HERE = Path(__file__).parent
QUICK_RESULTS = HERE.parent / "runs" / "bench-quick"
TOLERANCE = 1.3  # rounds are few, and machines differ


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A script with its arguments.

    Args:
        script: file in this folder, without its ending.
        arguments: of the script.
        needs_data: whether it reads MOSE_DATA.
    """

    script: str
    arguments: tuple[str, ...] = ()
    needs_data: bool = False

    @property
    def command(self) -> str:
        """What one would type for it, without the interpreter."""
        return " ".join((self.script, *self.arguments))


FULL = (
    Benchmark("import_time"),
    Benchmark("exit_latency"),
    Benchmark("forward"),
    Benchmark("encode", needs_data=True),
    Benchmark("loading_at_an_exit"),
    Benchmark("exit_profile"),
    Benchmark("scoring_memory"),
    Benchmark("pretraining_step", ("--rows", "4")),
    Benchmark("pretraining_step", ("--shape", "paper", "--rows", "4", "--without-plain")),
    Benchmark("contrastive_step", ("--bf16",)),
    Benchmark("contrastive_step", ("--bf16", "--shape", "mini", "--max-tokens", "64", "256")),
    Benchmark("distillation_step"),
    Benchmark("scale_out", ("--ranks", "8", "64", "128")),
    Benchmark("near_duplicates", needs_data=True),
    Benchmark("vector_index"),
    Benchmark("shipped_model", needs_data=True),
)
QUICK = (
    Benchmark("import_time", ("--rounds", "2")),
    Benchmark("exit_latency", ("--quick",)),
    Benchmark("forward", ("--quick", "--rounds", "4")),
    Benchmark("pretraining_step", ("--rows", "2", "--tokens", "128", "--repeats", "3", "--vocabularies", "8192")),
    Benchmark("encode", ("--texts", "24", "--characters", "1500", "--repeats", "3"), needs_data=True),
)


def main() -> int:
    """Run them; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes alone")
    parser.add_argument("--accept", action="store_true", help="with --quick: later runs compare with these ratios")
    parser.add_argument("--only", nargs="+", metavar="SCRIPT", help="of these scripts alone")
    arguments = parser.parse_args()
    chosen = [one for one in (QUICK if arguments.quick else FULL) if one.script in (arguments.only or [one.script])]
    if arguments.accept and (not arguments.quick or arguments.only or "MOSE_DATA" not in os.environ):
        parser.error("--accept needs --quick, MOSE_DATA, and all scripts: later runs compare with all ratios")
    if not chosen:
        parser.error(f"--only takes names among {', '.join(one.script for one in FULL)}")
    environment = dict(os.environ)
    if arguments.quick:
        shutil.rmtree(QUICK_RESULTS, ignore_errors=True)  # results of an earlier run are no result of this one
        environment["MOSE_BENCH_RESULTS"] = str(QUICK_RESULTS)
    outcomes = [(benchmark.command, run(benchmark, environment)) for benchmark in chosen]
    print("\n" + "\n".join(f"{command}: {outcome}" for command, outcome in outcomes))
    worse: list[str] = []
    if not arguments.quick:
        subprocess.run([sys.executable, HERE / "table.py"], check=True)
    else:
        measured = ratios_with_a_target(QUICK_RESULTS)
        if arguments.accept:
            print(write("quick", measured))
        elif (COMMITTED / "quick.json").is_file():
            committed = json.loads((COMMITTED / "quick.json").read_text(encoding="utf-8"))["figures"]
            worse = regressions(measured, committed)
            print("\n".join([f"not measured: {name}" for name in sorted(committed.keys() - measured.keys())]))
            print("\n".join(worse) or f"No measured ratio is over {TOLERANCE} times worse than in results/quick.json.")
    return int(any(outcome.startswith("failed") for _, outcome in outcomes) or bool(worse))


def ratios_with_a_target(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: row} of the ratios in a folder of results that have a target, so that one knows which side is worse."""
    found = {}
    for name, rows_of in table.SOURCES.items():
        if (path := folder / f"{name}.json").is_file():
            rows = rows_of(json.loads(path.read_text(encoding="utf-8"))["figures"])
            found |= {row["name"]: row for row in rows if {"most", "least"} & row.keys() and "unit" not in row}
    return found


def regressions(measured: Mapping[str, Mapping[str, Any]], committed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each ratio whose better end is over TOLERANCE times worse than the committed ratio."""
    lines = []
    for name in measured.keys() & committed.keys():
        row, before = measured[name], committed[name]["value"]
        small_is_good = "most" in row
        best = row.get("low" if small_is_good else "high", row["value"])
        if (best > before * TOLERANCE) if small_is_good else (best * TOLERANCE < before):
            lines.append(f"worse: {name}: {row['value']:.2f} x, in results/quick.json {before:.2f} x")
    return sorted(lines)


def run(benchmark: Benchmark, environment: dict[str, str]) -> str:
    """What became of one: how long it took, that it failed, or why it was skipped."""
    script = HERE / f"{benchmark.script}.py"
    print(f"\n== {benchmark.command}", flush=True)
    if benchmark.needs_data and "MOSE_DATA" not in environment:
        return "skipped: MOSE_DATA is not set"
    if not script.is_file():
        return "failed: there is no such script"
    start = time.perf_counter()
    result = subprocess.run([sys.executable, script, *benchmark.arguments], env=environment)
    seconds = time.perf_counter() - start
    return f"{seconds:.0f} s" if result.returncode == 0 else f"failed with status {result.returncode}"


if __name__ == "__main__":
    sys.exit(main())
