"""The whole way in a few minutes: measure the shipped model, fine-tune it on your code, measure again, slice, search.

    python examples/quickstart.py                      # on the packages installed beside this one
    python examples/quickstart.py --data ~/checkouts   # on a folder of your own repositories

Everything is written to the output folder. An interrupted run continues when it is started again.
Packages that the shipped model was trained on (hub_configs/mose-code/corpus.yaml) look better than unseen code would.
"""

import argparse
import json
import os
import shutil
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
from modular_star_encoder.data.splits import RetrievalData
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.report import Report, make_report
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import held_out_tasks
from modular_star_encoder.hub.subprocess_check import ReloadRequest, verify_reload
from modular_star_encoder.inference.checkpoints import load_checkpoint, slice_checkpoint
from modular_star_encoder.inference.encoders import ExitEncoder
from modular_star_encoder.search.index import CodeIndex
from modular_star_encoder.search.local_store import LocalStore
from modular_star_encoder.training.finetuning import finetune, prepare_data
from modular_star_encoder.training.recipes import FinetuningRecipe, hub_config_folder, load_config, load_recipe
from modular_star_encoder.utils.files import write_json

SHIPPED = "mose-code"
# Never trained on: the default folder to search here, and what later examples search.
KEPT_OUT = ("transformers", "huggingface-hub")
SEARCHED_PACKAGE = "huggingface_hub"
QUESTIONS = ("download a file from a repository", "delete a branch", "format a number of bytes for humans")


def main(argv: list[str] | None = None) -> int:
    """Run every stage; 0 on success, 2 after wrong input, 130 after Ctrl-C."""
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
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="settings that differ from the recipe, such as max_steps=20")
    add("--data", metavar="FOLDER", help="folder of repositories to use in place of the installed packages")
    add("--out", metavar="FOLDER", default="runs/quickstart", help="where everything is written")
    add("--recipe", metavar="FILE", help="recipe of fine-tuning (default: hub_configs/mose-code/finetune.yaml)")
    add("--slice-exit-layer", metavar="K", type=int, help="exit to slice at (default: the middle one)")
    add("--search-folder", metavar="FOLDER", help="code to search (default: a package kept out of training)")
    add("--question", metavar="TEXT", action="append", help="question to answer; may be repeated")
    add("--restart", action="store_true", help="remove what an earlier run left in the output folder")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """All stages in order; each is skipped when its result is there already."""
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    path = arguments.recipe or hub_config_folder(SHIPPED) / "finetune.yaml"
    source: dict[str, Any] = {"languages": ["python"]}
    source |= {"folder": arguments.data} if arguments.data else {"installed": True, "exclude": list(KEPT_OUT)}
    open_corpus(source)  # fails before anything is written if there is no code
    recipe = load_recipe(FinetuningRecipe, path, [f"data.functions={json.dumps(source)}", *arguments.overrides])
    config = load_config(recipe.model)
    slice_exit = config.check_exit(arguments.slice_exit_layer or config.exit_layers[len(config.exit_layers) // 2])
    out = open_output(arguments, recipe)

    announce("1/5  Collect documented functions; whole repositories are held out")
    data = prepare_data(recipe.rows(), out / "data", progress=True)
    announce("2/5  Measure the shipped model on the held-out functions")
    shipped = encoder(recipe.model, "shipped", recipe)
    print(evaluate(data, [shipped], recipe, out).to_markdown())
    announce("3/5  Fine-tune every exit on the other functions")
    log = finetune(recipe, out / "finetuned", data=data, before=False)
    announce("4/5  Measure again")
    model = out / "finetuned" / "model"
    results = evaluate(data, [encoder(model, "fine-tuned", recipe), shipped], recipe, out)
    print(results.to_markdown())
    print(summary(results))
    announce(f"5/5  Slice at exit {slice_exit}, load it back where this package does not exist, and search")
    slice_report = slice_and_reload(model, data, slice_exit, out)
    hits = search(arguments, model)

    seconds = round(time.perf_counter() - start, 1)
    report = {
        "data": arguments.data or "installed packages",
        "functions": {"train": data.report["train"], "test": data.report["held_out"]},
        "retrieval": results.to_dict(),
        "slice": slice_report,
        "search": hits,
        "finetuning": log,
        "seconds": seconds,
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
    }
    write_json(out / "results.json", report)
    print(f"\n{seconds:.0f} s · checkpoint {model} · {out / 'results.json'}")


def announce(title: str) -> None:
    """A heading between the stages."""
    print(f"\n== {title}", flush=True)


def open_output(arguments: argparse.Namespace, recipe: FinetuningRecipe) -> Path:
    """The output folder, new or left by an interrupted run with the same settings.

    Raises:
        ValueError: the folder holds a run with other settings, or something that no quickstart wrote.
    """
    out = Path(arguments.out)
    settings = json.loads(json.dumps(recipe.to_dict()))  # tuples become lists, as in the file
    written = out / "settings.json"
    if arguments.restart and written.is_file():
        shutil.rmtree(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not written.is_file():
            raise ValueError(f"{out} is not empty and holds no quickstart run; name another folder with --out.")
        if json.loads(written.read_text(encoding="utf-8")) != settings:
            raise ValueError(
                f"{out} holds a run with other settings; use --restart, or name another folder with --out."
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(written, settings)
    return out


def encoder(checkpoint: str | Path, name: str, recipe: FinetuningRecipe) -> ExitEncoder:
    """A checkpoint at every exit, with the text lengths of training."""
    model, tokenizer = load_checkpoint(checkpoint)
    return ExitEncoder(model, tokenizer, name, max_length=max(recipe.lengths().values()))


def evaluate(data: RetrievalData, encoders: list[ExitEncoder], recipe: FinetuningRecipe, out: Path) -> Report:
    """MRR among the held-out functions at every exit of some encoders, beside BM25; results are stored in `out`."""
    tasks = held_out_tasks(data.held_out, limit=recipe.eval_pairs, seed=recipe.seed)
    return make_report(tasks, evaluate_tasks(tasks, [*map(EmbeddingRetriever, encoders), BM25()], out=out))


def summary(results: Report) -> str:
    """What fine-tuning gained at each exit, and whether the deepest beats BM25."""
    mrr = {(row.retriever, row.exit_layer): 100 * row.mean.value for row in results.tables[0].rows}
    exits = [exit_layer for name, exit_layer in mrr if name == "shipped"]
    lines = [f"exit {one}: {mrr['shipped', one]:.1f} → {mrr['fine-tuned', one]:.1f}" for one in exits]
    deepest, bm25 = mrr["fine-tuned", exits[-1]], mrr["BM25", None]
    verdict = "beats" if deepest > bm25 else "does not beat"
    return "\n".join([*lines, f"Exit {exits[-1]} {verdict} BM25: {deepest:.1f} against {bm25:.1f} (MRR × 100)."])


def slice_and_reload(model: Path, data: RetrievalData, exit_layer: int, out: Path) -> dict[str, Any]:
    """Cut the checkpoint; compare both checkpoints' embeddings at this exit in a process without our package."""
    folder = out / f"slice-{exit_layer}"
    if not folder.exists():
        slice_checkpoint(model, exit_layer, folder)
    texts = [example.description for example in data.held_out[:16] if example.description]
    requests = [ReloadRequest(str(model), texts, exit_layers=[exit_layer]), ReloadRequest(str(folder), texts)]
    full, cut = verify_reload(requests)
    identical = bool(np.array_equal(full.exits[exit_layer], cut.sentence_transformer))
    # AutoModel takes the mean of the tokens before the head, SentenceTransformer after it: equal up to rounding.
    difference = float(np.abs(full.exits[exit_layer] - cut.auto_model).max())
    sizes = {path.name: (path / "model.safetensors").stat().st_size for path in (model, folder)}
    print(f"SentenceTransformer: {'identical to' if identical else 'DIFFERS from'} exit {exit_layer} of the full model")
    print(f"AutoModel: differs by at most {difference:.0e}")
    print(f"{sizes[folder.name] / 1e6:.1f} MB instead of {sizes[model.name] / 1e6:.1f} MB in {folder}")
    if not identical or difference > 1e-6:
        raise RuntimeError(f"The slice {folder} does not reproduce exit {exit_layer} of {model}.")
    return {"exit_layer": exit_layer, "identical": identical, "auto_model_difference": difference, "bytes": sizes}


def search(arguments: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Answer questions over a code folder with the deepest exit."""
    folder = arguments.search_folder or arguments.data or Path(sys.modules[SEARCHED_PACKAGE].__file__).parent
    questions = arguments.question or list(QUESTIONS)
    index = CodeIndex.build(folder, LocalStore(), checkpoint=model)
    answers = index.search(questions, top_k=3)
    for answer in answers:
        print(f"# {answer.question}", *answer.hits, sep="\n")
    return [{"question": answer.question, "hits": [asdict(hit) for hit in answer.hits]} for answer in answers]


if __name__ == "__main__":
    sys.exit(main())
