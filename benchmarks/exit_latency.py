"""The latency of exit k against k/depth of the full model's: does leaving early save what it should?

    python benchmarks/exit_latency.py           # the 1B configuration in bfloat16, and ten layers of it in float32
    python benchmarks/exit_latency.py --quick   # ten thin layers

All exits take turns in one process, in an order drawn anew for each round, on one batch without padding; a round gives
each exit's share of the full depth's time. Beside the layers, every exit pays for token embeddings, its projection head
and pooling.
"""

import argparse
from typing import Any

import torch
from models import random_model, shape
from ratios import figure, ratio, take_turns
from report import write_rows

from modular_star_encoder.inference.profile import embed, random_batch
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderForRetrieval

CUT = [1, 2, 5, 8, 10]
MOST = 1.10


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="runs of each exit (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="texts at once (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="ten layers of hub_configs/small alone, in float32")
    parser.add_argument("--name", default="exit_latency", help="of the results (default: %(default)s)")
    arguments = parser.parse_args()
    cases: list[tuple[str, ModularStarEncoderConfig, torch.dtype]] = [
        ("1B, bfloat16", shape("finetuned"), torch.bfloat16),
        ("1B cut to 10 layers, float32", shape("finetuned", 10, CUT), torch.float32),
    ]
    if arguments.quick:
        cases = [("small with 10 layers, float32", shape("small", 10, CUT), torch.float32)]
    rows = [row for case in cases for row in measure(*case, arguments)]
    settings = {"batch_size": arguments.batch_size, "length": arguments.length}
    write_rows(arguments.name, rows, settings)


def measure(
    name: str, config: ModularStarEncoderConfig, dtype: torch.dtype, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each exit above the deepest."""
    model = random_model(ModularStarEncoderForRetrieval, config, dtype)
    batch = random_batch(model, arguments.batch_size, arguments.length)
    exits, depth = list(config.exit_layers), config.num_hidden_layers
    runs = {str(exit_layer): (lambda exit_layer=exit_layer: embed(model, batch, exit_layer)) for exit_layer in exits}
    seconds = take_turns(runs, arguments.rounds, warm_up=2, name=name)
    return [
        figure(
            f"{name}: exit {exit_layer} / {exit_layer}/{depth} of the full depth",
            ratio(seconds, str(exit_layer), str(depth), scale=depth / exit_layer),
            most=MOST,
            exit_layer=exit_layer,
        )
        for exit_layer in exits[:-1]
    ]


if __name__ == "__main__":
    main()
