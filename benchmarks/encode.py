"""Encode the real functions of CodeSearchNet: token budgets, against SentenceTransformer and against plain padding.

    MOSE_DATA=~/data python benchmarks/encode.py                # 4,392 functions, hub_configs/small, both dtypes
    MOSE_DATA=~/data python benchmarks/encode.py --texts 400 --repeats 5

One checkpoint with random weights, one text list, one tokenizer; tokenizing is part of every contender's time.

    encode_exits          sorted by length, batches of so many tokens; in bfloat16 of `compile_for_inference`
    sentence-transformers `SentenceTransformer.encode` of the same folder: sorted by length, padded
    unsorted              batches of 32 in the order of the corpus, padded
    five encodes          `encode_exits` once for each exit, against once for all

Embeddings must be the same: the largest difference of a component is in the results.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import compile_for_inference, save_random_checkpoint, shape
from ratios import Seconds, figure, ratio, take_turns
from report import write_rows
from sentence_transformers import SentenceTransformer

from modular_star_encoder.evaluation.benchmarks.codesearchnet import language_patterns, read_functions
from modular_star_encoder.evaluation.benchmarks.rows import require_files
from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.inference.encode import bf16_is_faster, encode_exits

LANGUAGES = ("go", "javascript", "ruby")
BATCH_SIZE = 32
LEAST = {"bfloat16": 1.3, "float32": 1.0}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="small", help="folder of hub_configs/ (default: %(default)s)")
    dtypes = list(LEAST) if bf16_is_faster() else ["float32"]
    parser.add_argument("--dtypes", nargs="+", choices=LEAST, default=dtypes, help="(default here: %(default)s)")
    parser.add_argument("--texts", type=int, help="about so many functions, evenly spaced (default: all)")
    parser.add_argument(
        "--characters", type=int, default=sys.maxsize, help="leave out longer functions (default: none)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--name", default="encode", help="of the results (default: %(default)s)")
    arguments = parser.parse_args()
    if "MOSE_DATA" not in os.environ:
        print("skipped: set MOSE_DATA to a folder that holds codesearchnet/{go,javascript,ruby}_test.jsonl.gz")
        sys.exit(0)
    texts = real_functions(Path(os.environ["MOSE_DATA"], "codesearchnet"))
    texts = [text for text in texts if len(text) <= arguments.characters]
    if arguments.texts:
        texts = texts[:: max(1, len(texts) // arguments.texts)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_random_checkpoint(shape(arguments.config), texts, Path(folder, "model"))
        for dtype in arguments.dtypes:
            rows += measure(checkpoint, texts, dtype, arguments.repeats)
    write_rows(arguments.name, rows, {"config": arguments.config, "texts": len(texts)})


def real_functions(folder: Path) -> list[str]:
    """Code of every row, language by language."""
    functions = (read_functions(require_files(folder, language_patterns("test", name)), name) for name in LANGUAGES)
    return [row.code for rows in functions for row in rows.values()]


def measure(checkpoint: Path, texts: list[str], dtype: str, repeats: int) -> list[dict[str, Any]]:
    """The rows of one dtype."""
    model, tokenizer = load_checkpoint(checkpoint, device="cpu", dtype=dtype)
    stock = SentenceTransformer(str(checkpoint), device="cpu", model_kwargs={"dtype": dtype})
    exits, deepest = model.config.exit_layers, model.config.num_hidden_layers
    # Compiled in the type that it is for.
    fastest = compile_for_inference(model) if dtype == "bfloat16" else model
    embeddings: dict[str, np.ndarray] = {}

    def ours(*exit_layers: int) -> dict[int, np.ndarray]:
        return encode_exits(fastest, tokenizer, texts, exit_layers=exit_layers, progress=False)

    def keep(name: str, encode: Callable[[], np.ndarray]) -> Callable[[], None]:
        def run() -> None:
            embeddings[name] = encode()

        return run

    contenders = {
        "encode_exits": keep("ours", lambda: ours(deepest)[deepest]),
        "sentence-transformers": keep("stock", lambda: sentence_transformers_encode(stock, texts)),
        "unsorted": keep("unsorted", lambda: unsorted_encode(model, tokenizer, texts)),
        "all exits": lambda: ours(*exits),
        "five encodes": lambda: [ours(exit_layer) for exit_layer in exits],
    }
    seconds = take_turns(contenders, repeats, name=dtype)
    return rows_of(seconds, embeddings, dtype)


def rows_of(seconds: Seconds, embeddings: dict[str, np.ndarray], dtype: str) -> list[dict[str, Any]]:
    """Ratios of texts per second, the share of one pass, and the largest difference of a component."""
    faster = {"stock": "sentence-transformers", "unsorted": "unsorted"}
    least = {"stock": LEAST[dtype], "unsorted": 2.0}
    rows = [
        figure(f"{dtype}: texts/s / {faster[other]}", ratio(seconds, faster[other], "encode_exits"), least=least[other])
        for other in faster
    ]
    rows.append(
        figure(
            f"{dtype}: five exits in one pass / five encodes", ratio(seconds, "all exits", "five encodes"), most=0.45
        )
    )
    difference = max(float(np.abs(embeddings["ours"] - embeddings[other]).max()) for other in faster)
    rows.append(figure(f"{dtype}: largest difference of a component", {"value": difference}, most=1e-3, unit=""))
    return rows


def sentence_transformers_encode(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    """As a user calls it."""
    return model.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False, convert_to_numpy=True)


def unsorted_encode(model: torch.nn.Module, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Padded batches in the order of the corpus."""
    unpad, model.config.unpad_inputs = model.config.unpad_inputs, False
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH_SIZE):
            batch = tokenizer(
                texts[start : start + BATCH_SIZE],
                padding=True,
                truncation=True,
                max_length=model.config.max_position_embeddings,
                return_tensors="pt",
            )
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            parts.append(output.sentence_embedding.float().numpy())
    model.config.unpad_inputs = unpad
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
