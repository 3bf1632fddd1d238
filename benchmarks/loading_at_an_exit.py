"""Load a checkpoint at one exit, against loading all of it and cutting: seconds and memory of each, as ratios.

    python benchmarks/loading_at_an_exit.py                       # random weights of the paper's size, exit 9
    python benchmarks/loading_at_an_exit.py --checkpoint FOLDER --exit-layer 4

Each run is a process of its own and the contenders take turns. Memory is anonymous memory (RssAnon of
/proc/self/status, Linux only), sampled while loading, above what the process used before: pages of a file that is
mapped into memory are not in it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from report import write
from tqdm.auto import tqdm

CONTENDERS = ("at the exit", "all, then cut")
DTYPES = ("float32", "own")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder to load (default: random weights of --config, written for this)")
    parser.add_argument("--config", default="finetuned", help="folder of hub_configs/ (default: %(default)s)")
    parser.add_argument("--exit-layer", type=int, default=9, help="the exit (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--run", nargs=2, metavar=("CONTENDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(load_once(arguments.checkpoint, arguments.exit_layer, *arguments.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.checkpoint is None:
            arguments.checkpoint = folder
            write_random_checkpoint(arguments.config, folder)
        figures = measure(arguments.checkpoint, arguments.exit_layer, arguments.repeats)
    print_table(figures)
    print(f"\n{write('loading_at_an_exit', figures)}")


def write_random_checkpoint(name: str, folder: str) -> None:
    """Random weights in bfloat16 at the shape of a folder of hub_configs/."""
    from modular_star_encoder.modeling import ModularStarEncoderForRetrieval
    from modular_star_encoder.training.recipes import load_config

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = ModularStarEncoderForRetrieval(load_config(name))
    model = model.to_empty(device="cpu")
    for parameter in tqdm(list(model.parameters()), desc="random weights"):
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def load_once(checkpoint: str, exit_layer: int, contender: str, dtype: str) -> dict[str, float]:
    """Seconds, peak anonymous bytes above the start, and bytes of the tensors kept."""
    from modular_star_encoder.modeling import ModularStarEncoderForRetrieval

    options = {} if dtype == "own" else {"dtype": getattr(torch, dtype)}
    baseline, peak, done = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.002)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    if contender == CONTENDERS[0]:
        model = ModularStarEncoderForRetrieval.from_pretrained(checkpoint, exit_layer=exit_layer, **options)
    else:
        model = ModularStarEncoderForRetrieval.from_pretrained(checkpoint, **options).slice(exit_layer)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    kept = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return {"seconds": seconds, "peak_bytes": max(peak[0], anonymous_bytes()) - baseline, "kept_bytes": kept}


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("This system does not tell anonymous memory (RssAnon in /proc/self/status).")


def measure(checkpoint: str, exit_layer: int, repeats: int) -> list[dict]:
    """Medians of every contender and dtype, run in turns after one unmeasured run."""
    cases = [(contender, dtype) for dtype in DTYPES for contender in CONTENDERS]
    results: dict[tuple[str, str], list[dict]] = {case: [] for case in cases}
    with tqdm(total=len(cases) * (repeats + 1), desc="loading") as bar:
        for repeat in range(repeats + 1):
            for case in cases:
                command = [sys.executable, __file__, "--checkpoint", checkpoint, "--exit-layer", str(exit_layer)]
                output = subprocess.run([*command, "--run", *case], check=True, capture_output=True, text=True).stdout
                if repeat:
                    results[case].append(json.loads(output.splitlines()[-1]))
                bar.update()
    return [
        {
            "contender": contender,
            "dtype": dtype,
            "exit_layer": exit_layer,
            **{key: statistics.median(run[key] for run in runs) for key in runs[0]},
        }
        for (contender, dtype), runs in results.items()
    ]


def print_table(figures: list[dict]) -> None:
    """One line per contender; time against loading all, memory against the tensors kept."""
    print("dtype    contender      seconds  of loading all  peak anonymous  of tensors kept")
    for row in figures:
        other = next(r for r in figures if r["dtype"] == row["dtype"] and r["contender"] == CONTENDERS[1])
        print(
            f"{row['dtype']:8} {row['contender']:14} {row['seconds']:7.2f}  {row['seconds'] / other['seconds']:14.2f}"
            f"  {row['peak_bytes'] / 1e9:11.2f} GB  {row['peak_bytes'] / row['kept_bytes']:15.2f}"
        )


if __name__ == "__main__":
    main()
