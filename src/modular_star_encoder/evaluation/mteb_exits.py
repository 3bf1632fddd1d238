"""Evaluate the exits of a checkpoint with mteb (extra `mteb`), on CoIR, MTEB(Code) or other tasks of mteb.

For mteb, exit k is a model named `{owner}/{model}-exit-{k}`, with a checksum of the weights as revision, so each exit
has result files of its own. mteb orders documents with equal scores arbitrarily, and downloads missing datasets.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from modular_star_encoder.data.prompts import LANGUAGES
from modular_star_encoder.evaluation.retrievers import EmbeddingCache, EmbeddingRetriever
from modular_star_encoder.evaluation.tasks import candidate_batches
from modular_star_encoder.inference import resolve_checkpoint
from modular_star_encoder.inference.checkpoints import checkpoint_checksum, load_checkpoint
from modular_star_encoder.inference.encoders import ExitEncoder, Text
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.utils.errors import UserError, naming_extra
from modular_star_encoder.utils.files import user_path

with naming_extra():
    import mteb
    from datasets import Dataset
    from mteb.abstasks import AbsTask, AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder, get_prompt_name

PROSE, CODE = None, ""  # CODE: code in the language that mteb's subset names, or in any language

TASK_SIDES: dict[str, tuple[str | None, str | None]] = {
    "AppsRetrieval": (PROSE, "python"),
    "COIRCodeSearchNetRetrieval": (CODE, PROSE),
    "CodeSearchNetCCRetrieval": (CODE, CODE),
    "CodeTransOceanContest": ("python", "c++"),
    "CodeTransOceanDL": ("python", "python"),
    "CosQA": (PROSE, "python"),
}
"""{task of mteb: (language of its queries, of its documents)}. In all other tasks, prose queries search for code."""


class MtebExitEncoder(AbsEncoder):
    """Embeds texts at one exit of a model; implements mteb's interface of encoders.

    Code and prose, told apart by `TASK_SIDES`, get their published prompts; tasks without queries get no prompt. mteb
    asks for one exit at a time, so the first call with a text embeds it at all `exit_layers` and caches the results.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        retriever: EmbeddingRetriever,
        exit_layer: int,
        exit_layers: Sequence[int],
        meta: ModelMeta,
        prompts: Mapping[str, str] | None = None,  # {mteb's key, such as `{task}-query`: prefix}, if not as published
    ) -> None:
        self.retriever, self.exit_layer, self.exit_layers = retriever, exit_layer, exit_layers
        self.mteb_model_meta, self.prompts = meta, dict(prompts or {})

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, hf_subset: str, **options: Any
    ) -> np.ndarray:
        """Return the embeddings (N, size) float32 of the N texts in all batches of `inputs`."""
        prompt = self._prompt(task_metadata, hf_subset, options.get("prompt_type"))
        texts = [(prompt, text) for batch in inputs for text in batch["text"]]
        self.retriever.embed(texts, self.exit_layers, progress=options.get("show_progress_bar", True))
        return self.retriever.rows(texts, self.exit_layer)[:]

    def _prompt(self, task_metadata: Any, subset: str, prompt_type: Any) -> str:
        if (name := get_prompt_name(self.prompts, task_metadata, prompt_type)) is not None:
            return self.prompts[name]
        if prompt_type is None:
            return ""
        language = TASK_SIDES.get(task_metadata.name, (PROSE, CODE))[prompt_type.value == "document"]
        if language == CODE and subset in LANGUAGES:
            language = subset
        return self.retriever.encoder.prompt(Text("", language))


def run_mteb(
    checkpoint: str | os.PathLike[str],
    tasks: str | AbsTask | Iterable[str | AbsTask],  # tasks or their names, or names of benchmarks, such as "CoIR"
    exit_layers: Sequence[int] | None = None,  # None: all exits of the checkpoint
    out: str | os.PathLike[str] = "runs/mteb",
    *,
    model_name: str | None = None,  # `owner/model` in the results; by default the Hub id, or `local/{folder}`
    prompts: Mapping[str, str] | None = None,  # in place of published prompts; see `MtebExitEncoder`
    overwrite: bool = False,  # whether to evaluate again if results exist
    progress: bool = True,
    **encode_options: Any,
) -> dict[int, dict[str, float]]:
    """Evaluate exits of a checkpoint on tasks of mteb; return {exit_layer: {task: main score from 0 to 1}}.

    mteb writes results to the folder `out`, as `results/{owner}__{model}-exit-{k}/{revision}/{task}.json`; a repeated
    call reuses them. `out/embeddings` is a cache. `encode_options` are arguments of `encode_exits`: max_length,
    tokens_per_batch and dtype.
    """
    chosen, out = _resolve_tasks(tasks), user_path(out)
    path = resolve_checkpoint(checkpoint)
    is_local = os.path.isdir(path)
    name = model_name or (f"local/{Path(path).resolve().name}" if is_local else path)
    if "/" not in name:
        raise UserError("mteb.model_name", f"model_name={name!r} must have the form owner/model.")
    model, tokenizer = load_checkpoint(path, max(exit_layers) if exit_layers else None)
    encoder = ExitEncoder(model, tokenizer, name, exit_layers=exit_layers, **encode_options)
    retriever = EmbeddingRetriever(encoder, EmbeddingCache(out / "embeddings"))
    common = {"revision": checkpoint_checksum(path), "adapted_from": None if is_local else path}
    metas = {k: _model_meta(model.config, name, k, common) for k in encoder.exit_layers if k is not None}
    cache = mteb.ResultCache(out)
    options: dict[str, Any] = {"cache": cache, "co2_tracker": False, "show_progress_bar": False}
    options["encode_kwargs"] = {"show_progress_bar": progress}
    scores: dict[int, dict[str, float]] = {exit_layer: {} for exit_layer in metas}
    for task in tqdm(chosen, desc="mteb", unit="task", disable=not progress):
        # mteb itself would reuse complete results of another dataset with the same name.
        known = {k: cache.load_task_result(task.metadata.name, meta) for k, meta in metas.items()}
        revision = task.metadata.revision
        due = [k for k, one in known.items() if overwrite or one is None or one.dataset_revision != revision]
        was_loaded = task.data_loaded
        if due and not was_loaded:
            task.load_data()  # once for all exits; mteb would load and drop the data for each exit
        for k, meta in metas.items():
            options["overwrite_strategy"] = "always" if k in due else "only-missing"
            result = mteb.evaluate(MtebExitEncoder(retriever, k, due, meta, prompts), task, **options)
            scores[k][task.metadata.name] = float(result.task_results[0].get_score())
        if not was_loaded and task.data_loaded:
            task.unload_data()
    return scores


def _model_meta(config: Any, name: str, exit_layer: int, common: Mapping[str, Any]) -> ModelMeta:
    with torch.device("meta"):
        parameters = ModularStarEncoderForRetrieval(config.cut(exit_layer)).num_parameters()
    values = {"name": f"{name}-exit-{exit_layer}", "n_parameters": parameters, "embed_dim": config.projection_size}
    values |= {"n_embedding_parameters": config.vocab_size * config.hidden_size}
    values |= {"max_tokens": config.max_position_embeddings, "use_instructions": config.instruction_prompts}
    values |= {"framework": ["PyTorch", "Transformers"], "similarity_fn_name": "cosine"}
    return ModelMeta(**{**dict(ModelMeta.create_empty()), **values, **common})


def _resolve_tasks(tasks: str | AbsTask | Iterable[str | AbsTask]) -> list[AbsTask]:
    """Return the named tasks and the tasks of the named benchmarks, each task once."""
    chosen: dict[str, AbsTask] = {}
    for task in [tasks] if isinstance(tasks, str | AbsTask) else tasks:
        for one in _tasks_named(task) if isinstance(task, str) else [task]:
            chosen.setdefault(one.metadata.name, one)
    if not chosen:
        raise UserError("mteb.task.missing", "Name at least one task or benchmark of mteb in `tasks`.")
    return list(chosen.values())


def _tasks_named(name: str) -> Sequence[AbsTask]:
    try:
        return [mteb.get_task(name)]
    except KeyError as error:
        try:
            return mteb.get_benchmark(name).tasks
        except KeyError:
            raise UserError("mteb.task.unknown", f"mteb has no task or benchmark {name!r}: {error.args[0]}") from error


def local_task(rows: Iterable[tuple[str, str, str | None]], name: str) -> AbsTask:
    """Make an mteb task of finding code by description from (description, code, language) rows; skip repeated texts."""
    code_of: dict[str, str] = {}
    codes: set[str] = set()
    for description, code, _ in rows:
        if description not in code_of and code not in codes:
            code_of[description] = code
            codes.add(code)
    candidate_batches(len(code_of))  # checks the number of pairs
    revision = hashlib.sha256(json.dumps([list(code_of), list(code_of.values())]).encode()).hexdigest()[:16]
    queries = Dataset.from_list([{"id": f"q{row}", "text": text} for row, text in enumerate(code_of)])
    documents = [{"id": f"d{row}", "text": text, "title": ""} for row, text in enumerate(code_of.values())]
    relevant = {f"q{row}": {f"d{row}": 1} for row in range(len(code_of))}

    class LocalTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description="Descriptions of code and the code that they describe.",
            dataset={"path": f"local/{name}", "revision": revision},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="mrr_at_1000",
            modalities=["text"],
        )

    task, corpus = LocalTask(), Dataset.from_list(documents)
    data = RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None)
    task.dataset, task.data_loaded = {"default": {"test": data}}, True
    return task
