"""Peak memory of one exit on the CPU, in a process of its own: what else a process does would be measured with it.

Run as a script by `measure_memory`. Usage: python -m …profile_memory REQUEST, where REQUEST is JSON; prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class MemoryUse(NamedTuple):
    """Of a process that embeds, in MB (10^6 bytes), None where the system doesn't tell.

    `base` is what it takes with all libraries before it loads anything, `peaks` the most so far after each batch.
    """

    base: float | None
    peaks: list[float | None]


def measure_memory(
    checkpoint: str, exit_layer: int, dtype: str, shapes: Sequence[tuple[int, int]], threads: int
) -> MemoryUse:
    """Peak resident memory of a fresh process that loads an exit and embeds one batch per shape.

    Shapes run in ascending order of their tokens, so that no batch is charged with a larger one before it; the peak
    while loading counts for every shape.

    Args:
        checkpoint: folder or Hub id.
        dtype: of weights and computation, such as `"float32"`.
        shapes: (batch_size, length) each.
        threads: that torch uses.

    Returns:
        Peaks in the order of `shapes`.

    Raises:
        OSError: the process failed, for want of memory perhaps; the message holds its last line.
    """
    request = {"checkpoint": checkpoint, "exit_layer": exit_layer, "dtype": dtype, "shapes": shapes, "threads": threads}
    process = subprocess.run(  # noqa: S603 - our own module, arguments passed as a list
        [sys.executable, "-P", "-m", __name__, json.dumps(request)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        said = process.stderr.strip().splitlines() or [f"status {process.returncode}"]
        raise OSError(f"The memory of exit {exit_layer} can't be measured, its process ended with: {said[-1]}")
    return MemoryUse(*json.loads(process.stdout.splitlines()[-1]))


def peak_memory_mb() -> float | None:
    """Largest resident memory of this process so far, in MB (10^6 bytes); None where the system doesn't tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _run(request: dict[str, Any]) -> MemoryUse:
    """The child's work."""
    import torch

    from modular_star_encoder.inference.load import load_checkpoint
    from modular_star_encoder.inference.profile import embed, random_batch

    torch.set_num_threads(request["threads"])
    base = peak_memory_mb()
    model, _ = load_checkpoint(request["checkpoint"], request["exit_layer"], "cpu", request["dtype"])
    shapes = [tuple(shape) for shape in request["shapes"]]
    peaks = {}
    for shape in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        embed(model, random_batch(model, *shape), request["exit_layer"])
        peaks[shape] = peak_memory_mb()
    return MemoryUse(base, [peaks[shape] for shape in shapes])


if __name__ == "__main__":
    print(json.dumps(_run(json.loads(sys.argv[1]))))
