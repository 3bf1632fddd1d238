"""One exit of a retrieval model as an ONNX file for text, with dynamic batch and length (extra `onnx`).

Inputs: `input_ids` and `attention_mask`, int64 (batch_size, sequence_length), padded on either side. Outputs, float32:
`last_hidden_state` (batch_size, sequence_length, D), the projected tokens, which sentence-transformers pools; and
`sentence_embedding` (batch_size, D), pooled and normalised, which text-embeddings-inference takes as it is.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
