"""Quality of every exit against its depth (the paper's Figure 4) and its latency; needs the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modular_star_encoder.evaluation.report import Row, Table
from modular_star_encoder.inference.exit_profile import ExitProfile
from modular_star_encoder.utils.errors import UserError
from modular_star_encoder.utils.files import staged_file
from modular_star_encoder.utils.markdown import metric_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_PANEL = (4.2, 3.2)  # inches


def plot_report(tables: Sequence[Table], profiles: Mapping[str, Path], folder: Path) -> None:
    """Write quality_by_depth.png if a retriever has exits, and quality_by_latency.png if exit profiles exist.

    Plots of an earlier run are removed first.

    Args:
        tables: one panel each.
        profiles: {retriever: the file where its exit profile would be}.
        folder: of the plots.

    Raises:
        ImportError: matplotlib is missing.
        UserError: the profiles cannot be compared, or are of other exits.
    """
    by_depth, by_latency = folder / "quality_by_depth.png", folder / "quality_by_latency.png"
    for path in (by_depth, by_latency):
        path.unlink(missing_ok=True)
    if not any(row.exit_layer is not None for table in tables for row in table.rows):
        return
    plot_quality_by_depth(tables, by_depth)
    found = {name: ExitProfile.load(path) for name, path in profiles.items() if path.is_file()}
    if found:
        _check_comparable(found)
        latencies = {name: median_latencies(profile) for name, profile in found.items()}
        plot_quality_by_latency(tables, latencies, by_latency)


def _check_comparable(profiles: Mapping[str, ExitProfile]) -> None:
    alike = {
        (profile.device, profile.shapes[0], *(profile.machine.get(part) for part in ("processor", "threads", "gpu")))
        for profile in profiles.values()
    }
    if len(alike) > 1:
        raise UserError(
            "evaluation.plots.other_machines",
            f"The exit profiles of {' and '.join(profiles)} are of different machines, devices, threads or shapes of "
            "batches: measure them alike with `mose profile`.",
        )


def plot_quality_by_depth(tables: Sequence[Table], path: Path) -> Path:
    """A panel for each table: the main metric of each exit against its number of layers, with intervals.

    Retrievers without exits are dashed horizontal lines.

    Raises:
        ImportError: matplotlib is missing.
        UserError: no table has a retriever with exits.
    """
    if not any(row.exit_layer is not None for table in tables for row in table.rows):
        raise UserError("evaluation.plots.no_exits", "No retriever has exits, so quality by depth cannot be plotted.")
    figure, panels = _panels(len(tables))
    for axes, table in zip(panels, tables, strict=True):
        for name, rows in _with_exits(table).items():
            _line(axes, [row.exit_layer for row in rows], rows, name)
        for number, row in enumerate(row for row in table.rows if row.exit_layer is None):
            axes.axhline(100 * row.mean.value, linestyle="--", linewidth=1, color=f"C{7 + number}", label=row.label)
        axes.set_xlabel("layers executed")
        axes.set_xticks(sorted({row.exit_layer for row in table.rows if row.exit_layer is not None}))
        _finish(axes, table)
    return _save(figure, path)


def plot_quality_by_latency(tables: Sequence[Table], latencies: Mapping[str, Mapping[int, float]], path: Path) -> Path:
    """A panel for each table: the main metric of each exit against the median latency of that exit.

    Args:
        latencies: {retriever: {exit_layer: milliseconds}}, all on one machine (see `median_latencies`).

    Raises:
        ImportError: matplotlib is missing.
        UserError: no row has a latency.
    """
    if not any(_timed(rows, latencies) for table in tables for rows in _with_exits(table).values()):
        raise UserError(
            "evaluation.plots.no_latency", "No exit of these retrievers has a latency in the exit profiles."
        )
    figure, panels = _panels(len(tables))
    for axes, table in zip(panels, tables, strict=True):
        for name, rows in _with_exits(table).items():
            if timed := _timed(rows, latencies):
                times = [latencies[row.retriever][row.exit_layer] for row in timed]
                _line(axes, times, timed, name)
                for row, milliseconds in zip(timed, times, strict=True):
                    axes.annotate(str(row.exit_layer), (milliseconds, 100 * row.mean.value), fontsize="small")
        axes.set_xlabel("median latency, ms")
        axes.set_xscale("log")
        _finish(axes, table)
    return _save(figure, path)


def median_latencies(profile: ExitProfile) -> dict[int, float]:
    """{exit_layer: median milliseconds} of an exit profile, at the first shape of batch that it measured."""
    return {k: profile.measurement(k, profile.shapes[0]).latency_ms_p50 for k in profile.exits}


def _with_exits(table: Table) -> dict[str, list[Row]]:
    """Rows by retriever and size, exits ascending."""
    found: dict[str, list[Row]] = {}
    for row in table.rows:
        if row.exit_layer is not None:
            name = row.retriever if row.dimensions is None else f"{row.retriever}, {row.dimensions} dimensions"
            found.setdefault(name, []).append(row)
    return {name: sorted(rows, key=lambda row: row.exit_layer) for name, rows in found.items()}


def _timed(rows: Sequence[Row], latencies: Mapping[str, Mapping[int, float]]) -> list[Row]:
    return [row for row in rows if row.exit_layer in latencies.get(row.retriever, {})]


def _line(axes: Axes, places: Sequence[float], rows: Sequence[Row], label: str) -> None:
    (line,) = axes.plot(places, [100 * row.mean.value for row in rows], marker="o", markersize=4, label=label)
    low, high = ([100 * getattr(row.mean, bound) for row in rows] for bound in ("low", "high"))
    axes.fill_between(places, low, high, alpha=0.15, color=line.get_color(), linewidth=0)


def _finish(axes: Axes, table: Table) -> None:
    axes.set_title(table.title, fontsize="medium")
    axes.set_ylabel(f"{metric_label(table.metric)} × 100")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Figures need matplotlib: pip install 'modular-star-encoder[plots]'.") from None
    columns = min(_COLUMNS, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(columns * _PANEL[0], lines * _PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(lines, columns, number) for number in range(1, count + 1)]


def _save(figure: Figure, path: Path) -> Path:
    with staged_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return path
