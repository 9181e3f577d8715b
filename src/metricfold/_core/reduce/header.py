"""The header: the numbers at the front of each rank's vector, by which all see whether they agree.

It says, too, how much memory the others are about to take for what follows. So it is held to what this
version writes, and what is refused is refused on all ranks alike, for all have received the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum

import numpy as np

from metricfold._core.fold.sample import FloatArray
from metricfold._core.sketch.weights import LARGEST_COUNT, countable

__all__ = [
    "AGREED",
    "HEADER_SIZE",
    "MOST_CUSTOM",
    "MOST_ERROR",
    "MOST_NEWS",
    "PROTOCOL",
    "Field",
    "Kind",
    "RouteChoice",
    "check",
    "check_route",
    "check_whole",
    "name_ranks",
]

PROTOCOL = 3


class Kind(IntEnum):
    """Which call a rank is in."""

    REDUCE = 1
    STATE_DICT = 2

    @property
    def label(self) -> str:
        return {Kind.REDUCE: "a reduction", Kind.STATE_DICT: "state_dict()"}[self]


class Field(IntEnum):
    """Where each number of a rank's header stands; up to RULES, all ranks must send the same."""

    PROTOCOL = 0
    KIND = 1
    SEQUENCE = 2
    """How many exchanges the rank has completed."""
    STEP = 3
    """The caller's step, or -1."""
    SCHEMA = 4
    """Hash of the agreed schema."""
    GENERATION = 5
    """How often state was loaded or reset."""
    RUN = 6
    """Hash of the run total, and of which reduction's state the rank has loaded."""
    ROUTE = 7
    """Which route the caller wants."""
    RULES = 8
    """Hash of the rules that look for alerts; 0 for none."""
    PENDING = 9
    """1 if the rank holds something that the schema has no place for."""
    BLOB_HASH = 10
    BLOB_SIZE = 11
    """Hash and size of what is pending, or of the error."""
    ERROR = 12
    """1 if the rank has failed and takes part with identities."""
    SECONDS = 13
    """Wall time since the rank's last reduction."""
    CUSTOM_SIZE = 14
    """Size of the results of handlers without lanes."""
    SINK_FAILED = 15
    """1 if a logger's sink has failed there, and all ranks are to hear of it."""
    ALERTS = 16
    """What a local rule of the rank has found, as a number that says which rule and rank; else 0."""


AGREED = Field.RULES + 1
"""So many fields, from the first, must be the same on all ranks."""
HEADER_SIZE = 20
"""A few more than there are fields, for later versions."""


class RouteChoice(IntEnum):
    """What the caller wants."""

    AUTO = 0
    GATHER = 1
    TREE = 2


_ALIASES = {"narrow": RouteChoice.GATHER, "wide": RouteChoice.TREE}


def check_route(route: object) -> RouteChoice:
    """Return what `route` stands for; raises ValueError if it is none."""
    for name, choice in [*((one.name.lower(), one) for one in RouteChoice), *_ALIASES.items()]:
        if route == name:
            return choice
    raise ValueError(f"route={route!r}: use 'auto', 'gather' or 'tree'")


# -- What a rank may send ------------------------------------------------------------------------

MOST_NEWS = 2**24
"""Bytes of one rank's news."""
MOST_ERROR = 2**14
"""Bytes of what a rank says of its failure."""
MOST_CUSTOM = 2**26
"""Bytes of one rank's results of handlers without lanes."""

# What stands behind the fields is for later versions.
_HIGHEST = np.full(len(Field), LARGEST_COUNT)
_HIGHEST[[Field.KIND, Field.ROUTE]] = max(Kind), max(RouteChoice)
_HIGHEST[[Field.PENDING, Field.ERROR, Field.SINK_FAILED]] = 1.0
_HIGHEST[[Field.BLOB_SIZE, Field.CUSTOM_SIZE]] = MOST_NEWS, MOST_CUSTOM


def check_whole(headers: FloatArray) -> None:
    """Raise, on all ranks alike, if what a rank sent is no header, or that of another version.

    Args:
        headers: everyone's, shape (world_size, HEADER_SIZE).
    """
    if len(set(headers[:, Field.PROTOCOL].tolist())) > 1:
        check(headers)
    given = headers[:, : len(Field)]
    fitting = countable(given) & (given <= _HIGHEST)
    kind, step, seconds = given[:, [Field.KIND, Field.STEP, Field.SECONDS]].T
    fitting[:, Field.KIND] &= kind >= min(Kind)
    fitting[:, Field.STEP] |= step == -1.0
    fitting[:, Field.SECONDS] = (seconds >= 0.0) & (seconds <= LARGEST_COUNT)
    wrong = {
        rank: f"its header has {given[rank, place]:g} as {Field(place).name.lower()}"
        for rank, place in reversed(np.argwhere(~fitting).tolist())  # of each rank the first stays
    }
    size, failed, pending = given[:, [Field.BLOB_SIZE, Field.ERROR, Field.PENDING]].T
    conflicting = (size > 0) != ((failed == 1.0) | (pending == 1.0))
    conflicting |= (failed == 1.0) & ((size > MOST_ERROR) | (pending == 1.0))
    for rank in np.flatnonzero(conflicting).tolist():
        wrong.setdefault(rank, f"its header announces {size[rank]:g} bytes of neither kind")
    if wrong:
        raise RuntimeError(
            f"{name_ranks(wrong)} sent what no rank sends: of rank {min(wrong)}, {wrong[min(wrong)]}. "
            "Nothing was reduced; install the same version of metricfold everywhere, and look after "
            "that rank's machine"
        )


# -- Whether all are where the others are ----------------------------------------------------------


def check(headers: FloatArray) -> None:
    """Raise, on all ranks alike, if the ranks are not in the same call with the same state."""
    agreed = headers[:, :AGREED]
    if (agreed == agreed[0]).all():
        return
    for field, (beginning, say, end) in _COMPLAINTS.items():
        groups: dict[float, list[int]] = {}
        for rank, number in enumerate(headers[:, field].tolist()):
            groups.setdefault(number, []).append(rank)
        if len(groups) > 1:
            who = (f"{name_ranks(ranks)} {say(number)}" for number, ranks in groups.items())
            raise RuntimeError(f"{beginning}: {', '.join(who)}. {end}")


# What must be the same on all ranks: how the complaint begins, what it says of each group of ranks,
# and how it ends.
_COMPLAINTS: dict[Field, tuple[str, Callable[[float], str], str]] = {
    Field.PROTOCOL: (
        "the ranks run different versions of metricfold",
        "with protocol {:.0f}".format,
        "Install the same version everywhere",
    ),
    Field.SEQUENCE: (
        "the ranks are not in step",
        "after {:.0f} exchanges".format,
        "Make a new aggregator on all ranks and load the last checkpoint",
    ),
    Field.KIND: (
        "the ranks are in different calls",
        lambda number: f"called {Kind(int(number)).label}",
        "Nothing was reduced and nothing is lost; every rank must make the same calls in the same order",
    ),
    Field.GENERATION: (
        "load_state_dict() or reset() was not called alike on all ranks",
        "have done it {:.0f}x".format,
        "Call it on every rank",
    ),
    Field.SCHEMA: (
        "the ranks have agreed on different keys",
        lambda number: f"with schema {int(number):x}",
        "Make a new aggregator on all ranks and load the last checkpoint",
    ),
    Field.STEP: (
        "the ranks report different steps",
        lambda number: "gave no step" if number < 0 else f"gave {number:.0f}",
        "Nothing was reduced and nothing is lost; log the same step on every rank",
    ),
    Field.RUN: (
        "the ranks hold different run totals, or go on from states of different reductions",
        lambda number: f"with state {int(number):x}",
        "Load the same checkpoint on every rank",
    ),
    Field.ROUTE: (
        "the ranks were told different routes",
        lambda number: f"with route={RouteChoice(int(number)).name.lower()!r}",
        "Make the aggregator with the same route on every rank",
    ),
    Field.RULES: (
        "the ranks look for different alerts",
        lambda number: f"with rules {int(number):x}" if number else "without a rule",
        (
            "Nothing was reduced and nothing is lost; call alert_on() alike on every rank: the same rules "
            "with the same settings, and functions of the same name"
        ),
    ),
}


def name_ranks(ranks: Iterable[int]) -> str:
    """Return ``rank 3``, or ``ranks 0-2, 5``."""
    numbers = sorted(ranks)
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {text}" if len(numbers) == 1 else f"ranks {text}"
