"""Models and a tokenizer small enough to build in every test."""

import json
import shutil
from pathlib import Path

import torch

from modular_star_encoder.data.prompts import code_prompt, text_prompt
from modular_star_encoder.data.tokenizer import train_tokenizer
from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from modular_star_encoder.inference.exit_profile import ExitProfile, Measurement, ProfiledExit
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval
from modular_star_encoder.utils.reports import machine_kind

EXIT_LAYERS = (1, 2, 4)
PROJECTION_SIZE = 16
VOCAB_SIZE = 300
# The form of `mose-code`; the default form is the published models'.
ZERO = {
    "exit_layers": (0, 1, 2, 4),
    "exit_norm": "none",
    "projection_head": "linear",
    "projection_order": "pool_then_project",
    "token_weights": True,
}
NO_DROPOUT = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0)


def tiny_tokenizer():
    texts = [text_prompt(), code_prompt("python"), "def add(first, second):\n    return first + second\n"]
    return train_tokenizer(texts, VOCAB_SIZE, progress=False)


def tiny_config(**changes):
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "exit_layers": EXIT_LAYERS,
        "projection_size": PROJECTION_SIZE,
        "pad_token_id": 0,
    }
    return ModularStarEncoderConfig(**(settings | changes))


def tiny_model(model_class=ModularStarEncoderForRetrieval, **changes):
    torch.manual_seed(0)
    return model_class(tiny_config(**changes))


def tiny_batch(padding_side="left", lengths=(12, 7, 3), seed=1, more=0):
    """Token ids and attention mask of rows with these lengths, and `more` columns; the same rows whatever the side."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + more
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if padding_side == "left" else slice(0, length)
        input_ids[row, place] = torch.randint(4, VOCAB_SIZE, (length,), generator=generator)
        attention_mask[row, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def run(model, **inputs):
    """The output of `model` in evaluation mode, without gradients."""
    with torch.inference_mode():
        return model.eval()(**inputs)


def equal(got, expected):
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def save_tiny_checkpoint(folder: Path, **changes) -> Path:
    return save_retrieval_checkpoint(tiny_model(**changes), tiny_tokenizer(), folder)


def tiny_profile(fingerprint, exits=EXIT_LAYERS, quality=True, machine=None):
    """Exit k takes k × 1.23 ms and 100 + k MB, has k × 1.1 million parameters and a quality of k / 9."""
    return ExitProfile(
        exits={
            k: ProfiledExit(
                parameters=k * 1_100_000,
                weights_mb=4.4 * k,
                measurements=(Measurement(1, 32, 1e6, 1.23 * k, 2.0 * k, 10.0, 320.0, 100.0 + k, 5),),
                quality={"tiny-mrr": k / 9} if quality else {},
            )
            for k in exits
        },
        device="cpu",
        dtype="float32",
        attn_implementation="sdpa",
        checkpoint=fingerprint,
        base_memory_mb=50.0,
        machine=machine or machine_kind(),
        versions={"torch": "2.13.0"},
        date="2026-01-02",
    )


REPOSITORY = "some-org/tiny.star-encoder"


def cache_repository(checkpoint, cache, patch):
    """Lay a checkpoint out as a download would: a snapshot named by its commit, which `main` refers to. Go offline."""
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = cache / f"models--{REPOSITORY.replace('/', '--')}", "a1" * 20
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return shutil.copytree(checkpoint, repository / "snapshots" / commit)


def write_files(folder, files):
    """Write texts or bytes by their paths below a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def change_json(folder, name="config.json", **changes):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def contents(folder):
    """The bytes of every file below a folder, by its path there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
