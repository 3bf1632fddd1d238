"""One exit of a retrieval model as an ONNX file for text, with dynamic batch and length (extra `onnx`).

Inputs: `input_ids` and `attention_mask`, int64 (batch_size, sequence_length), padded on either side. Outputs, float32:
`last_hidden_state` (batch_size, sequence_length, D), the projected tokens, which sentence-transformers pools; and
`sentence_embedding` (batch_size, D), pooled and normalised, which text-embeddings-inference takes as it is.
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

if TYPE_CHECKING:
    import onnx_ir


ONNX_FILE = "onnx/model.onnx"
"""Where sentence-transformers and text-embeddings-inference look for it in a folder."""

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")

# A protobuf file ends at 2 GiB; the rest of that is for the graph.
_LARGEST_FILE = 2**31 - 2**27


class _ServedExit(torch.nn.Module):
    """What an exported file computes."""

    def __init__(self, model: ModularStarEncoderForRetrieval) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        exit_layer = self.model.config.num_hidden_layers
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, exit_layer=exit_layer)
        return {name: output[name] for name in OUTPUTS}


def export_onnx(model: ModularStarEncoderForRetrieval, path: str | os.PathLike, exit_layer: int | None = None) -> None:
    """Write one exit of a model as an ONNX file; nothing is compared yet (see `check_onnx`).

    The exporter is torch's own, on top of `torch.export`. Weights of more than 2 GB lie beside the file, as
    `{path}_data`.

    Args:
        model: in float32, on the CPU. It is not changed.
        path: the file; its folder must exist.
        exit_layer: the deepest exit if None.

    Raises:
        ValueError: an exit that the model doesn't have, or weights that are not float32 on the CPU.
        ImportError: onnxscript is missing.
    """
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
        raise ValueError(
            f"ONNX files are made of float32 weights on the CPU, not of {parameter.dtype} on {parameter.device}: "
            "load the model with dtype=torch.float32."
        )
    served = served_exit(model, exit_layer)
    sample = {
        "input_ids": torch.zeros(2, 3, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
    }
    longest = served.model.config.max_position_embeddings
    sizes = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length", max=longest)}
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    except ImportError as error:
        raise missing_extra() from error
    with quiet_libraries(), torch.no_grad():
        program: Any = torch.onnx.export(
            served,
            (),
            kwargs=sample,
            dynamo=True,
            dynamic_shapes=dict.fromkeys(INPUTS, sizes),
            output_names=list(OUTPUTS),
            verbose=False,
        )
    # The exporter notes for each node the lines of code that it comes from, with the paths of this machine.
    save_graph(ClearMetadataAndDocStringPass()(program.model).model, path)


def served_exit(model: ModularStarEncoderForRetrieval, exit_layer: int | None = None) -> torch.nn.Module:
    """The computation of the exported file, as a module in evaluation mode that shares the model's weights.

    Raises:
        ValueError: an exit that the model doesn't have.
    """
    cut = model.slice(model.config.num_hidden_layers if exit_layer is None else exit_layer)
    # Leaving padding out needs lengths on the host, and a graph has none.
    cut.config.unpad_inputs = False
    cut.set_attn_implementation("sdpa")
    return _ServedExit(cut).eval()


def save_graph(graph: onnx_ir.Model, path: str | os.PathLike) -> None:
    """Write a graph, with its weights in `{path}_data` where they don't fit into one file.

    optimum and text-embeddings-inference fetch a file of this name and no other.
    """
    import onnx_ir

    tensors = [value.const_value for value in graph.graph.initializers.values()]
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) > _LARGEST_FILE:
        onnx_ir.save(graph, path, external_data=f"{Path(path).name}_data")
    else:
        # Weights that were read from a file beside another graph would stay there.
        onnx_ir.save(onnx_ir.external_data.load_to_model(graph), path)


def open_session(path: str | os.PathLike) -> Any:
    """An `onnxruntime.InferenceSession` of a file on the CPU, with as many threads as torch has.

    Raises:
        ImportError: onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra() from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back advice of exporter and quantiser that is about other models (torchvision, convolutions)."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def missing_extra() -> ImportError:
    """What to raise where a package of the extra is missing."""
    return ImportError("ONNX files need onnxruntime and onnxscript: pip install 'modular-star-encoder[onnx]'.")


TOLERANCE = 1e-4

_LONGEST = 256


@dataclass(frozen=True, slots=True)
class OnnxDifferences:
    """Largest absolute differences between a file and its model.

    Attributes:
        last_hidden_state: at real tokens, divided by the largest absolute value of the batch where that is above 1.
        sentence_embedding: of the embeddings, whose length is 1.
        batches: how many were compared.
    """

    last_hidden_state: float
    sentence_embedding: float
    batches: int


def check_onnx(
    model: ModularStarEncoderForRetrieval,
    path: str | os.PathLike,
    exit_layer: int | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> OnnxDifferences:
    """Compare an ONNX file with the exit that it was made of: one text and several, one token and many, both paddings.

    Args:
        model: the model that `export_onnx` was given.
        path: the file.
        exit_layer: as it was given there.

    Raises:
        ValueError: an output differs by more than `tolerance`, or is NaN; the message says which, where and by how
            much.
        ImportError: onnxruntime is missing.
    """
    served, session = served_exit(model, exit_layer), open_session(path)
    largest, batches = dict.fromkeys(OUTPUTS, 0.0), 0
    for batch in _batches(model.config.vocab_size, min(_LONGEST, model.config.max_position_embeddings)):
        with torch.inference_mode():
            expected = served(**batch)
        found = session.run(list(OUTPUTS), {name: tensor.numpy() for name, tensor in batch.items()})
        real = batch["attention_mask"].bool()
        for name, values in zip(OUTPUTS, map(torch.from_numpy, found), strict=True):
            wanted = expected[name]
            if name == "last_hidden_state":
                # What stands at padding is arbitrary, and never read.
                values, wanted = values[real], wanted[real]
            difference = float((values - wanted).abs().max() / wanted.abs().max().clamp(min=1))
            if not difference <= tolerance:
                raise ValueError(
                    f"{path} does not compute what the model computes: {name} differs by {difference:.2g} (allowed: "
                    f"{tolerance:g}) at a batch of {real.shape[0]} × {real.shape[1]} tokens."
                )
            largest[name] = max(largest[name], difference)
        batches += 1
    return OnnxDifferences(*(largest[name] for name in OUTPUTS), batches)


def _batches(vocab_size: int, longest: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random tokens: one and several texts, of equal and of different lengths, padded on the left and on the right."""
    generator = torch.Generator().manual_seed(0)
    for lengths in ((1,), (longest,), (1, 1), (7, 7, 7, 7, 7), (longest, 1, longest // 2)):
        width = max(lengths)
        places = torch.arange(width).expand(len(lengths), -1)
        tokens = torch.randint(vocab_size, (len(lengths), width), generator=generator)
        right = (places < torch.tensor(lengths)[:, None]).long()
        for mask in (right, right.flip(1)) if len(set(lengths)) > 1 else (right,):
            yield {"input_ids": tokens, "attention_mask": mask}


QUANTIZED_FILE = "onnx/model_qint8.onnx"

SETTINGS: dict[str, Any] = {"per_channel": True, "reduce_range": True}
"""A scale for each output, and 7 of the 8 bits: on x86 processors without VNNI, sums of two products of 8 bits saturate
(onnxruntime's guide to quantisation), and a loss measured with VNNI would not hold there."""


def quantize_onnx(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Write `source` with int8 weights of its linear layers and its token embedding.

    What it costs in quality has to be measured: see `hub.onnx_folder.compare_rankings`.

    Args:
        source: an ONNX file with float32 weights.
        target: the file to write; its folder must exist.

    Raises:
        ImportError: onnxruntime is missing.
    """
    try:
        import onnx_ir
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise missing_extra() from error
    # The quantiser names weights that don't fit into a file otherwise than serving software expects.
    with tempfile.TemporaryDirectory(prefix=".quantizing-", dir=Path(target).parent) as folder:
        beside = Path(f"{os.fspath(source)}_data").exists()
        draft = Path(folder, "model.onnx")
        with quiet_libraries():
            quantize_dynamic(source, draft, weight_type=QuantType.QInt8, use_external_data_format=beside, **SETTINGS)
        save_graph(onnx_ir.load(draft), target)
