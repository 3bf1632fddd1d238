"""A model whose wide layers are compiled for inference on a CPU.

Nine tenths of a layer's arithmetic are in its MLP. torch.compile with frozen weights (inductor's `freezing`) packs
them once in the layout that oneDNN multiplies best, and has oneDNN apply bias and GELU while a tile of the product
is still in cache, in place of a pass over memory each. Tokens go through in chunks of about a thousand, so that what is
between the two products (12,288 wide in the 1B configuration) stays near the processor too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from tqdm.auto import tqdm

from modular_star_encoder.modeling import ModularStarEncoderForRetrieval

TOKENS_PER_CHUNK = 1024


def compile_for_inference(
    model: ModularStarEncoderForRetrieval, *, tokens_per_chunk: int = TOKENS_PER_CHUNK, progress: bool = True
) -> ModularStarEncoderForRetrieval:
    """The same model with compiled MLPs, which shares its parameters; `model` itself stays as it is.

    Compiled code runs under `torch.inference_mode()` and without autocast, as `encode_exits` and
    `SentenceTransformer.encode` call a model; in any other mode the plain layers run. Weights are packed when this is
    called, and packed copies of the MLPs' are kept: later changes of the parameters have no effect, and memory for
    weights about doubles. Compiling takes a second or more per layer, and may need a C++ compiler.

    Args:
        model: on a CPU. Worth it in bfloat16, on processors with AVX512-BF16 or AMX.
        tokens_per_chunk: tokens that go through an MLP at once.
        progress: show a bar while compiling.

    Raises:
        ValueError: a model on another device, a chunk of fewer than two tokens, or torch.compile failed.
    """
    if model.device.type != "cpu":
        raise ValueError(f"compile_for_inference is for CPUs; the model is on {model.device}.")
    if tokens_per_chunk < 2:
        raise ValueError(f"tokens_per_chunk {tokens_per_chunk} must be at least 2.")
    compiled = model.slice(model.config.num_hidden_layers).eval()
    for layer in tqdm(compiled.model.layers, desc="compiling", unit="layer", disable=not progress, leave=False):
        # An attribute of the instance: names of parameters, and so saving, stay as they are.
        layer.mlp.forward = _in_chunks(layer.mlp.forward, _compile(layer.mlp, model), tokens_per_chunk)
    return compiled


def _compile(mlp: nn.Module, model: ModularStarEncoderForRetrieval) -> Callable[[torch.Tensor], torch.Tensor]:
    """One MLP with its weights frozen, for any number of tokens from two on."""
    import torch._dynamo.config
    import torch._inductor.config
    from torch._dynamo.exc import BackendCompilerFailed

    # All layers share one code object, and so count as recompilations of one function.
    limits = torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
    compiled = torch.compile(mlp.forward, dynamic=True, fullgraph=True)
    # Several lengths, for what torch takes for constant at the first is compiled anew at the second.
    with limits, torch._inductor.config.patch(freezing=True), torch.inference_mode():
        try:
            for tokens in (64, 96):
                compiled(torch.zeros(tokens, model.config.hidden_size, dtype=model.dtype))
        except BackendCompilerFailed as error:
            reason = str(error.inner_exception).partition("\n")[0]
            raise ValueError(f"torch.compile failed; is there a C++ compiler? {reason}") from error
    return compiled


def _in_chunks(
    plain: Callable[[torch.Tensor], torch.Tensor], compiled: Callable[[torch.Tensor], torch.Tensor], chunk: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """An MLP's forward: compiled where it may be."""

    def forward(states: torch.Tensor) -> torch.Tensor:
        flat = states.flatten(0, -2)
        if not torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or len(flat) < 2:
            return plain(states)
        # Parts of equal length in place of a short last one.
        parts = flat.tensor_split(-(-len(flat) // chunk))
        outputs = [compiled(part) for part in parts]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view_as(states)

    return forward
