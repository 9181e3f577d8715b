"""The plots of docs/scale.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from benchmarks.scale.answers import NARROW, WIDE, cost, wide_from
from benchmarks.scale.model import Algorithm, Network
from benchmarks.scale.results import First, Results, Steady
from benchmarks.table import bytes_text
from benchmarks.table import seconds as duration

__all__ = ["plots", "save"]

_COLOURS = ("#1f77b4", "#e08214", "#9467bd")
_DASHES = {NARROW: "-", WIDE: (0, (4, 2))}
_WORLDS = [2**power for power in range(2, 15)]
_TICKS = (16, 64, 256, 1024, 4096, 16_384)


def plots(results: Results, network: Network) -> dict[str, Figure]:
    """Return each plot by its name; the caller saves and closes them."""
    return {
        "rank": _rank(results),
        "log": _log(results, network),
        "first": _first(results),
    }


def save(figure: Figure, path: Path) -> None:
    """Write a plot as a PNG of few colours, which is a third as large, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def _rank(results: Results) -> Figure:
    """What a rank receives, computes and holds: measured."""
    figure, panels = _panels(("received a log", "CPU time a log, rank 0", "memory a log, rank 0"))
    values: Sequence[Callable[[Steady], float]] = (
        lambda row: sum(one.received for one in row.collectives),
        lambda row: row.reduce + row.report,
        lambda row: row.report_peak,
    )
    for colour, workload in zip(_COLOURS, _workloads(results), strict=False):
        for route, dashes in _DASHES.items():
            rows = [row for row in results.steady if (row.workload, row.route) == (workload, route)]
            for axes, value in zip(panels, values, strict=True):
                across, up = [row.ranks for row in rows], [value(row) for row in rows]
                axes.plot(across, up, color=colour, linestyle=dashes, marker="o", markersize=3.5)
    _finish(figure, panels, (bytes_text, duration, bytes_text), _workloads(results), _DASHES)
    return figure


def _log(results: Results, network: Network) -> Figure:
    """How long a log takes: the CPU time of a rank, and the model of the network."""
    titles = [f"a log, {algorithm.value} collectives" for algorithm in Algorithm]
    figure, panels = _panels(titles)
    for axes, algorithm in zip(panels, Algorithm, strict=True):
        for colour, workload in zip(_COLOURS, _workloads(results), strict=False):
            first_wide = wide_from(results, workload)
            for route, dashes in _DASHES.items():
                logs = [
                    cost(results, workload, route, ranks, algorithm, network) for ranks in _WORLDS
                ]
                up = [log.total for log in logs]
                axes.plot(_WORLDS, up, color=colour, linestyle=dashes, linewidth=1.4)
                simulated = [
                    (ranks, log.total)
                    for ranks, log in zip(_WORLDS, logs, strict=True)
                    if log.rank.measured
                ]
                axes.plot(*zip(*simulated, strict=True), "o", color=colour, markersize=3.5)
            axes.axvline(first_wide, color=colour, linewidth=0.8, linestyle=":")
        axes.set_xlim(_WORLDS[0], _WORLDS[-1] * 1.2)
    styled = {**_DASHES, "auto turns wide": ":"}
    _finish(figure, panels, (duration, duration), _workloads(results), styled)
    for axes in panels[1:]:
        axes.set_ylim(panels[0].get_ylim())
    return figure


def _first(results: Results) -> Figure:
    """What agreeing on the keys takes: measured."""
    figure, panels = _panels(("received, first log", "CPU time, first log", "memory, first log"))
    values: Sequence[Callable[[First], float]] = (
        lambda row: sum(one.received for one in row.collectives),
        lambda row: row.seconds,
        lambda row: row.peak,
    )
    styles = dict(zip(sorted({row.different for row in results.first}), "-:", strict=False))
    for colour, workload in zip(_COLOURS, _workloads(results), strict=False):
        for different, dashes in styles.items():
            rows = [
                row
                for row in results.first
                if (row.workload, row.different) == (workload, different)
            ]
            for axes, value in zip(panels, values, strict=True):
                across, up = [row.ranks for row in rows], [value(row) for row in rows]
                axes.plot(across, up, color=colour, linestyle=dashes, marker="o", markersize=3.5)
    styled = {_different(different): dashes for different, dashes in styles.items()}
    _finish(figure, panels, (bytes_text, duration, bytes_text), _workloads(results), styled)
    return figure


def _different(number: int) -> str:
    return "the same news everywhere" if number == 1 else f"{number} different ones"


def _panels(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    size = (9.0, 3.3) if len(titles) > 2 else (9.0, 3.8)
    figure, panels = plt.subplots(1, len(titles), figsize=size, dpi=100, layout="constrained")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
    return figure, list(panels)


def _finish(
    figure: Figure,
    panels: Sequence[Axes],
    shows: Sequence[Callable[[float], str]],
    workloads: Sequence[str],
    styles: Mapping[str, Any],
) -> None:
    for axes, show in zip(panels, shows, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(_TICKS, [_thousands(tick) for tick in _TICKS])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _, show=show: show(number)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.tick_params(labelsize=8)
        axes.grid(visible=True, color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("ranks", fontsize=8.5)
    coloured = [
        Line2D([], [], color=colour, label=workload)
        for colour, workload in zip(_COLOURS, workloads, strict=False)
    ]
    styled = [
        Line2D([], [], color="#5a5a5a", linestyle=dashes, label=name)
        for name, dashes in styles.items()
    ]
    # Legends fill column by column: a pair of each in a column.
    blank = Line2D([], [], linestyle="", label=" ")
    styled += [blank] * (len(coloured) - len(styled))
    handles = [line for pair in zip(coloured, styled, strict=True) for line in pair]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)


def _thousands(number: int) -> str:
    return f"{number}" if number < 1024 else f"{number // 1024}k"


def _workloads(results: Results) -> list[str]:
    return list(dict.fromkeys(row.workload for row in results.steady))
