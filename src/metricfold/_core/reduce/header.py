"""The header: the numbers at the front of each rank's vector, by which all see whether they agree."""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "AGREED",
    "HEADER_SIZE",
    "PROTOCOL",
    "Field",
    "Kind",
    "RouteChoice",
    "check_route",
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
