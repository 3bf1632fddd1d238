"""Evaluate exits of a checkpoint on tasks of mteb, or on a retrieval task made of functions in a folder.

    pip install 'modular-star-encoder[mteb]'
    python examples/mteb_exits.py hub_configs/mose-code --tasks CosQA CodeSearchNetRetrieval --exit-layers 0,6
    python examples/mteb_exits.py hub_configs/mose-code --tasks "MTEB(Code, v1)"
    python examples/mteb_exits.py hub_configs/mose-code --data ~/checkouts

The first two commands download mteb's datasets; the third needs no network. Results are stored in --out in mteb's
format. An interrupted run continues when the same command is started again.
"""

import argparse
import sys

from modular_star_encoder.cli import exit_list
from modular_star_encoder.data.functions import collect_functions
from modular_star_encoder.data.sources.repositories import folder_repositories


def main() -> int:
    """Evaluate and print the scores; return the exit code: 0 on success, 2 after wrong input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of the checkpoint")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks or benchmarks of mteb")
    what.add_argument("--data", metavar="FOLDER", help="folder of source code to make a task from")
    parser.add_argument("--exit-layers", metavar="LIST", type=exit_list, help="exits, such as 4,9 (default: all)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/mteb", help="output folder (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        from modular_star_encoder.evaluation.mteb_exits import local_task, run_mteb  # needs mteb

        tasks = arguments.tasks
        if arguments.data:
            functions, _ = collect_functions(folder_repositories(arguments.data))
            rows = [(function.description, function.code, function.language) for function in functions]
            tasks = [local_task(rows, "FunctionsOfAFolder")]
        scores = run_mteb(arguments.checkpoint, tasks, arguments.exit_layers, arguments.out)
    except KeyboardInterrupt:
        print("\nmteb_exits: interrupted; start it again to continue.", file=sys.stderr)
        return 130
    except (ImportError, ValueError, OSError) as error:
        print(f"mteb_exits: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for exit_layer, values in scores.items():
        for task, score in values.items():
            print(f"exit {exit_layer:3}  {task:40} {100 * score:6.2f}")
    print(f"results in {arguments.out}/results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
