"""Which file a path means, and the one error that says why it means none."""

from __future__ import annotations

import os
from pathlib import Path

from metricfold.metric import escaped
from metricfold.sinks.lines import HEAD, is_ours

__all__ = ["LookError", "find"]

_MOST_NAMED = 5


class LookError(ValueError):
    """What is looked at is no run, or has not what is asked for; says so in a sentence."""


def find(path: str | os.PathLike[str]) -> Path:
    """Return the run file that a path means: the file itself, or the only one that a folder holds.

    Raises:
        LookError: there is none, or a folder holds several.
    """
    path = Path(path)
    shown = escaped(str(path))
    try:
        if not path.is_dir():
            if not path.exists():
                raise LookError(
                    f"{shown} does not exist: give a file that JSONLSink wrote, or its folder"
                )
            return path
        found = _runs_in(path)
        if len(found) == 1:
            return found[0]
        if found:
            names = _listed([one.name for one in found])
            raise LookError(f"{shown} holds {len(found)} runs: give one of {names}")
        below = [one for one in sorted(path.iterdir()) if one.is_dir() and _runs_in(one)]
    except OSError as error:
        raise LookError(f"{shown} cannot be read ({error.strerror or error})") from error
    hint = f"; there are some in {_listed([str(one) for one in below])}" if below else ""
    raise LookError(f"{shown} holds no run, which is a .jsonl file that JSONLSink wrote{hint}")


def _runs_in(folder: Path) -> list[Path]:
    return [one for one in sorted(folder.glob("*.jsonl")) if one.is_file() and _is_run(one)]


def _is_run(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return is_ours(file.read(HEAD))
    except OSError:
        return False


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    said = ", ".join(map(escaped, names[:_MOST_NAMED]))
    return f"{said} and {more} more" if more > 0 else said
