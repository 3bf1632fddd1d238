"""An ONNX file with 8-bit weights, whose activations are quantised as they come (dynamic quantisation)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from modular_star_encoder.hub.onnx_export import missing_extra, quiet_libraries, save_graph

QUANTIZED_FILE = "onnx/model_qint8.onnx"

SETTINGS: dict[str, Any] = {"per_channel": True, "reduce_range": True}
"""A scale for each output, and 7 of the 8 bits: on x86 processors without VNNI, sums of two products of 8 bits saturate
(onnxruntime's guide to quantisation), and a loss measured with VNNI would not hold there."""


def quantize_onnx(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Write `source` with int8 weights of its linear layers and its token embedding.

    What it costs in quality has to be measured: see `onnx_ranking.compare_rankings`.

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
