"""Embedding functions on a CPU: mose-code, other encoders and model2vec, each at its fastest backend, in one run.

    MOSE_DATA=~/data python benchmarks/contenders.py BAAI/bge-small-en-v1.5 sentence-transformers/all-MiniLM-L6-v2

The texts are the candidates of CodeSearchNet's test tasks (`--rows` from each pool of 1,000), cut to 256 tokens, the
limit of all-MiniLM-L6-v2. Every contender embeds all of them in each round, tokenizing included:

    torch float32, bfloat16    `SentenceTransformer.encode` of the other encoders; ours by `encode_exits` in float32, by
                               the encoder of `mose index` in bfloat16; bfloat16 only where the processor has it
    ONNX int8                  onnxruntime with weights of 8 bits, the same batches for every encoder
    numpy                      what `mose search` uses at exit 0, without torch
    model2vec                  its library with exit 0 of mose-code as `mose export --format model2vec` writes it

MRR: descriptions against all texts of their pool, with what the contender itself computed. First answer: a new process
imports, loads and embeds one question. Memory: the peak of such a process that embeds 200 texts.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ratios import Seconds, figure, median_of, ratio, take_turns
from report import status_bytes, write

from modular_star_encoder.utils.reports import markdown_table

CHECKPOINT = Path(__file__).parent.parent / "hub_configs" / "mose-code"
MAX_TOKENS, SIZE = 256, 384  # of a text; of the vectors of all encoders that were compared
QUESTION = "retry a failed request"
Encode = Callable[[Sequence[str]], np.ndarray]


def main() -> None:
    """Parse, measure, print, write; or be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", help="names or folders of SentenceTransformer models")
    parser.add_argument("--rows", type=int, default=1000, help="of each pool (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--name", default="contenders", help="of the results (default: %(default)s)")
    parser.add_argument("--open", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        name, folder = arguments.open
        encode = contenders(arguments.encoders, Path(folder))[name]()
        encode([QUESTION])
        if arguments.texts:
            encode(arguments.texts.read_text(encoding="utf-8").split("\0"))
            print(status_bytes("VmHWM"))
        return
    if "MOSE_DATA" not in os.environ:
        return print("skipped: set MOSE_DATA to a folder that holds codesearchnet/ruby_test.jsonl.gz")
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def contenders(encoders: Sequence[str], folder: Path) -> dict[str, Callable[[], Encode]]:
    """{name: function that loads a contender}; exported files are kept in `folder`."""
    found: dict[str, Callable[[], Encode]] = {}
    dtypes = ("float32", "bfloat16")
    for name in encoders:
        label = Path(name).name
        found |= {f"{label}, torch {dtype}": partial(stock, name, dtype) for dtype in dtypes}
        found[f"{label}, ONNX int8"] = partial(stock_onnx, name, folder / f"{label}.onnx")
    for k in (6, 2, 1):
        found |= {f"exit {k}, torch float32": partial(ours, k), f"exit {k}, mose index": partial(ours_indexing, k)}
        found[f"exit {k}, ONNX int8"] = partial(ours_onnx, k, folder / f"exit-{k}.onnx")
    return found | {"exit 0, numpy": exit_zero, "exit 0, model2vec": partial(model2vec, folder / "model2vec")}


def stock(name: str, dtype: str) -> Encode:
    """As a user of sentence-transformers calls it."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": dtype})
    model.max_seq_length = MAX_TOKENS
    return lambda texts: model.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)


def stock_onnx(name: str, path: Path) -> Encode:
    """The same model by onnxruntime: its transformer and pooling as one graph."""
    import torch
    from sentence_transformers import SentenceTransformer

    from modular_star_encoder.hub.onnx_export import quantize_onnx

    model = SentenceTransformer(name, device="cpu", model_kwargs={"attn_implementation": "eager"}).eval()

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]

    if not path.exists():
        inputs = {name: torch.ones(2, 8, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=MAX_TOKENS)}
        whole = path.with_suffix(".float32.onnx")
        options: dict[str, Any] = {"dynamic_shapes": dict.fromkeys(inputs, shape), "verbose": False}
        torch.onnx.export(Graph(), (), str(whole), kwargs=inputs, output_names=["sentence_embedding"], **options)
        quantize_onnx(whole, path)
    return by_onnxruntime(path, model.tokenizer)


def ours(exit_layer: int) -> Encode:
    """`encode_exits` at one exit."""
    from modular_star_encoder.inference.checkpoints import load_checkpoint
    from modular_star_encoder.inference.encode import encode_exits

    options: dict[str, Any] = {"exit_layers": [exit_layer], "progress": False, "max_length": MAX_TOKENS}
    encode = partial(encode_exits, *load_checkpoint(CHECKPOINT, exit_layer, "cpu"), **options)
    return lambda texts: encode(list(texts))[exit_layer]


def ours_indexing(exit_layer: int) -> Encode:
    """As `mose index` embeds many pieces: in bfloat16 where that is faster."""
    from modular_star_encoder.search.embedder import Embedder

    encode = Embedder(CHECKPOINT, "cpu").encoder([exit_layer])
    return lambda texts: encode(list(texts), max_length=MAX_TOKENS)[exit_layer]


def ours_onnx(exit_layer: int, path: Path) -> Encode:
    """The file that `mose export --format onnx` writes, in 8 bits."""
    from modular_star_encoder.hub.onnx_export import export_onnx, quantize_onnx
    from modular_star_encoder.inference.checkpoints import load_checkpoint

    model, tokenizer = load_checkpoint(CHECKPOINT, exit_layer=exit_layer, device="cpu")
    if not path.exists():
        export_onnx(model, path.with_suffix(".float32.onnx"))
        quantize_onnx(path.with_suffix(".float32.onnx"), path)
    return by_onnxruntime(path, tokenizer)


def by_onnxruntime(path: Path, tokenizer: Any) -> Encode:
    """Batches of texts of like length, as for `encode_exits`."""
    from modular_star_encoder.hub.onnx_export import open_session
    from modular_star_encoder.inference.encode import encode_batches

    session = open_session(path)

    def encode_batch(batch: Any) -> np.ndarray:
        inputs = {name: np.asarray(batch[name]) for name in ("input_ids", "attention_mask")}
        return session.run(["sentence_embedding"], inputs)[0][None]

    options: dict[str, Any] = {"max_length": MAX_TOKENS, "progress": False, "tokens_per_batch": 2048}
    return lambda texts: encode_batches(tokenizer, list(texts), encode_batch, (1, SIZE), **options)[0]


def exit_zero() -> Encode:
    """As `mose search` embeds."""
    from modular_star_encoder.inference.exit_zero import NumpyEncoder

    encoder = NumpyEncoder(CHECKPOINT)
    encoder.tokenizer.enable_truncation(MAX_TOKENS)
    return encoder.encode


def model2vec(folder: Path) -> Encode:
    """The library, on the folder that we export."""
    if not folder.exists():
        from modular_star_encoder import export_static

        export_static(CHECKPOINT, folder, format="model2vec")
    from model2vec import StaticModel

    model = StaticModel.from_pretrained(folder)
    return lambda texts: model.encode(list(texts), max_length=MAX_TOKENS)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Time all contenders in turns, then their processes; print and write."""
    from modular_star_encoder.evaluation.benchmarks import load_benchmark
    from modular_star_encoder.inference.encode import bf16_is_faster

    tasks: list[Any] = load_benchmark("codesearchnet-999", os.environ["MOSE_DATA"], allow_subset=True)
    pools = [
        [
            [part[row].text for row in rows[: arguments.rows]]
            for part, rows in zip((task.queries, task.documents), pool, strict=True)
        ]
        for task in tasks
        for pool in task.pools
    ]
    languages = [task.name for task in tasks for _ in task.pools]
    texts = [text for _, documents in pools for text in documents]
    loaders = contenders(arguments.encoders, folder).items()
    opened = {name: load() for name, load in loaders if bf16_is_faster() or "bfloat16" not in name}
    vectors: dict[str, np.ndarray] = {}

    def embed(name: str) -> None:
        vectors[name] = opened[name](texts)

    seconds = take_turns({name: partial(embed, name) for name in opened}, arguments.rounds, name="embedding")
    quality = {}
    for name, encode in opened.items():
        found: dict[str, list[float]] = {language: [] for language in languages}
        for place, (queries, documents) in enumerate(pools):
            start = sum(len(one) for _, one in pools[:place])
            found[languages[place]] += reciprocal_ranks(encode(queries), vectors[name][start : start + len(documents)])
        quality[name] = 100 * float(np.mean([np.mean(one) for one in found.values()]))
    opened.clear()
    (folder / "texts").write_text("\0".join(texts[:: max(1, len(texts) // 200)][:200]), encoding="utf-8")
    parts = {name: process(arguments.encoders, name, folder) for name in vectors}
    rows = [
        {
            "contender": name,
            "texts_per_second": median_of([len(texts) / one for one in seconds[name]]),
            "mrr": round(quality[name], 1),
            "first_answer_seconds": parts[name][0],
            "peak_mib": parts[name][1],
        }
        for name in vectors
    ]
    ratios = ratios_of(seconds, [Path(name).name for name in arguments.encoders])
    table = markdown(rows, ratios, len(texts))
    figures = {"texts": len(texts), "contenders": rows, "rows": ratios}
    print(f"{table}\n\n{write(arguments.name, figures, table)}")


def reciprocal_ranks(queries: np.ndarray, documents: np.ndarray) -> list[float]:
    """1 / rank of document i for query i, by cosine; ties count against it."""
    units = [one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12) for one in (queries, documents)]
    scores = units[0].astype(np.float32) @ units[1].astype(np.float32).T
    return list(1 / (scores >= scores.diagonal()[:, None]).sum(axis=1))


def process(encoders: Sequence[str], name: str, folder: Path) -> tuple[dict[str, Any], int]:
    """Seconds of a new process until one question is embedded (median of two), and its peak MiB for 200 texts."""
    command = [sys.executable, __file__, *encoders, "--open", name, str(folder)]
    run = partial(subprocess.run, command, check=True, capture_output=True)
    first = take_turns({"one": run}, 2, warm_up=0, name=name)
    done = subprocess.run([*command, "--texts", str(folder / "texts")], check=True, capture_output=True, text=True)
    return median_of(first["one"]), int(done.stdout) // 2**20


def ratios_of(seconds: Seconds, encoders: Sequence[str]) -> list[dict[str, Any]]:
    """Texts per second of each of our exits over every other encoder's, both at their fastest backend."""

    def fastest(label: str) -> str:
        return min(
            (name for name in seconds if name.startswith(f"{label},")), key=lambda name: np.median(seconds[name])
        )

    least = {("bge", 6): 3.0, ("MiniLM", 6): 1.0, ("bge", 1): 10.0, ("MiniLM", 1): 10.0}
    rows = []
    for encoder in encoders:
        for k in (6, 2, 1, 0):
            target = next((value for (part, exit_), value in least.items() if part in encoder and exit_ == k), None)
            over, under = fastest(encoder), "exit 0, numpy" if k == 0 else fastest(f"exit {k}")
            rows.append(figure(f"CPU, texts/s: {under} / {over}", ratio(seconds, over, under), least=target))
    return [
        *rows,
        figure(
            "exit 0, numpy / exit 0, model2vec", ratio(seconds, "exit 0, model2vec", "exit 0, numpy"), least=1 / 1.2
        ),
    ]


def markdown(rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]], texts: int) -> str:
    """Both tables."""
    cells = [
        [
            row["contender"],
            "{value:.0f} ({low:.0f}–{high:.0f})".format(**row["texts_per_second"]),
            f"{row['mrr']:.1f}",
            "{value:.1f} s".format(**row["first_answer_seconds"]),
            f"{row['peak_mib']} MiB",
        ]
        for row in rows
    ]
    compared = [
        [
            row["name"],
            "{value:.2f} × ({low:.2f}–{high:.2f})".format(**row),
            f"≥ {row['least']:.2f}" if row.get("least") else "",
        ]
        for row in ratios
    ]
    parts = [
        f"{texts:,} texts of at most {MAX_TOKENS} tokens. MRR × 100 among the texts of a pool, mean of the languages.",
        "\n".join(markdown_table([["", "texts/s", "MRR", "first answer", "peak memory"], *cells])),
        "Texts per second, each at its fastest backend:",
        "\n".join(markdown_table([["", "ratio", "target"], *compared])),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
