"""What every benchmark writes: its figures beside the command, the versions and the machine kind that made them."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ratios import describe, is_met, target_of
from row_figure import plot_rows

from modular_star_encoder.utils.reports import library_versions, markdown_table, processor_model

COMMITTED = Path(__file__).parent / "results"
RESULTS = Path(os.environ.get("MOSE_BENCH_RESULTS", COMMITTED))
PACKAGES = ("torch", "transformers", "sentence-transformers", "safetensors")


def provenance() -> dict[str, Any]:
    """Command line, versions, and the kind of machine."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": library_versions(PACKAGES),
        "machine": {"cpu": processor_model(), "cores": _cores(), **_gpu()},
    }


def write(name: str, figures: Any, markdown: str | None = None) -> Path:
    """Write `benchmarks/results/{name}.json` and return its path; `markdown` goes into `{name}.md` beside it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    origin = provenance()
    path.write_text(json.dumps({**origin, "figures": figures}, indent=2) + "\n", encoding="utf-8")
    if markdown is not None:
        path.with_suffix(".md").write_text(f"{markdown}\n\n{_origin_line(origin)}\n", encoding="utf-8")
    return path


def write_rows(name: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None) -> Path:
    """Print rows (see `ratios.figure`), write them as JSON, Markdown and PNG, and return the JSON's path."""
    words = {True: "met", False: "not met", None: ""}
    cells = [(row["name"], describe(row), target_of(row), words[is_met(row)]) for row in rows]
    table = "\n".join(markdown_table([("", "figure", "target", ""), *cells]))
    path = write(name, {"settings": dict(settings or {}), "rows": list(rows)}, table)
    plot_rows([row for row in rows if row.get("unit", "×") == "×"], path.with_suffix(".png"))
    print(f"{table}\n\n{path}")
    return path


def returned_memory() -> dict[str, str]:
    """Environment in which glibc gives memory of a MiB and more back when it is freed.

    By itself it keeps some, and how much differs from run to run.
    """
    return {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def status_bytes(name: str) -> int:
    """A memory figure of this process, such as `VmHWM` (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"This system does not tell {name} in /proc/self/status.")


def _cores() -> int | None:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _origin_line(origin: dict[str, Any]) -> str:
    machine, versions = origin["machine"], origin["versions"]
    kind = ", ".join([machine["cpu"], f"{machine['cores']} cores", *([machine["gpu"]] if "gpu" in machine else [])])
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"`{origin['command']}` on {kind}; {packages}."


def _gpu() -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
