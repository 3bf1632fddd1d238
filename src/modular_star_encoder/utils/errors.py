"""Errors that a user can fix: bad input, and packages of an extra (an optional dependency) that are missing."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Raised for bad input, with one sentence that says what was given, what is allowed and what to do.

    `key` is the dotted name of the fault, such as `config.exit_layers.order`. It stays the same when the sentence is
    improved, so programs and tests can rely on it.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str]]:
        return type(self), (self.key, str(self))


def is_panic(error: BaseException) -> bool:
    """Return whether `error` is a panic of a Rust library, such as tokenizers. A panic is not an `Exception`."""
    return type(error).__name__ == "PanicException"


# Extra → the modules that the extra installs. A module of several extras is listed once: where most users need it.
_MODULES = {
    "train": "accelerate bm25s datasets evaluate jinja2 pydantic sklearn",
    "search": "filelock pygments threadpoolctl tree_sitter tree_sitter_language_pack",
    "dataset": "pyarrow rensa",
    "onnx": "onnx onnx_ir onnxruntime onnxscript",
    "demo": "gradio",
    "plots": "matplotlib",
    "mcp": "mcp",
    "mteb": "mteb",
    "peft": "peft",
    "qdrant": "qdrant_client",
}
_EXTRA_OF = {module: extra for extra, modules in _MODULES.items() for module in modules.split()}


def missing_extra(error: ModuleNotFoundError, command: str = "") -> ImportError | None:
    """Return an ImportError that names the extra to install; None if no extra installs the missing module.

    If the module belongs to the extra `train` or `dataset`, and `command` is one of these two names, the error names
    the extra `command`.
    """
    module = (error.name or "").partition(".")[0]
    extra = _EXTRA_OF.get(module)
    if command in ("train", "dataset") and extra in ("train", "dataset"):
        extra = command
    if extra is None:
        return None
    return ImportError(f"{module} is not installed. Install it with: pip install 'modular-star-encoder[{extra}]'")


@contextmanager
def naming_extra() -> Iterator[None]:
    """Context manager to import an optional package: if the package is missing, the ImportError names its extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from error
