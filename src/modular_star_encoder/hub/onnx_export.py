"""Export one exit of a retrieval model as an ONNX file, or as a folder for servers that run ONNX (extra `onnx`).

`export_onnx` describes the file's inputs and outputs. The folder is for text-embeddings-inference and
sentence-transformers' ONNX back end:

    config.json                       a StarCoder2 configuration, which optimum supports, with the exit's sizes
    tokenizer.json, tokenizer_config.json
    modules.json, 1_Pooling/, …       a SentenceTransformer, with module names that all versions accept
    onnx/model.onnx                   the exit in float32, compared with the model before the folder appears
    onnx/model_qint8.onnx             the exit with 8-bit weights, if requested
    onnx/export.json                  how much the outputs differ; scores of the model and the ONNX files on tasks

optimum's ONNX package needs transformers below 4.58 (optimum-onnx 0.1.0), which supports neither this model nor the
tokenizer class of transformers 5. The folder therefore declares another model type and tokenizer class.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from modular_star_encoder.data.prompts import sentence_transformer_prompts
from modular_star_encoder.inference import checkpoints, local_folder
from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.inference.encode import encode_batches
from modular_star_encoder.inference.encoders import Encoder, ExitEncoder, Prompted, Text
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval
from modular_star_encoder.utils.errors import UserError, naming_extra
from modular_star_encoder.utils.files import folder_checksum, staged_folder, user_path, write_json
from modular_star_encoder.utils.reports import library_versions, machine_kind

if TYPE_CHECKING:
    import onnx_ir

    from modular_star_encoder.evaluation.report import Report
    from modular_star_encoder.evaluation.tasks import RetrievalTask

# Paths that sentence-transformers and text-embeddings-inference expect in a folder.
ONNX_FILE = "onnx/model.onnx"
QUANTIZED_FILE = "onnx/model_qint8.onnx"
EXPORT_REPORT = "onnx/export.json"
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "modular-star-encoder")
_STARCODER2 = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "norm_epsilon", "use_bias", "bos_token_id"),
)
TOLERANCE = 1e-4  # largest allowed difference in an output of the ONNX file; see `check_onnx`
SCORE_TOLERANCE = 1e-3  # largest allowed difference in a mean metric: nearly equal scores may change their order
SETTINGS: dict[str, Any] = {"per_channel": True, "reduce_range": True}
"""Options of onnxruntime's quantiser: one scale per output channel, and 7 of the 8 bits. With all 8 bits, sums of two
products saturate on x86 processors without VNNI, and scores differ from those with VNNI."""
INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")
_LARGEST_FILE = 2**31 - 2**27  # a protobuf file has at most 2 GiB; this limit on the weights leaves space for the graph


_ATTENTION = "mose_onnx"


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """Compute attention with few graph nodes: query heads with the same keys are rows of one matrix product."""
    batch, heads, tokens, size = query.shape
    rows = (batch, heads // module.num_key_value_groups, module.num_key_value_groups * tokens)
    scores = ((query * scaling).reshape(*rows, size) @ key.transpose(2, 3)).reshape(batch, heads, tokens, tokens)
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return (weights.reshape(*rows, tokens) @ value).reshape(query.shape).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, eager_mask)


class _ServedExit(torch.nn.Module):
    def __init__(self, model: ModularStarEncoderForRetrieval) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        exit_layer = self.model.config.num_hidden_layers
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, exit_layer=exit_layer)
        return {name: output[name] for name in OUTPUTS}


def export_onnx(
    model: ModularStarEncoderForRetrieval, path: str | os.PathLike[str], exit_layer: int | None = None
) -> None:
    """Write a model up to one exit as an ONNX file, which `check_onnx` can then compare with the model.

    For B texts of T tokens, padded left or right, the file's inputs are `input_ids` and `attention_mask`, int64 (B, T).
    Its outputs are float32: `last_hidden_state` (B, T, D), the projected tokens, which sentence-transformers pools; and
    `sentence_embedding` (B, D), pooled and normalised, as text-embeddings-inference expects. D is the projection size.
    If the weights exceed 2 GB, they go to a second file, `{path}_data`.

    Args:
        model: a model in float32 on the CPU. It is not changed.
        path: the file to write; its folder must exist.
        exit_layer: exit to export; the deepest if None.

    Raises:
        ValueError: the model lacks the exit; the message lists its exits.
        UserError: the weights are not float32 on the CPU.
        ImportError: onnxscript is missing (extra `onnx`).

    Example:
        >>> model = AutoModel.from_pretrained("runs/model", dtype=torch.float32)  # doctest: +SKIP
        >>> export_onnx(model, "model.onnx", exit_layer=4)  # doctest: +SKIP
        >>> check_onnx(model, "model.onnx", exit_layer=4)["sentence_embedding"] < 1e-4  # doctest: +SKIP
        True
    """
    if (model.dtype, model.device.type) != (torch.float32, "cpu"):
        message = f"ONNX export needs weights in float32 on the CPU, not in {model.dtype} on {model.device}."
        raise UserError("onnx.dtype", f"{message} Load the model with dtype=torch.float32.")
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    sample = {"input_ids": torch.zeros_like(mask), "attention_mask": mask}
    longest = model.config.max_position_embeddings
    sizes = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length", max=longest)}
    options: dict[str, Any] = {"dynamic_shapes": dict.fromkeys(INPUTS, sizes), "output_names": list(OUTPUTS)}
    with naming_extra():
        import onnxscript  # noqa: F401 - torch's exporter needs it
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    served = served_exit(model, exit_layer)
    served.model.set_attn_implementation(_ATTENTION)
    with quiet_libraries(), torch.no_grad():
        program: Any = torch.onnx.export(served, (), kwargs=sample, dynamo=True, verbose=False, **options)
    # The exporter adds to each node the lines of code that it comes from, with local paths: remove them.
    save_graph(ClearMetadataAndDocStringPass()(program.model).model, path)


def served_exit(model: ModularStarEncoderForRetrieval, exit_layer: int | None = None) -> Any:
    """Return a module in evaluation mode that computes one exit, with the weights of `model`."""
    cut = model.slice(model.config.num_hidden_layers if exit_layer is None else exit_layer)
    # Skipping padding needs the lengths as Python numbers, which an exported graph does not have.
    cut.config.unpad_inputs = False
    cut.set_attn_implementation("sdpa")
    return _ServedExit(cut).eval()


def save_graph(graph: onnx_ir.Model, path: str | os.PathLike[str]) -> None:
    """Write an ONNX graph to `path`; if the weights exceed the limit of one file, write them to `{path}_data`."""
    import onnx_ir

    tensors = [value.const_value for value in graph.graph.initializers.values()]
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) > _LARGEST_FILE:
        onnx_ir.save(graph, path, external_data=f"{Path(path).name}_data")
    else:
        # Load the weights first: they may be in the data file of another graph, and would stay there.
        onnx_ir.save(onnx_ir.external_data.load_to_model(graph), path)


def _disable_telemetry() -> None:
    """Call this before onnxruntime is imported: it would report its use to Microsoft, and leave `.ses` in TMPDIR."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def open_session(path: str | os.PathLike[str]) -> Any:
    """Open an ONNX file as an `onnxruntime.InferenceSession` on the CPU, with as many threads as torch uses."""
    _disable_telemetry()
    with naming_extra():
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Context manager that hides warnings of torch's exporter and ONNX's quantiser, and removes torch's empty cache."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        # torch makes this folder when parts of it are imported. Unless a model was compiled, the folder is empty.
        cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
        if cache.parent == Path(tempfile.gettempdir()) and cache.name.startswith("torchinductor_"):
            with suppress(OSError):
                cache.rmdir()


def check_onnx(
    model: ModularStarEncoderForRetrieval,
    path: str | os.PathLike[str],
    exit_layer: int | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Return {name of an output: largest difference} between a model at one exit and its ONNX file, on random texts.

    If the model's largest absolute value in a batch is above 1, differences are divided by this value. UserError if an
    output is NaN or differs by more than `tolerance`.
    """
    served, session = served_exit(model, exit_layer), open_session(path)
    largest = dict.fromkeys(OUTPUTS, 0.0)
    for batch in _batches(model.config.vocab_size, min(256, model.config.max_position_embeddings)):
        with torch.inference_mode():
            expected = served(**batch)
        found = session.run(list(OUTPUTS), {name: tensor.numpy() for name, tensor in batch.items()})
        real = batch["attention_mask"].bool()
        for name, values in zip(OUTPUTS, map(torch.from_numpy, found), strict=True):
            wanted = expected[name]
            if name == "last_hidden_state":
                # Values at padding tokens are arbitrary, and pooling ignores them.
                values, wanted = values[real], wanted[real]
            difference = float((values - wanted).abs().max() / wanted.abs().max().clamp(min=1))
            if not difference <= tolerance:
                size = f"{difference:.2g} (allowed: {tolerance:g}), for {real.shape[0]} texts of {real.shape[1]} tokens"
                raise UserError("onnx.difference", f"Do not use {path}: its {name} differs from the model's by {size}.")
            largest[name] = max(largest[name], difference)
    return largest


def _batches(vocab_size: int, longest: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for lengths in ((1,), (longest,), (1, 1), (7, 7, 7, 7, 7), (longest, 1, longest // 2)):
        width = max(lengths)
        places = torch.arange(width).expand(len(lengths), -1)
        tokens = torch.randint(vocab_size, (len(lengths), width), generator=generator)
        right = (places < torch.tensor(lengths)[:, None]).long()
        for mask in (right, right.flip(1)) if len(set(lengths)) > 1 else (right,):
            yield {"input_ids": tokens, "attention_mask": mask}


def quantize_onnx(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy an ONNX file to `target` with the weights of linear layers and token embeddings rounded to int8."""
    _disable_telemetry()
    with naming_extra():
        import onnx
        import onnx_ir
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxscript.optimizer import fold_constants
    # Write to a temporary folder, because the quantiser gives the weights file a name that servers do not expect.
    with tempfile.TemporaryDirectory(prefix=".quantizing-", dir=Path(target).parent) as folder:
        options = SETTINGS | {"op_types_to_quantize": ["Gather", "MatMul"]}
        options["use_external_data_format"] = Path(f"{os.fspath(source)}_data").exists()
        folded, draft = Path(folder, "folded.onnx"), Path(folder, "model.onnx")
        with quiet_libraries():
            # The quantiser finds only weights that no node transposes, and transposes weights without their shapes.
            graph = fold_constants(onnx_ir.load(source), input_size_limit=2**40, output_size_limit=2**40).model
            save_graph(graph, folded)
            without_shapes = onnx.load(folded, load_external_data=False)
            del without_shapes.graph.value_info[:]
            onnx.save(without_shapes, folded)
            quantize_dynamic(folded, draft, weight_type=QuantType.QInt8, **options)
        save_graph(onnx_ir.load(draft), target)


class OnnxFolder(NamedTuple):
    """The folder of an export, and a report (None without tasks) with scores of the model and its ONNX files."""

    folder: Path
    report: Report | None


def export_onnx_folder(
    checkpoint: str | Path,
    exit_layer: int | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    int8: bool = False,
    tasks: Sequence[RetrievalTask] = (),
    progress: bool = True,
) -> OnnxFolder:
    """Export one exit of a retrieval checkpoint (the deepest if None) as a folder for servers that run ONNX.

    Raises UserError, and writes no folder, if the float32 ONNX file and the model differ in their outputs for random
    texts or in their scores on `tasks`. With `int8`, a file with 8-bit weights is written too; this needs `tasks`. If
    `out` is None, `default_folder` names the folder.
    """
    if int8 and not tasks:
        raise UserError("hub.onnx.int8", "`int8` needs `tasks`, to measure how much quality is lost.")
    model, tokenizer = load_checkpoint(checkpoint, exit_layer, device="cpu", dtype=torch.float32)
    exit_layer = model.config.num_hidden_layers
    checkpoints.check_servable(model.config)
    out = default_folder(checkpoint, exit_layer) if out is None else user_path(out)
    with staged_folder(out) as staging, tqdm(bar_format="{desc}…", disable=not progress, leave=False) as bar:
        bar.set_description_str("exporting")
        prompts = checkpoints.stored_prompts(checkpoint)
        prompts = prompts or sentence_transformer_prompts(instructions=model.config.instruction_prompts)
        _write_serving_files(staging, model.config, tokenizer, prompts)
        (staging / "onnx").mkdir()
        files = {"float32": staging / ONNX_FILE}
        export_onnx(model, files["float32"])
        bar.set_description_str("checking")
        content: dict[str, Any] = {"exit_layer": exit_layer, "versions": library_versions(PACKAGES)}
        content |= {"machine": machine_kind(), "tolerance": TOLERANCE}
        content["differences_from_torch"] = check_onnx(model, files["float32"])
        if int8:
            bar.set_description_str("quantising")
            files["int8"] = staging / QUANTIZED_FILE
            quantize_onnx(files["float32"], files["int8"])
            content["int8"] = SETTINGS
        report = None
        if tasks:
            bar.set_description_str("ranking")
            encoder = ExitEncoder(model, tokenizer, "model", exit_layers=(exit_layer,))
            report = compare_scores(encoder, files, tasks, progress=progress)
            content["tables"] = report.to_dict()["tables"]
        content["bytes"] = {name: path.stat().st_size for name, path in files.items()}
        write_json(staging / EXPORT_REPORT, content)
    return OnnxFolder(out, report)


def default_folder(checkpoint: str | os.PathLike[str], exit_layer: int, ending: str = "onnx") -> Path:
    """Return the path NAME-EXIT-ENDING next to the checkpoint NAME or, for a Hub id, in the working folder."""
    local = local_folder(checkpoint)
    folder = Path(Path(checkpoint).name) if local is None else local.resolve()
    return folder.with_name(f"{folder.name}-{exit_layer}-{ending}")


def _write_serving_files(
    folder: Path, config: ModularStarEncoderConfig, tokenizer: Any, prompts: dict[str, str]
) -> None:
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
    checkpoints.save_tokenizer(tokenizer, config, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(path, {name: value for name, value in settings.items() if name != "backend"})
    # An ONNX file has one exit, so the module takes no `exit_layer`.
    modules = [{name: value for name, value in module.items() if name != "kwargs"} for module in checkpoints.MODULES]
    checkpoints.write_sentence_transformer_files(folder, config, prompts, modules)


class OnnxEncoder(Encoder):
    """Embeds texts with an ONNX file, and with the prompts and the tokenizer of `reference`, the model's encoder."""

    def __init__(self, path: str | os.PathLike[str], reference: ExitEncoder, name: str) -> None:
        self.name, self.exit_layers = name, reference.exit_layers
        self._session, self._reference = open_session(path), reference
        path = Path(path)
        self.checksum = f"{reference.checksum}-{folder_checksum(path.parent, (path.name, f'{path.name}_data'))}"

    def prompt(self, text: Text) -> str:
        return self._reference.prompt(text)

    def encode(
        self, texts: Sequence[Prompted], exit_layers: Sequence[int | None], *, progress: bool = True
    ) -> Mapping[int | None, np.ndarray]:
        config: Any = self._reference.model.config
        prompted = [prompt + text for prompt, text in texts]
        options = {"max_length": config.max_position_embeddings, "progress": progress}
        shape = (1, config.projection_size)
        embeddings = encode_batches(self._reference.tokenizer, prompted, self._encode_batch, shape, **options)
        return dict.fromkeys(exit_layers, embeddings[0])

    def _encode_batch(self, batch: Mapping[str, torch.Tensor]) -> np.ndarray:
        inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
        return self._session.run(["sentence_embedding"], inputs)[0][None]


def compare_scores(
    reference: ExitEncoder,
    files: Mapping[str, str | os.PathLike[str]],
    tasks: Sequence[RetrievalTask],
    *,
    progress: bool = True,
) -> Report:
    """Return a report of the scores on `tasks` of a model at one exit, `reference`, and of its ONNX files.

    `files` is {name: path}. Raises UserError if a score of the file named "float32" differs from the model's score by
    more than `SCORE_TOLERANCE`.
    """
    from modular_star_encoder.evaluation.report import make_report
    from modular_star_encoder.evaluation.retrievers import EmbeddingRetriever
    from modular_star_encoder.evaluation.run import evaluate_tasks

    encoders = [reference, *(OnnxEncoder(path, reference, name) for name, path in files.items())]
    results = evaluate_tasks(tasks, list(map(EmbeddingRetriever, encoders)), progress=progress)
    report = make_report(tasks, results)
    for table in report.tables:
        for row in table.rows:
            if row.retriever == "float32" and row.difference and abs(row.difference.value) > SCORE_TOLERANCE:
                difference = f"differs from the model's by {row.difference.value:+.4f} (allowed: {SCORE_TOLERANCE:g})"
                raise UserError("hub.onnx.rankings", f"The ONNX file's {table.metric} in {table.title} {difference}.")
    return report
