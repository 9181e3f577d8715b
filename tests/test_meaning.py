"""What a weight, a mask, a NaN and nothing at all mean, the same whichever way values come in.

A table of cases is run through a list of ways in, each of which hands metrics to an aggregator, and
through a list of ways out, each of which gives the results. What is right is worked out here from
the values alone (`truth`).
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from handlers_of_users import LaneMean, LaneRMS, aggregator_of_users
from jax_devices import on_devices
from ranks import run_threads
from ways_in import (
    CATEGORICAL,
    DISTRIBUTION,
    MAX,
    MEAN,
    MIN,
    RATE,
    SUM,
    Take,
    as_batch,
    as_list,
    one_by_one,
)
from ways_in import WAYS_IN as ON_THE_HOST

from metricfold import (
    CategoricalCountAggHandler,
    DistributionAggHandler,
    LaneHandler,
    MaxAggHandler,
    MeanAggHandler,
    Metric,
    MetricBatch,
    MetricsAggregator,
    SumAggHandler,
)

NAN, INF = math.nan, math.inf


# -- The ways in ---------------------------------------------------------------------------------


def with_weights_on_a_device(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    torch = pytest.importorskip("torch")
    as_list(aggregator, [metric._replace(weight=torch.tensor(metric.weight)) for metric in metrics])


def on_a_torch_device(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    torch = pytest.importorskip("torch")
    for dataset, name, value, agg, weight in metrics:
        held = value if isinstance(value, str) else torch.tensor(value)
        aggregator.record(name, held, agg, dataset=dataset, weight=torch.tensor(weight))


def on_a_jax_device(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    numpy = pytest.importorskip("jax.numpy")
    for dataset, name, value, agg, weight in metrics:
        held = value if isinstance(value, str) else numpy.asarray(value)
        aggregator.record(name, held, agg, dataset=dataset, weight=numpy.asarray(weight))


def _as_arrays(
    aggregator: MetricsAggregator,
    metrics: list[Metric],
    values_in: Callable[[Any], Any],
    weights_in: Callable[[Any], Any],
) -> None:
    """Record the values of each dataset as one array of two rows, the second of which is padding."""
    for dataset in dict.fromkeys(metric.dataset_name for metric in metrics):
        group = [metric for metric in metrics if metric.dataset_name == dataset]
        values = np.array([[metric.value for metric in group]] * 2, dtype=np.float64)
        weights = np.array(
            [[metric.weight for metric in group], [0] * len(group)], dtype=np.float64
        )
        name, agg = group[0].name, group[0].agg_type
        aggregator.record(name, values_in(values), agg, dataset=dataset, weight=weights_in(weights))


def in_an_array(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    _as_arrays(aggregator, metrics, np.asarray, np.asarray)


def in_a_torch_array(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    torch = pytest.importorskip("torch")
    _as_arrays(aggregator, metrics, torch.tensor, torch.tensor)


def in_a_jax_array(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    numpy = pytest.importorskip("jax.numpy")
    _as_arrays(aggregator, metrics, numpy.asarray, numpy.asarray)


def in_an_array_weighed_on_a_device(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    _as_arrays(aggregator, metrics, np.asarray, pytest.importorskip("torch").tensor)


def in_a_torch_array_weighed_here(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    _as_arrays(aggregator, metrics, pytest.importorskip("torch").tensor, np.asarray)


def in_a_masked_array(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    """What has weight 0 is masked in every other array, and its weight in the others."""

    def masked(array: Any) -> Any:
        masks = np.array([[not metric.weight for metric in group], [True] * len(group)])
        return np.ma.MaskedArray(array, mask=masks)

    for place, dataset in enumerate(dict.fromkeys(metric.dataset_name for metric in metrics)):
        group = [metric for metric in metrics if metric.dataset_name == dataset]
        ones = all(metric.weight in (0, 1) for metric in group)
        if ones and place % 2:
            values = masked([[metric.value for metric in group]] * 2)
            aggregator.record(group[0].name, values, group[0].agg_type, dataset=dataset, each=True)
        elif place % 2:
            _as_arrays(aggregator, group, masked, lambda weights: np.where(weights, weights, 1))
        else:
            _as_arrays(aggregator, group, np.asarray, masked)


def in_rows(metrics: Sequence[Metric], *datasets: str) -> tuple[tuple[str, ...], Any, Any]:
    """Return the datasets, and the values and weights of each in a row, padded by NaN of weight 0."""
    datasets = datasets or tuple(dict.fromkeys(metric.dataset_name for metric in metrics))
    values, weights = np.full((len(datasets), 8), NAN), np.zeros((len(datasets), 8))
    for row, dataset in enumerate(datasets):
        group = [metric for metric in metrics if metric.dataset_name == dataset]
        values[row, : len(group)] = [metric.value for metric in group]
        weights[row, : len(group)] = [metric.weight for metric in group]
    return datasets, values, weights


def in_cells(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    """A cell for each value: what is printed is all of them in one."""
    datasets, values, weights = in_rows(metrics)
    for dataset, row, weight in zip(datasets, values, weights, strict=True):
        name, agg = metrics[0].name, metrics[0].agg_type
        aggregator.record(name, row, agg, axes={"cell": 8}, weight=weight, dataset=dataset)


def by_a_torch_accumulator(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    """One value after another, with an id and a weight each; without weights if all are 1."""
    torch = pytest.importorskip("torch")
    from metricfold.torch import DeviceAccumulator

    if not metrics:
        return
    datasets = list(dict.fromkeys(metric.dataset_name for metric in metrics))
    accumulator = DeviceAccumulator({metrics[0].name: metrics[0].agg_type}, datasets)
    weights = torch.tensor([metric.weight for metric in metrics], dtype=torch.float64)
    accumulator.update(
        metrics[0].name,
        torch.tensor([metric.value for metric in metrics], dtype=torch.float64),
        weights=None if (weights == 1).all() else weights,
        dataset_ids=torch.tensor([datasets.index(metric.dataset_name) for metric in metrics]),
    )
    aggregator.drain(accumulator)


def by_a_torch_accumulator_in_rows(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    """A row of float32 for each dataset, with a mask where all weights are 0 or 1."""
    torch = pytest.importorskip("torch")
    from metricfold.torch import DeviceAccumulator

    if not metrics:
        return
    datasets, values, weights = in_rows(metrics)
    name, agg = metrics[0].name, metrics[0].agg_type
    accumulator = DeviceAccumulator({"other": "mean", name: agg}, datasets)
    mask = bool(np.isin(weights, (0, 1)).all())
    accumulator.update(
        name,
        torch.from_numpy(values).float(),
        weights=torch.from_numpy(weights > 0 if mask else weights),
        dataset_ids=torch.arange(len(datasets), dtype=torch.int32),
    )
    aggregator.drain(accumulator)


def by_a_torch_accumulator_in_cells(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    """In rows, whose values belong to three cells in turn, or of one of them to none, by its weight."""
    torch = pytest.importorskip("torch")
    from metricfold.torch import DeviceAccumulator

    if not metrics:
        return
    datasets, values, weights = in_rows(metrics)
    name, agg = metrics[0].name, metrics[0].agg_type
    accumulator = DeviceAccumulator({name: (agg, "cell")}, datasets, axes={"cell": 3})
    mask = bool(np.isin(weights, (0, 1)).all())
    cells = np.where(weights != 0, np.arange(8) % 3, 7)
    accumulator.update(
        name,
        torch.from_numpy(values),
        weights=torch.from_numpy(weights > 0 if mask else weights),
        ids={"cell": torch.from_numpy(cells)},
        dataset_ids=torch.arange(len(datasets)),
    )
    aggregator.drain(accumulator)


def by_a_jax_accumulator(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    """As in rows, by one compiled program for each aggregation; of masks where weights do not count."""
    if not metrics:
        return
    name, agg = metrics[0].name, metrics[0].agg_type
    _, values, weights = in_rows(metrics, "a", "b")
    empty, step = _jax_step(name, agg)
    given = np.float32(weights) if agg in WEIGHED else weights > 0
    aggregator.drain(step(empty, np.float32(values), given))


@functools.cache
def _jax_step(name: str, agg: Any) -> tuple[Any, Any]:
    import jax

    from metricfold.jax import DeviceAccumulator

    ids = np.arange(2)

    def step(acc: Any, values: Any, weights: Any) -> Any:
        return acc.update(name, values, weights=weights, dataset_ids=ids)

    return DeviceAccumulator({name: agg}, ("a", "b")), jax.jit(step)


IN_ARRAYS: list[Take] = [in_an_array, in_a_masked_array]
ON_DEVICES: list[Take] = [with_weights_on_a_device, on_a_torch_device, on_a_jax_device]
ARRAYS_ON_DEVICES: list[Take] = [
    in_a_torch_array,
    in_a_jax_array,
    in_an_array_weighed_on_a_device,
    in_a_torch_array_weighed_here,
]
ACCUMULATORS: list[Take] = [by_a_torch_accumulator, by_a_torch_accumulator_in_rows]
IN_CELLS: list[Take] = [in_cells, by_a_torch_accumulator_in_cells]
WAYS_IN = [*ON_THE_HOST, *IN_ARRAYS, *ON_DEVICES, *ARRAYS_ON_DEVICES, *ACCUMULATORS, *IN_CELLS]
every_host_way_in = pytest.mark.parametrize("way_in", ON_THE_HOST, ids=lambda way: way.__name__)

# -- The ways out --------------------------------------------------------------------------------

WayOut = Callable[[Take, list[Metric], Mapping[str, Any]], dict[str, float]]


def alone(way_in: Take, metrics: list[Metric], options: Mapping[str, Any]) -> dict[str, float]:
    aggregator = aggregator_of_users(**options)
    way_in(aggregator, metrics)
    return aggregator.get_metrics_for_logging("t")


def from_a_checkpoint(
    way_in: Take, metrics: list[Metric], options: Mapping[str, Any]
) -> dict[str, float]:
    saving, loading = aggregator_of_users(**options), aggregator_of_users(**options)
    way_in(saving, metrics)
    loading.load_state_dict(saving.state_dict())
    return loading.get_metrics_for_logging("t")


def over_two_ranks(
    way_in: Take, metrics: list[Metric], options: Mapping[str, Any]
) -> dict[str, float]:
    """Half of the metrics each, over the exchange that `options` name."""

    def train(communicator: Any) -> dict[str, float]:
        aggregator = aggregator_of_users(communicator=communicator, **options)
        way_in(aggregator, metrics[communicator.rank :: 2])
        return aggregator.get_metrics_for_logging("t")

    first, second = run_threads(train, 2)
    assert str(first) == str(second)
    return first  # type: ignore[no-any-return]


# -- The table -----------------------------------------------------------------------------------


class Value(NamedTuple):
    value: Any
    weight: float = 1.0
    dataset: str = "a"


COUNTING = {
    "one value": [Value(5)],
    "two datasets": [Value(3.0), Value(1.0, 1, "b"), Value(2.5), Value(-4.0, 1, "b")],
    "ints and bools": [Value(3), Value(True), Value(False, True), Value(7, True)],
    "padding": [Value(3.0), Value(1.0), Value(99.0, 0), Value(-99.0, False), Value(2.0, True)],
    "padding that is no number": [Value(3.0), Value(NAN, 0), Value(INF, 0.0), Value(-INF, 0)],
    "padding first": [Value(NAN, 0), Value(7.0), Value(NAN, 0, "b"), Value(2.0, 1, "b")],
    "a dataset of padding alone": [Value(2.0), Value(4.0, 0, "b"), Value(NAN, 0, "b")],
    "nothing but padding": [Value(4.0, 0), Value(NAN, 0), Value(1.0, 0, "b")],
    "nothing": [],
    "a NaN": [Value(1.0), Value(NAN), Value(3.0), Value(4.0, 1, "b")],
    "infinities": [Value(1.0), Value(INF), Value(2.0), Value(-INF, 1, "b")],
    "both infinities": [Value(INF), Value(-2.0), Value(-INF), Value(3.0, 1, "b")],
    "a NaN beside an infinity": [Value(NAN), Value(INF), Value(2.0), Value(NAN, 0), Value(0.0)],
    "nothing but NaN": [Value(NAN), Value(NAN), Value(2.0, 1, "b"), Value(NAN, 0, "b")],
    "zeros": [Value(0.0), Value(-0.0), Value(0, True), Value(-0.0, 1, "b")],
    "far from zero": [Value(1048576.5), Value(1048576.25), Value(1048577.0), Value(1048576.5)],
}
WEIGHING = {
    "weights": [Value(3.0, 2), Value(1.0, 0.5), Value(5.0, 1.5), Value(4.0, 3, "b")],
    "weights and padding": [Value(3.0, 2), Value(NAN, 0), Value(5.0, 0.25), Value(9.0, 0, "b")],
    "a weighty NaN": [Value(3.0, 2), Value(NAN, 3), Value(5.0, 0.5)],
    "a weighty infinity": [Value(3.0, 2), Value(INF, 3), Value(5.0, 0.5)],
    "all of one weight": [
        Value(3.0, 0.25),
        Value(-1.0, 0.25),
        Value(NAN, 0),
        Value(6.5, 0.25, "b"),
    ],
}
WEIGHED = (MEAN, DISTRIBUTION, "lane mean", "state mean")
ACCUMULATED = (SUM, MEAN, MAX, MIN, DISTRIBUTION)
TYPES = (SUM, MEAN, MAX, MIN, DISTRIBUTION, RATE, "lane rms", "lane mean", "state mean")


def truth(agg: Any, values: Sequence[Value], on_nan: str) -> dict[str, float]:
    """Return what `values` come to; None for what this test knows nothing about."""
    results: dict[str, float] = {}
    for dataset in dict.fromkeys(value.dataset for value in values):
        counted = [value for value in values if value.weight and value.dataset == dataset]
        x = np.array([value.value for value in counted], dtype=float)
        w = np.array([value.weight for value in counted], dtype=float)
        with np.errstate(invalid="ignore"):  # inf - inf
            found = _truth(agg, x, w, on_nan) if counted else {}
        results |= {f"t_{dataset}/m{suffix}": result for suffix, result in found.items()}
    return results


def _truth(agg: Any, x: Any, w: Any, on_nan: str) -> dict[str, float]:
    if agg is DISTRIBUTION:
        return _distribution(x, w)
    nans = int(np.isnan(x).sum())
    if agg == "state mean" or on_nan == "propagate" or agg in ("lane rms", "lane mean"):
        counts = {}
        if nans:
            return {"": NAN}
    else:
        counts = {"_nan_count": float(nans)} if nans else {}
        x, w = x[~np.isnan(x)], w[~np.isnan(x)]
        if not x.size:
            return counts
    results = {
        SUM: x.sum,
        RATE: x.sum,
        MAX: x.max,
        MIN: x.min,
        MEAN: lambda: x @ w / w.sum(),
        "lane mean": lambda: x @ w / w.sum(),
        "state mean": lambda: x @ w / w.sum(),
        "lane rms": lambda: np.mean(x**2) ** 0.5,
    }
    return {"": float(results[agg]()), **counts}


def _distribution(x: Any, w: Any) -> dict[str, float]:
    finite = np.isfinite(x)
    results = {
        "nan_count": float(np.isnan(x).sum()),
        "inf_count": float(np.isinf(x).sum()),
        "count": float(finite.sum()),
    }
    results = {name: count for name, count in results.items() if count}
    x, w = x[finite], w[finite]
    if x.size:
        mean = x @ w / w.sum()
        results |= {"mean": mean, "min": x.min(), "max": x.max()}
        # How weighted values are ranked is the business of tests/test_distribution.py.
        plain = (w == 1).all()
        for percentile in (5, 50, 95):
            results[f"p{percentile:02d}"] = np.percentile(x, percentile) if plain else math.pi
        if x.size > 1:
            results["std"] = (w @ (x - mean) ** 2 / (w.sum() - w @ w / w.sum())) ** 0.5
    return {f"_stat_{name}": float(result) for name, result in results.items()}


def check(agg: Any, found: Mapping[str, float], wanted: Mapping[str, float], way_in: Take) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if agg is RATE and math.isfinite(value):
            assert np.sign(found[name]) == np.sign(value), name
        elif value != math.pi:
            rel = 1e-12
            if "_stat_p" in name:  # of a histogram, which accumulators have one of few buckets
                rel = 2**-6 if way_in in (*ACCUMULATORS, by_a_jax_accumulator) else 1e-7
            assert found[name] == pytest.approx(value, rel=rel, nan_ok=True), name


def metrics_of(agg: Any, values: Sequence[Value]) -> list[Metric]:
    return [Metric(dataset, "m", value, agg, weight) for value, weight, dataset in values]


def cases(agg: Any) -> dict[str, list[Value]]:
    return COUNTING | WEIGHING if agg in WEIGHED else COUNTING


def check_cases(agg: Any, way_in: Take, way_out: WayOut, **options: Any) -> None:
    """Check all cases, each in turn."""
    for name, values in cases(agg).items():
        if agg is RATE and way_out is from_a_checkpoint:
            continue  # a rate begins anew: no time has passed
        found = way_out(way_in, metrics_of(agg, values), options)
        try:
            check(agg, found, truth(agg, values, options.get("on_nan", "propagate")), way_in)
        except AssertionError as error:
            raise AssertionError(f"{name}, {options}: {error}\nfound {found}") from error


def types_of(way_in: Take) -> Sequence[Any]:
    """Return the types that a way in has."""
    types = ACCUMULATED if way_in in (*ACCUMULATORS, by_a_torch_accumulator_in_cells) else TYPES
    without_cells = (DISTRIBUTION, "state mean") if way_in in IN_CELLS else ()
    return [agg for agg in types if agg not in without_cells]


@pytest.mark.parametrize("on_nan", ["propagate", "skip"])
@pytest.mark.parametrize(
    ("agg", "way_in"),
    [(agg, way) for way in WAYS_IN for agg in types_of(way)],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_every_way_in_means_the_same(agg: Any, on_nan: str, way_in: Take) -> None:
    check_cases(agg, way_in, alone, on_nan=on_nan)


WAYS_THROUGH: list[Take] = [
    as_batch,
    in_a_torch_array,
    by_a_torch_accumulator_in_rows,
    by_a_torch_accumulator_in_cells,
]
"""Besides a list, one of each kind of state that leaves by a checkpoint or to other ranks."""


@pytest.mark.parametrize("way_out", [from_a_checkpoint, over_two_ranks], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("agg", "way_in"),
    [(agg, as_list) for agg in TYPES]
    + [(agg, way) for way in WAYS_THROUGH for agg in ACCUMULATED if agg in types_of(way)],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_every_way_out_means_the_same(agg: Any, way_in: Take, way_out: WayOut) -> None:
    for route in ("narrow", "wide"):
        check_cases(agg, way_in, way_out, route=route)


@on_devices(1)
@pytest.mark.parametrize("agg", ACCUMULATED, ids=str)
def test_a_compiled_accumulator_of_jax_means_the_same(agg: Any) -> None:
    for on_nan in ("propagate", "skip"):
        check_cases(agg, by_a_jax_accumulator, alone, on_nan=on_nan)
    check_cases(agg, by_a_jax_accumulator, from_a_checkpoint)
    for route in ("narrow", "wide"):
        check_cases(agg, by_a_jax_accumulator, over_two_ranks, route=route)


# -- Weight 0 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way_in", [*ON_THE_HOST, *ON_DEVICES], ids=lambda way: way.__name__)
def test_a_category_of_weight_0_is_none(way_in: Take) -> None:
    aggregator = MetricsAggregator()
    weights = {"a": 1, "b": 0, "": 1, "c": 0.0}
    metrics = [
        Metric("d", "kind", kind or "a", CATEGORICAL, weight) for kind, weight in weights.items()
    ]
    way_in(aggregator, [*metrics, Metric("e", "kind", 3, CATEGORICAL, 0)])
    assert aggregator.get_metrics_for_logging("t") == {"t_d/kind_count_a": 2.0}


@every_host_way_in
@pytest.mark.parametrize("agg", [*TYPES, CATEGORICAL], ids=str)
def test_what_a_value_of_weight_0_is_does_not_matter(agg: Any, way_in: Take) -> None:
    aggregator = aggregator_of_users()
    for value in (NAN, None, "", "two\nlines", object(), np.zeros(3), 10**400, np.ma.masked):
        way_in(aggregator, [Metric("d", "m", value, agg, 0)])
    assert aggregator.get_metrics_for_logging("t") == {}
    # A key that has had no value has no type yet.
    way_in(aggregator, [Metric("d", "m", 2.0, SUM)])
    assert aggregator.get_metrics_for_logging("t") == {"t_d/m": 2.0}


@every_host_way_in
def test_a_metric_of_weight_0_takes_no_name(way_in: Take) -> None:
    aggregator = MetricsAggregator()
    way_in(aggregator, [Metric("d", "len_stat_mean", 2.0, SUM, 0)])
    way_in(aggregator, [Metric("d", "len", 2.0, DISTRIBUTION)])
    way_in(aggregator, [Metric("d", "len_stat_max", 2.0, SUM, 0)])
    assert aggregator.get_metrics_for_logging("t")["t_d/len_stat_mean"] == 2.0


@every_host_way_in
@pytest.mark.parametrize(
    ("metric", "complaint"),
    [
        (Metric("d", "", 1, SUM, 0), "the name of a metric.* is empty"),
        (Metric("d", "m", 1, "median", 0), "metric 'm' of dataset 'd'.*'median', for which no han"),
        (Metric("d", "loss", 1, SUM, 0), "metric 'loss' of dataset 'd' is already registered"),
        (Metric("d", "m", 1, None, 0), "None is not an aggregation type"),  # type: ignore[arg-type]
        (Metric("d", "m", 1, SUM, -0.5), "the weight -0.5 is not a finite number of 0 or more"),
    ],
    ids=str,
)
def test_a_mistake_is_one_at_weight_0_too(way_in: Take, metric: Metric, complaint: str) -> None:
    aggregator = MetricsAggregator()
    aggregator.record("loss", 2.0, dataset="d")
    with pytest.raises((TypeError, ValueError), match=complaint):
        way_in(aggregator, [metric])
    assert aggregator.get_metrics_for_logging("t") == {"t_d/loss": 2.0}


@pytest.mark.parametrize(
    "handler",
    [SumAggHandler(), MeanAggHandler(), MaxAggHandler(), DistributionAggHandler(), LaneMean()],
    ids=lambda handler: type(handler).__name__,
)
def test_a_handler_that_is_called_by_hand_leaves_weight_0_out(handler: LaneHandler) -> None:
    state = handler.initialize_metric_state("d", "m", SUM)
    for value, weight in ((NAN, 0), (3.0, 1.0), (99.0, 0.0)):
        handler.update(state, Metric("d", "m", value, SUM, weight))
    plain = handler.initialize_metric_state("d", "m", SUM)
    handler.update(plain, Metric("d", "m", 3.0, SUM))
    assert state == plain
    counter = CategoricalCountAggHandler()
    state = counter.initialize_metric_state("d", "kind", CATEGORICAL)
    for category, weight in (("a", 1.0), ("b", 0)):
        counter.update(state, Metric("d", "kind", category, CATEGORICAL, weight))
    assert state.metadata["counts"] == {"a": 1}


def test_a_record_of_weight_0_with_values_per_rank_is_nothing() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("seconds", NAN, weight=0, per_rank=True)
    aggregator.record("seconds", 2.0, per_rank=True)
    assert aggregator.get_metrics_for_logging("t") == {"t/seconds": 2.0}


# -- Weights where none count --------------------------------------------------------------------

UNWEIGHED = (SUM, MAX, MIN, RATE, CATEGORICAL, "lane rms")


@every_host_way_in
@pytest.mark.parametrize("weight", [2, 0.5, np.float32(3), np.array([7])], ids=repr)
@pytest.mark.parametrize("agg", UNWEIGHED, ids=str)
def test_a_weight_that_was_ignored_is_refused_with_the_whole_batch(
    agg: Any, weight: Any, way_in: Take
) -> None:
    """0.1.0 took such a value with any weight, and ignored that."""
    aggregator = aggregator_of_users()
    aggregator.record("before", 1.0)
    first, bad = Metric("d", "first", 1.0, MEAN), Metric("d", "m", 1.0, agg, weight)
    advice = "handler say weighted = True" if agg == "lane rms" else "use 'mean' or 'distribution'"
    if way_in is one_by_one:
        first = bad
    with pytest.raises(ValueError, match=r"metric 'm' of dataset 'd'.*once \(weight 1\)") as caught:
        way_in(aggregator, [first, bad])
    assert advice in str(caught.value)
    assert "would be ignored" in str(caught.value)
    assert aggregator.get_metrics_for_logging("t") == {"t/before": 1.0}
    # Once the key is known it is refused all the same.
    way_in(aggregator, [bad._replace(weight=1)])
    with pytest.raises(ValueError, match="would be ignored"):
        way_in(aggregator, [first, bad])


@pytest.mark.parametrize("agg", UNWEIGHED, ids=str)
def test_a_data_worker_hands_such_a_weight_on(agg: Any) -> None:
    batch = MetricBatch.from_metrics(
        [Metric("d", "m", value, agg, weight) for value, weight in [(1, 2), (NAN, 0), (3, 1)]]
    )
    aggregator = aggregator_of_users()
    aggregator.record("m", 5, agg, dataset="d")
    before = aggregator.reduce().as_dict()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"metric 'm' of dataset 'd'.*would be ignored"):
            aggregator.update(pickle.loads(pickle.dumps(batch)))
    after = aggregator.reduce().as_dict()
    assert after.keys() == before.keys()
    assert agg is RATE or after == before


@pytest.mark.parametrize(
    ("agg", "way_in"),
    [
        (agg, way)
        for way in [*ON_DEVICES, as_list, as_batch]
        for agg in UNWEIGHED
        if not (agg == "lane rms" and way is as_batch)  # a worker knows no such handler
    ],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_of_a_weight_on_a_device_only_0_or_not_matters_there(agg: Any, way_in: Take) -> None:
    torch = pytest.importorskip("torch")
    values = [(3.0, 2.0), (3.0, 0.5), (9.0, 0.0)]
    if way_in in ON_THE_HOST:
        values = [(value, torch.tensor(weight)) for value, weight in values]
    aggregator = aggregator_of_users()
    way_in(aggregator, [Metric("d", "m", value, agg, weight) for value, weight in values])
    results = aggregator.get_metrics_for_logging("t")
    if agg is not RATE:
        name, wanted = {SUM: ("m", 6.0), CATEGORICAL: ("m_count_3.0", 2.0)}.get(agg, ("m", 3.0))
        assert results == {f"t_d/{name}": wanted}
    assert len(results) == 1


@every_host_way_in
def test_a_handler_without_lanes_gets_every_weight_but_0(way_in: Take) -> None:
    aggregator = aggregator_of_users()
    weighed = [(2.0, 0), (2.0, 0.5), (5.0, 3), (1.0, np.int64(2)), (NAN, 0.0)]
    way_in(aggregator, [Metric("d", "m", value, "state mean", weight) for value, weight in weighed])
    way_in(aggregator, [Metric("d", "m", 7.0, "state mean", 0)])
    assert aggregator.get_metrics_for_logging("t") == {"t_d/m": (1 + 15 + 2) / 5.5}


def test_a_timer_is_not_refused_where_a_mean_of_your_own_takes_no_weights() -> None:
    aggregator = MetricsAggregator()
    aggregator.register_handler(MEAN, LaneRMS())
    for _ in range(3):
        with aggregator.timer("data"):
            pass
    assert aggregator.get_metrics_for_logging("t")["t/data_seconds"] > 0
