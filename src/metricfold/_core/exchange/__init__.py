"""How vectors travel between ranks: two routes to the same result.

`Narrow`: one all-gather, so that every rank sees what each rank sent. `Wide`: an all-reduce by MAX
and one by SUM, whose cost for a rank does not grow with their number. Which one is taken follows
from the agreed schema and the world size alone, so that all ranks take the same.
"""

from __future__ import annotations

from metricfold._core.exchange.base import Attendance, Exchanged, Merged, Outgoing, Recent, Route
from metricfold._core.exchange.narrow import Narrow
from metricfold._core.exchange.wide import Wide
from metricfold._core.reduce.header import RouteChoice
from metricfold._core.reduce.schema import Schema

__all__ = [
    "Attendance",
    "Exchanged",
    "Merged",
    "Narrow",
    "Outgoing",
    "Recent",
    "Route",
    "Wide",
    "choose",
]

_MOST_GATHERED = 4 * 2**20
"""Bytes of all ranks together, beyond which the wide route is taken."""


def choose(schema: Schema, world_size: int, wanted: RouteChoice) -> Route:
    """Return the route that all ranks take with `schema`."""
    narrow = Narrow(schema)
    # Before they have agreed on anything, ranks do not know what the others want either.
    if wanted is RouteChoice.NARROW or not schema.entries:
        return narrow
    small = world_size == 1 or 8 * narrow.size * world_size <= _MOST_GATHERED
    if wanted is RouteChoice.AUTO and small:
        return narrow
    return Wide(schema, world_size)
