"""What every benchmark writes: its figures beside the command, the versions and the machine kind that made them."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ratios import describe, is_met, target_of

from modular_star_encoder.evaluation.machine import library_versions, processor_model
from modular_star_encoder.evaluation.markdown import markdown_table

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


def write_rows(name: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None) -> Path:
    """Print rows (see `ratios.figure`) and write them as JSON and, beside it, as Markdown; returns the JSON's path."""
    table = rows_as_markdown(rows)
    print(table)
    path = write(name, {"settings": dict(settings or {}), "rows": list(rows)})
    about = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    machine = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    text = f"`{about['command']}`\n\n{table}\n\n{versions}; {machine}.\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{path}")
    return path


def rows_as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was measured, the figure with its interval, the target, and whether it is met."""
    words = {True: "met", False: "not met", None: ""}
    cells = [(row["name"], describe(row), target_of(row), words[is_met(row)]) for row in rows]
    return "\n".join(markdown_table([("", "figure", "target", ""), *cells]))


def status_bytes(name: str) -> int:
    """A memory figure of this process, such as `VmHWM` (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"This system does not tell {name} in /proc/self/status.")


def _gpu() -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
