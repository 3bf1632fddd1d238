"""The command `mose doctor`: prints versions, devices, folders, and which extras are installed."""

from __future__ import annotations

import argparse
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

DISTRIBUTION = "modular-star-encoder"
CORE = (DISTRIBUTION, "torch", "transformers", "sentence-transformers", "huggingface_hub", "numpy")


def add_doctor_command(commands: Any) -> None:
    """Add `mose doctor` to the subparsers of `mose`."""
    doctor = commands.add_parser("doctor", help="print versions, devices, cache folders, and missing packages")
    doctor.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> None:
    from modular_star_encoder.utils.reports import library_versions

    versions = library_versions(CORE)
    sections = {
        "Versions": {name: version or "not installed" for name, version in versions.items()},
        "Devices": devices() if versions["torch"] else {"torch": "not installed"},
        "Folders": folders(),
        "Extras": {
            extra: f"lacks {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'" if missing else "ready"
            for extra, missing in missing_packages().items()
        },
    }
    width = max(len(name) for section in sections.values() for name in section)
    for title, section in sections.items():
        print(title, *(f"  {name:{width}}  {text}" for name, text in section.items()), "", sep="\n")


def devices() -> dict[str, str]:
    """Return name → description of each device that torch can use: the processor, and GPUs with their memory."""
    import torch

    from modular_star_encoder.utils.reports import machine_kind

    cpu = machine_kind()
    found = {"cpu": f"{cpu['processor']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['memory_gb']} GB"}
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found if len(found) > 1 else found | {"gpu": "none found"}


def folders() -> dict[str, str]:
    """Return {name: text} for the folder of mose-code, the caches with their sizes, and the connection to the Hub."""
    from huggingface_hub import constants

    from modular_star_encoder.inference import shipped_model

    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / DISTRIBUTION
    return {
        "mose-code": shipped_model(),
        "indexes of mose search": folder_size(cache),
        "models of the Hub": folder_size(Path(constants.HF_HUB_CACHE)),
        "connection to the Hub": "off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "on",
    }


def folder_size(folder: Path) -> str:
    """Return a folder's path and size, such as `/tmp/cache (12 MB)`; `(not there yet)` if it does not exist."""
    if not folder.is_dir():
        return f"{folder} (not there yet)"
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return f"{folder} ({size / 1e6:,.0f} MB)"


def missing_packages() -> dict[str, list[str]]:
    """Return {extra of this package: its requirements that are not installed or have an unsuitable version}."""
    from packaging.requirements import Requirement

    own = distribution(DISTRIBUTION)
    requirements = [Requirement(line) for line in own.requires or ()]

    def missing(extra: str) -> set[str]:
        found: set[str] = set()
        for one in requirements:
            if one.marker is None or not one.marker.evaluate({"extra": extra}):
                continue
            if one.name == DISTRIBUTION:  # this extra includes another extra, as `search` includes `languages`
                found.update(*map(missing, one.extras - {extra}))
                continue
            try:
                version = distribution(one.name).version
                if not one.specifier.contains(version, prereleases=True):
                    found.add(f"{one.name}{one.specifier} (is {version})")
            except PackageNotFoundError:
                found.add(one.name)
        return found

    return {extra: sorted(missing(extra)) for extra in sorted(own.metadata.get_all("Provides-Extra") or ())}
