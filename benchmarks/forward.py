"""A forward pass against transformers' own models of the same size, on a CPU.

    python benchmarks/forward.py                    # equal dimensions; 1B layers in bfloat16; texts of mixed length
    python benchmarks/forward.py --quick            # the first part alone, small

Three parts, each with its contenders in turns in one process:

    equal dimensions  our trunk, Starcoder2Model, and a ModernBertModel whose MLPs are as wide as makes its layers as
                      large (they are gated, with as many key as query heads, and two layers of three see a window)
    1B layers         the first 9 layers of the 1B configuration in bfloat16, which share the weights of a
                      Starcoder2Model: as they are, and compiled (`compile_for_inference`); beside the share of the
                      fastest matrix product in the same run
    mixed lengths     256 texts of 150 tokens in the mean, sorted: stock in padded batches, ours without padding and
                      compiled

Starcoder2Model attends to earlier tokens only, ours to all: attention is somewhat more work for us, never less.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from models import MatmulPeak, compile_for_inference, modernbert_config, random_model, shape, starcoder2_config
from ratios import Seconds, figure, ratio, take_turns
from report import write_rows
from transformers import ModernBertModel, PreTrainedModel, Starcoder2Model

from modular_star_encoder.inference.profile import flops_per_token
from modular_star_encoder.modeling import (
    ModularStarEncoderConfig,
    ModularStarEncoderForRetrieval,
    ModularStarEncoderModel,
)

PARTS = ("equal", "large", "mixed")
SHAPES = {(16, 512): 1.5, (1, 512): 1.15, (1, 64): 1.4}
TEXTS, MEAN_LENGTH = 256, 150


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--layers", type=int, default=9, help="of the 1B configuration (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=TEXTS, help="of mixed length (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first part alone, on short batches")
    parser.add_argument("--name", default="forward", help="of the results (default: %(default)s)")
    arguments = parser.parse_args()
    rows = []
    if arguments.quick or "equal" in arguments.parts:
        rows += equal_dimensions(arguments)
    if not arguments.quick and {"large", "mixed"} & set(arguments.parts):
        rows += large_layers(arguments)
    write_rows(arguments.name, rows, {"layers": arguments.layers, "texts": arguments.texts})


def equal_dimensions(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """hub_configs/small beside stock models, float32 and bfloat16."""
    config = shape("small")
    shapes = [(4, 128)] if arguments.quick else [(8, 128), (4, 512)]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        models = {
            "ours": random_model(ModularStarEncoderModel, config, dtype),
            "Starcoder2Model": random_model(Starcoder2Model, starcoder2_config(config), dtype),
            "ModernBertModel": random_model(ModernBertModel, modernbert_config(config), dtype),
        }
        for batch, length in shapes:
            ids = random_ids(config, batch, length)
            runs = {contender: forward_of(model, ids) for contender, model in models.items()}
            seconds = take_turns(runs, 3 * arguments.rounds, warm_up=2, name=f"{name}, {batch} × {length}")
            rows += [
                figure(
                    f"equal dimensions, {name}, {batch} × {length}: {other} / ours",
                    ratio(seconds, other, "ours"),
                    least=1.0,
                )
                for other in list(models)[1:]
            ]
    return rows


def large_layers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Layers of the 1B configuration in bfloat16."""
    config = shape("finetuned", arguments.layers)
    ours = random_model(ModularStarEncoderForRetrieval, config, torch.bfloat16)
    with torch.device("meta"):
        stock = Starcoder2Model(starcoder2_config(config)).eval()
    stock.load_state_dict(ours.model.state_dict(keep_vars=True), assign=True)
    stock.rotary_emb = type(stock.rotary_emb)(stock.config)
    compiled = compile_for_inference(ours)
    models = {"stock": stock, "as it is": ours.model, "compiled": compiled.model}
    rows = []
    for (batch, length), least in SHAPES.items() if "large" in arguments.parts else ():
        ids = random_ids(config, batch, length)
        runs = {contender: forward_of(model, ids) for contender, model in models.items()}
        peaks = MatmulPeak()
        seconds = take_turns({**runs, "matrix product": peaks.measure}, arguments.rounds, name=f"{batch} × {length}")
        name = f"1B layers, bfloat16, {batch} × {length}"
        rows += large_rows(seconds, name, least)
        flops = batch * length * flops_per_token(config, arguments.layers, length)
        rows += shares_of_the_peak(seconds, name, flops, peaks.best)
    if "mixed" in arguments.parts:
        rows.append(mixed_lengths(models, config, arguments))
    return rows


def large_rows(seconds: Seconds, name: str, least: float) -> list[dict[str, Any]]:
    """Against stock: compiled, which has the target, and as it is."""
    return [
        figure(f"{name}: stock / compiled", ratio(seconds, "stock", "compiled"), least=least),
        figure(f"{name}: stock / as it is", ratio(seconds, "stock", "as it is")),
    ]


def shares_of_the_peak(seconds: Seconds, name: str, flops: float, peak: float) -> list[dict[str, Any]]:
    """The share that each contender's median reaches of the fastest matrix product in the same run."""
    return [
        figure(
            f"{name}: share of the matrix product's {peak / 1e9:.0f} GFLOP/s, {contender}",
            {"value": round(100 * flops / float(torch.tensor(seconds[contender]).median()) / peak, 1)},
            unit="%",
        )
        for contender in ("stock", "compiled")
    ]


def mixed_lengths(
    models: dict[str, PreTrainedModel], config: ModularStarEncoderConfig, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Sorted texts in batches of 32: padded by stock, without padding by ours."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(arguments.texts, generator=generator).mul(0.8).exp()
    lengths = (drawn * MEAN_LENGTH / drawn.mean()).round().long().clamp(8, 1024).sort(descending=True).values
    batches = []
    for part in lengths.split(32):
        mask = (torch.arange(int(part.max())) < part[:, None]).long()
        batches.append((random_ids(config, *mask.shape) * mask, mask))

    models["compiled"].config.unpad_inputs = True

    def run(model: PreTrainedModel) -> Callable[[], None]:
        def forward() -> None:
            for ids, mask in batches:
                forward_of(model, ids, mask)()

        return forward

    rounds = max(3, arguments.rounds // 2)
    seconds = take_turns({name: run(models[name]) for name in ("stock", "compiled")}, rounds, name="mixed lengths")
    real = float(lengths.sum() / sum(ids.numel() for ids, _ in batches))
    name = f"1B layers, bfloat16, {arguments.texts} texts of mixed length: stock, padded / compiled, without padding"
    return figure(name, ratio(seconds, "stock", "compiled"), least=2.0, share_of_real_tokens=round(real, 3))


def forward_of(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Callable[[], Any]:
    """One pass for inference, nothing kept for a next token."""
    options = {"use_cache": False} if isinstance(model, Starcoder2Model) else {}

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask, **options).last_hidden_state

    return run


def random_ids(config: ModularStarEncoderConfig, batch: int, length: int) -> torch.Tensor:
    """Token ids (batch, length), the same in every call."""
    return torch.randint(1, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
