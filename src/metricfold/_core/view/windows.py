"""Which view a log shows of each metric: the run, the interval, or whichever suits its type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

__all__ = ["View", "WindowLike", "check_view", "check_window", "view_of"]

View: TypeAlias = Literal["run", "interval"]
WindowLike: TypeAlias = str | Mapping[str, str]
"""``"run"``, ``"interval"``, ``"auto"``, or a mapping from metric names to those."""

_WINDOWS = ("run", "interval", "auto")


def check_window(window: WindowLike) -> None:
    """Refuse a window that is none."""
    chosen = list(window.values()) if isinstance(window, Mapping) else [window]
    for one in chosen:
        if not isinstance(one, str) or one not in _WINDOWS:
            raise ValueError(
                f"window={one!r}: use 'run', 'interval', 'auto', or a dict from metric names to "
                "those. The run is everything since the start, and the interval since the log before"
            )


def check_view(window: str) -> View:
    """Return the window as the one view that it is."""
    if window not in ("run", "interval"):
        raise ValueError(f"window={window!r}: use 'run' or 'interval'")
    return "run" if window == "run" else "interval"


def view_of(window: WindowLike, name: str, *, is_total: bool) -> View:
    """Return the view that is shown of the metric `name`, be it a total of all that came in or not."""
    chosen = window if isinstance(window, str) else window.get(name, "auto")
    if chosen == "auto":
        return "run" if is_total else "interval"
    return check_view(chosen)
