"""The card of a published model: metadata for the Hub, and for its readers only what was measured."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modular_star_encoder.evaluation.report import (
    Row,
    Table,
    interval,
    median_latencies,
    plot_quality_by_depth,
    plot_quality_by_latency,
)
from modular_star_encoder.hub.manifest import MAIN, Manifest
from modular_star_encoder.inference.exit_profile import ExitProfile
from modular_star_encoder.modeling import ModularStarEncoderConfig, ModularStarEncoderPreTrainedModel
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.hub import render_card
from modular_star_encoder.utils.reports import metric_label, percent

LATENCY_FIGURE, DEPTH_FIGURE = "quality_by_latency.png", "quality_by_depth.png"
UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Measurements:
    """The measurements of the exits of one repository."""

    parameters: Mapping[int, int]  # exit_layer → parameters of the model loaded at this exit, counted
    profile: ExitProfile | None  # costs of these exits; None if they were not measured
    tables: Sequence[Table]  # benchmarks, with the rows of these exits and of retrievers without exits

    def cut(self, parameters: Mapping[int, int]) -> "Measurements":
        """The measurements of a slice with these exits, whose embeddings are the parent's."""
        profile = self.profile
        if profile is not None:
            kept = {k: profiled for k, profiled in profile.exits.items() if k in parameters}
            exits = {k: replace(profiled, parameters=parameters[k]) for k, profiled in kept.items()}
            profile = replace(profile, exits=exits) if exits else None
        tables = [replace(table, rows=rows) for table in self.tables if (rows := _rows_of(table, parameters))]
        return Measurements(parameters, profile, tables)


def count_parameters(
    model_class: type[ModularStarEncoderPreTrainedModel], config: ModularStarEncoderConfig
) -> dict[int, int]:
    """Parameters of a model of this configuration, loaded at each of its exits; allocates no weights."""
    with torch.device("meta"):
        return {k: model_class(config.cut(k)).num_parameters() for k in config.exit_layers}


def _rows_of(table: Table, exits: Mapping[int, Any]) -> list[Row]:
    """The rows of these exits and of retrievers without exits; nothing without a row of these exits."""
    rows = [row for row in table.rows if row.exit_layer is None or row.exit_layer in exits]
    return rows if any(row.exit_layer is not None for row in rows) else []


def measurement_rows(measurements: Measurements) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a card's table, with a column for each exit and each retriever without exits."""
    exits = list(measurements.parameters)
    others = [row for table in measurements.tables for row in table.rows if row.exit_layer is None]
    retrievers = list(dict.fromkeys(row.retriever for row in others))
    header = ["", *(f"exit {k}" for k in exits), *retrievers]
    blank = [""] * len(retrievers)
    rows = [["parameters", *(f"{count:,}" for count in measurements.parameters.values()), *blank]]
    rows += [[name, *cells, *blank] for name, cells in _cost_rows(measurements.profile, exits)]
    for table in measurements.tables:
        by_exit = {row.exit_layer: row for row in table.rows if row.exit_layer is not None}
        by_name = {row.retriever: row for row in table.rows if row.exit_layer is None}
        cells = [_quality(by_exit.get(k)) for k in exits] + [_quality(by_name.get(name)) for name in retrievers]
        rows.append([f"{table.title}: {metric_label(table.metric)} × 100", *cells])
    return header, rows


def _cost_rows(profile: ExitProfile | None, exits: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
    if profile is None:
        return
    shape = profile.shapes[0]
    measured = [profile.measurement(k, shape) if k in profile.exits else None for k in exits]

    def cells(form: str, value: Any) -> list[str]:
        values = [None if one is None else value(one) for one in measured]
        return [UNKNOWN if one is None else form.format(one) for one in values]

    tokens = shape[0] * shape[1]
    yield "GFLOPs per batch", cells("{:.3g}", lambda one: one.flops_per_token * tokens / 1e9)
    yield "latency, median, ms", cells("{:.3g}", lambda one: one.latency_ms_p50)
    yield "latency, 95th percentile, ms", cells("{:.3g}", lambda one: one.latency_ms_p95)
    if any(one is not None and one.peak_memory_mb is not None for one in measured):
        yield "peak memory, MB", cells("{:,.0f}", lambda one: one.peak_memory_mb)


def _quality(row: Row | None) -> str:
    return UNKNOWN if row is None else f"{percent(row.mean.value)} ({interval(row.mean)})"


def eval_results(measurements: Measurements) -> list[EvalResult]:
    """The `model-index`: the main metric × 100 for each benchmark and exit."""
    tasks = {"f1": ("text-classification", "Clone detection")}
    results = []
    for table in measurements.tables:
        kind, name = tasks.get(table.metric, ("text-retrieval", "Code retrieval"))
        results += [
            EvalResult(
                task_type=kind,
                task_name=name,
                dataset_type=re.sub(r"\W+", "-", table.benchmark).lower(),
                dataset_name=table.title,
                metric_type=table.metric,
                metric_name=f"{metric_label(table.metric)} at exit {row.exit_layer}",
                metric_value=round(100 * row.mean.value, 2),
            )
            for row in table.rows
            if row.exit_layer is not None
        ]
    return results


def draw(measurements: Measurements, folder: Path) -> str | None:
    """Draw quality by latency, or by depth where latency was not measured.

    Returns:
        The file's name; None for fewer than two exits or without benchmarks.

    Raises:
        ImportError: matplotlib is missing.
    """
    if len(measurements.parameters) < 2 or not measurements.tables:
        return None
    if measurements.profile is None:
        return plot_quality_by_depth(measurements.tables, folder / DEPTH_FIGURE).name
    times = median_latencies(measurements.profile)
    names = {row.retriever for table in measurements.tables for row in table.rows if row.exit_layer is not None}
    return plot_quality_by_latency(measurements.tables, dict.fromkeys(names, times), folder / LATENCY_FIGURE).name


CARD = "README.md"
HUB = "https://huggingface.co"
TAGS = ("modular-star-encoder", "multi-exit", "code", "code-search")


@dataclass(frozen=True, slots=True)
class Parent:
    """The model that another one comes from."""

    repository: str  # where it is published
    branch: str
    is_slice: bool  # whether the other model was cut from it; otherwise its training started from it
    layers: int  # number of its layers
    revision: str | None = None  # its commit; None while it is not known

    @property
    def link(self) -> str:
        """A Markdown link to the revision."""
        return repository_link(self.repository, self.branch, self.revision)


@dataclass(frozen=True, slots=True)
class SliceLink:
    """A slice in the card of its parent: named by the SHA-256 of its weights, since its revision links back."""

    repository: str
    branch: str
    exit_layer: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CardContent:
    """The content of a card."""

    repository: str
    branch: str
    heading: str  # what distinguishes it from the manifest's other models
    config: ModularStarEncoderConfig
    retrieval: bool  # whether it embeds; otherwise it is a pre-trained model
    prompts: Mapping[str, str]  # of its SentenceTransformer
    measurements: Measurements  # of its exits
    figure: str | None = None  # file name of the figure; None if there is none
    parent: Parent | None = None  # the model that it comes from
    slices: Sequence[SliceLink] = ()  # those cut from it
    only_exit: bool = False  # whether it has one exit's head alone, although it is deeper than others
    training_data: str | None = ""  # in prose
    training_rows: Sequence[tuple[str, Any]] = ()
    recipe: str = ""  # as YAML


def repository_link(repository: str, branch: str = MAIN, revision: str | None = None) -> str:
    """A Markdown link to a repository of the Hub, at a branch or a revision."""
    place = revision or (None if branch == MAIN else branch)
    name = repository if branch == MAIN else f"{repository}, branch {branch}"
    return f"[{name}]({HUB}/{repository}{f'/tree/{place}' if place else ''})"


def model_card(content: CardContent, manifest: Manifest) -> str:
    """The card as text."""
    config, measured = content.config, content.measurements
    head, rows = measurement_rows(measured)
    card = render_card(
        "model.md.jinja",
        content=content,
        manifest=manifest,
        metadata=card_metadata(content, manifest).to_yaml(line_break="\n"),
        layers=config.num_hidden_layers,
        exit_layers=config.exit_layers,
        parameters=measured.parameters[config.num_hidden_layers],
        dimension=config.projection_size if content.retrieval else config.hidden_size,
        longest=config.max_position_embeddings,
        query=_literal(content.prompts.get("query", "") + "sum of two numbers"),
        code=_literal(content.prompts.get("document_python", "") + "def add(a, b):\n    return a + b"),
        measured_head=head,
        measured_rows=rows,
        notes=_notes(content),
        slices=[
            (one.exit_layer, repository_link(one.repository, one.branch), f"`{one.sha256}`") for one in content.slices
        ],
    )
    return re.sub(r"\n{3,}", "\n\n", card)


def _literal(text: str) -> str:
    """A text as a literal of Python, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def card_metadata(content: CardContent, manifest: Manifest) -> ModelCardData:
    """The card's metadata block."""
    parent = content.parent
    base = parent.repository if parent and parent.repository != content.repository else None
    results = eval_results(content.measurements)
    return ModelCardData(
        model_name=content.repository.partition("/")[2],
        language=["code", "en"],
        license=manifest.license,
        license_name=manifest.license_name,
        license_link=manifest.license_link,
        library_name="sentence-transformers" if content.retrieval else "transformers",
        pipeline_tag="sentence-similarity" if content.retrieval else "fill-mask",
        tags=[*TAGS, *manifest.tags],
        datasets=list(manifest.datasets) or None,
        base_model=base,
        eval_results=results or None,
    )


def check_card(path: Path) -> None:
    """Check that the Hub's client can read a card's metadata, and that its figures exist.

    Raises:
        UserError: `hub.card.metadata`: the metadata are missing or wrong; `hub.card.figure`: a figure is missing.
    """
    try:
        card = ModelCard.load(path)
        data = card.data.to_dict()
        missing = [name for name in ("license", "library_name", "pipeline_tag", "tags") if not data.get(name)]
        fault = f"lacks {', '.join(missing)}" if missing else ""
    except (ValueError, OSError, KeyError, TypeError) as error:
        fault = f"can't be read: {' '.join(str(error).split())}"
    if fault:
        raise UserError("hub.card.metadata", f"The metadata of {path} {fault}.")
    for figure in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.text):
        if not (path.parent / figure).is_file():
            raise UserError("hub.card.figure", f"{path} shows {figure}, which does not exist.")


def _notes(content: CardContent) -> list[str]:
    """The notes below the table."""
    measured, notes = content.measurements, []
    if measured.tables:
        notes.append("Benchmarks: with the 95 % interval of a bootstrap over queries.")
        notes += [f"{table.benchmark}: {'; '.join([table.size, *table.notes])}." for table in measured.tables]
    if measured.profile is not None:
        notes.append(_conditions(measured.profile))
    if content.parent is not None and content.parent.is_slice and (measured.tables or measured.profile):
        notes.append("All of this was measured on the parent at this exit.")
    return notes


def _conditions(profile: ExitProfile) -> str:
    """Where and how costs were measured."""
    size, length = profile.shapes[0]
    place = profile.machine.get("gpu") if profile.device == "cuda" else profile.machine.get("processor")
    threads = "" if profile.device == "cuda" else f", {profile.machine.get('threads')} threads"
    return (
        f"Costs: batches of {size} × {length} tokens in {profile.dtype} on {place}{threads}, "
        f"torch {profile.versions.get('torch')}, {profile.date}; memory: of a process that loads this exit alone."
    )
