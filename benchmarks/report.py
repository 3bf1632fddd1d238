"""What every benchmark writes: its figures beside the command, the versions and the machine kind that made them."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from modular_star_encoder.evaluation.machine import library_versions, processor_model

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "sentence-transformers", "safetensors")


def provenance() -> dict[str, Any]:
    """Command line, versions, and the kind of machine."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": library_versions(PACKAGES),
        "machine": {"cpu": processor_model(), "cores": os.cpu_count(), **_gpu()},
    }


def write(name: str, figures: Any) -> Path:
    """Write `benchmarks/results/{name}.json` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**provenance(), "figures": figures}, indent=2) + "\n", encoding="utf-8")
    return path


def status_bytes(name: str) -> int:
    """A memory figure of this process, such as `VmHWM` (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"This system does not tell {name} in /proc/self/status.")


def _gpu() -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
