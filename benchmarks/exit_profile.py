"""What each exit of a model costs, as shares of the deepest: random weights in the shape of a folder of hub_configs/.

    python benchmarks/exit_profile.py                       # the small model
    python benchmarks/exit_profile.py --config finetuned    # the paper's; needs 8 GB of memory

The exits take turns within one run (see modular_star_encoder.inference.profile, which measures). Parameters and
memory on a CPU include what every exit has: token embeddings; interpreter and libraries (`base_memory_mb`).
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from report import write

from modular_star_encoder.data.tokenizer import train_tokenizer
from modular_star_encoder.inference.checkpoints import save_retrieval_checkpoint
from modular_star_encoder.inference.exit_profile import ExitProfile
from modular_star_encoder.inference.profile import ProfilePlan, format_profile, profile_checkpoint
from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
from modular_star_encoder.training.recipes import load_config


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="small", help="folder of hub_configs/ (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="default: %(default)s")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each exit and shape (default: %(default)s)")
    arguments = parser.parse_args()
    plan = ProfilePlan(tuple(arguments.batch_sizes), tuple(arguments.lengths), arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_random_checkpoint(arguments.config, Path(folder, "model"))
        profile = profile_checkpoint(checkpoint, plan, dtype=arguments.dtype)
    print(format_profile(profile))
    figures = {
        "config": arguments.config,
        "shares_of_the_deepest_exit": shares(profile),
        "profile": {"format": 1, **asdict(profile)},
    }
    print(f"\n{write(f'exit_profile_{arguments.config}', figures)}")


def write_random_checkpoint(name: str, folder: Path) -> Path:
    """A retrieval checkpoint with random weights and a tokenizer that nothing here depends on."""
    torch.manual_seed(0)
    config = load_config(name)
    config.architectures = [ModularStarEncoderForRetrieval.__name__]
    tokenizer = train_tokenizer([Path(__file__).read_text(encoding="utf-8")], 400, progress=False)
    return save_retrieval_checkpoint(ModularStarEncoderForRetrieval(config), tokenizer, folder)


def shares(profile: ExitProfile) -> list[dict[str, float | int | None]]:
    """Arithmetic, median time and peak memory above the libraries' own of each exit, over the deepest's."""
    rows = []
    for shape in profile.shapes:
        last = profile.measurement(max(profile.exits), shape)
        for exit_layer in profile.exits:
            own = profile.measurement(exit_layer, shape)
            peaks = [one.peak_memory_mb - (profile.base_memory_mb or 0) for one in (own, last)]
            rows.append(
                {
                    "exit_layer": exit_layer,
                    "batch_size": shape[0],
                    "length": shape[1],
                    "flops": round(own.flops_per_token / last.flops_per_token, 3),
                    "median_time": round(own.latency_ms_p50 / last.latency_ms_p50, 3),
                    "peak_memory": round(peaks[0] / peaks[1], 3),
                }
            )
    return rows


if __name__ == "__main__":
    main()
