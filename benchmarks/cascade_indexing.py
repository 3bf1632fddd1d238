"""What it costs to index documents at a shallow exit, beside a deep one: random weights, documents of mixed length.

Imported by cascade.py (`--shape`).
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from modular_star_encoder.inference.encode import evaluating, length_batches
from modular_star_encoder.inference.profile import flops_per_token
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.training.recipes import load_config
from modular_star_encoder.utils.reports import markdown_table

SHAPES = {"paper": "finetuned", "small": "small"}
"""Folders of hub_configs/."""
CANDIDATES = 200
_TOKENS_PER_BATCH = 2048
_MEAN, _SIGMA, _SHORTEST, _LONGEST = 150, 0.8, 16, 1024


def measure_indexing(shape: str, documents: int, sample: int, rounds: int) -> tuple[dict[str, Any], str]:
    """Time of exits and of resuming, interleaved batch by batch, on a sample; and arithmetic, on all documents.

    The sample is every n-th document in the order of length, so that it has their mix of lengths. Each time is the
    best of `rounds`, summed over the batches, and extrapolated by the number of tokens.
    """
    if not 0 < sample <= documents or rounds < 1:
        raise ValueError(f"sample must be 1 to {documents}, not {sample}, and rounds at least 1, not {rounds}.")
    model = random_model(SHAPES[shape])
    config = model.config
    shallow, deep = config.exit_layers[0], config.exit_layers[-1]
    lengths = document_lengths(documents)
    chosen = np.sort(lengths)[np.linspace(0, documents - 1, sample).round().astype(int)]
    seconds = time_batches(model, chosen.tolist(), shallow, deep, rounds)
    scale = lengths.sum() / chosen.sum()
    total = {name: float(values.min(axis=1).sum() * scale) for name, values in seconds.items()}
    flops = {
        exit_layer: float(sum(length * flops_per_token(config, exit_layer, int(length)) for length in lengths))
        for exit_layer in (shallow, deep)
    }
    # What the deep exit would have cost at indexing, against what it costs for the candidates of each question.
    candidates = min(CANDIDATES, documents)
    per_question = total["resumed"] / documents * candidates
    figures = {
        "config": SHAPES[shape],
        "dtype": "bfloat16",
        "documents": {
            "number": documents,
            "tokens": int(lengths.sum()),
            "lengths": f"log-normal, mean {_MEAN}, sigma {_SIGMA}, {_SHORTEST} to {_LONGEST} tokens",
            "timed": int(sample),
            "timed_tokens": int(chosen.sum()),
        },
        "exit_layers": [shallow, deep],
        "seconds_extrapolated": {name: round(value, 2) for name, value in total.items()},
        "times_cheaper": round(total["deep"] / total["shallow"], 2),
        "times_less_arithmetic": round(flops[deep] / flops[shallow], 2),
        "resumed_over_deep": round(total["resumed"] / total["deep"], 3),
        "candidates": candidates,
        "seconds_for_candidates": round(per_question, 2),
        "questions_until_even": round((total["deep"] - total["shallow"]) / per_question, 1),
    }
    return figures, report_text(figures)


def random_model(name: str) -> Any:
    """Random weights in bfloat16 at the shape of a folder of hub_configs/; no float32 copy is ever made."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return ModularStarEncoderForRetrieval(load_config(name)).eval()
    finally:
        torch.set_default_dtype(default)


def document_lengths(count: int) -> np.ndarray:
    """Tokens of each document, the same in every run."""
    draws = np.random.default_rng(0).lognormal(np.log(_MEAN) - _SIGMA**2 / 2, _SIGMA, size=count)
    return np.clip(draws.round(), _SHORTEST, _LONGEST).astype(int)


def time_batches(model: Any, lengths: list[int], shallow: int, deep: int, rounds: int) -> dict[str, np.ndarray]:
    """Name → (batches, rounds) seconds, the passes taking turns; padded batches sorted by length, as in indexing."""
    batches = list(length_batches(lengths, _TOKENS_PER_BATCH))
    seconds = {name: np.empty((len(batches), rounds)) for name in ("shallow", "deep", "resumed")}
    generator = torch.Generator().manual_seed(0)
    with evaluating(model):
        for number, rows in enumerate(batches):
            sizes = torch.tensor([lengths[row] for row in rows])
            mask = (torch.arange(int(sizes.max())) < sizes[:, None]).long()
            ids = torch.randint(4, model.config.vocab_size, mask.shape, generator=generator) * mask
            states = model(ids, mask, exit_layer=shallow, output_residual_states=True).residual_states[0]
            passes = (
                ("shallow", {"input_ids": ids, "exit_layer": shallow}),
                ("deep", {"input_ids": ids, "exit_layer": deep}),
                ("resumed", {"inputs_embeds": states, "start_layer": shallow, "exit_layer": deep}),
            )
            for turn in range(rounds):
                for name, inputs in passes:
                    seconds[name][number, turn] = timed(lambda: model(attention_mask=mask, **inputs))  # noqa: B023
    return seconds


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report_text(figures: dict[str, Any]) -> str:
    """A table, and below it what was measured."""
    shallow, deep = figures["exit_layers"]
    documents, seconds = figures["documents"], figures["seconds_extrapolated"]
    rows = [
        ("", "seconds"),
        (f"index at exit {shallow}", f"{seconds['shallow']:,.1f}"),
        (f"index at exit {deep}", f"{seconds['deep']:,.1f}"),
        (
            f"exit {deep} for the {figures['candidates']} candidates of a question",
            f"{figures['seconds_for_candidates']:,.1f}",
        ),
    ]
    return "\n".join(
        [
            *markdown_table(rows),
            "",
            f"Indexing at exit {shallow} is {figures['times_cheaper']} × cheaper than at exit {deep} (arithmetic: "
            f"{figures['times_less_arithmetic']} ×). Re-ranking has cost as much as indexing deep after "
            f"{figures['questions_until_even']} questions of which no candidate was seen before.",
            f"`{figures['config']}` with random weights in {figures['dtype']}; {documents['number']:,} documents of "
            f"mixed length ({documents['lengths']}; {documents['tokens']:,} tokens), times extrapolated from "
            f"{documents['timed']:,} of them ({documents['timed_tokens']:,} tokens).",
        ]
    )
