"""The back ends of the stage of translation by name."""

from collections.abc import Mapping
from typing import Any

from modular_star_encoder.synthconl.completions import CompletionBackend

FREE_OPTIONS = {
    "vllm": {"batch_size", "tensor_parallel_size", "gpu_memory_utilization"},
    "openai": {"base_url", "api_key_variable", "concurrency", "attempts", "pause", "timeout"},
    "transformers": {"batch_size", "device"},
}
"""Each back end's options that say how it is run; what it writes does not depend on them, up to rounding."""


def open_backend(name: str, model: str, max_tokens: int, options: Mapping[str, Any]) -> CompletionBackend:
    """Return a back end; neither a model is loaded nor a request sent.

    Args:
        name: `"vllm"`, `"openai"` or `"transformers"`.
        model: The model, as the back end calls it.
        max_tokens: Largest number of tokens of an answer.
        options: Further arguments of `VLLMBackend`, `OpenAIBackend` or `TransformersBackend`.

    Raises:
        ValueError: If there is no such back end, or it does not take the options.
        ImportError: If it needs a package that isn't installed.
    """
    # A back end is imported when it is used: two of them load torch.
    match name:
        case "vllm":
            from modular_star_encoder.synthconl.local_backends import VLLMBackend as Backend
        case "openai":
            from modular_star_encoder.synthconl.openai_backend import OpenAIBackend as Backend
        case "transformers":
            from modular_star_encoder.synthconl.local_backends import TransformersBackend as Backend
        case _:
            raise ValueError(f"There is no back end {name!r}; there are {', '.join(FREE_OPTIONS)}.")
    try:
        return Backend(model, max_tokens, **options)
    except TypeError as error:
        message = str(error).partition("__init__() ")[2] or str(error)
        raise ValueError(f"The options of the back end {name!r} can't be used: {message}.") from error
