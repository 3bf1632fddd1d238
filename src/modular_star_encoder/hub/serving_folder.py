"""One exit as a folder for servers that run ONNX: text-embeddings-inference, and sentence-transformers' ONNX back end.

    config.json                       a StarCoder2's, the type that optimum knows; its sizes are those of the exit
    tokenizer.json, tokenizer_config.json
    modules.json, 1_Pooling/, …       a SentenceTransformer, by the module names that all versions know
    onnx/model.onnx                   checked against the model before the folder appears
    onnx/model_qint8.onnx             the same with 8-bit weights, if asked for
    onnx/export.json, quantization.json   what was compared, and what the 8 bits cost

optimum's ONNX package needs transformers below 4.58 (optimum-onnx 0.1.0), where neither our code nor transformers 5's
tokenizer class is known; hence the type and the class that this folder names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.evaluation.tasks import RetrievalTask
from modular_star_encoder.hub.onnx_ranking import RankingComparison, compare_rankings
from modular_star_encoder.inference.checkpoints import MODULES, check_servable, write_sentence_transformer_files
from modular_star_encoder.inference.encoders import ExitEncoder
from modular_star_encoder.inference.load import checkpoint_file, load_checkpoint
from modular_star_encoder.inference.onnx_export import (
    ONNX_FILE,
    QUANTIZED_FILE,
    SETTINGS,
    TOLERANCE,
    check_onnx,
    export_onnx,
    quantize_onnx,
)
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.utils.files import staged_folder, write_json
from modular_star_encoder.utils.reports import library_versions, machine_kind

EXPORT_REPORT = "onnx/export.json"
QUANTIZATION_REPORT = "onnx/quantization.json"

PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "modular-star-encoder")

_STARCODER2 = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "norm_epsilon",
    "use_bias",
    "bos_token_id",
)


class ServingFolder(NamedTuple):
    """What was written: the folder, and for each ONNX file ("float32", "int8") how it ranks beside its model."""

    folder: Path
    rankings: dict[str, list[RankingComparison]]


def export_for_serving(
    checkpoint: str | os.PathLike,
    exit_layer: int | None = None,
    out: str | os.PathLike | None = None,
    *,
    int8: bool = False,
    tasks: Sequence[RetrievalTask] = (),
    progress: bool = True,
) -> ServingFolder:
    """Write one exit of a retrieval checkpoint as a folder for serving.

    The ONNX file is compared with the model at several shapes, and on the rankings of `tasks`; the folder appears only
    if they agree. Two reports go with it: `onnx/export.json`, and with `int8` `onnx/quantization.json`, which says what
    the 8 bits cost on `tasks`.

    Args:
        checkpoint: a folder or Hub repository.
        exit_layer: the exit; the deepest if None.
        out: folder to write, which must not exist or be empty; beside the checkpoint's (for a repository, here) as
            `{name}-{exit_layer}-onnx` if None.
        int8: also write the file with 8-bit weights.
        tasks: what to rank.
        progress: whether to show progress bars.

    Raises:
        ValueError: a checkpoint or exit that isn't there to be had (see `load_checkpoint`), a model whose pooling
            SentenceTransformers don't know, `int8` without tasks to measure its cost on, `out` is taken, or the file
            does not compute what the model computes.
        OSError: as `load_checkpoint`.
        ImportError: the extra `onnx` is missing.
    """
    if int8 and not tasks:
        raise ValueError("8-bit weights cost quality, and how much has to be measured: give retrieval data with int8.")
    model, tokenizer = load_checkpoint(checkpoint, exit_layer, device="cpu", dtype=torch.float32)
    exit_layer = model.config.num_hidden_layers
    check_servable(model.config)
    out = default_folder(checkpoint, exit_layer) if out is None else Path(out).expanduser()
    with staged_folder(out) as staging:
        write_serving_files(staging, model.config, tokenizer, checkpoint_prompts(checkpoint, model.config))
        encoder = ExitEncoder(model, tokenizer, "model", exit_layers=(exit_layer,))
        rankings = _write_onnx_files(staging, encoder, int8, tasks, progress)
    return ServingFolder(out, rankings)


def _write_onnx_files(
    folder: Path, encoder: ExitEncoder, int8: bool, tasks: Sequence[RetrievalTask], progress: bool
) -> dict[str, list[RankingComparison]]:
    """Write, compare, and report on what lies in `onnx/`."""
    (folder / "onnx").mkdir()
    files, rankings = {"float32": folder / ONNX_FILE}, {"float32": []}
    total = 2 + int8 + bool(tasks)
    with tqdm(total=total, desc="exporting", unit="step", disable=not progress, leave=False) as bar:

        def step(description: str, function: Callable[..., Any], *arguments: Any) -> Any:
            bar.set_description(description)
            result = function(*arguments)
            bar.update()
            return result

        step("exporting", export_onnx, encoder.model, files["float32"])
        differences = step("checking", check_onnx, encoder.model, files["float32"])
        if int8:
            files["int8"] = folder / QUANTIZED_FILE
            step("quantising", quantize_onnx, files["float32"], files["int8"])
        if tasks:
            rankings = step("ranking", partial(compare_rankings, progress=progress), encoder, files, tasks)
    _check_rankings(rankings["float32"])
    common = {
        "exit_layer": encoder.exit_layers[0],
        "versions": library_versions(PACKAGES),
        "machine": machine_kind(),
    }
    compared = {"tolerance": TOLERANCE, **asdict(differences)}
    _write_report(folder / EXPORT_REPORT, common, rankings["float32"], differences_from_torch=compared)
    if int8:
        sizes = {f"{name}_bytes": path.stat().st_size for name, path in files.items()}
        _write_report(folder / QUANTIZATION_REPORT, common, rankings["int8"], settings=SETTINGS, **sizes)
    return rankings


def default_folder(checkpoint: str | os.PathLike, exit_layer: int) -> Path:
    """Where an exit goes if nothing else is said."""
    folder = Path(checkpoint).expanduser()
    name = f"{folder.resolve().name if folder.is_dir() else folder.name}-{exit_layer}-onnx"
    return folder.resolve().with_name(name) if folder.is_dir() else Path(name)


def checkpoint_prompts(checkpoint: str | os.PathLike, config: ModularStarEncoderConfig) -> dict[str, str]:
    """The prompts that a checkpoint's folder or repository names, or else the published ones."""
    file = checkpoint_file(checkpoint, "config_sentence_transformers.json")
    prompts = None if file is None else json.loads(file.read_text(encoding="utf-8")).get("prompts")
    return prompts or sentence_transformer_prompts(instructions=config.instruction_prompts)


def write_serving_files(
    folder: Path, config: ModularStarEncoderConfig, tokenizer: PreTrainedTokenizerBase, prompts: dict[str, str]
) -> None:
    """Write what stands beside `onnx/`: configuration, tokenizer, and the modules of a SentenceTransformer.

    Args:
        folder: an existing folder.
        config: of the model cut at the exit.
    """
    write_json(folder / "config.json", serving_config(config, tokenizer))
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["model_max_length"] = min(settings["model_max_length"], config.max_position_embeddings)
    write_json(path, {name: value for name, value in settings.items() if name != "backend"})
    # An ONNX file has one exit, and so nothing to pass on.
    modules = [{name: value for name, value in module.items() if name != "kwargs"} for module in MODULES]
    write_sentence_transformer_files(folder, config, prompts, modules)


def serving_config(config: ModularStarEncoderConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The configuration of a StarCoder2 of the exit's sizes, as transformers before and after version 5 reads it.

    No model is built from it. text-embeddings-inference needs sizes and a token for padding (backends/ort/src/lib.rs),
    optimum a type that it knows.
    """
    rope = dict(config.rope_parameters)
    padding = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    return {
        "architectures": ["Starcoder2Model"],
        "model_type": "starcoder2",
        **{name: getattr(config, name) for name in _STARCODER2},
        "eos_token_id": config.eos_token_id if isinstance(config.eos_token_id, int) else None,
        "pad_token_id": padding,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "sliding_window": None,
        "use_cache": False,
        "torch_dtype": "float32",
    }


def _check_rankings(comparisons: Sequence[RankingComparison]) -> None:
    for comparison in comparisons:
        if not comparison.agrees:
            other = comparison.queries - comparison.same_top_10 - comparison.ties_in_top_10
            raise ValueError(
                f"The ONNX file ranks otherwise than the model: {other} of {comparison.queries} queries of "
                f"{comparison.benchmark}, {comparison.task} have other first ten documents."
            )


def _write_report(path: Path, common: dict[str, Any], comparisons: Sequence[RankingComparison], **own: Any) -> None:
    rankings = [comparison.to_dict() for comparison in comparisons]
    write_json(path, {**common, **own, "rankings": rankings})
