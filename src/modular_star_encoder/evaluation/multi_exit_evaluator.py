"""Retrieval quality of every exit while a model trains, as a metric that can choose the best checkpoint.

The same evaluator serves `MultiExitTrainer(evaluator=…)` and, being one of sentence-transformers' own kind,
`SentenceTransformerTrainer(evaluator=…)`. All exits come from one pass over the texts.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import distributed, nn

from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.evaluation.exits import RetrievalRow, RetrievalSet
from modular_star_encoder.inference.encode import encode_exits

# What sentence-transformers calls our poolings.
POOLING_MODES = {"mean": "mean", "lasttoken": "lasttoken"}


class MultiExitEvaluator(BaseEvaluator):
    """Text → code retrieval at every exit: MRR, NDCG@10 and Recall@k of each, their mean and their worst over exits.

    The result names them `mrr_exit_4`, `mrr_mean`, `mrr_worst`, `ndcg_at_10_exit_4` and so on; trainers put `eval_` in
    front, so that `TrainingArguments(metric_for_best_model="eval_mrr_mean", load_best_model_at_end=True)` keeps the
    checkpoint whose exits are best on average, and `eval_mrr_worst` the one whose weakest exit is strongest. Ties count
    against the model (see `RetrievalSet`).

    In a training of several processes: `MultiExitTrainer` has each process encode its share of the texts, all of
    them score the whole, and the first one's figures are taken; with parameters split by FSDP every process encodes
    all. `SentenceTransformerTrainer` decides itself: from version 6.2 on, the first process evaluates alone.

    Args:
        retrieval_set: queries and documents; `from_pairs` does without one.
        tokenizer: needed for a `ModularStarEncoderForRetrieval`; a SentenceTransformer brings its own.
        exit_layers: which exits; all that the model has if None.
        distractors: rank each document among this many others (999 in the CodeSearchNet protocol, see `distractors`),
            which needs pairs; None ranks the full pool for every query.
        seed: of the batches of distractors.
        recall_at: values of k for Recall@k.
        prompts: prefixes `query`, `document` and `document_{language}`; by default those of the SentenceTransformer,
            or the published ones if the model's configuration asks for instructions.
        max_length: longer texts are cut to this number of tokens; the model's limit if None.
        tokens_per_batch: padding included; see `encode_exits`.
        name: goes before the names of the metrics, to tell several evaluators apart.
        write_csv: append a line per evaluation to `Multi-Exit_evaluation_{name}_results.csv` in the `output_path` that
            the trainer gives.
        progress: show progress bars.

    Raises:
        ValueError: `distractors` without pairs, or none.
    """

    def __init__(
        self,
        retrieval_set: RetrievalSet,
        *,
        tokenizer: Any = None,
        exit_layers: Sequence[int] | None = None,
        distractors: int | None = None,
        seed: int = 0,
        recall_at: Sequence[int] = (1, 10),
        prompts: Mapping[str, str] | None = None,
        max_length: int | None = None,
        tokens_per_batch: int = 8192,
        name: str = "",
        write_csv: bool = True,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if distractors is not None and (distractors < 1 or not retrieval_set.is_paired):
            raise ValueError("distractors must be at least 1, and needs pairs: one document for each query.")
        self.retrieval_set, self.tokenizer, self.exit_layers = retrieval_set, tokenizer, exit_layers
        self.distractors, self.seed, self.recall_at = distractors, seed, tuple(recall_at)
        self.prompts, self.max_length, self.tokens_per_batch = prompts, max_length, tokens_per_batch
        self.name, self.write_csv, self.progress = name, write_csv, progress
        self.primary_metric = f"{name}_mrr_mean" if name else "mrr_mean"

    @classmethod
    def from_pairs(cls, rows: Iterable[RetrievalRow | tuple[str, str, str]], **options: Any) -> MultiExitEvaluator:
        """An evaluator on (description, code, language) rows; `options` as for the class."""
        return cls(RetrievalSet.from_pairs(rows), **options)

    def __call__(
        self,
        model: SentenceTransformer | nn.Module,
        output_path: str | None = None,
        epoch: float = -1,
        steps: int = -1,
        *,
        across_processes: bool = False,
    ) -> dict[str, float]:
        """Evaluate a model.

        Args:
            model: a `ModularStarEncoderForRetrieval`, or a SentenceTransformer of such a model, pooling as its
                configuration says and at most a normalisation. It is in evaluation mode for the time of the call.
            output_path: folder for the CSV file.
            epoch, steps: written into it.
            across_processes: every process of the training calls this, so the texts may be divided among them.

        Raises:
            ValueError: a model of another kind, an exit that it doesn't have, no tokenizer, or embeddings that are NaN.
        """
        parts = self._parts(model)
        asked = [parts.prompts.get("query", "") + query for query in self.retrieval_set.queries]
        queries = self._encode(parts, asked, across_processes)
        documents = self._encode(parts, self._documents(parts.prompts), across_processes)
        protocol = {"distractors": self.distractors, "seed": self.seed, "recall_at": self.recall_at}
        per_exit = {
            exit_layer: self.retrieval_set.score(embeddings, documents[exit_layer], **protocol)
            for exit_layer, embeddings in queries.items()
        }
        metrics = _over_exits(per_exit)
        if output_path is not None and self.write_csv:
            self._write_line(Path(output_path), {"epoch": epoch, "steps": steps, **metrics})
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        if isinstance(model, SentenceTransformer):
            self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the evaluator."""
        return {"exit_layers": self.exit_layers, "distractors": self.distractors}

    def _documents(self, prompts: Mapping[str, str]) -> list[str]:
        """The documents, each with the prompt of its language, or that of any code."""
        any_code = prompts.get("document", "")
        return [
            (prompts.get(f"document_{language}", any_code) if language else any_code) + document
            for document, language in zip(self.retrieval_set.documents, self.retrieval_set.languages, strict=True)
        ]

    def _parts(self, model: SentenceTransformer | nn.Module) -> _Parts:
        """What encoding needs of either kind of model."""
        if isinstance(model, SentenceTransformer):
            network = _network(model)
            prompts = {name: prompt or "" for name, prompt in model.prompts.items()}
            max_length = self.max_length or model.max_seq_length
            return _Parts(network, model.tokenizer, prompts if self.prompts is None else self.prompts, max_length)
        if self.tokenizer is None:
            raise ValueError("Give the evaluator a tokenizer: a model that is no SentenceTransformer has none.")
        prompts = sentence_transformer_prompts(instructions=model.config.instruction_prompts)
        return _Parts(model, self.tokenizer, prompts if self.prompts is None else self.prompts, self.max_length)

    def _encode(self, parts: _Parts, texts: list[str], across_processes: bool) -> dict[int, np.ndarray]:
        """Embeddings (N, D) of each exit."""
        exit_layers = self.exit_layers or parts.network.config.exit_layers

        def encode(share: list[str]) -> dict[int, np.ndarray]:
            return encode_exits(
                parts.network,
                parts.tokenizer,
                share,
                exit_layers=exit_layers,
                max_length=parts.max_length,
                tokens_per_batch=self.tokens_per_batch,
                progress=self.progress,
            )

        world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        if not across_processes or world == 1 or _is_split(parts.network):
            return encode(texts)
        unique = sorted(dict.fromkeys(texts), key=len)
        shares: list[dict[int, np.ndarray]] = [{}] * world
        distributed.all_gather_object(shares, encode(unique[distributed.get_rank() :: world]))
        places = {text: place for place, text in enumerate(unique)}
        order = np.array([places[text] for text in texts])
        return {
            exit_layer: np.stack([shares[place % world][exit_layer][place // world] for place in order])
            for exit_layer in shares[0]
        }

    def _write_line(self, folder: Path, line: dict[str, float]) -> None:
        """Append one line to the CSV file, which begins with the names of its columns."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"Multi-Exit_evaluation{'_' + self.name if self.name else ''}_results.csv"
        is_new = not path.exists()
        with path.open("a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            columns = list(line) if is_new else next(csv.reader(file), [])
            if set(columns) != set(line):
                raise ValueError(f"{path} holds other metrics; give this evaluator a name of its own.")
            writer = csv.DictWriter(file, columns)
            if is_new:
                writer.writeheader()
            writer.writerow(line)


def _over_exits(per_exit: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Each metric at each exit, its mean and its worst: `{4: {"mrr": 0.5}}` → `mrr_exit_4`, `mrr_mean`, `mrr_worst`."""
    result = {}
    for metric in next(iter(per_exit.values())):
        values = {exit_layer: scores[metric] for exit_layer, scores in per_exit.items()}
        result |= {f"{metric}_exit_{exit_layer}": value for exit_layer, value in values.items()}
        result |= {f"{metric}_mean": sum(values.values()) / len(values), f"{metric}_worst": min(values.values())}
    return result


class _Parts(NamedTuple):
    """What encoding needs of a model; `max_length` None is the network's limit."""

    network: nn.Module
    tokenizer: Any
    prompts: Mapping[str, str]
    max_length: int | None


def _network(model: SentenceTransformer) -> nn.Module:
    """The network of a SentenceTransformer whose other modules do what the network does itself.

    Raises:
        ValueError: another network, or modules that would change its embeddings.
    """
    network = getattr(model[0], "auto_model", None)
    names = [type(module).__name__ for module in model]
    config = getattr(network, "config", None)
    pools_alike = (
        names in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
        and hasattr(network, "projection_heads")
        and config.projection_order == "project_then_pool"
        and model[1].pooling_mode == POOLING_MODES.get(config.pooling)
        and model[1].include_prompt
    )
    if not pools_alike:
        raise ValueError(
            "MultiExitEvaluator needs a SentenceTransformer of a ModularStarEncoderForRetrieval, pooled as its "
            f"configuration says, with nothing behind but a normalisation; this one has {', '.join(names)}."
        )
    return network


def _is_split(network: nn.Module) -> bool:
    """Whether FSDP2 has split the parameters, so that every forward pass needs every process."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in network.modules())
