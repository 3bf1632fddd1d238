"""Fine-tune the model mose-code on your code, compare scores before and after, slice it and search, in a few minutes.

    python examples/quickstart.py                      # on the packages that are installed in this environment
    python examples/quickstart.py --data ~/checkouts   # on a folder of your own repositories

All files are written to the output folder. An interrupted run continues when the same command is started again.
Scores on packages that mose-code was trained on (hub_configs/mose-code/corpus.yaml) are higher than on unseen code.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Two threads that spin while they wait for each other lose their time as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import transformers

from modular_star_encoder.cli.main import keep_few_compiled_operations
from modular_star_encoder.data.functions import open_corpus
from modular_star_encoder.evaluation.report import TABLES, Report
from modular_star_encoder.hub.subprocess_check import ReloadRequest, verify_reload
from modular_star_encoder.inference.checkpoints import slice_checkpoint
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.local_store import LocalStore
from modular_star_encoder.training.finetuning import finetune
from modular_star_encoder.training.recipes import FinetuningRecipe, hub_config_folder, load_config, load_recipe
from modular_star_encoder.utils.files import write_json

SHIPPED = "mose-code"
# Never trained on: the default folder to search here, and what later examples search.
KEPT_OUT = ("transformers", "huggingface-hub")
SEARCHED_PACKAGE = "huggingface_hub"
QUESTIONS = ("download a file from a repository", "delete a branch", "format a number of bytes for humans")


def main(argv: list[str] | None = None) -> int:
    """Run every stage; return the exit code: 0 on success, 2 after wrong input, 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    keep_few_compiled_operations()
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; start it again to continue from the last checkpoint.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"quickstart: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="settings that differ from the recipe, such as max_steps=20")
    add("--data", metavar="FOLDER", help="folder of repositories to use in place of the installed packages")
    add("--out", metavar="FOLDER", default="runs/quickstart", help="output folder")
    add("--recipe", metavar="FILE", help="recipe of fine-tuning (default: hub_configs/mose-code/finetune.yaml)")
    add("--slice-exit-layer", metavar="K", type=int, help="exit to slice at (default: the middle one)")
    add("--search-folder", metavar="FOLDER", help="code to search (default: a package kept out of training)")
    add("--question", metavar="TEXT", action="append", help="question to answer; may be repeated")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run all stages in order; fine-tuning and slicing are skipped if their results exist in the output folder."""
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    path = arguments.recipe or hub_config_folder(SHIPPED) / "finetune.yaml"
    source: dict[str, Any] = {"languages": ["python"]}
    source |= {"folder": arguments.data} if arguments.data else {"installed": True, "exclude": list(KEPT_OUT)}
    open_corpus(source)  # fails before anything is written if there is no code
    recipe = load_recipe(FinetuningRecipe, path, [f"data.functions={json.dumps(source)}", *arguments.overrides])
    config = load_config(recipe.model)
    slice_exit = config.check_exit(arguments.slice_exit_layer or config.exit_layers[len(config.exit_layers) // 2])

    announce("1/3  Fine-tune every exit on documented functions; whole repositories are held out")
    out = Path(arguments.out)
    log = finetune(recipe, out)
    model = out / "model"
    report = Report(TABLES.validate_python(log["retrieval"]["tables"]), ())
    print(report.to_markdown())
    print(summary(report))
    announce(f"2/3  Slice at exit {slice_exit}, and load it where this package does not exist")
    slice_report = slice_and_reload(model, slice_exit, out)
    announce("3/3  Search")
    hits = search(arguments, model)

    seconds = round(time.perf_counter() - start, 1)
    versions = {name: version(name) for name in ("torch", "transformers", "sentence-transformers")}
    results = {"finetuning": log, "slice": slice_report, "search": hits, "seconds": seconds, "versions": versions}
    write_json(out / "results.json", results)
    print(f"\n{seconds:.0f} s · checkpoint {model} · {out / 'results.json'}")


def announce(title: str) -> None:
    """Print the heading of a stage."""
    print(f"\n== {title}", flush=True)


def summary(report: Report) -> str:
    """Return a text with MRR × 100 of each exit before and after training, and of BM25 and the deepest exit."""
    mrr = {(row.retriever, row.exit_layer): 100 * row.mean.value for row in report.tables[0].rows}
    exits = [exit_layer for name, exit_layer in mrr if name == "trained"]
    lines = [f"exit {one}: {mrr['before training', one]:.1f} → {mrr['trained', one]:.1f}" for one in exits]
    deepest, bm25 = mrr["trained", exits[-1]], mrr["BM25", None]
    verdict = "beats" if deepest > bm25 else "does not beat"
    return "\n".join([*lines, f"Exit {exits[-1]} {verdict} BM25: {deepest:.1f} against {bm25:.1f} (MRR × 100)."])


def slice_and_reload(model: Path, exit_layer: int, out: Path) -> dict[str, Any]:
    """Slice the checkpoint at an exit; compare the slice's embeddings with those of the full model at this exit.

    Both are loaded in a process without this package. Returns {name: value}; RuntimeError if the embeddings differ.
    """
    folder = out / f"slice-{exit_layer}"
    if not folder.exists():
        slice_checkpoint(model, exit_layer, folder)
    texts = list(QUESTIONS)
    requests = [ReloadRequest(str(model), texts, exit_layers=[exit_layer]), ReloadRequest(str(folder), texts)]
    full, cut = verify_reload(requests)
    identical = bool(np.array_equal(full[f"exit-{exit_layer}"], cut["sentence_transformer"]))
    # AutoModel takes the mean of the tokens before the head, SentenceTransformer after it: equal up to rounding.
    difference = float(np.abs(full[f"exit-{exit_layer}"] - cut["auto_model"]).max())
    sizes = {path.name: (path / "model.safetensors").stat().st_size for path in (model, folder)}
    print(f"SentenceTransformer: {'identical to' if identical else 'DIFFERS from'} exit {exit_layer} of the full model")
    print(f"AutoModel: differs by at most {difference:.0e}")
    print(f"{sizes[folder.name] / 1e6:.1f} MB instead of {sizes[model.name] / 1e6:.1f} MB in {folder}")
    if not identical or difference > 1e-6:
        raise RuntimeError(f"The slice {folder} differs from exit {exit_layer} of {model}: delete {folder}.")
    return {"exit_layer": exit_layer, "identical": identical, "auto_model_difference": difference, "bytes": sizes}


def search(arguments: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Search a folder of code with the deepest exit; print and return the best three hits of each question."""
    folder = arguments.search_folder or arguments.data or Path(sys.modules[SEARCHED_PACKAGE].__file__).parent
    questions = arguments.question or list(QUESTIONS)
    index = CodeIndex.build(folder, LocalStore(), checkpoint=model)
    answers = index.search(questions, top_k=3)
    for answer in answers:
        print(f"# {answer.question}", *answer.hits, sep="\n")
    return [{"question": answer.question, "hits": [asdict(hit) for hit in answer.hits]} for answer in answers]


if __name__ == "__main__":
    sys.exit(main())
