"""A checkpoint of an aggregator: three plain keys, valid on any number of ranks.

    {"format": "metricfold", "version": 1, "payload": "{...}"}

The payload is JSON text, so the state passes through `torch.load(weights_only=True)`, `json`,
`torch.distributed.checkpoint` (which restores only keys that the destination already has: these
three are always there) and Orbax alike. Arrays are base64 of little-endian float64, bit for bit.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metricfold.custom import SavedState
from metricfold.handlers import FloatArray
from metricfold.packing import Key, Schema, Window
from metricfold.totals import NOBODY, Totals

__all__ = ["FORMAT", "VERSION", "Saved", "decode", "encode", "share"]

FORMAT = "metricfold"
VERSION = 1
_MOST_VALUES = 65_536
"""How many recent values of one metric a checkpoint holds, over all ranks."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint holds.

    Args:
        run: the run total.
        interval: what the open interval holds so far.
        windows: each DISTRIBUTION's recent values, one window for each rank that saved.
        custom: states of handlers without lanes, of all ranks, per view.
    """

    run: Totals
    interval: Totals
    windows: Mapping[Key, Sequence[Window]]
    custom: Mapping[str, list[SavedState]]


def encode(saved: Saved) -> dict[str, Any]:
    """Return `saved` as a state dict of plain types."""
    content = {
        "entries": json.loads(saved.run.schema.to_json()),
        "run": _encode_totals(saved.run),
        "interval": _encode_totals(saved.interval.moved(saved.run.schema)),
        "windows": [
            [list(key), [_encode_window(window) for window in _thinned(windows)]]
            for key, windows in saved.windows.items()
        ],
        "custom": saved.custom,
    }
    payload = _json({"checksum": _checksum(content), "content": content})
    return {"format": FORMAT, "version": VERSION, "payload": payload}


def decode(state: object) -> Saved:
    """Return what `state` holds.

    Raises:
        ValueError: the state is foreign, newer, truncated or damaged; the message says which.
    """
    if not isinstance(state, Mapping) or "format" not in state or "payload" not in state:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            "this is no state of a MetricsAggregator: it must have the keys 'format', 'version' "
            f"and 'payload', but it has {found}"
        )
    if state["format"] != FORMAT:
        raise ValueError(
            f"this state was written by {state['format']!r}, not by {FORMAT!r}: load the part of "
            "the checkpoint that MetricsAggregator.state_dict() returned"
        )
    version = state.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise ValueError(
            f"this state has version {version!r}, and this metricfold reads version {VERSION}"
            + (": install a newer metricfold" if newer else "")
        )
    payload = state["payload"]
    if not isinstance(payload, str):
        raise ValueError(
            f"the state's payload is {type(payload).__name__}, not text: it is damaged"
        )
    content = _checked_content(payload)
    schema = Schema(Schema.entries_from_json(json.dumps(content["entries"])))
    return Saved(
        run=_decode_totals(schema, content["run"]),
        interval=_decode_totals(schema, content["interval"]),
        windows={
            (key[0], key[1]): [_decode_window(window) for window in windows]
            for key, windows in content["windows"]
        },
        custom=content["custom"],
    )


def share(windows: Sequence[Window], rank: int, world_size: int, limit: int) -> Window:
    """Return one rank's share of the windows that some number of ranks saved.

    Values are dealt out one by one, by age, so that each rank gets its part of the recent ones;
    those of the open interval stay the newest.
    """
    weighted = any(window.weights is not None for window in windows)
    older = [(w, slice(0, w.values.size - w.fresh)) for w in windows]
    fresh = [(w, slice(w.values.size - w.fresh, None)) for w in windows]
    dealt = [_deal(part, rank, world_size, weighted=weighted) for part in (older, fresh)]
    values = np.concatenate([values for values, _ in dealt])[-limit:]
    weights = np.concatenate([weights for _, weights in dealt])[-limit:]
    return Window(values, weights if weighted else None, min(dealt[1][0].size, limit))


def _deal(
    parts: Iterable[tuple[Window, slice]], rank: int, world_size: int, *, weighted: bool
) -> tuple[FloatArray, FloatArray]:
    values: list[FloatArray] = []
    weights: list[FloatArray] = []
    ages: list[FloatArray] = []
    for window, keep in parts:
        part = window.values[keep]
        values.append(part)
        ones = np.ones(window.values.size) if window.weights is None else window.weights
        weights.append(ones[keep])
        ages.append(np.arange(part.size, 0, -1, dtype=np.float64))
    if not values:
        return np.empty(0), np.empty(0)
    # Oldest first; those of one age in the order of the ranks that saved them.
    order = np.argsort(-np.concatenate(ages), kind="stable")
    mine = order[::-1][rank::world_size][::-1]
    return np.concatenate(values)[mine], np.concatenate(weights)[mine]


def _thinned(windows: Sequence[Window]) -> list[Window]:
    """Thin the windows evenly, so that all together hold at most `_MOST_VALUES`."""
    most = max(_MOST_VALUES // max(len(windows), 1), 1)
    return [_thin(window, most) for window in windows]


def _thin(window: Window, most: int) -> Window:
    size = window.values.size
    if size <= most:
        return window
    kept = np.linspace(0, size - 1, most).round().astype(np.intp)
    weights = None if window.weights is None else window.weights[kept]
    fresh = int((kept >= size - window.fresh).sum())
    return Window(window.values[kept], weights, fresh)


def _encode_totals(totals: Totals) -> dict[str, Any]:
    return {
        "sums": _to_text(totals.sums),
        "lost": _to_text(totals.lost),
        "maxs": _to_text(totals.maxs),
        "seconds": totals.seconds,
    }


def _decode_totals(schema: Schema, content: Mapping[str, Any]) -> Totals:
    totals = Totals(
        schema,
        _to_array(content["sums"]),
        _to_array(content["lost"]),
        _to_array(content["maxs"]),
        # Ranks of another job would say nothing here.
        np.full(schema.max_width, NOBODY, dtype=np.int64),
        float(content["seconds"]),
    )
    if (totals.sums.size, totals.maxs.size) != (schema.sum_width, schema.max_width):
        raise ValueError("the state's totals do not fit its keys: it is damaged")
    return totals


def _encode_window(window: Window) -> dict[str, Any]:
    return {
        "values": _to_text(window.values),
        "weights": None if window.weights is None else _to_text(window.weights),
        "fresh": window.fresh,
    }


def _decode_window(content: Mapping[str, Any]) -> Window:
    weights = content["weights"]
    return Window(
        _to_array(content["values"]),
        None if weights is None else _to_array(weights),
        int(content["fresh"]),
    )


def _to_text(array: FloatArray) -> str:
    return base64.b64encode(array.astype("<f8").tobytes()).decode("ascii")


def _to_array(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)


def _checked_content(payload: str) -> Any:
    try:
        parsed = json.loads(payload)
        if parsed["checksum"] == _checksum(parsed["content"]):
            return parsed["content"]
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(
        "the state's payload is truncated or damaged (its checksum differs): load an earlier "
        "checkpoint"
    )


def _json(content: object) -> str:
    return json.dumps(content, separators=(",", ":"), sort_keys=True)


def _checksum(content: object) -> str:
    return hashlib.blake2b(_json(content).encode(), digest_size=8).hexdigest()
