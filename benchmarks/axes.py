"""What a metric of 60 x 256 cells costs: layers and experts, as one metric with axes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks.table import Section, at_most, cost, seconds_of
from benchmarks.timing import interleaved
from metricfold import MetricsAggregator
from metricfold._core.fold.state import State
from metricfold._core.reduce.wire import Outgoing, Wire
from metricfold.sinks import Record
from metricfold.sinks.heat_map import heat_map, png
from metricfold.sinks.jsonl import encoded

_LAYERS, _EXPERTS = 60, 256
_RANKS = 8
_CALLS = 4


def measure(*, quick: bool) -> list[Section]:
    """Return what a rank takes to record, pack and merge, and what the logger's thread takes."""
    rounds = 3 if quick else 60
    layers, experts = (6, 8) if quick else (_LAYERS, _EXPERTS)
    counts = np.random.default_rng(0).integers(0, 1000, (layers, experts)).astype(float)
    axes = {"layer": layers, "expert": experts}
    aggregator = MetricsAggregator()

    def record() -> None:
        aggregator.record("expert_tokens", counts, "sum", axes=axes)

    def log() -> None:
        record()
        aggregator.reduce()

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

    times = {
        name: _cpu(function, rounds)
        for name, function in {
            "record": record,
            "pack": pack_and_merge,
            "log": log,
            "dict": lambda: snapshot.as_dict("train", by={"expert_tokens": "layer"}),
            "both": lambda: snapshot.as_dict("train", by={"expert_tokens": tuple(axes)}),
            "line": lambda: encoded(written),
            "image": lambda: png(heat_map(counts)),
        }.items()
    }
    first = [_first(counts, axes) for _ in range(3)]
    return [
        Section(
            f"A metric of {layers} x {experts} cells: CPU time",
            [
                seconds_of("record", times["record"], "ms", at_most(0.3)),
                seconds_of(f"pack, and merge of {_RANKS} ranks", times["pack"], "ms", at_most(0.5)),
                seconds_of("first record, reduction and dict", first, "s", at_most(1)),
                seconds_of("record and reduce(), 1 rank", times["log"], "ms"),
                seconds_of("dict by layer", times["dict"], "ms"),
                seconds_of("dict by layer and expert", times["both"], "ms"),
                seconds_of("line of JSON", times["line"], "ms"),
                seconds_of("heat map", times["image"], "ms"),
            ],
        ),
        _on_device(64 if quick else 4096, rounds),
    ]


def _on_device(tokens: int, rounds: int) -> Section:
    """Return what an accumulator takes for the experts of one layer's tokens, on a CPU."""
    import torch

    from metricfold.torch import DeviceAccumulator

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

    times = interleaved(
        {
            "bincount": counted,
            "update": lambda: layer.update(ones, ids={"expert": top}),
            "of datasets": lambda: of_several.update(
                ones, ids={"expert": top}, dataset_ids=datasets
            ),
            "of counts": lambda: layer.update(counted()),
        },
        rounds,
    )
    bare = times["bincount"]
    return Section(
        f"An accumulator takes in which of 64 experts {tokens:,} tokens choose, 8 each (CPU)",
        [
            cost("update, ids of experts", times["update"], "bincount", bare),
            cost("the same with ids of datasets", times["of datasets"], "bincount", bare),
            cost("bincount, and update with that", times["of counts"], "bincount", bare),
        ],
    )


def _cpu(function: Callable[[], object], rounds: int) -> list[float]:
    """Return the CPU seconds of a call, one number a round."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(_CALLS):
            function()
        times.append((time.process_time() - began) / _CALLS)
    return times


def _first(
    counts: np.ndarray[tuple[int, int], np.dtype[np.float64]], axes: dict[str, int]
) -> float:
    """Return the seconds of a first log, by layer."""
    began = time.process_time()
    aggregator = MetricsAggregator(by={"expert_tokens": "layer"})
    aggregator.record("expert_tokens", counts, "sum", axes=axes)
    aggregator.get_metrics_for_logging("train")
    return time.process_time() - began
