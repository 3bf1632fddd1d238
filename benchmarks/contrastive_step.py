"""One contrastive step over all exits at growing batch sizes: ours, and sentence-transformers' AdaptiveLayerLoss.

    python benchmarks/contrastive_step.py                                # batches of 64 … 4096
    python benchmarks/contrastive_step.py --batch-sizes 64 2048 --memory-limit 8

Contenders have the same layers, exits, pairs and logit scale; each is a forward and a backward pass, without optimiser.

    cached      our objective with mini-batches (gradient caching) and without padding
    whole       our objective with the whole batch in one graph, without padding
    adaptive    AdaptiveLayerLoss over MultipleNegativesRankingLoss in both directions, without its divergence term; in
                place of layers drawn at random it gets our exits. It has no projection heads, and so less to compute

Each contender at each batch size is a process of its own, in which memory beyond the model is limited (RLIMIT_DATA on
CPU); running out of it is a result. Within a batch size the processes take turns step by step; seconds are medians.
Peak memory is resident memory at its peak (VmHWM) above that before the first step, on CPU, and `max_memory_allocated`
on a GPU. On CPU, glibc is told to give memory of a MiB and more back when it is freed (MALLOC_MMAP_THRESHOLD_): by
itself it keeps some, and how much differs from run to run. Each process keeps as many compiled operations as `mose`.

`mixed` pairs are documented functions of the installed packages; `equal` ones are the same tokens cut into texts of
those pairs' mean lengths.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from report import returned_memory, status_bytes, write
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from modular_star_encoder.cli.main import keep_few_compiled_operations
from modular_star_encoder.data.collators import pad_inputs
from modular_star_encoder.data.finetuning_rows import RetrievalTexts
from modular_star_encoder.data.functions import collect_functions
from modular_star_encoder.data.pairs import described
from modular_star_encoder.data.sources.repositories import installed_repositories
from modular_star_encoder.data.tokenizer import train_tokenizer
from modular_star_encoder.modeling import (
    ModularStarEncoderConfig,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderModel,
)
from modular_star_encoder.objectives.contrastive import ContrastiveObjective
from modular_star_encoder.objectives.contrastive_settings import ContrastiveSettings
from modular_star_encoder.objectives.exit_losses import exit_weights
from modular_star_encoder.training.recipes import load_config
from modular_star_encoder.utils.reports import markdown_table

CONTENDERS = ("cached", "whole", "adaptive")
SIDES = ("query", "document")
KINDS = ("mixed", "equal")
LOGIT_SCALE = 10.0
OUT_OF_MEMORY = "out of memory"


def main() -> None:
    """Parse, measure, print, write; or be one of the measured processes."""
    arguments = build_parser().parse_args()
    if arguments.contender:
        answer_steps(arguments)
        return
    names = ("shape", "attention", "mini_batch_tokens", "max_tokens", "memory_limit", "repeats", "bf16")
    settings = {name: getattr(arguments, name) for name in names}
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="contrastive-step-") as folder:
        arguments.pairs = Path(folder)
        save_pairs(arguments)
        for kind in arguments.kinds:
            for batch_size in arguments.batch_sizes:
                figures += measure(arguments, kind, batch_size)
                print_rows(figures[-len(arguments.contenders) :])
                # Large batches take long: what was measured before a stop is kept.
                name = arguments.name or f"contrastive_step_{arguments.shape}"
                path = write(name, {"settings": settings, "steps": figures}, curve(figures))
    print(f"\n{path}")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of pairs (default: both)")
    parser.add_argument("--shape", default="small", help="of the model, a name in hub_configs (default: %(default)s)")
    parser.add_argument("--attention", default="sdpa", help="attention of all contenders (default: %(default)s)")
    parser.add_argument("--mini-batch-tokens", type=int, default=4096, help="of `cached` (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, nargs=2, default=[128, 512], metavar=("QUERY", "DOCUMENT"))
    parser.add_argument("--memory-limit", type=float, default=12.0, help="GiB of each step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each contender")
    parser.add_argument("--bf16", action="store_true", help="compute under bfloat16 autocast")
    parser.add_argument("--name", help="of the results file (default: contrastive_step_ and the shape)")
    parser.add_argument("--pairs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    return parser


def device() -> str:
    """Where everything runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def save_pairs(arguments: argparse.Namespace) -> None:
    """Tokenized pairs of both kinds, each side as one row of ids and its texts' lengths."""
    functions, _ = collect_functions(installed_repositories())
    count = min(len(functions), max(arguments.batch_sizes) * (arguments.repeats + 1))
    functions = random.Random(0).sample(functions, count)
    texts = [text for function in functions for text in (function.description, function.code)]
    tokenizer = train_tokenizer(texts, load_config(arguments.shape).vocab_size)
    query_tokens, document_tokens = arguments.max_tokens
    pairs = RetrievalTexts(
        described(functions), tokenizer, max_text_tokens=query_tokens, max_code_tokens=document_tokens, prompts=False
    )
    if len(pairs) < max(arguments.batch_sizes):
        raise ValueError(f"The installed packages have {len(pairs)} pairs, fewer than the largest batch.")
    mixed, equal = {}, {}
    for side in SIDES:
        ids = [pairs[index][f"{side}_ids"] for index in range(len(pairs))]
        lengths = torch.tensor([len(row) for row in ids])
        mean = round(lengths.float().mean().item())
        mixed |= {f"{side}_ids": torch.cat(ids), f"{side}_lengths": lengths}
        count = int(lengths.sum()) // mean
        equal |= {f"{side}_ids": torch.cat(ids)[: count * mean], f"{side}_lengths": torch.full((count,), mean)}
        print(f"{side}: {len(ids)} texts of {int(lengths.min())} to {int(lengths.max())} tokens, {mean} in the mean")
    for kind, tensors in zip(KINDS, (mixed, equal), strict=True):
        save_file(tensors, arguments.pairs / f"{kind}.safetensors")


def measure(arguments: argparse.Namespace, kind: str, batch_size: int) -> list[dict[str, Any]]:
    """One figure per contender: its outcome, and where it ran, seconds and peak memory."""
    workers = {contender: Worker(arguments, contender, kind, batch_size) for contender in arguments.contenders}
    answers: dict[str, list[dict[str, Any]]] = {contender: [] for contender in workers}
    try:
        for step in tqdm(range(arguments.repeats + 1), desc=f"{kind} pairs, batch {batch_size}", leave=False):
            for contender, worker in workers.items():
                answers[contender].append(worker.step(step))
    finally:
        for worker in workers.values():
            worker.stop()
    figures = []
    for contender, of_steps in answers.items():
        figure = {"kind": kind, "batch_size": batch_size, "contender": contender, "outcome": of_steps[-1]["outcome"]}
        if figure["outcome"] == "ran":
            figure |= {
                "seconds": statistics.median(answer["seconds"] for answer in of_steps[1:]),
                "peak_bytes": of_steps[-1]["peak_bytes"],
                "tokens": statistics.mean(answer["tokens"] for answer in of_steps[1:]),
                "padded_tokens": statistics.mean(answer["padded_tokens"] for answer in of_steps[1:]),
                "loss": of_steps[0]["loss"],
            }
        figures.append(figure)
    return figures


class Worker:
    """A contender at one batch size, in a process that does one step for each line it is sent."""

    def __init__(self, arguments: argparse.Namespace, contender: str, kind: str, batch_size: int) -> None:
        options = {
            "--contender": contender,
            "--kind": kind,
            "--batch-size": batch_size,
            "--pairs": arguments.pairs,
            "--shape": arguments.shape,
            "--attention": arguments.attention,
            "--mini-batch-tokens": arguments.mini_batch_tokens,
            "--memory-limit": arguments.memory_limit,
        }
        command = [sys.executable, __file__, *(str(part) for option in options.items() for part in option)]
        self.process = subprocess.Popen(
            command + ["--bf16"] * arguments.bf16,
            env={**os.environ, **returned_memory()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.outcome = "ran"

    def step(self, number: int) -> dict[str, Any]:
        """The answer to one step; once a process has failed, always how."""
        if self.outcome == "ran":
            try:
                self.process.stdin.write(f"{number}\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = ""
            # Without an answer the process was ended: by the system, or by a library that could not allocate.
            answer = json.loads(line) if line else {"outcome": f"ended with status {self.process.wait()}"}
            self.outcome = answer["outcome"]
            return answer
        return {"outcome": self.outcome}

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def answer_steps(arguments: argparse.Namespace) -> None:
    """Be a worker: make the model, limit the memory, then do a step for each line of the standard input."""
    keep_few_compiled_operations()
    config = load_config(arguments.shape)
    dropout = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0)
    config = ModularStarEncoderConfig(**(config.to_dict() | dropout | {"architectures": None}))
    step_of = {"cached": own_step, "whole": own_step, "adaptive": adaptive_layer_step}[arguments.contender]
    torch.manual_seed(0)
    step = step_of(arguments, config)
    pairs = load_file(arguments.pairs / f"{arguments.kind}.safetensors")
    texts = {side: pairs[f"{side}_ids"].split(pairs[f"{side}_lengths"].tolist()) for side in SIDES}
    before = torch.cuda.memory_allocated() if device() == "cuda" else status_bytes("VmRSS")
    limit_memory(arguments.memory_limit)
    for line in sys.stdin:
        answer = timed_step(step, new_batch(texts, arguments.batch_size, int(line)), arguments.bf16)
        peak = torch.cuda.max_memory_allocated() if device() == "cuda" else status_bytes("VmHWM")
        print(json.dumps({**answer, "peak_bytes": peak - before}), flush=True)


def limit_memory(gibibytes: float) -> None:
    """Let allocations fail that go this much beyond what is allocated now."""
    limit = int(gibibytes * 2**30)
    if device() == "cuda":
        limit += torch.cuda.memory_allocated()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
        return
    import resource

    limit += status_bytes("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def new_batch(texts: dict[str, tuple[torch.Tensor, ...]], size: int, number: int) -> dict[str, dict[str, torch.Tensor]]:
    """The batch of a step, the same for every contender, padded on the left as our tokenizers do."""
    batch = {}
    for side, of_side in texts.items():
        rows = [of_side[(number * size + row) % len(of_side)] for row in range(size)]
        batch[side] = {name: tensor.to(device()) for name, tensor in pad_inputs(rows, 0, "left").items()}
    return batch


def timed_step(step: Callable[..., torch.Tensor], batch: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """Do one step; the answer says how it went."""
    masks = [inputs["attention_mask"] for inputs in batch.values()]
    start = time.perf_counter()
    try:
        with torch.autocast(device(), dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = step(batch)
        loss.backward()
        value = loss.item()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error):
            return {"outcome": OUT_OF_MEMORY}
        raise
    return {
        "outcome": "ran",
        "seconds": time.perf_counter() - start,
        "loss": value,
        "tokens": sum(int(mask.sum()) for mask in masks),
        "padded_tokens": sum(mask.numel() for mask in masks),
    }


def own_step(arguments: argparse.Namespace, config: ModularStarEncoderConfig) -> Callable[..., torch.Tensor]:
    """Our objective, with or without mini-batches."""
    config.unpad_inputs = True
    model = ModularStarEncoderForRetrieval(config).to(device())
    model.set_attn_implementation(arguments.attention)
    tokens = arguments.mini_batch_tokens if arguments.contender == "cached" else None
    objective = ContrastiveObjective(ContrastiveSettings(logit_scale=LOGIT_SCALE, mini_batch_tokens=tokens))
    exits = tuple(config.exit_layers)
    weights = exit_weights("paper", exits, config.num_hidden_layers).to(device())

    def step(batch: dict[str, Any]) -> torch.Tensor:
        model.zero_grad()
        return (objective(model.train(), batch, exits).losses * weights).sum()

    return step


def adaptive_layer_step(arguments: argparse.Namespace, config: ModularStarEncoderConfig) -> Callable[..., torch.Tensor]:
    """sentence-transformers' loss over the same layers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    trunk = ModularStarEncoderModel(config)
    with tempfile.TemporaryDirectory(dir=arguments.pairs) as folder:
        trunk.save_pretrained(folder)
        train_tokenizer(["a tokenizer has to be there"], 260, progress=False).save_pretrained(folder)
        transformer = Transformer(folder, model_kwargs={"attn_implementation": arguments.attention})
    modules = [transformer, Pooling(config.hidden_size), Normalize()]
    model = SentenceTransformer(modules=modules, device=device()).train()
    ranking = MultipleNegativesRankingLoss(
        model, scale=LOGIT_SCALE, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    shallow = list(config.exit_layers[:-1])
    # Paper weights of the exits: theirs are divided by the number of prior layers.
    weight = {layer: len(shallow) * layer / config.num_hidden_layers for layer in shallow}
    loss = AdaptiveLayerLoss(
        model, ranking, n_layers_per_step=len(shallow), kl_temperature=0, layer_weighting=weight.__getitem__
    )

    def step(batch: dict[str, Any]) -> torch.Tensor:
        model.zero_grad()
        with mock.patch("random.sample", return_value=shallow):
            return loss([dict(batch[side]) for side in SIDES], None)

    return step


def curve(figures: list[dict[str, Any]]) -> str:
    """A Markdown table with a line per kind of pairs and batch size: seconds and memory of each contender."""
    contenders = list(dict.fromkeys(figure["contender"] for figure in figures))
    cells = {}
    for figure in figures:
        ran = figure["outcome"] == "ran"
        shown = f"{figure['seconds']:.2f} s, {figure['peak_bytes'] / 2**30:.2f} GiB" if ran else figure["outcome"]
        cells.setdefault((figure["kind"], str(figure["batch_size"])), {})[figure["contender"]] = shown
    rows = [(*place, *(of_place.get(contender, "") for contender in contenders)) for place, of_place in cells.items()]
    return "\n".join(markdown_table([("pairs", "batch", *contenders), *rows]))


def print_rows(figures: list[dict[str, Any]]) -> None:
    """One line per contender, with its ratios to `adaptive`."""
    theirs = next((figure for figure in figures if figure["contender"] == "adaptive"), {})
    for figure in figures:
        line = f"{figure['kind']:6} {figure['batch_size']:5}  {figure['contender']:9}"
        if figure["outcome"] == "ran":
            line += f"{figure['seconds']:9.2f} s  {figure['peak_bytes'] / 2**30:6.2f} GiB  loss {figure['loss']:.3f}"
            if theirs.get("outcome") == "ran":
                line += f"  {theirs['seconds'] / figure['seconds']:.2f} × the steps per second of adaptive"
        else:
            line += f"{figure['outcome']:>20}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
