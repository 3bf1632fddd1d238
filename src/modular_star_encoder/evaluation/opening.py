"""From a name on the command line to a system: a baseline, one of our checkpoints, anyone's model, an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from modular_star_encoder.evaluation.bm25 import BM25
from modular_star_encoder.evaluation.checkpoint import check_checkpoint, load_checkpoint
from modular_star_encoder.evaluation.embedding_cache import EmbeddingCache
from modular_star_encoder.evaluation.encoders import ExitEncoder, SentenceTransformerEncoder
from modular_star_encoder.evaluation.endpoint import OPENAI_URL, EndpointEncoder
from modular_star_encoder.evaluation.systems import EmbeddingSystem, Encoder, System
from modular_star_encoder.modeling import ModularStarEncoderConfig

_ENDPOINT = "openai:"


def open_system(name: str, cache: EmbeddingCache | None = None, exit_layers: Sequence[int] | None = None) -> System:
    """The system of a name.

    Args:
        name: `bm25`, `tfidf`, `openai:MODEL` or `openai:MODEL@URL` (key in OPENAI_API_KEY), or the folder or Hub
            repository of one of our checkpoints or of any model that sentence-transformers loads.
        cache: where embeddings are kept.
        exit_layers: exits of one of our checkpoints; all if None.

    Raises:
        ValueError: an exit that the model doesn't have, or a model that can't be loaded.
        OSError: no such folder or repository.
    """
    if exit_layers and (name in ("bm25", "tfidf") or name.startswith(_ENDPOINT)):
        raise ValueError(f"{name} is no ModularStarEncoder, so it has no exits to choose.")
    if name == "bm25":
        return BM25()
    if name == "tfidf":
        from modular_star_encoder.evaluation.tfidf import TfIdf  # scikit-learn is slow to import

        return TfIdf()
    if name.startswith(_ENDPOINT):
        model, _, url = name.removeprefix(_ENDPOINT).partition("@")
        return EmbeddingSystem(EndpointEncoder(model, url or OPENAI_URL), cache)
    return EmbeddingSystem(open_encoder(name, exit_layers), cache)


def open_encoder(name: str, exit_layers: Sequence[int] | None = None) -> Encoder:
    """One of our checkpoints, or any model that sentence-transformers loads; see `open_system`."""
    folder = Path(name).expanduser()
    label = "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else name
    if not (folder / "modules.json").is_file():
        check_checkpoint(name)
    if _is_ours(name):
        model, tokenizer = load_checkpoint(name, max(exit_layers) if exit_layers else None)
        return ExitEncoder(model, tokenizer, label, exit_layers=exit_layers)
    if exit_layers:
        raise ValueError(f"{name} is no ModularStarEncoder, so it has no exits to choose.")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformerEncoder(SentenceTransformer(str(folder) if folder.is_dir() else name), label)


def _is_ours(name: str) -> bool:
    try:
        config = AutoConfig.from_pretrained(Path(name).expanduser() if Path(name).expanduser().is_dir() else name)
    except ValueError:  # a type that transformers doesn't know: not ours, and sentence-transformers will say so
        return False
    except OSError:  # sentence-transformers' older layout has no config.json at the top
        return False
    return isinstance(config, ModularStarEncoderConfig)
