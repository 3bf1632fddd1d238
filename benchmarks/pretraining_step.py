"""One pre-training step with the losses of five exits, against one with the deepest exit's alone and the plain version.

    python benchmarks/pretraining_step.py                    # hidden 384, 12 layers, vocabularies 8k and 49k
    python benchmarks/pretraining_step.py --shape paper      # a 12-layer cut of the 1B configuration

Contenders take turns in one process; seconds are medians. `plain` computes the logits of all tokens at all exits, as
code that follows the formula would. Peak memory is measured in a process per contender: resident memory at the end of
its peak (VmHWM) above that before the first step, on CPU, where glibc is told to give back memory that is freed
(MALLOC_MMAP_THRESHOLD_); `max_memory_allocated` on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from report import returned_memory, status_bytes, write
from torch import nn
from tqdm.auto import tqdm

from modular_star_encoder.inference.encode import bf16_is_faster
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForPreTraining
from modular_star_encoder.objectives.exit_losses import exit_weights

SHAPES = {
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "exit_layers": [1, 3, 6, 9, 12],
    },
    "paper": {"num_hidden_layers": 12, "exit_layers": [1, 3, 6, 9, 12]},
}
CONTENDERS = ("five exits", "deepest exit", "plain")
MASKED_SHARE = 0.15


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="model (default: %(default)s)")
    parser.add_argument("--vocabularies", type=int, nargs="+", help="default: 8192 49156; 49156 for paper")
    parser.add_argument("--rows", type=int, default=8, help="rows per step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each contender")
    parser.add_argument("--without-plain", action="store_true", help="leave the plain version out")
    parser.add_argument("--memory-of", nargs=2, metavar=("CONTENDER", "VOCABULARY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        contender, vocabulary = arguments.memory_of
        print(peak_memory(arguments, contender, int(vocabulary)))
        return
    figures = []
    for vocabulary in arguments.vocabularies or ([49156] if arguments.shape == "paper" else [8192, 49156]):
        figures += measure(arguments, vocabulary)
    print_table(figures)
    print(f"\n{write(f'pretraining_step_{arguments.shape}', figures)}")


def new_model(shape: str, vocabulary: int) -> ModularStarEncoderForPreTraining:
    """Random weights, no dropout."""
    dropout = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0)
    torch.manual_seed(0)
    config = ModularStarEncoderConfig(vocab_size=vocabulary, pad_token_id=0, **SHAPES[shape], **dropout)
    return ModularStarEncoderForPreTraining(config).to(device())


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def new_batch(rows: int, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens, 15 % of them to predict."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(4, vocabulary, (rows, tokens), generator=generator)
    masked = torch.rand(rows, tokens, generator=generator) < MASKED_SHARE
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.where(masked, input_ids, -100),
        "icc_labels": torch.arange(rows) % 2,
    }
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def plain_loss(model: ModularStarEncoderForPreTraining, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same loss by its formula: logits of every token at every exit."""
    config, heads = model.config, model.heads
    mask = batch["attention_mask"]
    outputs = model.model(batch["input_ids"], attention_mask=mask, exit_layers=config.exit_layers)
    total = 0
    for row, (exit_layer, states) in enumerate(zip(config.exit_layers, outputs.exit_hidden_states, strict=True)):
        logits = heads.decoder(heads.token_features(states, row)).float()
        mlm = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        icc_logits = heads.icc_classifier(heads.pooler(states, mask, heads.exit_embedding(row))).float()
        icc = nn.functional.cross_entropy(icc_logits, batch["icc_labels"])
        total = total + exit_layer / config.num_hidden_layers * (mlm + icc)
    return total


def own_loss(model: ModularStarEncoderForPreTraining, batch: dict[str, torch.Tensor], exits: list[int]) -> torch.Tensor:
    """The loss of our objective at these exits."""
    output = model(**batch, exit_layers=exits)
    weights = exit_weights("paper", exits, model.config.num_hidden_layers).to(output.mlm_losses.device)
    return ((output.mlm_losses + output.icc_losses) * weights).sum()


def step_of(contender: str, model: ModularStarEncoderForPreTraining, batch: dict[str, torch.Tensor]) -> Callable:
    """One forward and backward pass, in bfloat16 autocast where the processor has it; returns the loss."""
    exits = list(model.config.exit_layers)

    def step() -> float:
        model.zero_grad()
        with torch.autocast(device(), dtype=torch.bfloat16, enabled=bf16_is_faster()):
            if contender == "plain":
                loss = plain_loss(model, batch)
            else:
                loss = own_loss(model, batch, exits if contender == "five exits" else exits[-1:])
        loss.backward()
        return loss.item()

    return step


def measure(arguments: argparse.Namespace, vocabulary: int) -> list[dict]:
    """Median seconds of interleaved steps and peak memory of each contender."""
    contenders = [c for c in CONTENDERS if c != "plain" or not arguments.without_plain]
    model = new_model(arguments.shape, vocabulary)
    batch = new_batch(arguments.rows, arguments.tokens, vocabulary)
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    losses = {}
    for repeat in tqdm(range(arguments.repeats + 1), desc=f"vocabulary {vocabulary}"):
        for contender in contenders:
            start = time.perf_counter()
            losses[contender] = step_of(contender, model, batch)()
            if repeat:
                seconds[contender].append(time.perf_counter() - start)
    if "plain" in losses and abs(losses["plain"] - losses["five exits"]) > 0.01 * losses["plain"]:
        raise RuntimeError(f"The contenders do not compute the same loss: {losses}.")
    del model, batch
    return [
        {
            "shape": arguments.shape,
            "vocabulary": vocabulary,
            "contender": contender,
            "rows": arguments.rows,
            "tokens": arguments.tokens,
            "seconds": statistics.median(seconds[contender]),
            "peak_bytes": memory_in_own_process(arguments, contender, vocabulary),
        }
        for contender in contenders
    ]


def memory_in_own_process(arguments: argparse.Namespace, contender: str, vocabulary: int) -> int:
    """Peak memory of two steps in a fresh process."""
    options = ["--shape", arguments.shape, "--rows", str(arguments.rows), "--tokens", str(arguments.tokens)]
    command = [sys.executable, __file__, *options, "--memory-of", contender, str(vocabulary)]
    environment = {**os.environ, **returned_memory()}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def peak_memory(arguments: argparse.Namespace, contender: str, vocabulary: int) -> int:
    """Bytes above the state before the first step."""
    model = new_model(arguments.shape, vocabulary)
    step = step_of(contender, model, new_batch(arguments.rows, arguments.tokens, vocabulary))
    before = torch.cuda.memory_allocated() if device() == "cuda" else status_bytes("VmRSS")
    for _ in range(2):
        step()
    return (torch.cuda.max_memory_allocated() if device() == "cuda" else status_bytes("VmHWM")) - before


def print_table(figures: list[dict]) -> None:
    """One line per contender, with ratios to the other two."""
    print("vocabulary  contender     seconds  peak memory  time and memory of deepest alone  of plain")
    for row in figures:
        others = {other["contender"]: other for other in figures if other["vocabulary"] == row["vocabulary"]}
        ratios = [
            f"{row['seconds'] / others[name]['seconds']:.2f} × {row['peak_bytes'] / others[name]['peak_bytes']:.2f} ×"
            if name in others
            else ""
            for name in ("deepest exit", "plain")
        ]
        memory = f"{row['peak_bytes'] / 2**30:.2f} GiB"
        print(
            f"{row['vocabulary']:10}  {row['contender']:12} {row['seconds']:8.2f}  {memory:>11}"
            f"  {ratios[0]:>32}  {ratios[1]}"
        )


if __name__ == "__main__":
    main()
