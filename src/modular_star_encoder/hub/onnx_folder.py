"""Export one exit as a folder for text-embeddings-inference and for sentence-transformers' ONNX back end.

    config.json                       a StarCoder2 configuration, which optimum supports, with the sizes of the exit
    tokenizer.json, tokenizer_config.json
    modules.json, 1_Pooling/, …       a SentenceTransformer, with module names that all versions accept
    onnx/model.onnx                   the exit; it is compared with the model before the folder appears
    onnx/model_qint8.onnx             the exit with 8-bit weights, if requested
    onnx/export.json, quantization.json   differences from the model, and the loss of quality with 8 bits

optimum's ONNX package needs transformers below 4.58 (optimum-onnx 0.1.0), which supports neither this model nor the
tokenizer class of transformers 5. The folder therefore declares another model type and tokenizer class.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.evaluation.metrics import bootstrap_interval
from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever, Retriever
from modular_star_encoder.evaluation.run import evaluate_tasks
from modular_star_encoder.evaluation.tasks import Estimate, RetrievalTask, TaskResult
from modular_star_encoder.inference import local_folder
from modular_star_encoder.inference.checkpoints import (
    MODULES,
    check_servable,
    load_checkpoint,
    save_tokenizer,
    stored_prompts,
    write_sentence_transformer_files,
)
from modular_star_encoder.inference.encode import encode_batches
from modular_star_encoder.inference.encoders import ExitEncoder, Prompted, Text
from modular_star_encoder.inference.onnx_export import (
    ONNX_FILE,
    QUANTIZED_FILE,
    SETTINGS,
    TOLERANCE,
    check_onnx,
    export_onnx,
    open_session,
    quantize_onnx,
)
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import folder_checksum, staged_folder, write_json
from modular_star_encoder.utils.reports import library_versions, machine_kind, markdown_table, metric_label, percent

EXPORT_REPORT = "onnx/export.json"
QUANTIZATION_REPORT = "onnx/quantization.json"
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "modular-star-encoder")
_STARCODER2 = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "norm_epsilon", "use_bias", "bos_token_id"),
)

TOP = 10
TIE = 1e-5
"""Scores that differ by less are ties, because rounding of the embeddings may change their order."""


@dataclass(frozen=True, slots=True)
class RankingComparison:
    """Says how far the rankings of an ONNX file, on one task, agree with those of its PyTorch model."""

    benchmark: str
    task: str
    queries: int
    candidates: int
    same_top_10: int  # number of queries whose first ten documents are the same, in the same order
    ties_in_top_10: int  # number of queries whose first ten differ only in the order of ties
    shared_top_10: float  # mean fraction of documents that both have among their first ten, in any order
    metric: str  # the task's main metric, such as `mrr`
    model: float  # value of the metric for the model, from 0 to 1
    file: float  # value of the metric for the file
    difference: Estimate  # `file` - `model`, with its 95 % bootstrap interval over the queries


class OnnxFolder(NamedTuple):
    """The written folder; and for each ONNX file ("float32", "int8"), its comparisons with the model, one per task."""

    folder: Path
    rankings: dict[str, list[RankingComparison]]


def export_onnx_folder(
    checkpoint: str | Path,
    exit_layer: int | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    int8: bool = False,
    tasks: Sequence[RetrievalTask] = (),
    progress: bool = True,
) -> OnnxFolder:
    """Export one exit of a retrieval checkpoint as a folder for servers that run ONNX.

    The ONNX file is compared with the model on batches of several shapes and on the rankings of `tasks`; the folder is
    written only if they agree. It contains the report `onnx/export.json`, and with `int8` also
    `onnx/quantization.json`, which compares the 8-bit file with the model on `tasks`.

    Args:
        checkpoint: a folder or Hub repository.
        exit_layer: exit to export; the deepest if None.
        out: folder to write; it must be empty or not exist. By default it is `{name}-{exit_layer}-onnx`, next to the
            checkpoint's folder (for a repository, in the current folder).
        int8: also write a file with 8-bit weights; needs `tasks`.
    """
    if int8 and not tasks:
        raise UserError("hub.onnx.int8", "`int8` needs `tasks`, on which the loss of quality is measured.")
    model, tokenizer = load_checkpoint(checkpoint, exit_layer, device="cpu", dtype=torch.float32)
    exit_layer = model.config.num_hidden_layers
    check_servable(model.config)
    out = default_folder(checkpoint, exit_layer) if out is None else Path(out).expanduser()
    with staged_folder(out) as staging, tqdm(unit="step", disable=not progress, leave=False) as bar:
        bar.set_description("exporting")
        _write_serving_files(staging, model.config, tokenizer, checkpoint_prompts(checkpoint, model.config))
        (staging / "onnx").mkdir()
        files = {"float32": staging / ONNX_FILE}
        export_onnx(model, files["float32"])
        bar.set_description("checking")
        differences = check_onnx(model, files["float32"])
        if int8:
            bar.set_description("quantising")
            files["int8"] = staging / QUANTIZED_FILE
            quantize_onnx(files["float32"], files["int8"])
        rankings: dict[str, list[RankingComparison]] = {name: [] for name in files}
        if tasks:
            bar.set_description("ranking")
            encoder = ExitEncoder(model, tokenizer, "model", exit_layers=(exit_layer,))
            rankings = compare_rankings(encoder, files, tasks, progress=progress)
        for one in rankings["float32"]:
            if other := one.queries - one.same_top_10 - one.ties_in_top_10:
                place = f"{one.benchmark}, {one.task}: {other} of {one.queries} queries"
                raise UserError("hub.onnx.rankings", f"The top 10 of the ONNX file and the model differ in {place}.")
        common = {"exit_layer": exit_layer, "versions": library_versions(PACKAGES), "machine": machine_kind()}
        compared = {"tolerance": TOLERANCE, **asdict(differences)}
        reports: dict[str, Any] = {EXPORT_REPORT: {"differences_from_torch": compared}}
        if int8:
            sizes = {f"{name}_bytes": path.stat().st_size for name, path in files.items()}
            reports[QUANTIZATION_REPORT] = {"settings": SETTINGS, **sizes}
        for (path, own), ranked in zip(reports.items(), rankings.values(), strict=True):
            write_json(staging / path, {**common, **own, "rankings": list(map(asdict, ranked))})
    return OnnxFolder(out, rankings)


def default_folder(checkpoint: str | os.PathLike[str], exit_layer: int, ending: str = "onnx") -> Path:
    """Return the default output folder for one exit: `{name}-{exit_layer}-{ending}`, next to the checkpoint."""
    local = local_folder(checkpoint)
    folder = Path(Path(checkpoint).name) if local is None else local.resolve()
    return folder.with_name(f"{folder.name}-{exit_layer}-{ending}")


def checkpoint_prompts(checkpoint: str | os.PathLike[str], config: ModularStarEncoderConfig) -> dict[str, str]:
    """Return the prompts in a checkpoint's SentenceTransformer files; if it has none, those of the published models."""
    return stored_prompts(checkpoint) or sentence_transformer_prompts(instructions=config.instruction_prompts)


def _write_serving_files(
    folder: Path, config: ModularStarEncoderConfig, tokenizer: PreTrainedTokenizerBase, prompts: dict[str, str]
) -> None:
    """Write all files outside of `onnx/`: configuration, tokenizer, and the modules of a SentenceTransformer."""
    # Versions 4 and 5 of transformers can read this configuration. No model is built from it: text-embeddings-inference
    # needs its sizes and padding token (backends/ort/src/lib.rs), and optimum needs a model type that it supports.
    rope = dict(config.rope_parameters)
    settings = {
        "architectures": ["Starcoder2Model"],
        "model_type": "starcoder2",
        **{name: getattr(config, name) for name in _STARCODER2},
        "eos_token_id": config.eos_token_id if isinstance(config.eos_token_id, int) else None,
        "pad_token_id": tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "sliding_window": None,
        "use_cache": False,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", settings)
    save_tokenizer(tokenizer, config, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(path, {name: value for name, value in settings.items() if name != "backend"})
    # An ONNX file has one exit, so the module takes no `exit_layer`.
    modules = [{name: value for name, value in module.items() if name != "kwargs"} for module in MODULES]
    write_sentence_transformer_files(folder, config, prompts, modules)


class OnnxEncoder:
    """Encodes texts with an ONNX file; prompts and tokenizer come from `reference`, the original model's encoder."""

    dimensions: tuple[int | None, ...] = (None,)

    def __init__(self, path: str | os.PathLike[str], reference: ExitEncoder, name: str) -> None:
        self.name, self.exit_layers = name, reference.exit_layers
        self._session, self._reference = open_session(path), reference
        path = Path(path)
        self.checksum = f"{reference.checksum}-{folder_checksum(path.parent, (path.name, f'{path.name}_data'))}"

    def prompt(self, text: Text) -> str:
        """See `Encoder`."""
        return self._reference.prompt(text)

    def encode(
        self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True
    ) -> Mapping[int | None, np.ndarray]:
        """See `Encoder`."""
        config: Any = self._reference.model.config
        embeddings = encode_batches(
            self._reference.tokenizer,
            [prompt + text for prompt, text in texts],
            self._encode_batch,
            max_length=config.max_position_embeddings,
            progress=progress,
        )
        if embeddings is None:  # no texts
            embeddings = np.empty((1, 0, config.projection_size), dtype=np.float32)
        return dict.fromkeys(exit_layers, embeddings[0])

    def _encode_batch(self, batch: Mapping[str, torch.Tensor]) -> np.ndarray:
        inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
        return self._session.run(["sentence_embedding"], inputs)[0][None]


def compare_rankings(
    reference: ExitEncoder,
    files: Mapping[str, str | os.PathLike[str]],
    tasks: Sequence[RetrievalTask],
    *,
    progress: bool = True,
) -> dict[str, list[RankingComparison]]:
    """Rank with `reference`, an encoder of one exit, and its ONNX files; return {file: comparisons, one per task}."""
    model = EmbeddingRetriever(reference)
    expected = evaluate_tasks(tasks, [model], progress=progress)
    comparisons = {}
    for name, path in files.items():
        file = EmbeddingRetriever(OnnxEncoder(path, reference, name))
        results = zip(tasks, expected, evaluate_tasks(tasks, [file], progress=progress), strict=True)
        comparisons[name] = [_comparison(task, (model, file), pair) for task, *pair in results]
    return comparisons


def _comparison(
    task: RetrievalTask, retrievers: tuple[Retriever, Retriever], results: Sequence[TaskResult]
) -> RankingComparison:
    parts = []
    for pool in task.pools:
        queries = [task.queries[row] for row in pool.queries]
        documents = [task.documents[row] for row in pool.documents]
        blocks = [one.scores(queries, documents, one.variants[0]).blocks() for one in retrievers]
        for expected, found in zip(*blocks, strict=True):
            if expected.scores.shape[1] != len(documents):
                message = f"{task.name} of {task.benchmark} has too many documents to compare: {len(documents):,}."
                raise UserError("hub.onnx.documents", message)
            parts.append(compare_tops(expected.scores, found.scores))
    same, tied, shared = map(np.concatenate, zip(*parts, strict=True))
    model, file = results
    changes = np.array(file.values) - np.array(model.values)
    return RankingComparison(
        benchmark=task.benchmark,
        task=task.name,
        queries=len(same),
        candidates=model.candidates,
        same_top_10=int(same.sum()),
        ties_in_top_10=int((tied & ~same).sum()),
        shared_top_10=float(shared.mean()),
        metric=model.main,
        model=model.estimates[model.main].value,
        file=file.estimates[file.main].value,
        difference=Estimate(float(changes.mean()), *bootstrap_interval(changes, seed=0)),
    )


def compare_tops(expected: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare the ten best columns of each row in two score matrices (Q, N); of equal scores, the first is the best.

    Returns three arrays (Q,): whether both have the same columns in the same order; whether, at every rank, the column
    of `expected` and the column of `found` differ by less than `TIE` in their scores in `expected`, so that another
    order is only a tie; the fraction of columns that both have, in any order.
    """
    first, second = (np.argsort(-scores, axis=1, kind="stable")[:, :TOP] for scores in (expected, found))
    in_order, as_found = (np.take_along_axis(expected, order, axis=1) for order in (first, second))
    shared = (first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1)
    return (first == second).all(axis=1), (np.abs(in_order - as_found) < TIE).all(axis=1), shared


def format_rankings(rankings: Mapping[str, Sequence[RankingComparison]]) -> str:
    """Return a Markdown table that compares each ONNX file with its model, a row per task; scores are × 100."""
    header = ("", "task", "same top 10", "shared top 10", "metric", "model", "file", "difference")
    rows = [
        (
            name,
            f"{one.benchmark}, {one.task}",
            f"{one.same_top_10 + one.ties_in_top_10} of {one.queries}",
            percent(one.shared_top_10),
            metric_label(one.metric),
            percent(one.model),
            percent(one.file),
            f"{100 * one.difference.value:+.2f} ({100 * one.difference.low:+.2f} to {100 * one.difference.high:+.2f})",
        )
        for name, comparisons in rankings.items()
        for one in comparisons
    ]
    return "\n".join(markdown_table([header, *rows]))
