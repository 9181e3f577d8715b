"""What a metric of 60 x 256 cells costs: layers and experts, as one metric with axes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.table import Budget, Section, at_most, cost, seconds_of
from benchmarks.timing import interleaved, taken
from metricfold import MetricsAggregator
from metricfold._core.fold.state import State
from metricfold._core.reduce.wire import Outgoing, Wire
from metricfold.sinks import Record
from metricfold.sinks.heat_map import heat_map, png
from metricfold.sinks.lines import encoded
from metricfold.torch import DeviceAccumulator

_LAYERS, _EXPERTS, _RANKS = 60, 256, 8


def measure(*, quick: bool) -> list[Section]:
    """Return what a rank takes to record, pack and merge, and what the logger's thread takes."""
    rounds = 3 if quick else 60
    layers, experts = (6, 8) if quick else (_LAYERS, _EXPERTS)
    counts = np.random.default_rng(0).integers(0, 1000, (layers, experts)).astype(float)
    axes = {"layer": layers, "expert": experts}
    aggregator = MetricsAggregator()
    record = partial(aggregator.record, "expert_tokens", counts, "sum", axes=axes)

    def log() -> None:
        record()
        aggregator.reduce()

    def first() -> None:
        by_layer = MetricsAggregator(by={"expert_tokens": "layer"})
        by_layer.record("expert_tokens", counts, "sum", axes=axes)
        by_layer.get_metrics_for_logging("train")

    log()
    snapshot = aggregator.reduce()
    schema, (key,) = snapshot._whole.schema, snapshot._whole.schema.entries
    handler = snapshot._handlers.of_key[key].laned()
    lanes = handler.fold_cells(counts.reshape(-1), np.ones(counts.size))
    held = Outgoing({key: State.of_cells(*lanes, schema.entries[key].axes)}, {})
    wire = Wire(schema, _RANKS, joining=False)
    rows = np.stack([wire.pack(held, rank)[0] for rank in range(_RANKS)])
    written = Record(1, 0.0, {}, arrays=snapshot.arrays("train"))

    def pack_and_merge() -> None:
        wire.pack(held, 0)
        wire.merged(rows)

    def dict_by(by: str | tuple[str, ...]) -> Callable[[], object]:
        return lambda: snapshot.as_dict("train", by={"expert_tokens": by})

    calls: list[tuple[str, Callable[[], object], Budget | None]] = [
        ("record", record, at_most(0.3)),
        (f"pack, and merge of {_RANKS} ranks", pack_and_merge, at_most(0.5)),
        ("record and reduce(), 1 rank", log, None),
        ("dict by layer", dict_by("layer"), None),
        ("dict by layer and expert", dict_by(tuple(axes)), None),
        ("line of JSON", lambda: encoded(written), None),
        ("heat map", lambda: png(heat_map(counts)), None),
    ]
    ways = {what: call for what, call, _ in calls}
    times = interleaved(ways, rounds, calls_per_turn=4, clock=time.process_time)
    section = Section(f"A metric of {layers} x {experts} cells: CPU time")
    section.rows = [seconds_of(what, times[what], "ms", budget) for what, _, budget in calls]
    firsts = [taken(first) for _ in range(3)]
    section.rows.append(seconds_of("first record, reduction and dict", firsts, "s", at_most(1)))
    return [section, _on_device(64 if quick else 4096, rounds)]


def _on_device(tokens: int, rounds: int) -> Section:
    """Return what an accumulator takes for the experts of one layer's tokens, on a CPU."""
    top, ones = torch.randint(0, 64, (tokens, 8)), torch.ones(tokens, 8)
    datasets = torch.randint(0, 4, (tokens,))
    metrics = {"expert_tokens": ("sum", "layer", "expert")}
    alone, several = (
        DeviceAccumulator(metrics, names, axes={"layer": 24, "expert": 64})
        for names in ((), ("a", "b", "c", "d"))
    )
    layer, of_several = (one.at("expert_tokens", layer=3) for one in (alone, several))

    def counted() -> torch.Tensor:
        return torch.bincount(top.reshape(-1), minlength=64)

    ways: dict[str, Callable[[], object]] = {
        "update, ids of experts": lambda: layer.update(ones, ids={"expert": top}),
        "the same with ids of datasets": lambda: of_several.update(
            ones, ids={"expert": top}, dataset_ids=datasets
        ),
        "bincount, and update with that": lambda: layer.update(counted()),
    }
    times = interleaved({**ways, "bincount": counted}, rounds)
    section = Section(
        f"An accumulator takes in which of 64 experts {tokens:,} tokens choose, 8 each (CPU)"
    )
    section.rows = [cost(way, times[way], "bincount", times["bincount"]) for way in ways]
    return section
