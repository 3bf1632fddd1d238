"""Measure the retrieval quality of every exit during training, for example to keep the best checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import distributed, nn

from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.evaluation.metrics import query_values, rank_task
from modular_star_encoder.evaluation.retrievers import CosineScores
from modular_star_encoder.evaluation.tasks import RetrievalTask, pairs_task, task_from_mappings
from modular_star_encoder.inference.checkpoints import is_servable
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.objectives.contrastive_settings import rank_and_count
from modular_star_encoder.utils.errors import UserError

_Encode = Callable[[list[str]], dict[int, np.ndarray]]  # from N texts to {exit_layer: embeddings (N, D)}


class MultiExitEvaluator(BaseEvaluator):
    """Evaluates text → code retrieval at every exit: MRR, NDCG@10 and Recall@k.

    Pass an evaluator as `MultiExitTrainer(evaluator=…)` or `SentenceTransformerTrainer(evaluator=…)`. One pass over the
    texts embeds them at all exits. Among documents with equal scores, relevant documents are ranked last.

    The metrics are `mrr_exit_4` and so on for each exit, `mrr_mean` and `mrr_worst` for the mean and the minimum over
    the exits, and likewise `ndcg_at_10_…` and `recall_at_{k}_…`. Trainers add the prefix `eval_`.
    `TrainingArguments(metric_for_best_model="eval_mrr_mean", load_best_model_at_end=True)` keeps the checkpoint with
    the best mean over the exits; `"eval_mrr_worst"` keeps the checkpoint whose worst exit is best.

    With several processes, each process of `MultiExitTrainer` embeds a share of the texts (all texts if FSDP splits the
    parameters), and then every process ranks all documents. With `SentenceTransformerTrainer` (sentence-transformers
    6.2 or newer), only the first process evaluates.

    Args:
        task: queries, documents, and which documents are relevant; `from_pairs` and `from_mappings` build it.
        tokenizer: required for a `ModularStarEncoderForRetrieval`; a SentenceTransformer has its own tokenizer.
        exit_layers: exits to evaluate; all exits of the model if None.
        recall_at: values of k for Recall@k.
        prompts: {name: prefix of texts}, with the names `query`, `document` and `document_{language}`. If None, a
            SentenceTransformer uses its own prompts; other models use the published prompts (none if
            `config.instruction_prompts` is false).
        max_length: maximum number of tokens of a text; longer texts are cut. If None, the model's limit.
        tokens_per_batch: maximum number of tokens in a batch, padding included; see `encode_exits` for the default.
        name: prefix of the names of the metrics, to tell several evaluators apart.
        progress: whether to show progress bars.

    Example:
        >>> rows = [("Sorts a list.", "def f(x): return sorted(x)", "python"), ("Adds.", "int g(int a) …", "c")]
        >>> evaluator = MultiExitEvaluator.from_pairs(rows, candidates=1000)
        >>> evaluator.primary_metric
        'mrr_mean'
        >>> evaluator(SentenceTransformer("runs/model"))["mrr_exit_4"]  # doctest: +SKIP
    """

    def __init__(
        self,
        task: RetrievalTask,
        *,
        tokenizer: Any = None,
        exit_layers: Sequence[int] | None = None,
        recall_at: Sequence[int] = (1, 10),
        prompts: Mapping[str, str] | None = None,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        name: str = "",
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.task, self.tokenizer, self.exit_layers, self.recall_at = task, tokenizer, exit_layers, tuple(recall_at)
        self.prompts, self.max_length, self.tokens_per_batch = prompts, max_length, tokens_per_batch
        self.name, self.progress = name, progress
        self.primary_metric = f"{name}_mrr_mean" if name else "mrr_mean"

    @classmethod
    def from_pairs(
        cls,
        rows: Iterable[tuple[str, str, str | None]],
        *,
        candidates: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> MultiExitEvaluator:
        """Build an evaluator from (description, code, language) rows.

        Args:
            rows: at least two rows.
            candidates: number of candidates of a query, at least two (1000 in CodeSearchNet's protocol). Rows are
                divided at random into batches of this size, and a query's candidates are the codes in its batch. If
                None, all codes are candidates.
            seed: random seed of the division into batches.
            options: arguments of `MultiExitEvaluator` other than `task`.
        """
        return cls(pairs_task("pairs", "all", rows, size=candidates, seed=seed), **options)

    @classmethod
    def from_mappings(
        cls,
        queries: Mapping[str, str],
        corpus: Mapping[str, str],
        relevant: Mapping[str, Collection[str]],
        language: str | None = None,
        **options: Any,
    ) -> MultiExitEvaluator:
        """Build an evaluator from the mappings that sentence-transformers' InformationRetrievalEvaluator takes.

        Args:
            queries, corpus: {id: text} of the queries, and of the documents, which are candidates of every query.
            relevant: {id of a query: ids of its relevant documents}; queries without relevant documents are left out.
            language: programming language of all documents; None if unknown, or if the documents are prose.
            options: arguments of `MultiExitEvaluator` other than `task`.
        """
        return cls(task_from_mappings(queries, corpus, relevant, language), **options)

    def __call__(
        self,
        model: SentenceTransformer | ModularStarEncoderForRetrieval,
        output_path: str | None = None,
        epoch: int = -1,
        steps: int = -1,
        *,
        across_processes: bool = False,
    ) -> dict[str, float]:
        """Evaluate every exit of a model; return {metric: a fraction between 0 and 1}.

        Args:
            model: a `ModularStarEncoderForRetrieval`, or a SentenceTransformer that wraps this model and has the same
                pooling. The model is set to evaluation mode; afterwards its previous mode is restored.
            output_path: not used, because the trainers log the metrics.
            epoch, steps: shown in the model card of a SentenceTransformer.
            across_processes: set it if all training processes make this call; each process embeds a share of the texts.

        Raises:
            UserError: the model is of another class, an exit or the tokenizer is missing, or a score is NaN.
        """
        network, encode, prompts = self._encoding(model)
        if across_processes:
            encode = partial(_encode_share, network, encode)
        queries = encode([prompts.get("query", "") + query.text for query in self.task.queries])
        default = prompts.get("document", "")
        documents = encode([prompts.get(f"document_{one.language}", default) + one.text for one in self.task.documents])
        scores = {k: self._score(embeddings, documents[k]) for k, embeddings in queries.items()}
        metrics: dict[str, float] = {}
        for name in next(iter(scores.values())):
            values = {k: one[name] for k, one in scores.items()}
            metrics |= {f"{name}_exit_{k}": value for k, value in values.items()}
            metrics |= {f"{name}_mean": sum(values.values()) / len(values), f"{name}_worst": min(values.values())}
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        if isinstance(model, SentenceTransformer):
            self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """Return {name: value} of the settings that a model card shows."""
        return {"exit_layers": self.exit_layers, "candidates": len(self.task.pools[0].documents)}

    def _score(self, queries: np.ndarray, documents: np.ndarray) -> dict[str, float]:
        """Return {metric: mean over the queries} from Q query embeddings (Q, D) and N document embeddings (N, D)."""
        ranking, _ = rank_task(self.task, lambda pool: CosineScores(queries[pool.queries], documents[pool.documents]))
        metrics = ("mrr", "ndcg@10", *(f"recall@{k}" for k in self.recall_at))
        return {metric.replace("@", "_at_"): float(np.mean(query_values(ranking, metric))) for metric in metrics}

    def _encoding(
        self, model: SentenceTransformer | ModularStarEncoderForRetrieval
    ) -> tuple[ModularStarEncoderForRetrieval, _Encode, Mapping[str, str]]:
        """Return (the retrieval model inside `model`, a function that encodes texts with it, {name: prompt})."""
        if isinstance(model, SentenceTransformer):
            network, tokenizer, max_length = _network(model), model.tokenizer, self.max_length or model.max_seq_length
            prompts = {name: prompt or "" for name, prompt in model.prompts.items()}
        elif self.tokenizer is None:
            raise UserError("evaluator.tokenizer.missing", "Give the evaluator a `tokenizer`: the model contains none.")
        else:
            network, tokenizer, max_length = model, self.tokenizer, self.max_length
            prompts = sentence_transformer_prompts(instructions=model.config.instruction_prompts)
        options: dict[str, Any] = {"exit_layers": self.exit_layers or None, "max_length": max_length}
        options |= {"tokens_per_batch": self.tokens_per_batch, "progress": self.progress}
        encode = partial(encode_exits, network, tokenizer, **options)
        return network, encode, prompts if self.prompts is None else self.prompts


def _network(model: SentenceTransformer) -> ModularStarEncoderForRetrieval:
    """Return the retrieval model in a SentenceTransformer; UserError if other modules would change its embeddings."""
    network: Any = getattr(model[0], "auto_model", None)  # its class differs if AutoModel ran remote code
    names = [type(module).__name__ for module in model]
    is_known = names in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    is_ours = is_known and hasattr(network, "projection_heads") and is_servable(network.config)
    if is_ours and model[1].pooling_mode == network.config.pooling and model[1].include_prompt:
        return network
    needed = "a ModularStarEncoderForRetrieval, Pooling as its config.json says, and optionally Normalize"
    message = f"The SentenceTransformer must consist of {needed}; its modules are {', '.join(names)}."
    raise UserError("evaluator.model.other", message)


def _encode_share(network: nn.Module, encode: _Encode, texts: list[str]) -> dict[int, np.ndarray]:
    """Embed a share of N texts in each process; return {exit_layer: embeddings (N, D) of all texts} to each process."""
    rank, world = rank_and_count()
    if world == 1:
        return encode(texts)
    from torch.distributed.fsdp import FSDPModule  # some builds of torch lack it

    # If FSDP2 has split the parameters, every process must take part in every forward pass.
    if any(isinstance(module, FSDPModule) for module in network.modules()):
        return encode(texts)
    unique = sorted(dict.fromkeys(texts), key=len)
    shares: list[dict[int, np.ndarray]] = [{}] * world
    distributed.all_gather_object(shares, encode(unique[rank::world]))
    places = {text: divmod(place, world) for place, text in enumerate(unique)}
    return {k: np.stack([shares[own][k][row] for row, own in (places[text] for text in texts)]) for k in shares[0]}
