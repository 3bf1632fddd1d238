"""Run tasks of mteb at several exits of a checkpoint, or mteb's retrieval on functions of your own.

    pip install 'modular-star-encoder[mteb]'
    python examples/mteb_exits.py runs/quickstart/model --tasks CosQA CodeSearchNetRetrieval --exit-layers 1,3
    python examples/mteb_exits.py runs/quickstart/model --tasks "MTEB(Code, v1)"
    python examples/mteb_exits.py runs/quickstart/model --data ~/checkouts

The first two fetch mteb's data sets; the third needs no network. Results lie in mteb's own format in --out, where an
interrupted run finds what it has.
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from modular_star_encoder.data.functions import collect_functions
from modular_star_encoder.data.repositories import folder_repositories
from modular_star_encoder.evaluation.mteb_exits import run_mteb
from modular_star_encoder_cli import exit_list


class FunctionsOfAFolder(AbsTaskRetrieval):
    """The first paragraph of a Python function's docstring asks for the function, among all functions of the folder."""

    metadata = TaskMetadata(
        name="FunctionsOfAFolder",
        description="Descriptions of functions and their code, from a folder.",
        dataset={"path": "local/functions", "revision": "1"},
        type="Retrieval",
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn", "python-Code"],
        main_score="mrr_at_1000",
        modalities=["text"],
    )

    def __init__(self, folder: str) -> None:
        super().__init__()
        functions = collect_functions(folder_repositories(folder, languages=("python",))).functions
        # Only the first of several with the same description or code: the others would be wrong answers to it.
        first = {function.description: function for function in reversed(functions)}.values()
        functions = list({function.code: function for function in first}.values())
        if len(functions) < 2:
            raise ValueError(f"{folder} holds {len(functions)} documented functions: too few to rank.")
        queries = [{"id": f"q{row}", "text": function.description} for row, function in enumerate(functions)]
        corpus = [{"id": f"d{row}", "text": function.code, "title": ""} for row, function in enumerate(functions)]
        data = RetrievalSplitData(
            corpus=Dataset.from_list(corpus),
            queries=Dataset.from_list(queries),
            relevant_docs={f"q{row}": {f"d{row}": 1} for row in range(len(functions))},
            top_ranked=None,
        )
        self.dataset, self.data_loaded = {"default": {"test": data}}, True


def main() -> int:
    """Run; 0 on success, 2 after wrong input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub repository")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks or benchmarks of mteb")
    what.add_argument("--data", metavar="FOLDER", help="a folder of Python code")
    parser.add_argument("--exit-layers", metavar="LIST", type=exit_list, help="all (the default), or a list: 4,9")
    parser.add_argument("--out", metavar="FOLDER", default="runs/mteb", help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        tasks = arguments.tasks or [FunctionsOfAFolder(arguments.data)]
        # Another folder's results would be taken for this one's.
        out = Path(arguments.out, Path(arguments.data).resolve().name) if arguments.data else Path(arguments.out)
        scores = run_mteb(arguments.checkpoint, tasks, arguments.exit_layers, out)
    except KeyboardInterrupt:
        print("\nmteb_exits: interrupted; start it again to continue.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"mteb_exits: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for exit_layer, values in scores.items():
        for task, score in values.items():
            print(f"exit {exit_layer:3}  {task:40} {100 * score:6.2f}")
    print(f"results in {out / 'results'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
