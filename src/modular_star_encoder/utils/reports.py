"""Helpers for reports and model cards: format numbers and tables; name the hardware and the package versions."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modular_star_encoder.utils.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import RepoCard

Card = TypeVar("Card", bound="RepoCard")

PACKAGES = ("torch", "transformers", "modular-star-encoder")


def percent(value: float) -> str:
    """Format a fraction as percent with one decimal and without a percent sign: 0.1234 → `12.3`."""
    return f"{100 * value:.1f}"


def metric_label(name: str) -> str:
    """Return the name of a metric for tables: `mrr` → MRR, `recall@10` → R@10."""
    return name if name in ("precision", "recall") else name.replace("recall@", "R@").upper()


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table with aligned columns; the first of `rows` is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]


def machine_kind(device: str = "cpu") -> dict[str, Any]:
    """Return {name: value}: processor, cores, torch's threads, memory_gb (or None); with CUDA gpu and gpu_memory_gb."""
    import torch

    kind: dict[str, Any] = {"processor": processor_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    try:
        kind["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        kind["memory_gb"] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        kind |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
    return kind


def processor_model() -> str:
    """Return the model name of the processor, from /proc/cpuinfo or, without this file, from Python's `platform`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def library_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Return {name: version} of Python and of `packages`; the version is None if a package isn't installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def without_places(value: Any) -> Any:
    """Return a JSON value in which `$MOSE_DATA` and `$HOME` replace the paths that these two variables contain."""
    text = json.dumps(value, default=str)
    for variable in ("MOSE_DATA", "HOME"):
        if place := os.environ.get(variable, "").rstrip("/"):
            text = text.replace(json.dumps(place)[1:-1], f"${variable}")
    return json.loads(text)


def load_card(kind: type[Card], path: Path, required: Sequence[str], key: str) -> Card:
    """Load a Hub card of the class `kind`; UserError with `key` if it is unreadable or lacks `required` metadata."""
    try:
        card = kind.load(path)
        if not (missing := [name for name in required if not card.data.to_dict().get(name)]):
            return card
        fault = f"lacks {', '.join(missing)}"
    except (ValueError, OSError, KeyError, TypeError) as error:
        fault = f"can't be read: {' '.join(str(error).split())}"
    raise UserError(key, f"The metadata of {path} {fault}.")


def render_card(template: str, **values: Any) -> str:
    """Fill a template in `model_cards/` with `values`; return the card's text. UndefinedError if a value is missing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = PackageLoader("modular_star_encoder.model_cards", "")
    environment = Environment(  # noqa: S701  Markdown, not HTML
        loader=templates, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = cell
    return environment.get_template(template).render(**values).lstrip()


def cell(value: Any) -> str:
    """Format a value for a cell of a Markdown table: 1234 → `1,234`; text in one line, with `|` and `<` escaped.

    � replaces each unprintable character, because the value may come from a stranger's server or data set.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = printable(" ".join(str(value).split()))
    return text.replace("|", "\\|").replace("<", "&lt;")


def printable(text: str) -> str:
    """Return `text` with `�` for each unprintable character (it could control the terminal) and spaces for tabs."""
    text = text.replace("\t", "    ")
    return text if text.isprintable() else "".join(one if one.isprintable() else "�" for one in text)
