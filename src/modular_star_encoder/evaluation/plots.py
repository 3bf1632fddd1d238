"""Quality of every exit against its depth (the paper's Figure 4) and its latency; needs the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modular_star_encoder.evaluation.report import Row, Table, title
from modular_star_encoder.inference.exit_profile import ExitProfile
from modular_star_encoder.utils.reports import metric_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_PANEL = (4.2, 3.2)  # inches


def plot_quality_by_depth(tables: Sequence[Table], path: Path) -> Path:
    """A panel for each table: the main metric of each exit against its number of layers, with intervals.

    Systems without exits are dashed lines across.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no table has a system with exits.
    """
    if not any(row.exit_layer is not None for table in tables for row in table.rows):
        raise ValueError("No system has exits, so there is nothing to draw against depth.")
    figure, panels = _panels(len(tables))
    for axes, table in zip(panels, tables, strict=True):
        for system, rows in _with_exits(table).items():
            _line(axes, [row.exit_layer for row in rows], rows, system)
        for number, row in enumerate(row for row in table.rows if row.exit_layer is None):
            axes.axhline(100 * row.mean.value, linestyle="--", linewidth=1, color=f"C{7 + number}", label=row.label)
        axes.set_xlabel("layers executed")
        axes.set_xticks(sorted({row.exit_layer for row in table.rows if row.exit_layer is not None}))
        _finish(axes, table)
    return _save(figure, path)


def plot_quality_by_latency(tables: Sequence[Table], latencies: Mapping[str, Mapping[int, float]], path: Path) -> Path:
    """A panel for each table: the main metric of each exit against the median latency of that exit.

    Args:
        latencies: {system: {exit_layer: milliseconds}}, of systems on one machine (see `median_latencies`).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no row has a latency.
    """
    if not any(_timed(rows, latencies) for table in tables for rows in _with_exits(table).values()):
        raise ValueError("No exit of these systems has a latency in the exit profiles.")
    figure, panels = _panels(len(tables))
    for axes, table in zip(panels, tables, strict=True):
        for system, rows in _with_exits(table).items():
            if timed := _timed(rows, latencies):
                times = [latencies[row.system][row.exit_layer] for row in timed]
                _line(axes, times, timed, system)
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
    """Rows by system and size, exits ascending."""
    systems: dict[str, list[Row]] = {}
    for row in table.rows:
        if row.exit_layer is not None:
            name = row.system if row.dimensions is None else f"{row.system}, {row.dimensions} dimensions"
            systems.setdefault(name, []).append(row)
    return {name: sorted(rows, key=lambda row: row.exit_layer) for name, rows in systems.items()}


def _timed(rows: Sequence[Row], latencies: Mapping[str, Mapping[int, float]]) -> list[Row]:
    return [row for row in rows if row.exit_layer in latencies.get(row.system, {})]


def _line(axes: Axes, places: Sequence[float], rows: Sequence[Row], label: str) -> None:
    (line,) = axes.plot(places, [100 * row.mean.value for row in rows], marker="o", markersize=4, label=label)
    low, high = ([100 * getattr(row.mean, bound) for row in rows] for bound in ("low", "high"))
    axes.fill_between(places, low, high, alpha=0.15, color=line.get_color(), linewidth=0)


def _finish(axes: Axes, table: Table) -> None:
    axes.set_title(title(table), fontsize="medium")
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
    temporary = path.with_name(f".{path.name}.tmp.png")
    try:
        figure.savefig(temporary, dpi=150)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
