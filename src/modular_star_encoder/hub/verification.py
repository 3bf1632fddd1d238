"""Check repositories before upload: no secrets, and without this package the embeddings of the source checkpoint."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open

from modular_star_encoder.data.tokenizer import load_tokenizer
from modular_star_encoder.hub.model_card import CARD, DEPTH_FIGURE, LATENCY_FIGURE, StagedRepository, check_card
from modular_star_encoder.hub.staging import TOKENIZER
from modular_star_encoder.hub.subprocess_check import ReloadRequest, embed_batch, verify_reload
from modular_star_encoder.inference import PROFILE_NAME
from modular_star_encoder.inference.checkpoints import SENTENCE_TRANSFORMER_FILES
from modular_star_encoder.modeling import ModularStarEncoderForPreTraining, ModularStarEncoderForRetrieval
from modular_star_encoder.utils.errors import UserError

# The other files that `stage_repositories` may write; what a repository lacks shows when it is loaded.
EXPECTED = {
    *("configuration_modular_star_encoder.py", "modeling_modular_star_encoder.py", "config.json"),
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *(CARD, PROFILE_NAME, LATENCY_FIGURE, DEPTH_FIGURE),
    *SENTENCE_TRANSFORMER_FILES,
}
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

SECRETS = (
    re.compile(rb"\b(hf|api_org)_[A-Za-z0-9]{20,}"),
    re.compile(rb"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,})"),
    re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    re.compile(rb"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(rb"\bxox[abposr]-[\w-]{10,}"),
    re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    re.compile(rb"://[^/\s:@\"']+:[^/\s:@\"']+@"),
)
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pt2", ".pth")
TEXT_LIMIT = 64 << 20

TEXTS = ("add two numbers", "def subtract(first, second):\n    return first - second", "x")
TOLERANCE = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}
"""dtype → largest allowed difference in a component of a unit vector: pooling outside the model rounds differently."""


def verify_repositories(staged: Sequence[StagedRepository], *, progress: bool = True) -> dict[str, float]:
    """Check staged repositories; return {key: largest difference between its embeddings and its source's}."""
    for one in staged:
        check_files(one.folder, tuple(one.settings.files))
        check_card(one.folder / CARD)
        _check_tokenizer(one.folder)
    requests = [
        ReloadRequest(str(one.folder), TEXTS, one.prompts.get("query", ""), one.config.exit_layers) for one in staged
    ]
    reloaded = verify_reload(requests, progress=progress)
    return {one.settings.key: _compare(one, found) for one, found in zip(staged, reloaded, strict=True)}


def check_files(folder: Path, extra: Sequence[str] = ()) -> None:
    """Raise UserError if a folder contains a file that is unsafe, or neither expected nor in `extra`."""
    token, home = (get_token() or "").encode(), os.path.expanduser("~").rstrip("/").encode()
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        if name not in EXPECTED and name not in extra and not WEIGHTS.fullmatch(name):
            message = f"{folder} contains the unexpected file {name}; list it under `files` in the manifest."
            raise UserError("hub.files.unexpected", message)
        with path.open("rb") as file:
            text = file.read(TEXT_LIMIT)
        if path.suffix in PICKLES or re.match(rb"\x80[\x02-\x05]|PK\x03\x04", text):
            raise UserError("hub.files.pickle", f"{path} may be a pickle; publish weights as safetensors only.")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as tensors:
                    text = json.dumps(tensors.metadata() or {}).encode()
            except SafetensorError as error:
                raise UserError("hub.files.safetensors", f"{path} is not a safetensors file: {error}.") from error
        places = [match.start() for pattern in SECRETS if (match := pattern.search(text))]
        places += [text.index(token)] if token and token in text else []
        if places:
            line = text[: places[0]].count(b"\n") + 1
            raise UserError("hub.files.secret", f"{name} in {folder} may contain a secret in line {line}: remove it.")
        if len(home) > 1 and home + b"/" in text:
            message = f"{name} in {folder} contains a path inside your home folder, {home.decode()}: remove it."
            raise UserError("hub.files.local_path", message)


def _check_tokenizer(folder: Path) -> None:
    tokenizer, names = load_tokenizer(folder), ("pad", "sep", "cls", "mask")
    faults = [f"has no {name} token" for name in names if getattr(tokenizer, f"{name}_token") is None]
    declared = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    if declared not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        faults.append(f"has tokenizer_class {declared!r}, which splits numbers differently")
    if faults:
        raise UserError("hub.tokenizer", f"The tokenizer of {folder} {' and '.join(faults)}.")


def _compare(staged: StagedRepository, found: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference between `found` and the source's embeddings; raise UserError above `TOLERANCE`."""
    own, dtype = _source_embeddings(staged)
    largest = 0.0
    for name, expected in own.items():
        scale = np.abs(expected).max() if name == "masked_lm" else 1.0
        difference = float(np.abs(expected - found[name]).max() / scale)
        if not difference <= TOLERANCE[dtype]:
            differs = f"{name} differs by {difference:.2g} (allowed: {TOLERANCE[dtype]:.2g})"
            message = f"{staged.folder} does not give the outputs of {staged.source}: {differs}."
            raise UserError("hub.reload.differs", message)
        largest = max(largest, difference)
    return largest


@torch.inference_mode()
def _source_embeddings(staged: StagedRepository) -> tuple[dict[str, np.ndarray], str]:
    model_class = ModularStarEncoderForRetrieval if staged.retrieval else ModularStarEncoderForPreTraining
    model = model_class.from_pretrained(staged.source).eval()
    tokenizer = load_tokenizer(staged.folder)
    cut = {"truncation": True, "max_length": model.config.max_position_embeddings}
    prompt, exits = staged.prompts.get("query", ""), staged.config.exit_layers
    batch = tokenizer([prompt + text for text in TEXTS], padding=True, return_tensors="pt", **cut)
    encoder = model if staged.retrieval else model.model
    own = {f"exit-{k}": embed_batch(encoder, batch, exit_layer=k) for k in exits}
    own["auto_model"] = own["sentence_transformer"] = own[f"exit-{exits[-1]}"]
    if not staged.retrieval:
        own["masked_lm"] = model(**batch, exit_layer=exits[-1]).logits[:, -1].float().numpy()
    return own, str(model.dtype).removeprefix("torch.")
