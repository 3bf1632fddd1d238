"""Write a model's card, its README.md on the Hub, with metadata, a table of measurements and a figure."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modular_star_encoder.evaluation.report import Table, interval, median_latencies, plot_quality
from modular_star_encoder.hub.manifest import MAIN, Manifest, RepositorySettings
from modular_star_encoder.inference.exit_profile import ExitProfile
from modular_star_encoder.modeling import ModularStarEncoderConfig
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import write_text
from modular_star_encoder.utils.http import check_repository_id
from modular_star_encoder.utils.reports import load_card, metric_label, percent, render_card

CARD = "README.md"
LATENCY_FIGURE, DEPTH_FIGURE = "quality_by_latency.png", "quality_by_depth.png"
HUB = "https://huggingface.co"
TAGS = ("modular-star-encoder", "multi-exit", "code", "code-search")
UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Measurements:
    """Parameter counts, costs and scores of the exits in one repository."""

    parameters: Mapping[int, int]  # {exit_layer: number of parameters of the model up to this exit}
    profile: ExitProfile | None  # costs of the exits; None if not measured
    tables: Sequence[Table]  # one per benchmark, with one row for each of the exits and each other retriever

    def cut(self, parameters: Mapping[int, int]) -> "Measurements":
        """Return only the measurements of exits that are keys of `parameters` ({exit_layer: number of parameters})."""
        profile, tables = self.profile, []
        if profile is not None:
            kept = {k: replace(profile.exits[k], parameters=parameters[k]) for k in profile.exits if k in parameters}
            profile = replace(profile, exits=kept) if kept else None
        for table in self.tables:
            rows = [row for row in table.rows if row.exit_layer is None or row.exit_layer in parameters]
            if any(row.exit_layer is not None for row in rows):
                tables.append(replace(table, rows=rows))
        return Measurements(parameters, profile, tables)


@dataclass(frozen=True, slots=True)
class StagedRepository:
    """A folder with all files of one repository, ready to upload, and the content of the repository's card."""

    settings: RepositorySettings  # entry in the manifest
    repository: str  # id on the Hub
    folder: Path  # folder of the files
    source: Path  # folder of the source checkpoint, whose outputs the files must reproduce
    config: ModularStarEncoderConfig
    retrieval: bool  # True for a retrieval model, False for a pre-trained model
    prompts: Mapping[str, str]  # {name: prompt}, for SentenceTransformer
    measurements: Measurements  # measurements of the exits
    figure: str | None = None  # file name of the figure; None if there is none
    parent: "StagedRepository | None" = None  # model from which it was cut, or from which its training started
    # (exit, link, SHA-256 of its weights) of each slice; the link has no revision, because slices are uploaded later
    slices: Sequence[tuple[int, str, str]] = ()
    training_rows: Sequence[tuple[str, Any]] = ()
    recipe: str = ""  # training recipe as YAML
    sections: Sequence[tuple[str, str]] = ()  # (heading, Markdown) of each additional section

    def link(self, revision: str | None = None) -> str:
        """Return a Markdown link to the repository, at `revision` or, if None, at the repository's branch."""
        branch = self.settings.branch
        name = self.repository if branch == MAIN else f"{self.repository}, branch {branch}"
        place = revision or (None if branch == MAIN else branch)
        return f"[{name}]({HUB}/{self.repository}{f'/tree/{place}' if place else ''})"


def write_card(staged: StagedRepository, manifest: Manifest, parent_revision: str | None = None) -> None:
    """Write the card of a staged repository; `parent_revision` is the commit of the parent model, None if unknown."""
    head, rows = measurement_rows(staged.measurements)
    metadata = _metadata(staged, manifest)
    card = render_card(
        "model.md.jinja",
        content=staged,
        manifest=manifest,
        metadata=metadata.to_yaml(line_break="\n"),
        base=metadata.base_model,
        parent_link=staged.parent.link(parent_revision) if staged.parent else None,
        parent_revision=parent_revision,
        query=_quoted(staged.prompts.get("query", "") + "sum of two numbers"),
        code=_quoted(staged.prompts.get("document_python", "") + "def add(a, b):\n    return a + b"),
        measured_head=head,
        measured_rows=rows,
    )
    write_text(staged.folder / CARD, re.sub(r"\n{3,}", "\n\n", card))


def check_card(path: Path) -> None:
    """Raise UserError if huggingface_hub can't read the metadata of a card, or if an image in the card is missing."""
    required = ("library_name", "pipeline_tag", "tags")
    card = load_card(ModelCard, path, required, "hub.card.metadata")
    text = re.sub(r"(?s)(`+).*?\1", "", card.text)  # without code
    for figure in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text):
        if not re.match(r"https?:|data:", figure) and not (path.parent / figure).is_file():
            raise UserError("hub.card.figure", f"{path} shows the image {figure}, which is missing: add it.")


def draw(measurements: Measurements, folder: Path) -> str | None:
    """Plot the scores of exits against latency or, if there is no exit profile, against depth.

    Returns the name of the figure's file; None if there are no scores, or only one exit.
    """
    if len(measurements.parameters) < 2 or not measurements.tables:
        return None
    if measurements.profile is None:
        plot_quality(measurements.tables, folder / DEPTH_FIGURE)
        return DEPTH_FIGURE
    times = median_latencies(measurements.profile)
    names = {row.retriever for table in measurements.tables for row in table.rows}
    plot_quality(measurements.tables, folder / LATENCY_FIGURE, dict.fromkeys(names, times))
    return LATENCY_FIGURE


def measurement_rows(measurements: Measurements) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of a card's table of measurements; the columns are exits, then others such as BM25."""
    exits = list(measurements.parameters)
    others = [row for table in measurements.tables for row in table.rows if row.exit_layer is None]
    retrievers = list(dict.fromkeys(row.retriever for row in others))
    columns: list[int | str] = [*exits, *retrievers]
    blank = [""] * len(retrievers)
    rows = [["parameters", *(f"{count:,}" for count in measurements.parameters.values()), *blank]]
    rows += [[name, *cells, *blank] for name, cells in _cost_rows(measurements.profile, exits)]
    for table in measurements.tables:
        means = {row.retriever if row.exit_layer is None else row.exit_layer: row.mean for row in table.rows}
        texts = {column: f"{percent(mean.value)} ({interval(mean)})" for column, mean in means.items()}
        name = f"{table.title}: {metric_label(table.metric)} × 100"
        rows.append([name, *(texts.get(column, UNKNOWN) for column in columns)])
        if table.reference.startswith("the same exit"):  # of the model before training
            changes = {row.exit_layer: row.difference for row in table.rows if row.exit_layer is not None}
            cells = [f"{one} p {one.p:.2g}" if (one := changes.get(k)) else UNKNOWN for k in exits]
            rows.append([f"{table.title}: change from {table.reference}", *cells, *blank])
    return ["", *(f"exit {k}" for k in exits), *retrievers], rows


def _cost_rows(profile: ExitProfile | None, exits: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
    if profile is None:
        return
    shape = profile.shapes[0]
    measured = [profile.measurement(k, shape) if k in profile.exits else None for k in exits]
    for name, form, scale, field in (
        ("GFLOPs per batch", "{:.3g}", shape[0] * shape[1] / 1e9, "flops_per_token"),
        ("latency, median, ms", "{:.3g}", 1, "latency_ms_p50"),
        ("latency, 95th percentile, ms", "{:.3g}", 1, "latency_ms_p95"),
        ("peak memory, MB", "{:,.0f}", 1, "peak_memory_mb"),
    ):
        values = [None if one is None else getattr(one, field) for one in measured]
        if any(value is not None for value in values):
            yield name, [UNKNOWN if value is None else form.format(value * scale) for value in values]


_quoted = partial(json.dumps, ensure_ascii=False)  # formats a text as a string literal of Python


def _metadata(staged: StagedRepository, manifest: Manifest) -> ModelCardData:
    """Return the metadata of a card. The parent model is the base model, if it is in another repository of the Hub."""
    base = staged.parent.repository if staged.parent else getattr(staged.config, "parent_repository", None)
    if base is not None:
        check_repository_id(base)
    return ModelCardData(
        model_name=staged.repository.partition("/")[2],
        language=["code", "en"],
        license=manifest.license,
        license_name=manifest.license_name,
        license_link=manifest.license_link,
        library_name="sentence-transformers" if staged.retrieval else "transformers",
        pipeline_tag="sentence-similarity" if staged.retrieval else "fill-mask",
        tags=[*TAGS, *manifest.tags],
        datasets=list(manifest.datasets) or None,
        base_model=None if base == staged.repository else base,
        eval_results=list(_eval_results(staged.measurements)) or None,
    )


def _eval_results(measurements: Measurements) -> Iterator[EvalResult]:
    tasks = {"f1": ("text-classification", "Clone detection")}
    for table in measurements.tables:
        kind, name = tasks.get(table.metric, ("text-retrieval", "Code retrieval"))
        for row in table.rows:
            if row.exit_layer is not None:
                yield EvalResult(
                    task_type=kind,
                    task_name=name,
                    dataset_type=re.sub(r"\W+", "-", table.benchmark).lower(),
                    dataset_name=table.title,
                    metric_type=table.metric,
                    metric_name=f"{metric_label(table.metric)} at exit {row.exit_layer}",
                    metric_value=round(100 * row.mean.value, 2),
                )
