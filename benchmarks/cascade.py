"""What a cascade costs and loses: a shallow exit finds candidates, a deep one ranks them. On rows of CodeSearchNet.

    MOSE_DATA=~/data python benchmarks/cascade.py CHECKPOINT --languages ruby

Each description is ranked against all functions of its language, by every exit alone and by every cascade of two exits.
A threshold of the shallow margin, below which the deep exit runs, is fitted on one half of the queries; all figures are
those of the other half, whose share of deep passes is counted. Functions beyond the candidates keep their shallow rank.

Cost is arithmetic by the formula of evaluation/profile_flops.py, tokens of the prompt included: of indexing 1,000
functions at the recall exit, and of one question. A question is embedded once, as deep as it needs; candidates are
embedded from text. Nothing is remembered between questions, as the package would.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cascade_figure import plot
from margins import FittedMargin, fit_threshold
from report import RESULTS, write

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.evaluation.benchmarks.codesearchnet import language_patterns, read_functions
from modular_star_encoder.evaluation.benchmarks.rows import require_files
from modular_star_encoder.evaluation.metrics import bootstrap_interval, spread
from modular_star_encoder.evaluation.tasks import RetrievalRow
from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.inference.encode import encode_exits, tokenize
from modular_star_encoder.inference.profile import flops_per_token
from modular_star_encoder.utils.reports import markdown_table, percent

CANDIDATES = (10, 50, 200)
SEED = 0


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a retrieval checkpoint")
    parser.add_argument("--languages", nargs="+", default=["ruby", "javascript", "go"], help="default: all three")
    parser.add_argument("--label", help="what the results call the checkpoint (default: the folder's name)")
    parser.add_argument("--name", help="of the results")
    arguments = parser.parse_args()
    if "MOSE_DATA" not in os.environ:
        parser.error("set MOSE_DATA to a folder that holds codesearchnet/")
    figures = measure_quality(arguments.checkpoint, arguments.languages)
    figures = {"checkpoint": arguments.label or Path(arguments.checkpoint).name, **figures}
    name = arguments.name or "cascade"
    text = table(figures)
    plot(figures, RESULTS / f"{name}.png")
    print(f"{text}\n\n{write(name, figures, text)}")


@dataclass(frozen=True, slots=True)
class Language:
    """Embeddings and sizes of one language.

    Attributes:
        name: of the language.
        queries, documents: exit_layer → (N, D); the document of query i is i.
        query_flops, document_flops: exit_layer → (N,) arithmetic of each text.
        held_out: (N,) bool; thresholds are fitted on the others.
    """

    name: str
    queries: dict[int, np.ndarray]
    documents: dict[int, np.ndarray]
    query_flops: dict[int, np.ndarray]
    document_flops: dict[int, np.ndarray]
    held_out: np.ndarray


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one way of ranking, for one language: (H,) values of the held-out queries.

    Attributes:
        reciprocal_ranks: of the right function.
        query_gflop: of a question, candidates included.
        deep: whether the deep exit ran.
    """

    reciprocal_ranks: np.ndarray
    query_gflop: np.ndarray
    deep: np.ndarray


def measure_quality(checkpoint: str, names: Sequence[str]) -> dict[str, Any]:
    """Every exit alone, and every cascade with and without a fitted margin."""
    model, tokenizer = load_checkpoint(checkpoint)
    folder = Path(os.environ["MOSE_DATA"], "codesearchnet")
    languages = [embed(model, tokenizer, name, read(folder, name)) for name in names]
    exits = list(model.config.exit_layers)
    ways = [summary(languages, [alone(one, exit_layer) for one in languages], exit_layer) for exit_layer in exits]
    for shallow, deep in ((r, d) for r in exits for d in exits if r < d):
        for candidates in CANDIDATES:
            found = [cascaded(one, shallow, deep, candidates) for one in languages]
            ways.append(summary(languages, [outcome for outcome, _, _ in found], shallow, deep, candidates))
            fitted = [(outcome, margin) for _, outcome, margin in found]
            ways.append(summary(languages, [one for one, _ in fitted], shallow, deep, candidates))
            ways[-1]["margins"] = {one.name: asdict(margin) for one, (_, margin) in zip(languages, fitted, strict=True)}
    sizes = {one.name: {"functions": len(one.held_out), "queries": int(one.held_out.sum())} for one in languages}
    return {"languages": sizes, "exit_layers": exits, "ways": ways}


def read(folder: Path, language: str) -> list[RetrievalRow]:
    """All documented functions of a language."""
    return list(read_functions(require_files(folder, language_patterns("test", language)), language).values())


def embed(model: Any, tokenizer: Any, name: str, rows: Sequence[RetrievalRow]) -> Language:
    """One pass over queries and functions gives every exit."""
    config = model.config
    instructions = config.instruction_prompts
    queries = [text_prompt(instructions=instructions) + row.description for row in rows]
    documents = [code_prompt(name, instructions=instructions) + row.code for row in rows]
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[np.random.default_rng(SEED).permutation(len(rows))[len(rows) // 2 :]] = True
    return Language(
        name,
        encode_exits(model, tokenizer, queries),
        encode_exits(model, tokenizer, documents),
        flops(model, tokenizer, queries),
        flops(model, tokenizer, documents),
        held_out,
    )


def flops(model: Any, tokenizer: Any, texts: list[str]) -> dict[int, np.ndarray]:
    """exit_layer → (N,) floating-point operations of each text."""
    config = model.config
    lengths = [len(ids) for ids in tokenize(tokenizer, texts, config.max_position_embeddings, progress=False)]
    return {
        exit_layer: np.array([length * flops_per_token(config, exit_layer, length) for length in lengths])
        for exit_layer in config.exit_layers
    }


def alone(language: Language, exit_layer: int) -> Outcome:
    """One exit ranks everything."""
    chosen = np.flatnonzero(language.held_out)
    ranks = np.array([rank for _, rank, _ in shallow_rankings(language, exit_layer, chosen)])
    cost = language.query_flops[exit_layer][chosen] / 1e9
    return Outcome(1 / ranks, cost, np.zeros(len(chosen), dtype=bool))


def cascaded(language: Language, shallow: int, deep: int, candidates: int) -> tuple[Outcome, Outcome, FittedMargin]:
    """A cascade whose deep exit always runs, one with a margin fitted on the other half, and that margin."""
    everything = np.arange(len(language.held_out))
    margins, first, second, candidate_flops = (np.empty(len(everything)) for _ in range(4))
    document, query = language.document_flops, language.query_flops
    for number, (order, rank, margin) in enumerate(shallow_rankings(language, shallow, everything)):
        found = order[:candidates]
        margins[number], first[number] = margin, 1 / rank
        second[number] = 1 / (deep_rank(language, deep, found, number) if rank <= candidates else rank)
        candidate_flops[number] = document[deep][found].sum()
    test = language.held_out
    fitted = fit_threshold(margins[~test], first[~test], second[~test])

    def outcome(runs: np.ndarray) -> Outcome:
        question = np.where(runs, query[deep], query[shallow])
        return Outcome(
            np.where(runs, second, first)[test],
            ((question + runs * candidate_flops) / 1e9)[test],
            runs[test],
        )

    return outcome(np.ones(len(everything), dtype=bool)), outcome(margins < fitted.margin), fitted


def shallow_rankings(
    language: Language, exit_layer: int, queries: np.ndarray
) -> Iterator[tuple[np.ndarray, int, float]]:
    """For each query all documents best first, the rank of the right one, and how far the best leads the second."""
    documents = language.documents[exit_layer]
    for number in queries:
        scores = documents @ language.queries[exit_layer][number]
        order = np.lexsort((np.arange(len(scores)) == number, -scores))  # the right one is the last of its equals
        yield order, int(np.flatnonzero(order == number)[0]) + 1, float(scores[order[0]] - scores[order[1]])


def deep_rank(language: Language, exit_layer: int, found: np.ndarray, right: int) -> int:
    """The rank of the right document among the candidates."""
    scores = language.documents[exit_layer][found] @ language.queries[exit_layer][right]
    return int(np.flatnonzero(found[np.lexsort((found == right, -scores))] == right)[0]) + 1


def summary(
    languages: Sequence[Language],
    outcomes: Sequence[Outcome],
    exit_layer: int,
    deep: int | None = None,
    candidates: int | None = None,
) -> dict[str, Any]:
    """Means over the languages, each of the same weight."""
    values = [{f"{one.name} {i}": float(value) for i, value in enumerate(outcome.reciprocal_ranks)}
              for one, outcome in zip(languages, outcomes, strict=True)]  # fmt: skip
    documents = [one.document_flops[exit_layer].mean() for one in languages]
    return {
        "exit_layer": exit_layer,
        "rerank_exit_layer": deep,
        "candidates": candidates,
        "mrr": float(np.mean([outcome.reciprocal_ranks.mean() for outcome in outcomes])),
        "interval": bootstrap_interval(spread(values), SEED),
        "deep_share": float(np.mean([outcome.deep.mean() for outcome in outcomes])),
        "index_gflop_per_1000": float(np.mean(documents)) * 1000 / 1e9,
        "query_gflop": float(np.mean([outcome.query_gflop.mean() for outcome in outcomes])),
    }


def table(figures: dict[str, Any]) -> str:
    """All ways of ranking, and below them the protocol."""
    header = ("", "MRR", "95 % interval", "deep passes", "GFLOP per 1,000 functions", "GFLOP per question")
    rows = [tuple(header)]
    for way in figures["ways"]:
        low, high = way["interval"]
        rows.append(
            (
                label(way),
                percent(way["mrr"]),
                f"{percent(low)}–{percent(high)}",
                f"{way['deep_share']:.0%}",
                f"{way['index_gflop_per_1000']:,.0f}",
                f"{way['query_gflop']:,.3f}",
            )
        )
    sizes = [f"{name} {one['queries']:,} queries among {one['functions']:,} functions"
             for name, one in figures["languages"].items()]  # fmt: skip
    return "\n".join([*markdown_table(rows), "", f"{figures['checkpoint']}; {'; '.join(sizes)}."])


def label(way: dict[str, Any]) -> str:
    """Such as `4 → 8, 50 candidates, fitted margin`."""
    if way["rerank_exit_layer"] is None:
        return f"exit {way['exit_layer']}"
    name = f"{way['exit_layer']} → {way['rerank_exit_layer']}, {way['candidates']} candidates"
    return f"{name}, fitted margin" if "margins" in way else name


if __name__ == "__main__":
    main()
