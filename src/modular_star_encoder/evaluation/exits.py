"""Retrieval quality at every exit, beside BM25 and the same model untrained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from modular_star_encoder.evaluation.harness import Cell, evaluate_tasks
from modular_star_encoder.evaluation.lexical import BM25
from modular_star_encoder.evaluation.retrievers import EmbeddingSystem
from modular_star_encoder.evaluation.scores import cosine_scores
from modular_star_encoder.evaluation.tasks import Judgements, Pool, RetrievalTask, distractor_batches
from modular_star_encoder.inference.encoders import ExitEncoder, Text
from modular_star_encoder.utils.reports import markdown_table, percent


@dataclass(frozen=True)
class RetrievalScores:
    """What one system reached. Figures are fractions between 0 and 1.

    `interval` is the 95 % bootstrap interval of `mrr` over the queries; `queries` is the number of queries ranked (rows
    of the incomplete last batch are not); `distractors` is how many wrong candidates each of them had.
    """

    mrr: float
    recall_at_1: float
    recall_at_10: float
    interval: tuple[float, float]
    queries: int
    distractors: int


class RetrievalRow(NamedTuple):
    """One pair: a description in prose and the function that it describes, without its documentation."""

    description: str
    code: str
    language: str


@dataclass(frozen=True)
class ExitResults:
    """Scores of each exit, and of the systems that a trained model has to beat.

    `untrained` is the same architecture with fresh weights: what the wording of the pairs gives away by itself.
    """

    exits: Mapping[int, RetrievalScores]
    bm25: RetrievalScores
    untrained: Mapping[int, RetrievalScores] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Only dicts, lists, strings and numbers, for JSON; exits become strings, as JSON wants."""
        return {
            "exits": {str(exit_layer): asdict(scores) for exit_layer, scores in self.exits.items()},
            "bm25": asdict(self.bm25),
            "untrained": {str(exit_layer): asdict(scores) for exit_layer, scores in self.untrained.items()},
        }


def evaluate_exits(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[RetrievalRow],
    *,
    exit_layers: Sequence[int] | None = None,
    untrained: bool = False,
    size: int = 1000,
    seed: int = 0,
    progress: bool = True,
    **encode_options: Any,
) -> ExitResults:
    """Find each description's code among `size` candidates (see `distractors`), at each exit and by BM25.

    Args:
        model: a `ModularStarEncoderForRetrieval`.
        rows: the pairs, of one language or of several; with several, distractors of other languages are easy ones.
        exit_layers: which exits; all that the model has if None.
        untrained: also measure the architecture with fresh weights (takes as long again, and as much memory).
        encode_options: go to `encode_exits`: max_length, tokens_per_batch, dtype.

    Raises:
        ValueError: an exit that the model doesn't have, or fewer than two rows.
    """
    task = pairs_task("folder", "all", [RetrievalRow(*row) for row in rows], size=size, seed=seed)
    encoder = ExitEncoder(model, tokenizer, "model", exit_layers=exit_layers, **encode_options)
    systems = [BM25(), EmbeddingSystem(encoder)]
    if untrained:
        systems.append(EmbeddingSystem(encoder.untrained(seed)))
    cells = evaluate_tasks([task], systems, seed=seed, progress=progress)
    exits = {system.name: _by_exit(cells, system.name) for system in systems}
    return ExitResults(exits["model"], exits["BM25"][None], exits.get("model, untrained", {}))


def pairs_task(
    benchmark: str,
    name: str,
    rows: Sequence[RetrievalRow],
    *,
    ids: Sequence[str] | None = None,
    size: int = 1000,
    seed: int = 0,
    **options: Any,
) -> RetrievalTask:
    """Find each description's code among `size` candidates, in the batches of `distractor_batches`.

    Args:
        ids: a name for each row; its number if None.
        options: other fields of the task.
    """
    pools = tuple(Pool(batch, batch) for batch in distractor_batches(len(rows), size, seed))
    return RetrievalTask(
        benchmark=benchmark,
        name=name,
        queries=[Text(row.description) for row in rows],
        documents=[Text(row.code, row.language) for row in rows],
        query_ids=[str(number) for number in range(len(rows))] if ids is None else list(ids),
        judgements=Judgements.one_each(range(len(rows))),
        pools=pools,
        **options,
    )


def _by_exit(cells: Sequence[Cell], system: str) -> dict[int | None, RetrievalScores]:
    """Scores of a system's whole embeddings, by exit."""
    widest: dict[int | None, Cell] = {}
    for cell in cells:
        kept = widest.get(cell.exit_layer)
        if cell.system == system and (kept is None or (cell.dimensions or 0) > (kept.dimensions or 0)):
            widest[cell.exit_layer] = cell
    return {exit_layer: _scores(cell) for exit_layer, cell in widest.items()}


def _scores(cell: Cell) -> RetrievalScores:
    mrr = cell.figures["mrr"]
    return RetrievalScores(
        mrr=mrr.value,
        recall_at_1=cell.figures["recall@1"].value,
        recall_at_10=cell.figures["recall@10"].value,
        interval=(mrr.low, mrr.high),
        queries=len(cell.values),
        distractors=cell.candidates - 1,
    )


COLUMNS = ("", "MRR", "95 % interval", "R@1", "R@10")


def format_table(results: ExitResults) -> str:
    """A Markdown table, aligned for reading as plain text, scores × 100; the line below it states the protocol."""
    rows = [("BM25", results.bm25)]
    rows += [(f"untrained, exit {exit_layer}", scores) for exit_layer, scores in results.untrained.items()]
    rows += [(f"exit {exit_layer}", scores) for exit_layer, scores in results.exits.items()]
    lines = markdown_table([COLUMNS, *((name, *_figures(scores)) for name, scores in rows)])
    scores = results.bm25
    protocol = f"{scores.queries} queries, {scores.distractors} distractors each, ties count against the system."
    return "\n".join([*lines, "", protocol])


def _figures(scores: RetrievalScores) -> tuple[str, ...]:
    low, high = scores.interval
    figures = (percent(scores.mrr), f"{percent(low)}–{percent(high)}")
    return (*figures, percent(scores.recall_at_1), percent(scores.recall_at_10))


NDCG_AT = 10
SCORES_PER_CHUNK = 2**24  # float64 and float32 copies of a chunk of scores take 200 MB together


@dataclass(frozen=True, slots=True, eq=False)
class RetrievalSet:
    """What is asked, what can be found, and what is right.

    Args:
        queries: descriptions, in order.
        documents: code, in order.
        languages: of each document, for its prompt; None where unknown.
        relevant: for each query the positions of its relevant documents, int64, at least one.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    languages: tuple[str | None, ...]
    relevant: tuple[np.ndarray, ...]

    @classmethod
    def from_pairs(cls, rows: Iterable[RetrievalRow | tuple[str, str, str]]) -> RetrievalSet:
        """(description, code, language) rows: the code of row i is what its description asks for.

        Raises:
            ValueError: fewer than two rows.
        """
        rows = [RetrievalRow(*row) for row in rows]
        if len(rows) < 2:
            raise ValueError(f"Ranking needs at least two pairs, not {len(rows)}.")
        descriptions, codes, languages = zip(*rows, strict=True)
        return cls(descriptions, codes, languages, tuple(np.array([position]) for position in range(len(rows))))

    @classmethod
    def from_mappings(
        cls,
        queries: Mapping[str, str],
        corpus: Mapping[str, str],
        relevant: Mapping[str, Collection[str]],
        language: str | None = None,
    ) -> RetrievalSet:
        """Texts by id, and for each query's id the ids of its documents; queries without any are left out.

        Args:
            language: of all documents.

        Raises:
            ValueError: no query has a relevant document, there are fewer than two documents, or `relevant` names a
                document that `corpus` doesn't hold.
        """
        places = {name: place for place, name in enumerate(corpus)}
        asked = [name for name in queries if relevant.get(name)]
        unknown = sorted({document for name in asked for document in relevant[name]} - set(places))
        if unknown:
            raise ValueError(f"relevant names {len(unknown)} documents that are not in corpus, such as {unknown[0]!r}.")
        if not asked or len(places) < 2:
            raise ValueError(
                f"Ranking needs a query with a relevant document and at least two documents, "
                f"not {len(asked)} and {len(places)}."
            )
        return cls(
            tuple(queries[name] for name in asked),
            tuple(corpus.values()),
            (language,) * len(places),
            tuple(np.array(sorted({places[document] for document in relevant[name]})) for name in asked),
        )

    @property
    def is_paired(self) -> bool:
        """Whether document i, and no other, is relevant to query i, for all documents."""
        return len(self.queries) == len(self.documents) and all(
            places.tolist() == [query] for query, places in enumerate(self.relevant)
        )

    def score(
        self,
        queries: np.ndarray,
        documents: np.ndarray,
        *,
        distractors: int | None,
        seed: int,
        recall_at: Sequence[int],
    ) -> dict[str, float]:
        """Quality of embeddings by cosine similarity.

        Args:
            queries: (Q, D) float32.
            documents: (N, D) float32.
            distractors: rank each document among this many others, in the batches of `distractor_batches`; None ranks
                all documents for every query.
            seed: of the batches.
            recall_at: values of k.

        Returns:
            `mrr` (of the first relevant document), `ndcg_at_10` and `recall_at_{k}` (share of the relevant documents
            among the first k), means over the queries, in [0, 1]. NDCG has gain 1 and discount log2(rank + 1)
            (Järvelin and Kekäläinen, 2002).

        Raises:
            ValueError: an embedding is NaN.
        """
        ranks: list[np.ndarray] = []
        for query_rows, document_rows in self._blocks(distractors, seed):
            chosen = documents if document_rows is None else documents[document_rows]
            scores = cosine_scores(queries[query_rows], chosen)
            if np.isnan(scores).any():
                raise ValueError("The embeddings hold NaN, so nothing can be ranked: has the training diverged?")
            for place, query in enumerate(query_rows):
                # Within a batch of distractors the document of the i-th query is the i-th document.
                relevant = self.relevant[query] if document_rows is None else np.array([place])
                ranks.append(relevant_ranks(scores[place], relevant))
        return mean_metrics(ranks, recall_at)

    def _blocks(self, distractors: int | None, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Rows of the queries and of the documents (None: all) that are scored together."""
        if distractors is not None:
            for rows in distractor_batches(len(self.queries), distractors + 1, seed):
                yield rows, rows
            return
        step = max(1, SCORES_PER_CHUNK // len(self.documents))
        for start in range(0, len(self.queries), step):
            yield np.arange(start, min(start + step, len(self.queries))), None


def relevant_ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Ranks (R,) of one query's relevant documents, ascending: the j-th stands behind j - 1 relevant ones and behind
    every wrong one that scores as much or more.

    Args:
        scores: (N,) float32; higher is better.
        relevant: (R,) positions, at least one.
    """
    own = np.sort(scores[relevant])[::-1]
    as_good = np.count_nonzero(scores >= own[:, None], axis=1)
    relevant_as_good = np.count_nonzero(own >= own[:, None], axis=1)
    return as_good - relevant_as_good + np.arange(1, len(own) + 1)


def mean_metrics(ranks: Sequence[np.ndarray], recall_at: Sequence[int]) -> dict[str, float]:
    """Means over queries of what `RetrievalSet.score` returns, from the ranks of each query's relevant documents."""
    ideal = np.cumsum(1 / np.log2(np.arange(2, NDCG_AT + 2)))
    gains = [(1 / np.log2(own[own <= NDCG_AT] + 1)).sum() / ideal[min(len(own), NDCG_AT) - 1] for own in ranks]
    return {
        "mrr": float(np.mean([1 / own[0] for own in ranks])),
        f"ndcg_at_{NDCG_AT}": float(np.mean(gains)),
        **{f"recall_at_{k}": float(np.mean([np.mean(own <= k) for own in ranks])) for k in recall_at},
    }
