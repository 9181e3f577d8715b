"""Metrics of an accumulator that have axes: which rows they have, and what becomes of them."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest

from metricfold import MetricsAggregator
from metricfold._core.device.rows import COUNTS, EXTREMA, SUMS, Drained, HostArrays, Layout

METRICS = {"loss": "mean", "tokens": ("sum", "layer", "expert"), "top": ("max", "parameter")}
AXES = {"layer": 2, "expert": 3, "parameter": ["w.b", "a.c"]}


class OnHost:
    """An accumulator whose arrays are on the host already."""

    def __init__(self, layout: Layout, arrays: HostArrays) -> None:
        self.layout, self.arrays = layout, arrays

    def start_read(self) -> Any:
        return lambda: self.arrays

    def empty(self) -> OnHost:
        return self


def filled(layout: Layout) -> HostArrays:
    """Return arrays in which the row r has r values, which come to 10 r and are r at most."""
    rows = np.arange(layout.rows)
    counts, sums = np.zeros((len(rows), COUNTS), int), np.zeros((len(rows), SUMS, 1))
    counts[:, 0] = sums[:, 1, 0] = rows
    sums[:, 0, 0] = 10.0 * rows
    extrema = np.stack([rows, rows], axis=1).astype(float)
    assert extrema.shape[1] == EXTREMA
    return HostArrays(counts, sums, extrema, None, np.zeros((len(layout.names), 2), int))


def test_the_rows_of_a_metric_are_its_cells_in_each_dataset() -> None:
    layout = Layout.of(METRICS, ("web", "code"), AXES)
    assert layout.widths == (2, 12, 4)
    assert layout.rows == 18
    keys = [*layout.keys()]
    assert [(key, one.value, axes) for key, one, axes in keys][2:] == [
        (("web", "tokens"), "sum", "layer=2,expert=3"),
        (("code", "tokens"), "sum", "layer=2,expert=3"),
        (("web", "top"), "max", "parameter"),
        (("code", "top"), "max", "parameter"),
    ]
    states = dict(Drained(OnHost(layout, filled(layout))).arrive())
    # Row 0, the loss of web, has no values.
    assert states.keys() == {key for key, *_ in keys} - {("web", "loss")}
    assert states["code", "loss"].sums == (1.0, 0.0, 10.0, 1.0)
    for dataset, first in (("web", 2), ("code", 8)):
        sums = np.asarray(states[dataset, "tokens"].sums)
        assert sums.tolist() == [[row, 0, 10 * row] for row in range(first, first + 6)]
    # Labels are sorted for the log, cells with them.
    assert states["web", "top"].axes[0].labels == ("a.c", "w.b")
    assert np.asarray(states["web", "top"].maxs).tolist() == [[15.0], [14.0]]


def test_what_a_device_had_of_each_cell_is_what_is_logged() -> None:
    layout = Layout.of(METRICS, ("web", "code"), AXES)
    aggregator = MetricsAggregator()
    aggregator.drain(OnHost(layout, filled(layout)))
    snapshot = aggregator.reduce()
    values, labels = snapshot.array("code", "tokens")
    assert values.tolist() == [[80.0, 90.0, 100.0], [110.0, 120.0, 130.0]]
    assert labels == (("0", "1"), ("0", "1", "2"))
    values, labels = snapshot.array("web", "top")
    assert (values.tolist(), labels) == ([15.0, 14.0], (("a.c", "w.b"),))


def test_layouts_without_axes_are_what_they_were_before_there_were_any() -> None:
    """Accumulators that have been saved carry a fingerprint of the text, and a pickle of the fields."""
    layout = Layout.of({"loss": "mean", "n": ("sum",)}, ("web",))
    assert json.loads(layout.as_json()) == {
        "names": ["loss", "n"],
        "types": ["mean", "sum"],
        "datasets": ["web"],
    }
    before = object.__new__(Layout)
    before.__setstate__({name: getattr(layout, name) for name in ("names", "types", "datasets")})
    assert before == layout
    with_axes = Layout.of(METRICS, (), AXES)
    for copied in (Layout.from_json(with_axes.as_json()), pickle.loads(pickle.dumps(with_axes))):
        assert copied == with_axes
        assert hash(copied) == hash(with_axes)
        assert copied.fingerprint == with_axes.fingerprint
    others = [Layout.of(METRICS, (), AXES | {"layer": 4}), Layout.of({"loss": "mean"}, ())]
    assert len({one.fingerprint for one in (with_axes, *others)}) == 3


@pytest.mark.parametrize(
    ("metrics", "axes", "said"),
    [
        ({"t": ("sum", "layer")}, None, "metric 't' has the axis 'layer', but axes= declares none"),
        ({"t": ("sum", "layer", "layer")}, {"layer": 2}, "name each once"),
        ({"t": ("distribution", "layer")}, {"layer": 2}, "a distribution, which cannot have axes"),
        ({"t": "sum"}, {"layer": 2}, "declares 'layer', which no metric has"),
        ({"t": ("sum", "layer")}, {"layer": 0}, "axis 'layer' has the size 0"),
        ({"t": ("sum", "a", "b")}, {"a": 2**12, "b": 2**12}, "more than"),
    ],
)
def test_axes_that_cannot_be_are_errors_where_the_accumulator_is_made(
    metrics: Any, axes: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Layout.of(metrics, (), axes)
