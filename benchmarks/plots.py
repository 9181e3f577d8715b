"""Small plots for the pages: lines on logarithmic axes; one that begins at 0 is linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

__all__ = ["draw"]

_FIRST = "#d62728"
_OTHERS = ("#1f77b4", "#17a2a2", "#9467bd", "#e08214", "#5a5a5a", "#a6a6a6")
_MARKERS = "os^Dvxp"


def draw(
    path: Path,
    title: str,
    label: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    show: Callable[[float], str],
) -> None:
    """Draw `lines`, the first one foremost, and write them to `path` as a PNG.

    Args:
        path: where to.
        title: what is shown.
        label: of the horizontal axis.
        lines: points by name.
        show: how the vertical axis writes a number.
    """
    figure, axes = plt.subplots(figsize=(7.2, 3.4), dpi=100, layout="constrained")
    colours = (_FIRST, *_OTHERS)
    for place, (name, points) in enumerate(lines.items()):
        across, up = zip(*points, strict=True) if points else ((), ())
        axes.plot(
            across,
            up,
            label=name,
            color=colours[place % len(colours)],
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=5,
            linewidth=2.4 if place == 0 else 1.3,
            zorder=3 if place == 0 else 2,
        )
    ticks = sorted({across for points in lines.values() for across, _ in points})
    axes.set_xscale("log" if ticks[0] > 0 else "linear")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: show(number)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.grid(visible=True, color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    axes.set_title(title, loc="left", fontsize=11)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
