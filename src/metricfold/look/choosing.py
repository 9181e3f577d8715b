"""Which columns are meant, and which of them matter most."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from metricfold.look.place import LookError
from metricfold.look.reading import Key, RunFile
from metricfold.metric import escaped

__all__ = ["Group", "chosen", "grouped", "is_loss", "main_statistic", "title"]

Group: TypeAlias = tuple[str, str, str]
"""Prefix, name and statistic: what the datasets of a metric have in common."""

_PREFERRED = ("", "p50", "mean")
_MOST_NAMED = 5


def chosen(runs: Sequence[RunFile], names: Iterable[str]) -> list[Key]:
    """Return the keys of runs that names mean, in the order of the names; all without any.

    A name is that of a metric (``loss``), with its prefix (``train/loss``), a statistic behind it
    (``seq_len p50``), or a key as it is logged (``train_web/loss``); each may be a glob.

    Raises:
        LookError: a name means nothing; says what there is like it.
    """
    keys = {key: run.columns[key].printed for run in runs for key in run.columns}
    found: dict[Key, None] = {}
    wanted = list(names)
    for name in wanted:
        matching = [key for key, printed in keys.items() if _means(name, key, printed)]
        if not matching:
            raise LookError(_unknown(runs, name, keys.items()))
        found |= dict.fromkeys(matching)
    return list(found) if wanted else list(keys)


def _means(name: str, key: Key, printed: str) -> bool:
    statistic = f" {key.statistic}" if key.statistic else ""
    texts = {f"{key.name}{statistic}", f"{key.prefix}/{key.name}{statistic}", printed}
    if key.statistic in _PREFERRED:
        texts |= {key.name, f"{key.prefix}/{key.name}"}
    return any(fnmatchcase(text, name) for text in texts)


def _unknown(runs: Sequence[RunFile], name: str, keys: Iterable[tuple[Key, str]]) -> str:
    there = {f"{key.prefix}/{key.name}" if key.prefix else key.name for key, _ in keys}
    near = difflib.get_close_matches(name, there, n=_MOST_NAMED, cutoff=0.4)
    near = near or sorted(there)[:_MOST_NAMED]
    who = " and ".join(escaped(run.label) for run in runs)
    said = f"; there is {', '.join(map(escaped, near))}" if near else ", and no other metric"
    return f"no metric of {who} is called {escaped(name)}{said}"


def grouped(keys: Iterable[Key]) -> dict[Group, list[Key]]:
    """Return keys by what they have in common, that of all datasets first; losses come first."""
    groups: dict[Group, list[Key]] = {}
    for key in keys:
        groups.setdefault((key.prefix, key.name, key.statistic), []).append(key)
    for members in groups.values():
        members.sort(key=lambda key: key.dataset != "")
    ordered = sorted(groups.items(), key=lambda one: _rank(one[0]))
    return dict(ordered)


def _rank(group: Group) -> int:
    _, name, statistic = group
    if is_loss(name) and not statistic:
        return 0 if name.rpartition("/")[2] == "loss" else 1
    return 2


def is_loss(name: str) -> bool:
    """Return whether a metric of this name comes first, and is better when it is lower."""
    last = name.rpartition("/")[2]
    return last in ("loss", "perplexity") or last.endswith("_loss")


def main_statistic(key: Key) -> bool:
    """Return whether a key is the number, or of several the one, that stands for its metric."""
    return key.statistic in _PREFERRED[:2]


def title(group: Group) -> str:
    """Return how a group is called, such as ``train/seq_len p50``."""
    prefix, name, statistic = group
    text = f"{prefix}/{name}" if prefix else name
    return f"{text} {statistic}" if statistic else text
