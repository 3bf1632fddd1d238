"""How well mose-code ranks: every exit, fused with BM25, queries and documents of different exits, compressed forms.

    MOSE_DATA=~/data python benchmarks/shipped_model.py       # half an hour on two cores; --rows 100 for a rehearsal

CodeSearchNet test, 999 distractors, in every language of `$MOSE_DATA/codesearchnet`. results/{name}_evaluation is the
report of `mose evaluate`, results/{name}.md has the tables of the model card.
"""

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ratios import median_of, take_turns
from report import RESULTS, write

from modular_star_encoder.evaluation.benchmarks import load_benchmark
from modular_star_encoder.evaluation.lexical import BM25, bm25_scores
from modular_star_encoder.evaluation.metrics import bootstrap_interval, spread
from modular_star_encoder.evaluation.report import make_report
from modular_star_encoder.evaluation.retrievers import EmbeddingCache, EmbeddingRetriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import POOL, Pool
from modular_star_encoder.hub.onnx_export import OnnxEncoder, export_onnx, quantize_onnx
from modular_star_encoder.inference.checkpoints import checkpoint_checksum, load_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.inference.encoders import ExitEncoder
from modular_star_encoder.inference.exit_zero import NumpyEncoder
from modular_star_encoder.search.pieces import question_stems, stems
from modular_star_encoder.utils.reports import markdown_table

CHECKPOINT = Path(__file__).parent.parent / "hub_configs" / "mose-code"
SEARCH_WORDS = "BM25 of search"
Values = dict[str, list[float]]  # {language: one value for each query}
Encode = Callable[[list[str]], np.ndarray]


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=POOL, help="of a pool (default: %(default)s)")
    parser.add_argument("--name", default="mose_code", help="of the results (default: %(default)s)")
    parser.add_argument("--cache", help="folder that keeps the embeddings, so that an interrupted run continues")
    arguments = parser.parse_args()
    if "MOSE_DATA" not in os.environ:
        return print("skipped: set MOSE_DATA to a folder that holds codesearchnet/ruby_test.jsonl.gz")
    tasks: list[Any] = load_benchmark("codesearchnet-999", os.environ["MOSE_DATA"], allow_subset=True)
    cut = slice(arguments.rows)
    tasks = [replace(one, pools=[Pool(*(rows[cut] for rows in pool)) for pool in one.pools]) for one in tasks]
    model, tokenizer = load_checkpoint(CHECKPOINT, device="cpu")
    own = EmbeddingRetriever(ExitEncoder(model, tokenizer, "mose-code"), EmbeddingCache(arguments.cache))
    report = make_report(tasks, evaluate_tasks(tasks, [own, BM25()]), checksum=checkpoint_checksum(CHECKPOINT))
    report.write(RESULTS / f"{arguments.name}_evaluation")
    with tempfile.TemporaryDirectory() as folder:
        values = rank(tasks, own, compressed_forms(model, tokenizer, Path(folder)))
    figures: dict[str, Any] = {name: estimates(found) for name, found in values.items()}
    figures["milliseconds per text"] = milliseconds(model, tokenizer, [one.text for one in tasks[0].texts()[-64:]])
    text = markdown(figures, report.tables[0].size, model.config.exit_layers)
    print(f"{text}\n\n{write(arguments.name, figures, text)}")


def compressed_forms(model: Any, tokenizer: Any, folder: Path) -> dict[str, tuple[int, Encode]]:
    """{name: (exit, function that embeds texts)}: the deepest exit as int8 ONNX, exit 0 as tables in fewer bits."""
    export_onnx(model, folder / "model.onnx")
    quantize_onnx(folder / "model.onnx", folder / "int8.onnx")
    deepest = model.config.num_hidden_layers
    encoder = OnnxEncoder(folder / "int8.onnx", ExitEncoder(model, tokenizer, "", exit_layers=[deepest]), "")
    zero = NumpyEncoder(CHECKPOINT)
    half = zero.table.astype(np.float16).astype(np.float32)
    eighth = np.rint(zero.table / np.abs(zero.table).max() * 127)  # one scale, as model2vec's int8
    onnx = lambda texts: encoder.encode([("", text) for text in texts], [deepest])[deepest]  # noqa: E731
    return {
        "ONNX int8": (deepest, onnx),
        "table float16": (0, partial(by_table, zero, half)),
        "table int8": (0, partial(by_table, zero, eighth)),
    }


def by_table(zero: NumpyEncoder, table: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Embeddings (N, D) of length 1: the sums of the rows of a table (V, D) for the tokens of each text."""
    sums = np.stack([table[one.ids].sum(axis=0) for one in zero.tokenizer.encode_batch_fast(list(texts))])
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def rank(tasks: Sequence[Any], own: EmbeddingRetriever, forms: Mapping[str, tuple[int, Encode]]) -> dict[str, Values]:
    """{what: values}: reciprocal ranks, and the shares of the float32 model's first ten documents that are kept."""
    values: dict[str, Values] = defaultdict(lambda: defaultdict(list))
    for task in tasks:
        for pool in task.pools:
            texts = [task.queries[row] for row in pool.queries], [task.documents[row] for row in pool.documents]
            words = np.concatenate([block.scores for block in BM25().scores(*texts, own.variants[0]).blocks()])
            stemmed = [question_stems(one.text) for one in texts[0]], [stems(one.text) for one in texts[1]]
            of_search = np.concatenate([block.scores for block in bm25_scores(*stemmed).blocks()])
            found = {"BM25": reciprocal_ranks(words), SEARCH_WORDS: reciprocal_ranks(of_search)}
            vectors = {one.exit_layer: own.scores(*texts, one) for one in own.variants}
            scores = {(k, j): vectors[k].queries[:] @ vectors[j].documents[:].T for k in vectors for j in vectors}
            for (k, j), part in scores.items():
                found[f"{k} → {j}"] = reciprocal_ranks(part)
                if k == j:
                    found[f"{k} + BM25"] = reciprocal_ranks(standardised(part) + standardised(words))
                    found[f"{k} + {SEARCH_WORDS}"] = reciprocal_ranks(standardised(part) + standardised(of_search))
            for name, (k, encode) in forms.items():
                asked, answers = (encode([one.text for one in part]) for part in texts)
                shared = shared_of_ten(scores[k, k], asked @ answers.T)
                found |= {name: reciprocal_ranks(asked @ answers.T), f"{name}, share of ten": shared}
                found[f"{name}, same ten"] = shared == 1
            for name, part in found.items():
                values[name][task.name].extend(part)
    return values


def shared_of_ten(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The fraction of documents that are among the ten best in both score matrices (Q, D), for each query."""
    first, second = (np.argsort(-scores, axis=1, kind="stable")[:, :10] for scores in (expected, found))
    return (first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1)


def reciprocal_ranks(scores: np.ndarray) -> np.ndarray:
    """1 / rank of document i for query i; ties count against it."""
    return 1 / (scores >= scores.diagonal()[:, None]).sum(axis=1)


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores (Q, D) with mean 0 and deviation 1 over the candidates of each query."""
    return (scores - scores.mean(axis=1, keepdims=True)) / (scores.std(axis=1, keepdims=True) + 1e-9)


def estimates(values: Values) -> dict[str, list[float]]:
    """{language, or `mean`: [mean, bounds of its 95 % interval]} × 100."""
    parts = {name: np.array(found, dtype=float) for name, found in values.items()}
    parts["mean"] = spread([{f"{name} {i}": x for i, x in enumerate(found)} for name, found in parts.items()])
    return {name: [100 * x for x in (float(part.mean()), *bootstrap_interval(part, 0))] for name, part in parts.items()}


def milliseconds(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """{exit: median milliseconds per text}, tokenising included; each exit alone, and exit 0 in numpy."""
    encode = partial(encode_exits, model, tokenizer, texts, progress=False)
    runs = {"exit 0, numpy": partial(NumpyEncoder(CHECKPOINT).encode, texts)}
    runs |= {f"exit {k}": partial(encode, exit_layers=[k]) for k in model.config.exit_layers}
    return {name: median_of([1000 * one / len(texts) for one in found]) for name, found in take_turns(runs, 3).items()}


def markdown(figures: Mapping[str, Any], size: str, exits: Sequence[int]) -> str:
    """The tables of the model card."""

    means = {name: f"{one['mean'][0]:.1f}" for name, one in figures.items() if "mean" in one}
    names = {f"exit {k}": f"{k} → {k}" for k in exits}
    for words in ("BM25", SEARCH_WORDS):
        names |= {words: words} | {f"exit {k} + {words}": f"{k} + {words}" for k in exits}
    cells = {name: ["{:.1f} ({:.1f}–{:.1f})".format(*one) for one in figures[name].values()] for name in names.values()}
    matrix = [[f"queries of exit {k}", *(means[f"{k} → {j}"] for j in exits)] for k in exits]
    forms = [name.removesuffix(", same ten") for name in figures if name.endswith("same ten")]
    kept = [[one, means[f"{one}, same ten"], means[f"{one}, share of ten"], means[one]] for one in forms]
    times = [[name, f"{one['value']:.2f}"] for name, one in figures["milliseconds per text"].items()]
    parts = [
        f"MRR × 100 with its 95 % interval; {size}. “+ BM25”: sum of both scores, standardised over the candidates. "
        f"{SEARCH_WORDS}: with the words of `mose search` (stems, parts of identifiers, no stop words).",
        markdown_table([["", *figures["BM25"]], *([label, *cells[name]] for label, name in names.items())]),
        "Every query exit with every document exit, mean MRR × 100:",
        markdown_table([["", *(f"documents of exit {k}" for k in exits)], *matrix]),
        "Fewer bits: queries that keep their ten first documents in any order, and the share of ten that is kept, %:",
        markdown_table([["", "same ten", "share of ten", "MRR × 100"], *kept]),
        "Median milliseconds per text, tokenising included, for the last 64 Go functions of the task:",
        markdown_table([["", "ms"], *times]),
    ]
    return "\n\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts)


if __name__ == "__main__":
    main()
