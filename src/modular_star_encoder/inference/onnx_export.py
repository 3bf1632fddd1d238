"""Export one exit of a retrieval model as an ONNX file for any batch size and length (extra `onnx`).

Inputs: `input_ids` and `attention_mask`, int64 (batch_size, sequence_length), padded left or right. Outputs, float32:
`last_hidden_state` (batch_size, sequence_length, D) holds the projected tokens, which sentence-transformers pools;
`sentence_embedding` (batch_size, D) is pooled and normalised, as text-embeddings-inference expects.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.utils.errors import UserError, naming_extra

if TYPE_CHECKING:
    import onnx_ir

# Paths that sentence-transformers and text-embeddings-inference expect in a folder.
ONNX_FILE = "onnx/model.onnx"
QUANTIZED_FILE = "onnx/model_qint8.onnx"

TOLERANCE = 1e-4

SETTINGS: dict[str, Any] = {"per_channel": True, "reduce_range": True}
"""One scale per output, and 7 of the 8 bits: on x86 processors without VNNI, sums of two 8-bit products saturate
(onnxruntime's guide to quantisation), so a loss of quality that was measured with VNNI would not hold there."""

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")

# A protobuf file has at most 2 GiB; this limit on the weights leaves space for the graph.
_LARGEST_FILE = 2**31 - 2**27


class _ServedExit(torch.nn.Module):
    """The module that `export_onnx` exports: it computes the `OUTPUTS` at the deepest exit of a model."""

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

    The top of this module describes the inputs and outputs. Weights above 2 GB go to a second file, `{path}_data`.

    Args:
        model: a model in float32 on the CPU. It is not changed.
        path: the file to write; its folder must exist.
        exit_layer: exit to export; the deepest if None.

    Raises:
        UserError: the model lacks the exit, or its weights are not float32 on the CPU.
        ImportError: onnxscript is missing (extra `onnx`).

    Example:
        >>> model = AutoModel.from_pretrained("runs/model", dtype=torch.float32)  # doctest: +SKIP
        >>> export_onnx(model, "model.onnx", exit_layer=4)  # doctest: +SKIP
        >>> check_onnx(model, "model.onnx", exit_layer=4).sentence_embedding < 1e-4  # doctest: +SKIP
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
    with quiet_libraries(), torch.no_grad():
        program: Any = torch.onnx.export(served, (), kwargs=sample, dynamo=True, verbose=False, **options)
    # The exporter adds to each node the lines of code that it comes from, with local paths: remove them.
    save_graph(ClearMetadataAndDocStringPass()(program.model).model, path)


def served_exit(model: ModularStarEncoderForRetrieval, exit_layer: int | None = None) -> torch.nn.Module:
    """Return the module that `export_onnx` exports, in evaluation mode; it shares the weights of `model`."""
    cut = model.slice(model.config.num_hidden_layers if exit_layer is None else exit_layer)
    # Skipping padding needs the lengths as Python numbers, which an exported graph does not have.
    cut.config.unpad_inputs = False
    cut.set_attn_implementation("sdpa")
    return _ServedExit(cut).eval()


def save_graph(graph: onnx_ir.Model, path: str | os.PathLike[str]) -> None:
    """Write an ONNX graph; weights too large for one file go to `{path}_data`, the name that servers expect."""
    import onnx_ir

    tensors = [value.const_value for value in graph.graph.initializers.values()]
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) > _LARGEST_FILE:
        onnx_ir.save(graph, path, external_data=f"{Path(path).name}_data")
    else:
        # Load the weights first: they may be in the data file of another graph, and would stay there.
        onnx_ir.save(onnx_ir.external_data.load_to_model(graph), path)


def open_session(path: str | os.PathLike[str]) -> Any:
    """Open an ONNX file as an `onnxruntime.InferenceSession` on the CPU, with as many threads as torch uses."""
    with naming_extra():
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide all warnings in a `with` block: those of torch's exporter and ONNX's quantiser are about other models."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@dataclass(frozen=True, slots=True)
class OnnxDifferences:
    """The largest absolute differences between the outputs of a model and of its ONNX file."""

    last_hidden_state: float  # without padding; divided by the largest absolute value in the batch if above 1
    sentence_embedding: float  # between embeddings of length 1
    batches: int  # number of compared batches


def check_onnx(
    model: ModularStarEncoderForRetrieval,
    path: str | os.PathLike[str],
    exit_layer: int | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> OnnxDifferences:
    """Compare the outputs of a model and of its ONNX file, for batches of one or more texts, padded left or right.

    See `export_onnx` for the arguments. Raises UserError if an output is NaN or differs by more than `tolerance`; the
    message names the output, the batch and the difference.
    """
    served, session = served_exit(model, exit_layer), open_session(path)
    largest = dict.fromkeys(OUTPUTS, 0.0)
    batches = list(_batches(model.config.vocab_size, min(256, model.config.max_position_embeddings)))
    for batch in batches:
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
                raise UserError("onnx.difference", f"{path}: the output {name} differs from the model's by {size}.")
            largest[name] = max(largest[name], difference)
    return OnnxDifferences(**largest, batches=len(batches))


def _batches(vocab_size: int, longest: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of random tokens: one or more texts, of equal or different lengths, padded left or right."""
    generator = torch.Generator().manual_seed(0)
    for lengths in ((1,), (longest,), (1, 1), (7, 7, 7, 7, 7), (longest, 1, longest // 2)):
        width = max(lengths)
        places = torch.arange(width).expand(len(lengths), -1)
        tokens = torch.randint(vocab_size, (len(lengths), width), generator=generator)
        right = (places < torch.tensor(lengths)[:, None]).long()
        for mask in (right, right.flip(1)) if len(set(lengths)) > 1 else (right,):
            yield {"input_ids": tokens, "attention_mask": mask}


def quantize_onnx(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy an ONNX file to `target` with the weights of linear layers and token embeddings rounded to int8.

    `hub.onnx_folder.compare_rankings` measures the loss of quality.
    """
    with naming_extra():
        import onnx_ir
        from onnxruntime.quantization import QuantType, quantize_dynamic
    # The quantiser gives the weights file a name that serving software does not expect.
    with tempfile.TemporaryDirectory(prefix=".quantizing-", dir=Path(target).parent) as folder:
        # Only the two kinds of weights: a transposed copy of a head's weights can't have one scale per output.
        options = SETTINGS | {"op_types_to_quantize": ["Gather", "MatMul"]}
        options["use_external_data_format"] = Path(f"{os.fspath(source)}_data").exists()
        draft = Path(folder, "model.onnx")
        with quiet_libraries():
            quantize_dynamic(source, draft, weight_type=QuantType.QInt8, **options)
        save_graph(onnx_ir.load(draft), target)
