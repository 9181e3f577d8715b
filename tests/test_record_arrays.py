"""`record` of arrays whose elements each count, of masked values, and `record_all`."""

from __future__ import annotations

import functools
import gc
import importlib
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from handlers_of_users import ProductHandler, RMSHandler
from jax_devices import run_devices
from ranks import run_threads

from metricfold import LaneHandler, Metric, MetricBatch, MetricsAggregator, MetricState

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Maker:
    """Makes arrays of a framework, which is imported where the first is made."""

    module: str
    function: str

    def __call__(self, value: Any) -> Any:
        return getattr(importlib.import_module(self.module), self.function)(value)


MAKERS = {
    maker.module: maker
    for maker in (
        Maker("numpy", "asarray"),
        Maker("torch", "tensor"),
        Maker("jax.numpy", "asarray"),
    )
    if find_spec(maker.module.partition(".")[0])
}


def made_by(*makers: Maker) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with each of `makers`; with JAX's where JAX is, for here it would forbid to fork."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def placed(make: Maker, **kwargs: Any) -> None:
            if make.module == "jax.numpy":
                run_devices(test, 1, make=make, **kwargs)
            else:
                test(make=make, **kwargs)

        return pytest.mark.parametrize("make", makers, ids=lambda make: make.module)(placed)

    return decorate


every_framework = made_by(*MAKERS.values())
on_devices = made_by(*(maker for maker in MAKERS.values() if maker.module != "numpy"))


def recorded(*args: Any, **options: Any) -> dict[str, float]:
    aggregator = MetricsAggregator()
    aggregator.record("m", *args, **options)
    return aggregator.get_metrics_for_logging("t")


# -- Each element --------------------------------------------------------------------------------


@every_framework
def test_each_element_counts_as_if_it_had_been_recorded_alone(make: Any) -> None:
    values, weights = [[3.0, NAN, 5.0], [-2.0, INF, 7.5]], [[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]]
    aggregator, alone = MetricsAggregator(), MetricsAggregator()
    for name, agg in {"len": "distribution", "loss": "mean"}.items():
        aggregator.record(name, make(values), agg, weight=make(weights), dataset="d")
        aggregator.record(name, make(values), agg, weight=0.5, dataset="e", each=True)
        for row, row_weights in zip(values, weights, strict=True):
            for value, weight in zip(row, row_weights, strict=True):
                alone.record(name, value, agg, weight=weight, dataset="d")
                alone.record(name, value, agg, weight=0.5, dataset="e")
    assert str(aggregator.get_metrics_for_logging()) == str(alone.get_metrics_for_logging())


@every_framework
@pytest.mark.parametrize("agg", ["sum", "max", "distribution", "mean", "categorical_count"])
def test_an_empty_array_is_nothing(make: Any, agg: str) -> None:
    assert recorded(make(np.zeros((3, 0))), agg, each=True) == {}
    assert recorded(make(np.zeros(0)), agg, weight=make(np.zeros(0))) == {}
    assert recorded(make(np.zeros(3)), agg, each=True, weight=0) == {}


@every_framework
def test_an_array_of_one_element_is_one_value_with_each_or_without(make: Any) -> None:
    for value in (make(3.0), make([3.0]), make([[3.0]])):
        for options in ({}, {"each": True}, {"weight": make([2.0])}, {"weight": 2, "each": True}):
            assert recorded(value, **options) == {"t/m": 3.0}
    assert recorded(3.0, each=True) == {"t/m": 3.0}
    assert recorded("code", "categorical_count", each=True) == {"t/m_count_code": 1.0}


NUMPY_TYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
NARROW_TYPES = "bfloat16 float8_e4m3fn float8_e5m2"


@pytest.mark.parametrize(
    "dtype", [*NUMPY_TYPES.split(), "longdouble", *NARROW_TYPES.split(), "int4"]
)
def test_numpy_arrays_of_every_type_of_numbers_are_taken(dtype: str) -> None:
    if dtype in (*NARROW_TYPES.split(), "int4"):
        dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype))
    values = np.array([0, 1, 1, 0, 1]).astype(dtype)[::-1]
    assert recorded(values, "sum", each=True) == {"t/m": 3.0}
    assert recorded(values, "sum", weight=values) == {"t/m": 3.0}
    if dtype != "longdouble":
        assert set(recorded(values, "categorical_count", each=True).values()) == {3.0, 2.0}


@on_devices
@pytest.mark.parametrize("dtype", [*NUMPY_TYPES.split(), *NARROW_TYPES.split()])
def test_device_arrays_of_every_type_are_taken_with_others_in_one_log(
    make: Any, dtype: str
) -> None:
    torch = make.module == "torch"
    if "64" in dtype and not torch:
        pytest.skip("JAX has no 64 bits here")
    kind = getattr(importlib.import_module("torch" if torch else "jax.numpy"), dtype)
    aggregator = MetricsAggregator()
    for value in ([0, 1, 1, 0, 1], 1, [[1]], [1, 0]):
        array = make(value).to(kind) if torch else make(value).astype(kind)
        for name in ("a", "b"):
            aggregator.record(name, array, "sum", each=True)
        aggregator.record("other", make([1.5, 2.5]), "sum", each=True)
        aggregator.record("kind", array, "categorical_count", each=True)
    results = aggregator.get_metrics_for_logging("t")
    assert (results.pop("t/a"), results.pop("t/b"), results.pop("t/other")) == (6.0, 6.0, 16.0)
    one, zero = {"b": ("True", "False"), "f": ("1.0", "0.0")}.get(dtype[0], ("1", "0"))
    assert (
        results == {f"t/kind_count_{one}": 6.0, f"t/kind_count_{zero}": 3.0} or dtype == "bfloat16"
    )


@pytest.mark.parametrize("make", [np.asarray, MAKERS.get("torch", np.asarray)])
def test_an_integer_that_a_float_cannot_hold_is_refused_and_counted_right_as_a_category(
    make: Any,
) -> None:
    exact = [2**53, 2**60, -(2**62), 2**63 - 1024, 7]
    assert recorded(make(exact), "max", each=True) == {"t/m": 2.0**63 - 1024}
    aggregator = MetricsAggregator()
    aggregator.record("before", 1.0)
    with pytest.raises(  # noqa: PT012 - refused here on the host, at the log on a device
        (ValueError, RuntimeError), match=r"metric 'm': a value is an integer of more than 2\^53"
    ):
        aggregator.record("m", make([1, 2**53 + 1]), "max", each=True)
        aggregator.reduce()
    assert aggregator.get_metrics_for_logging("t") == {"t/before": 1.0}
    counted = recorded(make([2**53 + 1, 2**53]), "categorical_count", each=True)
    assert counted == {"t/m_count_9007199254740993": 1.0, "t/m_count_9007199254740992": 1.0}
    assert recorded(make(2**53 + 1), "categorical_count") == {"t/m_count_9007199254740993": 1.0}


def test_categories_may_come_in_arrays_of_texts() -> None:
    texts = np.array([["code", "prose"], ["code", "🙂"]])
    counts = {"t/m_count_code": 2.0, "t/m_count_prose": 1.0, "t/m_count_🙂": 1.0}
    assert recorded(texts, "categorical_count", each=True) == counts
    assert recorded(texts.astype(object), "categorical_count", each=True) == counts
    mask = np.array([[True, False], [False, False]])
    assert recorded(texts, "categorical_count", weight=mask) == {"t/m_count_code": 1.0}
    if "torch" in MAKERS:
        weight = MAKERS["torch"](mask)
        assert recorded(texts, "categorical_count", weight=weight) == {"t/m_count_code": 1.0}


@every_framework
def test_a_handler_without_lanes_gets_each_element_in_order(make: Any) -> None:
    class Keeper(RMSHandler):
        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            seen.append((metric.value, metric.weight))
            super().update(local_agg_metric, metric)

    seen: list[Any] = []
    aggregator = MetricsAggregator()
    aggregator.register_handler("keep", Keeper())
    aggregator.record("m", 1.0, "keep")
    aggregator.record("m", make([[2.0, 3.0], [4.0, 5.0]]), "keep", weight=make([[2, 0], [0.5, 1]]))
    aggregator.record("m", 6.0, "keep")
    aggregator.reduce()
    in_order = [(1.0, 1.0), (2.0, 2.0), (4.0, 0.5), (5.0, 1.0), (6.0, 1.0)]
    assert seen == [pair for pair in in_order for _ in ("run", "interval")]


def test_a_lane_handler_never_sees_what_does_not_count() -> None:
    class Total(LaneHandler):
        sum_lanes = ("total",)
        weighted = True

        def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
            seen.append((values.tolist(), None if weights is None else weights.tolist()))
            return (float(values.sum()),)

        def result(self, lanes: Any) -> float:
            return float(lanes["total"])

    seen: list[Any] = []
    aggregator = MetricsAggregator()
    aggregator.register_handler("total", Total())
    aggregator.record("m", np.array([1.0, 2.0, 4.0]), "total", weight=np.array([2, 0, 1]))
    aggregator.record("m", np.array([1.0, 2.0]), "total", weight=np.array([1, 0]))
    aggregator.record("m", np.array([NAN, 2.0]), "total", weight=np.array([0, 0]))
    assert seen == [([1.0, 4.0], [2.0, 1.0]), ([1.0], None)]


# -- On a device ---------------------------------------------------------------------------------


@every_framework
def test_a_window_is_in_the_order_of_arrival_wherever_arrays_lie(make: Any) -> None:
    aggregator = MetricsAggregator(dist_window_size=4)
    arrivals = [np.array([1.0, 2.0]), make([3.0, 4.0]), 5.0, np.array([6.0, 7.0]), make([[8.0]])]
    for array in arrivals:
        aggregator.record("m", array, "distribution", each=True)
    results = aggregator.get_metrics_for_logging("t")
    assert (results["t/m_stat_min"], results["t/m_stat_max"]) == (5.0, 8.0)
    assert results["t/m_stat_count"] == 4.0


@every_framework
def test_the_caller_may_reuse_arrays_and_the_graph_is_let_go(make: Any) -> None:
    values, weights = make([1.0, 3.0]), make([1.0, 3.0])
    aggregator = MetricsAggregator()
    for name, agg in (("m", "mean"), ("len", "distribution")):
        aggregator.record(name, values, agg, weight=weights)
        aggregator.record(name, np.array([2.5]), agg, weight=make([4.0]))
    if "jax" not in type(values).__module__:
        values[:] = 0
        weights[:] = 0
    results = aggregator.get_metrics_for_logging("t")
    assert results["t/m"] == 2.5
    assert (results["t/len_stat_min"], results["t/len_stat_max"]) == (1.0, 3.0)


def test_the_graph_of_an_array_is_not_retained_and_no_axis_gets_lost() -> None:
    torch = pytest.importorskip("torch")
    leaf = torch.arange(6.0, requires_grad=True)
    result = (leaf * 2).view(2, 3).t()  # not contiguous
    graph = weakref.ref(result)
    aggregator = MetricsAggregator(dist_window_size=2)
    aggregator.record("m", result, "distribution", each=True)
    aggregator.record("all", torch.ones(1, 1).expand(4, 5), "sum", each=True)
    del result
    gc.collect()
    assert graph() is None
    results = aggregator.get_metrics_for_logging("t")
    assert (results["t/m_stat_min"], results["t/m_stat_max"]) == (4.0, 10.0)  # the last row
    assert results["t/all"] == 20.0


@on_devices
def test_what_a_mark_comes_back_to_has_no_array_of_afterwards(make: Any) -> None:
    aggregator = MetricsAggregator()
    aggregator.record("m", make([1.0, 2.0]), "sum", each=True)
    mark = aggregator.mark()
    aggregator.record("m", make([4.0, 8.0]), "sum", each=True)
    aggregator.record("m", np.array([16.0]), "sum", each=True)
    aggregator.rollback(mark)
    aggregator.record("m", make([32.0, 64.0]), "sum", each=True)
    assert aggregator.get_metrics_for_logging("t") == {"t/m": 99.0}


@on_devices
def test_arrays_of_another_type_than_the_first_ranks_are_kept_beside_it(make: Any) -> None:
    """They were dropped, with a warning that counted them."""

    def train(communicator: Any) -> Any:
        aggregator = MetricsAggregator(communicator=communicator)
        if communicator.rank == 0:
            aggregator.record("m", 1.0, "sum")
        else:
            aggregator.record("m", make([[1.0, 2.0], [3.0, 4.0]]), "max", each=True)
            aggregator.record("m", 5.0, "max")
        with pytest.raises(ValueError, match="'m'"):
            aggregator.reduce()
        return aggregator.get_metrics_for_logging("t")

    assert run_threads(train, 2) == [{"t/m": 1.0, "t/m[max]": 5.0}] * 2


@every_framework
def test_arrays_of_two_ranks_are_pooled(make: Any) -> None:
    def train(communicator: Any) -> dict[str, float]:
        aggregator = MetricsAggregator(communicator=communicator)
        values = make([1.0, 2.0, 99.0]) if communicator.rank else make([7.0, 3.0, 99.0])
        for agg in ("sum", "max", "mean", "distribution"):
            aggregator.record(agg, values, agg, weight=make([True, True, False]))
        return aggregator.get_metrics_for_logging("t")

    for results in run_threads(train, 2):
        found = {key.removeprefix("t/"): value for key, value in results.items()}
        assert {name: found[name] for name in ("sum", "max", "mean")} == {
            "sum": 13.0,
            "max": 7.0,
            "mean": 3.25,
        }
        assert (found["distribution_stat_count"], found["distribution_stat_p50"]) == (4.0, 2.5)


@on_devices
def test_a_bad_weight_in_an_array_on_a_device_is_named_at_the_log(make: Any) -> None:
    aggregator = MetricsAggregator()
    aggregator.record("bad", make([1.0, 2.0]), weight=make([1.0, -0.5]))
    aggregator.record("good", make([1.0, 2.0]), weight=make([1.0, 3.0]))
    with pytest.raises(RuntimeError, match=r"'bad': the weight -0.5 is not a finite number"):
        aggregator.reduce()
    assert aggregator.get_metrics_for_logging("t") == {"t/good": 1.75}


# -- What is refused -----------------------------------------------------------------------------

ONE = "is not one value: reduce it first, such as by .mean.., or count each element: record"
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "many": ((np.ones(3),), {}, f"a NumPy array of shape .3,. {ONE}"),
    "many texts": ((np.array(["a", "b"]), "categorical_count"), {}, ONE),
    "none": ((np.ones(0),), {}, f"a NumPy array of shape .0,. {ONE}"),
    "weights for others": (
        (np.ones((2, 3)),),
        {"weight": np.ones(3)},
        r"weights of shape \(3,\) do not go with values of shape \(2, 3\): give one weight for",
    ),
    "weights for one": (
        (np.ones(1),),
        {"weight": np.ones(3)},
        r"weights of shape \(3,\) do not go",
    ),
    "a list": (([1.0, 2.0],), {}, r"the value \[1.0, 2.0\] \(list\).* np.asarray"),
    "each of a list": (([1.0],), {"each": True}, r"\[1.0\] \(list\) is no array whose"),
    "each of nothing": ((None,), {"each": True}, r"None \(NoneType\) is no array whose"),
    "a list of weights": ((np.ones(2),), {"weight": [1, 0]}, r"the weight \[1, 0\].*np.asarray"),
    "texts": ((np.array(["a", "b"]),), {"each": True}, "of type <U1 holds no real numbers"),
    "complex": ((np.ones(2) * 1j,), {"each": True}, "of type complex128 holds no real numbers"),
    "objects": ((np.array([1, None]),), {"each": True}, "of type object holds no real numbers"),
    "times": ((np.ones(2, "m8[s]"),), {"each": True}, "holds no real numbers"),
    "one time": ((np.timedelta64(5, "ns"),), {}, "is no number"),
    "bytes": ((np.array([b"a"] * 2), "categorical_count"), {"each": True}, "b'a'.*is no category"),
    "no category": ((np.array(["a", ""]), "categorical_count"), {"each": True}, "empty"),
    "a bad weight": (
        (np.ones(2),),
        {"weight": np.array([1, -1])},
        "the weight -1.0 is not a finite",
    ),
    "NaN as weight": (
        (np.ones(2),),
        {"weight": np.array([1, NAN])},
        "the weight nan is not a fini",
    ),
    "a bad weight for all": ((np.ones(2),), {"weight": -1, "each": True}, "the weight -1.0 is not"),
    "complex weights": ((np.ones(2),), {"weight": np.ones(2) * 1j}, "holds no real numbers"),
    "weights in a sum": ((np.ones(2), "sum"), {"weight": np.array([1, 2])}, "would be ignored"),
    "a weight in a sum": ((np.ones(2), "sum"), {"weight": 2, "each": True}, "would be ignored"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_array_is_refused_and_nothing_has_changed(case: str) -> None:
    arguments, options, complaint = BAD[case]
    aggregator = MetricsAggregator(on_bad_name="refuse")
    aggregator.record("before", 1.0)
    with pytest.raises((TypeError, ValueError), match=f"^metric 'm': .*{complaint}"):
        aggregator.record("m", *arguments, **options)
    aggregator.record("m", 2.0, "max")  # the name is free
    assert aggregator.get_metrics_for_logging("t") == {"t/before": 1.0, "t/m": 2.0}


@on_devices
def test_a_bad_array_on_a_device_is_refused_where_it_comes_in(make: Any) -> None:
    for arguments, options, complaint in [
        ((make([1.0, 2.0]),), {}, ONE),
        ((make([1.0, 2.0]),), {"weight": make([1.0, 2.0, 3.0])}, "weights of shape"),
        ((make([1.0, 2.0]),), {"weight": np.array([1.0, -1.0])}, "the weight -1.0"),
        ((make([1.0, 2.0]), "sum"), {"weight": np.array([1.0, 0.5])}, "would be ignored"),
        ((np.array(["a", "b"]),), {"weight": make([1.0, 2.0])}, "holds no real numbers"),
        ((np.array(["a", ""]), "categorical_count"), {"weight": make([1.0, 0.0])}, "is empty"),
        ((make([1j, 2j]),), {"each": True}, "complex"),
    ]:
        aggregator = MetricsAggregator(on_bad_name="refuse")
        with pytest.raises((TypeError, ValueError), match=f"^metric 'm': .*{complaint}"):
            aggregator.record("m", *arguments, **options)
        assert aggregator.get_metrics_for_logging("t") == {}


def test_what_numpy_or_torch_can_make_an_array_of_is_told_so() -> None:
    class Series:
        """As of pandas."""

        shape = (2,)

        def __array__(self, *_: Any, **__: Any) -> Any:
            return np.ones(2)

    for options in ({}, {"each": True}, {"weight": np.ones(2)}):
        with pytest.raises(TypeError, match=r"metric 'm'.*Series.*np.asarray\(...\)"):
            recorded(Series(), **options)
    with pytest.raises(TypeError, match=r"the weight .*Series.*np.asarray\(...\)"):
        recorded(np.ones(2), weight=Series())
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="metric 'm': the array cannot be taken as a value"):
        recorded(torch.ones(3).to_sparse(), each=True)


# -- From public reports -------------------------------------------------------------------------


def test_a_batch_of_padding_alone_changes_no_mean() -> None:
    """tracel-ai/burn#5577, torchrec#283: 0 / 0 of a batch without targets was weighed by its size."""
    aggregator = MetricsAggregator()
    for correct, valid in ((1, 1), (0, 10), (0, 0)):
        accuracy = np.float64(correct) / valid if valid else NAN
        aggregator.record("accuracy", accuracy, weight=valid)
    assert aggregator.get_metrics_for_logging("t") == {"t/accuracy": 1 / 11}


@every_framework
def test_a_nan_among_values_with_weights_is_left_out_with_its_weight(make: Any) -> None:
    """torchmetrics#1897, #3434: values and weights lost their NaN each on their own."""
    aggregator = MetricsAggregator(on_nan="skip")
    aggregator.record("m", make([1.0, NAN, 4.0]), weight=make([1.0, 5.0, 2.0]))
    assert aggregator.get_metrics_for_logging("t") == {"t/m": 3.0, "t/m_nan_count": 1.0}


@every_framework
def test_an_array_of_zeros_counts(make: Any) -> None:
    """torchmetrics#1063: zeros were taken for an empty array."""
    for agg in ("max", "min", "mean", "sum"):
        assert recorded(make([0.0, 0.0]), agg, each=True) == {"t/m": 0.0}
    assert recorded(make([0, 0]), "categorical_count", each=True) == {"t/m_count_0": 2.0}


@every_framework
def test_a_nan_under_the_mask_does_not_poison_the_mean(make: Any) -> None:
    """verl#6349, WeatherGenerator#2723: NaN * 0 is NaN."""
    losses, mask = make([[1.0, NAN], [3.0, INF]]), make([[True, False], [True, False]])
    for agg, wanted in {"mean": 2.0, "sum": 4.0, "max": 3.0}.items():
        assert recorded(losses, agg, weight=mask) == {"t/m": wanted}
    losses = make([[1.0, NAN], [3.0, 5.0]])
    assert str(recorded(losses, weight=make([[1.0, 1.0], [1.0, 0.0]]))) == "{'t/m': nan}"


@every_framework
def test_an_empty_batch_leaves_a_mean_as_it_was(make: Any) -> None:
    """tensorflow#61281: it was NaN from then on."""
    aggregator = MetricsAggregator()
    for values in ([1.0, 3.0], [], [5.0, 7.0]):
        aggregator.record("m", make(np.array(values)), each=True)
    assert aggregator.get_metrics_for_logging("t") == {"t/m": 4.0}


# -- Masked --------------------------------------------------------------------------------------


@pytest.mark.parametrize("agg", ["mean", "sum", "distribution", "categorical_count", "state"])
@pytest.mark.parametrize(
    "value",
    [
        np.ma.masked,
        np.ma.array([5.0, 7.0], mask=True).mean(),
        np.ma.array(5.0, mask=True),
        np.ma.array([9.0], mask=[True]),
    ],
    ids=["masked", "mean of nothing", "without axes", "one element"],
)
def test_what_is_masked_is_refused_whichever_way_it_comes(value: Any, agg: str) -> None:
    """0.1.0 took it for 0.0, or for the number under the mask."""
    aggregator = MetricsAggregator()
    aggregator.register_handler("state", ProductHandler())
    words = r"metric 'm'.*: what is masked has no value: leave the metric out"
    with pytest.raises(ValueError, match=words):
        aggregator.record("m", value, agg)
    with pytest.raises(ValueError, match=words):
        aggregator.record("m", 2, agg, weight=value)
    with pytest.raises(ValueError, match=words):
        aggregator.record_all({"other": 1.0, "m": value}, agg)
    with pytest.raises(ValueError, match=words):
        aggregator.update([Metric("d", "m", 1.0, agg), Metric("d", "m", value, agg)])
    with pytest.raises(ValueError, match=words):
        MetricBatch.from_metrics([Metric("d", "m", value, agg)])
    assert aggregator.get_metrics_for_logging("t") == {}


def test_masked_elements_do_not_count() -> None:
    values = np.ma.array([[1.0, NAN], [3.0, 99.0]], mask=[[False, True], [False, True]])
    assert recorded(values, each=True) == {"t/m": 2.0}
    assert recorded(values, weight=np.array([[3, 1], [1, 0]])) == {"t/m": 1.5}
    assert recorded(values, "max", each=True) == {"t/m": 3.0}
    assert recorded(values[:, 1], each=True) == {}
    assert recorded(np.ma.array([7.0], mask=[False])) == {"t/m": 7.0}
    assert recorded(np.ma.array([7.0, 8.0]), each=True) == {"t/m": 7.5}
    plain = np.array([1.0, 3.0, 5.0])
    weights = np.ma.array([1.0, -1.0, 3.0], mask=[False, True, False])
    assert recorded(plain, weight=weights) == {"t/m": 4.0}
    assert recorded(plain, weight=weights) == {"t/m": np.ma.average(plain, weights=weights)}
    texts = np.ma.array(["a", "", "b"], mask=[False, True, False])
    assert recorded(texts, "categorical_count", each=True) == {
        "t/m_count_a": 1.0,
        "t/m_count_b": 1.0,
    }


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("which", ["values", "weights"])
def test_a_mask_means_in_an_array_of_one_element_what_it_does_in_larger_ones(
    which: str, each: bool
) -> None:
    # A last batch of one sample, all of it padding, was refused.
    aggregator = MetricsAggregator()
    for size in (1, 2):
        masked = np.ma.MaskedArray(np.full(size, 5.0), mask=[True] * size)
        values, weights = (masked, np.ones(size)) if which == "values" else (np.ones(size), masked)
        aggregator.record("m", values, weight=weights, each=each)
    assert aggregator.get_metrics_for_logging() == {}


@on_devices
def test_the_weight_of_what_is_masked_is_not_looked_at(make: Any) -> None:
    """numpy/numpy#20375: a NaN among the weights made all of it NaN; here it was refused."""
    values = np.ma.array([1.0, 2.0, 3.0, 4.0], mask=[False, False, True, True])
    for weight in (np.array([1.0, 3.0, NAN, -1.0]), make([1.0, 3.0, INF, NAN])):
        assert recorded(values, weight=weight) == {"t/m": 1.75}
    with pytest.raises(ValueError, match="the weight nan is not a finite number"):
        recorded(values, weight=np.array([NAN, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ([1, 2, 3], [1, 0, 1]),
        ([1, 2, 3, 4], [1, 0, 1, 0]),
        ([1, 2, 3, 4, 5], [0, 1, 2, 1, 0]),
        ([0, 1, 2], [0, 0, 1]),
    ],
)
def test_percentiles_are_as_if_what_has_weight_0_were_not_there(
    values: list[int], weights: list[int]
) -> None:
    """numpy/numpy#27549, scikit-learn#33127, Hmisc#81, StatsBase.jl#313: in none of them they were."""
    percentiles = (0, 25, 50, 75, 100)
    aggregator = MetricsAggregator(percentiles=percentiles)
    aggregator.record("m", np.array(values), "distribution", weight=np.array(weights))
    logged = aggregator.get_metrics_for_logging("t")
    found = [logged[f"t/m_stat_p{percentile:02d}"] for percentile in percentiles]
    assert found == np.percentile(np.repeat(values, weights), percentiles).tolist()


def test_masks_here_and_weights_on_a_device_go_together() -> None:
    torch = pytest.importorskip("torch")
    values = np.ma.array([1.0, 99.0, 5.0, 9.0], mask=[False, True, False, False])
    weight = torch.tensor([1.0, 1.0, 3.0, 0.0])
    assert recorded(values, weight=weight) == {"t/m": 4.0}
    assert recorded(
        torch.tensor(values.data), weight=np.ma.array(weight.numpy(), mask=values.mask)
    ) == {"t/m": 4.0}


# -- Several metrics of a step -------------------------------------------------------------------


def test_several_metrics_are_taken_in_with_one_type_or_one_each() -> None:
    aggregator = MetricsAggregator()
    types = {"loss": "mean", "norm": "max", "tokens": "sum", "kind": "categorical_count"}
    for loss, weight in ((2.0, 3), (4.0, 1), (NAN, 0)):
        step = {"loss": loss, "norm": loss, "tokens": 8, "kind": "code"}
        aggregator.record_all(step, types, dataset="d", weight=weight)
    aggregator.record_all({"a": 1.0, "b": np.float32(2)})
    aggregator.record_all({})
    assert aggregator.get_metrics_for_logging("t") == {
        "t/a": 1.0,
        "t/b": 2.0,
        "t_d/loss": 2.5,
        "t_d/norm": 4.0,
        "t_d/tokens": 16.0,
        "t_d/kind_count_code": 2.0,
    }


@on_devices
def test_several_metrics_and_their_weight_may_lie_on_a_device(make: Any) -> None:
    aggregator = MetricsAggregator()
    for loss, weight in ((2.0, 3.0), (4.0, 1.0), (NAN, 0.0)):
        step = {"loss": make(loss), "norm": make([loss])}
        aggregator.record_all(step, {"loss": "mean", "norm": "max"}, weight=make(weight))
    assert aggregator.get_metrics_for_logging("t") == {"t/loss": 2.5, "t/norm": 4.0}


@pytest.mark.parametrize(
    ("metrics", "options", "complaint"),
    [
        ({"a": 1.0, "b": "text"}, {}, "metric 'b': the value 'text'"),
        ({"a": 1.0, "b": np.ones(2)}, {}, "metric 'b': a NumPy array of shape"),
        ({"a": 1.0, "b": {"c": 1.0}}, {}, "metric 'b': the value .* give each of its numbers"),
        ({"a": 1.0, "": 1.0}, {}, "the name of a metric is empty"),
        ({"a": 1.0, 3: 1.0}, {}, "the name of a metric must be a string"),
        ({"a": 1.0, "known": 1.0}, {}, "metric 'known' is already registered with .* sum,"),
        (
            {"a": 1.0, "b": 1.0},
            {"agg": {"a": "sum"}},
            "metric 'b' has no aggregation: agg= has 'a'",
        ),
        ({"a": 1.0, "b": 1.0}, {"agg": {"a": "sum", "b": "median"}}, "metric 'b'.*'median'"),
        ({"a": 1.0}, {"agg": None}, "metric 'a': None is not an aggregation type"),
        ({"a": 1.0}, {"dataset": ""}, "the dataset of the metrics is empty"),
        ({"a": 1.0, "b": 2}, {"weight": -1, "agg": {"a": "mean", "b": "sum"}}, "the weight -1"),
        ({"a": 1.0, "own": 2}, {"agg": {"a": "mean", "own": "state"}}, "halfway"),
        ([("a", 1.0)], {}, "takes the values by name, as in .'loss': loss., not list"),
    ],
    ids=str,
)
def test_of_several_metrics_none_is_taken_if_one_cannot_be(
    metrics: Any, options: Any, complaint: str
) -> None:
    class Halfway(RMSHandler):
        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            raise ValueError("a bad value, found halfway")

    aggregator = MetricsAggregator()
    aggregator.register_handler("state", Halfway())
    aggregator.record("known", 1.0, "sum")
    with pytest.raises((TypeError, ValueError), match=complaint):
        aggregator.record_all(metrics, **options)
    assert aggregator.get_metrics_for_logging("t") == {"t/known": 1.0}
    aggregator.record("a", 2.0, "max")  # the name is free
