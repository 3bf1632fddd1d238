"""Evaluate the exits of a checkpoint with mteb (extra `mteb`), on CoIR, MTEB(Code) or other tasks of mteb.

mteb computes the scores by its own protocol, with equal scores in arbitrary order. Each exit is a model with the name
`{owner}/{model}-exit-{k}`, so that each exit has its own result files. The revision is the Hub's commit, or a checksum
of the weights, so that a checkpoint gets new results after further training.

mteb downloads its datasets unless they are in the local cache; your own tasks (`local_task`) need no network.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from modular_star_encoder.data.prompts import LANGUAGES, code_prompt, text_prompt
from modular_star_encoder.evaluation.tasks import candidate_batches
from modular_star_encoder.inference import resolve_checkpoint
from modular_star_encoder.inference.checkpoints import checkpoint_checksum, load_checkpoint, load_config
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.utils.errors import UserError, naming_extra

with naming_extra():
    import mteb
    from datasets import Dataset
    from mteb.abstasks import AbsTask, AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
    from mteb.models.model_implementations import MODEL_REGISTRY


class Side(NamedTuple):
    """One side of a task, its queries or its documents: says if they are prose or code, and in which `language`."""

    is_code: bool
    language: str | None = None


TEXT, CODE, PYTHON = Side(False), Side(True), Side(True, "python")

TASK_SIDES = {
    "AppsRetrieval": (TEXT, PYTHON),
    "COIRCodeSearchNetRetrieval": (CODE, TEXT),
    "CodeSearchNetCCRetrieval": (CODE, CODE),
    "CodeTransOceanContest": (PYTHON, Side(True, "c++")),
    "CodeTransOceanDL": (PYTHON, PYTHON),
    "CosQA": (TEXT, PYTHON),
}
"""{task: (queries, documents)} of mteb's code tasks; in all other tasks, queries are prose and documents are code."""


class SharedExits:
    """Embeds texts at all exits in one pass, and keeps the embeddings because mteb asks for one exit after the other.

    mteb asks for the shallowest exit first; embeddings of deeper `exit_layers` are kept, in up to `memory_gb`
    (10^9 bytes); without space for them, only the requested exit is computed. `options` are passed to `encode_exits`.
    """

    def __init__(
        self,
        model: ModularStarEncoderForRetrieval,
        tokenizer: Any,
        exit_layers: Sequence[int],
        memory_gb: float = 4.0,
        **options: Any,
    ) -> None:
        self.model, self.limit = model, memory_gb * 1e9
        self._encode: Any = partial(encode_exits, model, tokenizer, **options)
        self.exit_layers = model.config.resolve_exits(exit_layers=exit_layers)
        self._kept: dict[tuple[bytes, int], np.ndarray] = {}

    def encode(self, texts: Sequence[str], exit_layer: int, prompt: str, *, progress: bool = False) -> np.ndarray:
        """Return the embeddings (N, D) float32 of N texts at one exit, each after `prompt`."""
        digest = hashlib.sha256(prompt.encode())
        for text in texts:
            digest.update(b"\0" + text.encode(errors="surrogatepass"))
        call = digest.digest()
        if (call, exit_layer) in self._kept:
            return self._kept.pop((call, exit_layer))
        deeper = [other for other in self.exit_layers if other > exit_layer]
        size = 4 * len(texts) * self.model.config.projection_size * len(deeper)
        if sum(array.nbytes for array in self._kept.values()) + size > self.limit:
            deeper = []
        exits = (exit_layer, *deeper)
        embeddings = self._encode(texts, exit_layers=exits, prompt=prompt, progress=progress)
        self._kept |= {(call, other): embeddings[other] for other in deeper}
        return embeddings[exit_layer]

    def expect(self, exit_layers: Sequence[int]) -> None:
        """Forget all kept embeddings, and prepare for mteb to ask for these exits next."""
        self._kept.clear()
        self.exit_layers = tuple(exit_layers)


class MtebExitEncoder(AbsEncoder):
    """Embeds texts at one exit of a model, in the interface that mteb expects.

    `TASK_SIDES` says which queries and documents are code and which are prose; each kind gets its published prompt.
    Symmetric tasks get no prompt.

    `shared` embeds at this exit, among others. `prompts` replaces prompts by others: {key of mteb: prefix}. The keys
    are, most specific first, `{task}-query`, `{task}`, `{task type}-query`, `{task type}`, `query`; or `document`.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self, shared: SharedExits, exit_layer: int, meta: ModelMeta, prompts: Mapping[str, str] | None = None
    ) -> None:
        self.shared, self.exit_layer, self.prompts = shared, exit_layer, dict(prompts or {})
        self.mteb_model_meta = meta

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, hf_subset: str, **options: Any
    ) -> np.ndarray:
        """Return the embeddings (N, D) float32 of N texts, which mteb passes in batches.

        Of the other options of mteb, `prompt_type` and `show_progress_bar` are used.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = self._prompt(task_metadata, hf_subset, options.get("prompt_type"))
        return self.shared.encode(texts, self.exit_layer, prompt, progress=options.get("show_progress_bar", True))

    def _prompt(self, task_metadata: Any, subset: str, prompt_type: Any) -> str:
        if (name := get_prompt_name(self.prompts, task_metadata, prompt_type)) is not None:
            return self.prompts[name]
        if prompt_type is None:
            return ""
        side = TASK_SIDES.get(task_metadata.name, (TEXT, CODE))[prompt_type.value == "document"]
        instructions = self.shared.model.config.instruction_prompts
        language = side.language or (subset if subset in LANGUAGES else None)
        make_prompt = partial(code_prompt, language) if side.is_code else text_prompt
        return make_prompt(instructions=instructions)


def run_mteb(
    checkpoint: str | os.PathLike[str],
    tasks: str | AbsTask | Iterable[str | AbsTask],
    exit_layers: Sequence[int] | None = None,
    out: str | os.PathLike[str] = "runs/mteb",
    *,
    model_name: str | None = None,
    prompts: Mapping[str, str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    memory_gb: float = 4.0,
    overwrite: bool = False,
    progress: bool = True,
    **encode_options: Any,
) -> dict[int, dict[str, float]]:
    """Evaluate exits of a checkpoint on tasks of mteb; return {exit_layer: {task: main score from 0 to 1}}.

    Existing results of the same weights and data are kept, so an interrupted run continues where it stopped.

    Args:
        checkpoint: folder or Hub id.
        tasks: names of tasks (`"CosQA"`) or benchmarks (`"CoIR"`, `"MTEB(Code, v1)"`), or task objects.
        exit_layers: exits to evaluate; all exits of the checkpoint if None.
        out: folder for mteb's result files: `results/{owner}__{model}-exit-{k}/{revision}/{task}.json`.
        model_name: `owner/model` in the results; by default the Hub id, or `local/{folder}`.
        prompts: see `MtebExitEncoder`.
        memory_gb: memory for embeddings that mteb needs later, see `SharedExits`.
        overwrite: evaluate again even if results exist.
        encode_options: passed to `encode_exits`: max_length, tokens_per_batch.
    """
    chosen = _resolve_tasks(tasks)
    path = resolve_checkpoint(checkpoint)
    model, tokenizer = load_checkpoint(path, max(exit_layers) if exit_layers else None, device, dtype)
    shared = SharedExits(model, tokenizer, exit_layers or model.config.exit_layers, memory_gb, **encode_options)
    metas = exit_model_metas(path, shared.exit_layers, model_name)
    encoders = [MtebExitEncoder(shared, k, meta, prompts) for k, meta in zip(shared.exit_layers, metas, strict=True)]
    cache = mteb.ResultCache(Path(out).expanduser())
    scores: dict[int, dict[str, float]] = {exit_layer: {} for exit_layer in shared.exit_layers}
    with tqdm(total=len(chosen) * len(encoders), desc="mteb", unit="run", disable=not progress) as bar:
        for task in chosen:
            for exit_layer, score in _run_task(task, encoders, cache, overwrite, progress):
                scores[exit_layer][task.metadata.name] = score
                bar.set_postfix_str(f"{task.metadata.name}, exit {exit_layer}")
                bar.update()
    return scores


def _run_task(
    task: AbsTask, encoders: Sequence[MtebExitEncoder], cache: mteb.ResultCache, overwrite: bool, progress: bool
) -> Iterator[tuple[int, float]]:
    """Evaluate one exit after the other on a task: store the results in the cache, and yield (exit, main score)."""
    was_loaded, due = task.data_loaded, []
    for encoder in encoders:
        known = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta)
        # mteb itself would reuse complete results of another dataset with the same name.
        if overwrite or known is None or known.dataset_revision != task.metadata.revision:
            due.append(encoder.exit_layer)
    encoders[0].shared.expect(due)
    if due and not was_loaded:
        task.load_data()  # once for all exits; mteb would load and drop the data for each exit
    options: dict[str, Any] = {"encode_kwargs": {"show_progress_bar": progress}, "show_progress_bar": False}
    for encoder in encoders:
        strategy = "always" if encoder.exit_layer in due else "only-missing"
        result = mteb.evaluate(encoder, task, cache=cache, overwrite_strategy=strategy, co2_tracker=False, **options)
        yield encoder.exit_layer, float(result.task_results[0].get_score())
    if not was_loaded and task.data_loaded:
        task.unload_data()


def exit_model_metas(
    checkpoint: str | os.PathLike[str],
    exit_layers: Sequence[int] | None = None,
    model_name: str | None = None,
    revision: str | None = None,
) -> list[ModelMeta]:
    """Return the `ModelMeta` of each exit, by which mteb can load the exit later; no weights are loaded here.

    See `run_mteb` for the arguments. If `revision` is None, it is `checkpoint_checksum(checkpoint)`.
    """
    config, path = load_config(checkpoint), resolve_checkpoint(checkpoint)
    is_local = os.path.isdir(path)
    name = model_name or (f"local/{Path(path).resolve().name}" if is_local else path)
    if "/" not in name:
        raise UserError("mteb.model_name", f"model_name={name!r} must have the form owner/model.")
    shared = {
        "revision": revision or checkpoint_checksum(path),
        "n_embedding_parameters": config.vocab_size * config.hidden_size,
        "max_tokens": config.max_position_embeddings,
        "embed_dim": config.projection_size,
        "framework": ["PyTorch", "Transformers"],
        "similarity_fn_name": "cosine",
        "use_instructions": config.instruction_prompts,
        "adapted_from": None if is_local else path,
    }
    metas = []
    for exit_layer in config.resolve_exits(exit_layers=exit_layers or config.exit_layers):
        with torch.device("meta"):
            parameters = ModularStarEncoderForRetrieval(config.cut(exit_layer)).num_parameters()
        # A partial function, as mteb writes the loader's arguments into the results, which must not hold local paths.
        loader = partial(load_exit_encoder, checkpoint=path, exit_layer=exit_layer)
        own = {"loader": loader, "name": f"{name}-exit-{exit_layer}", "n_parameters": parameters}
        metas.append(ModelMeta(**{**dict(ModelMeta.create_empty()), **shared, **own}))
    return metas


def register_exits(
    checkpoint: str | os.PathLike[str], exit_layers: Sequence[int] | None = None, model_name: str | None = None
) -> list[str]:
    """Register the exits of a checkpoint in mteb for this process, so that `mteb.get_model(name)` finds them.

    Returns the names of the exits in mteb. See `exit_model_metas` for the arguments and errors.
    """
    metas = {str(meta.name): meta for meta in exit_model_metas(checkpoint, exit_layers, model_name)}
    MODEL_REGISTRY.update(metas)
    return list(metas)


def load_exit_encoder(
    model_name: str,
    revision: str | None = None,
    *,
    checkpoint: str,
    exit_layer: int,
    device: str | None = None,
    dtype: str | None = None,
    prompts: Mapping[str, str] | None = None,
    **encode_options: Any,
) -> MtebExitEncoder:
    """Load one exit of a checkpoint; mteb calls this with the name and revision of the exit's `ModelMeta`."""
    model, tokenizer = load_checkpoint(checkpoint, exit_layer, device, dtype)
    shared = SharedExits(model, tokenizer, (exit_layer,), **encode_options)
    name = model_name.removesuffix(f"-exit-{exit_layer}")
    (meta,) = exit_model_metas(checkpoint, (exit_layer,), name, revision)
    return MtebExitEncoder(shared, exit_layer, meta, prompts)


def _resolve_tasks(tasks: str | AbsTask | Iterable[str | AbsTask]) -> list[AbsTask]:
    """Return the given tasks in order, without repetitions; a string stands for a task or all tasks of a benchmark."""
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
    """Make an mteb task of text → code retrieval from your own (description, code, language) rows.

    Of rows with the same description or code, only the first is kept, because the others would be wrong negatives.
    `name` is the name of the task and of its result files.
    """
    code_of: dict[str, str] = {}
    codes: set[str] = set()
    for description, code, _ in rows:
        if description not in code_of and code not in codes:
            code_of[description] = code
            codes.add(code)
    candidate_batches(len(code_of))  # checks the number of pairs
    digest = hashlib.sha256(json.dumps([list(code_of), list(code_of.values())]).encode()).hexdigest()

    class LocalTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description="Descriptions of code and the code that they describe.",
            dataset={"path": f"local/{name}", "revision": digest[:16]},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="mrr_at_1000",
            modalities=["text"],
        )

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            queries = [{"id": f"q{row}", "text": text} for row, text in enumerate(code_of)]
            documents = [{"id": f"d{row}", "text": text, "title": ""} for row, text in enumerate(code_of.values())]
            data = RetrievalSplitData(
                queries=Dataset.from_list(queries),
                corpus=Dataset.from_list(documents),
                relevant_docs={f"q{row}": {f"d{row}": 1} for row in range(len(code_of))},
                top_ranked=None,
            )
            self.dataset, self.data_loaded = {"default": {"test": data}}, True

    return LocalTask()
