"""Evaluate a model and baselines on benchmarks, with the steps of `mose evaluate --out`. Copy and change this script.

    python examples/evaluate.py MODEL --data FOLDER --benchmarks codesearchnet-999 exercism-code --out runs/evaluation
    python examples/evaluate.py MODEL --data FOLDER --benchmarks all --baselines bm25 tfidf OTHER_MODEL --out FOLDER

Finished results are stored in the output folder. A second run with the same folder computes only the missing results,
for example after an interruption, or with another baseline.
"""

import argparse
import shlex
import sys

from modular_star_encoder.evaluation.run import run_benchmarks


def main() -> int:
    """Evaluate and print the tables; return the exit code: 0 on success, 2 after wrong input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of the model")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="folder of the benchmarks, or hub to download")
    parser.add_argument("--benchmarks", nargs="+", default=["all"], metavar="NAME", help="default: all in --data")
    parser.add_argument("--baselines", nargs="*", default=["bm25", "tfidf"], metavar="NAME", help="default: bm25 tfidf")
    parser.add_argument("--exit-layers", nargs="*", type=int, metavar="K", help="exits of the model (default: all)")
    parser.add_argument("--allow-subset", action="store_true", help="accept partial files, with a note in the tables")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the reports and plots")
    arguments = parser.parse_args()
    try:
        report = run_benchmarks(
            arguments.model,
            arguments.benchmarks,
            arguments.data,
            arguments.out,
            exit_layers=arguments.exit_layers,
            baselines=arguments.baselines,
            allow_subset=arguments.allow_subset,
            command=shlex.join(["python", *sys.argv]),
        )
    except KeyboardInterrupt:
        print("\nevaluate: interrupted; start it again to continue.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"evaluate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for table in report.tables:
        print(f"\n{table.benchmark}, {table.metric}")
        for row in table.rows:
            print(f"  {row.label:40} {100 * row.mean.value:5.1f}  ({100 * row.mean.low:.1f}–{100 * row.mean.high:.1f})")
    print(f"\nReports in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
