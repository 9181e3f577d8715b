"""What an accumulator takes in: types, numbers of the host, containers, masks, under any configuration."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
from accumulated import logged
from jax_devices import on_devices
from test_jax_configurations import FLOAT8, TYPES, configurations

KINDS = {"mean": "mean", "sum": "sum", "max": "max", "min": "min", "len": "distribution"}


@on_devices(1)
def test_accumulators_say_the_same_under_any_configuration() -> None:
    """debug_infs found the -inf of an extremum that has seen nothing; guards found constants."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    kinds = {"sum": "sum", "top": "max"}
    x, w = jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([1, 0], jnp.int32)
    ids, five = jnp.array([0, 1], jnp.int32), nnx.Variable(jnp.float32(5))

    @jax.jit
    def step(acc: Any, x: Any, w: Any, ids: Any) -> Any:
        other = acc.empty().update_all(
            dict.fromkeys(acc.layout.names, x), weights=w, dataset_ids=ids
        )
        return acc.merge(other)

    for name, configuration in configurations().items():
        # One operation at a time compiles hundreds.
        metrics = kinds if name == "jit disabled" else kinds | {"len": "distribution"}
        with configuration():
            aggregator = MetricsAggregator()
            acc = aggregator.drain(step(DeviceAccumulator(metrics, ("a", "b")), x, w, ids))
            acc = acc.update("sum", np.float64(1), dataset_ids=0)
            acc = acc.update("sum", five, weights=True, dataset_ids=np.int64(0))
            aggregator.drain(acc)
            found = aggregator.get_metrics_for_logging("t")
        assert (found["t_a/sum"], found["t_a/top"]) == (10.0, 3.0), name
        assert found.get("t_a/len_stat_mean", 2.0) == 2.0, name
        assert not any(key.startswith("t_b") for key in found), name


@on_devices(1)
def test_narrow_types_are_taken_as_the_numbers_that_they_are() -> None:
    import jax
    import jax.numpy as jnp

    from metricfold.jax import DeviceAccumulator

    arrays = {name: jnp.array([1, 0, 1]).astype(name) for name in (*TYPES, FLOAT8)}
    acc = DeviceAccumulator(dict.fromkeys(arrays, "sum") | {"top": "max"})
    acc = jax.jit(lambda acc, arrays: acc.update_all(arrays))(acc, arrays)
    weighted = jax.jit(lambda acc, w: acc.update("top", jnp.array([1.0, 9.0, 2.0]), weights=w))
    for array in arrays.values():
        acc = weighted(acc, array)
    found = logged(acc)
    assert found.pop("t/top") == 2.0
    assert found == {f"t/{name}": 2.0 for name in arrays}


@on_devices(1)
def test_large_integers_are_exact_or_refused() -> None:
    """MAX and MIN rounded them to float32; the advice for others was to give a float."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"sum": "sum", "max": "max", "min": "min", "mean": "mean"}, ("a", "b"))

    def folded(x: Any, ids: Any = 0) -> dict[str, float]:
        return logged(acc.update_all(dict.fromkeys(acc.layout.names, x), dataset_ids=ids))

    for most in (2**24 + 1, 2**31 - 1, 2**31 + 1, 2**40 + 12345, 2**48 - 1, -(2**33) - 7):
        found = folded(most)
        assert found == {f"t_a/{name}": most for name in acc.layout.names}
        found = folded(np.array([most, 0, -most]))
        assert (found["t_a/max"], found["t_a/min"], found["t_a/sum"]) == (abs(most), -abs(most), 0)
    int32 = jnp.array([2**24 + 1, 2**24 + 2, 2**24, -(2**31), 2**31 - 1, 2**31 - 2], jnp.int32)
    found = folded(int32, jnp.array([0, 0, 0, 1, 1, 1]))
    assert (found["t_a/max"], found["t_a/min"]) == (2**24 + 2, 2**24)
    assert (found["t_b/max"], found["t_b/min"], found["t_b/sum"]) == (
        2**31 - 1,
        -(2**31),
        2**31 - 3,
    )
    uint32 = jnp.array([2**32 - 1, 2**32 - 2], jnp.uint32)
    assert folded(uint32)["t_a/sum"] == 2**33 - 3
    # Brought together from devices, too.
    both = jax.vmap(lambda x: acc.update("max", x, dataset_ids=0).reduce("i"), axis_name="i")(
        int32[:4]
    )
    assert logged(jax.tree.map(lambda a: a[0], both)) == {"t_a/max": 2**24 + 2}
    for wrong in (2**53 + 1, 2**60 + 1, 10**400, np.array([1, 2**52 + 2**26 + 1])):
        with pytest.raises(ValueError, match=r"more than the 48 bits.*record\(\) it"):
            acc.update("sum", wrong, dataset_ids=0)
    # A weight is a float32, and one that is none is not rounded to another.
    weighted = acc.update("mean", 3.0, weights=jnp.int32(2**24 + 1), dataset_ids=0)
    assert np.asarray(weighted.refused)[3].tolist() == [0, 1, 0]
    weighted = acc.update("mean", 3.0, weights=jnp.int32(2**25), dataset_ids=0)
    assert logged(weighted) == {"t_a/mean": 3.0}

    with jax.enable_x64(True):
        int64 = jnp.array([2**53 + 1, 2**40 + 1, -(2**47) - 1, 2**62])
        assert int64.dtype == jnp.int64
        wide = jax.jit(lambda acc, x: acc.update("sum", x, dataset_ids=0))(acc, int64)
        assert np.asarray(wide.refused)[0].tolist() == [0, 0, 1]
        assert logged(wide) == {"t_a/sum": 2**62 + 2**40 - 2**47}
        assert folded(2**40 + 12345)["t_a/max"] == 2**40 + 12345
        with pytest.raises(ValueError, match="48 bits"):
            acc.update("sum", 2**53 + 1, dataset_ids=0)
        uint64 = jnp.array([2**64 - 1, 2**63, 2**40 + 1], jnp.uint64)
        wide = acc.update("max", uint64, dataset_ids=0)
        assert np.asarray(wide.refused)[1].tolist() == [0, 0, 1]
        assert logged(wide) == {"t_a/max": 2.0**63}


@on_devices(1)
def test_large_whole_weights_of_the_host_are_rounded_with_and_without_64_bits() -> None:
    """With 64 bits they were left out, with a warning."""
    import jax
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"mean": "mean"})
    for configuration in (jax.enable_x64(False), jax.enable_x64(True)):
        with configuration:
            weights = np.array([2**31 + 1, 2**31 + 1], np.int64)
            held = acc.update("mean", np.array([1.0, 3.0]), weights=weights)
            assert not np.asarray(held.refused).any()
            assert logged(held) == {"t/mean": 2.0}


@on_devices(1)
def test_numbers_of_the_host_keep_48_bits() -> None:
    """A float64 of the host became a float32."""
    import jax
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"sum": "sum", "max": "max", "mean": "mean"})
    for configuration in (jax.enable_x64(False), jax.enable_x64(True)):
        with configuration:
            for value in (0.1, np.float64(1 / 3), np.float64([0.1, 0.7]), np.longdouble("0.1")):
                found = logged(acc.update_all(dict.fromkeys(acc.layout.names, value)))
                exact = np.asarray(value, np.float64)
                assert found["t/sum"] == pytest.approx(exact.sum(), rel=1e-14)
                assert found["t/mean"] == pytest.approx(exact.mean(), rel=1e-14)
                assert found["t/max"] == pytest.approx(exact.max(), rel=1e-14)
            assert logged(acc.update("sum", 1e300))["t/sum"] == np.inf
            for wrong in (
                "text",
                b"x",
                np.array(["x"]),
                None,
                1j,
                np.datetime64(1, "s"),
                np.array([2, "1"], object),
            ):
                with pytest.raises(TypeError):
                    acc.update("sum", wrong)


class Losses(NamedTuple):
    loss: Any
    accuracy: Any


@on_devices(1)
def test_metrics_and_weights_may_be_of_any_containers() -> None:
    import jax.numpy as jnp
    from flax import struct
    from flax.core import FrozenDict

    from metricfold.jax import DeviceAccumulator

    @struct.dataclass
    class Struct:
        loss: Any
        accuracy: Any

    acc = DeviceAccumulator({"loss": "mean", "accuracy": "mean"})
    x, y = jnp.array([1.0, 3.0]), jnp.array([[1.0, 0.0], [0.0, 0.0]])
    v, w = jnp.array([1.0, 0.0]), jnp.array([[1, 1], [0, 0]])
    ways = (
        lambda a, b: {"loss": a, "accuracy": b},
        lambda a, b: FrozenDict({"accuracy": b, "loss": a}),
        Losses,
        Struct,
    )
    for metrics in ways:
        assert logged(acc.update_all(metrics(x, y), weights=v)) == {
            "t/loss": 1.0,
            "t/accuracy": 0.5,
        }
        for weights in ways:
            found = logged(acc.update_all(metrics(x, y), weights=weights(v, w)))
            assert found == {"t/loss": 1.0, "t/accuracy": 0.5}
    assert logged(DeviceAccumulator({"l": "mean"}, ("a", "b")).update_all({})) == {}
    for error, complaint, values, weights in (
        (ValueError, "'loss' has no weights", ways[0](x, y), {"accuracy": w}),
        (TypeError, r"values\[0\]\[0\] is not the values of one metric", [[x], y], None),
        (TypeError, r"values\['loss'\]\['a'\] is not", Losses({"a": x}, y), None),
        (ValueError, "no metric 0", [x, y], None),
    ):
        with pytest.raises(error, match=complaint):
            acc.update_all(values, weights=weights)


@on_devices(1)
def test_weights_and_datasets_broadcast_to_the_values() -> None:
    import jax.numpy as jnp
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    x = jnp.arange(1.0, 7.0).reshape(2, 3)
    acc = DeviceAccumulator({"n": "sum"}, ("a", "b"))
    zeros = np.zeros(2, np.int32)
    for mask, total in (
        ([1, 0], 6.0),
        ([[1], [0]], 6.0),
        ([1, 0, 0], 5.0),
        ([[1, 0, 0]], 5.0),
        ([[1, 0, 0], [0, 1, 0]], 6.0),
        (1, 21.0),
        ([1], 21.0),
    ):
        found = logged(acc.update("n", x, weights=np.array(mask), dataset_ids=zeros))
        assert found == {"t_a/n": total}
    for ids in ([0, 1, 1], [[0, 1, 1]], [[0, 1, 1], [0, 1, 1]]):
        assert logged(acc.update("n", x, dataset_ids=np.array(ids))) == {
            "t_a/n": 5.0,
            "t_b/n": 16.0,
        }
    # Of as many tokens as samples, one per sample is meant.
    square = acc.update("n", jnp.array([[1.0, 2.0], [4.0, 8.0]]), dataset_ids=np.array([0, 1]))
    assert logged(square) == {"t_a/n": 3.0, "t_b/n": 12.0}
    for wrong in (np.ones(4), np.ones((2, 2)), np.ones((1, 2, 3)), np.ones((3, 1))):
        with pytest.raises(ValueError, match="NumPy broadcasts"):
            acc.update("n", x, weights=wrong, dataset_ids=zeros)


@on_devices(1)
def test_what_weighs_nothing_contributes_nothing() -> None:
    import jax.numpy as jnp
    import numpy as np

    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator(KINDS)
    x = jnp.array([np.nan, np.inf, -np.inf, 2.0, 1e38, -1e-45])
    for dtype in (np.float32, np.int32, bool):
        masked = acc.update_all(
            dict.fromkeys(KINDS, x), weights=np.array([0, 0, 0, 1, 0, 0], dtype)
        )
        found = logged(masked)
        assert (found["t/mean"], found["t/sum"], found["t/max"], found["t/min"]) == (2.0,) * 4
        assert (found["t/len_stat_count"], found["t/len_stat_max"]) == (1, 2.0)
        assert not any("nan" in name or "inf" in name for name in found)
        assert logged(acc.update_all(dict.fromkeys(KINDS, x), weights=np.zeros(6, dtype))) == {}


@on_devices(1)
def test_an_accumulator_travels_as_flax_jax_and_python_write_it() -> None:
    import copy
    import pickle

    import flax.serialization
    import jax
    import jax.numpy as jnp

    from metricfold._core.device.rows import Layout
    from metricfold.jax import DeviceAccumulator

    def new(*datasets: str) -> Any:
        return DeviceAccumulator({"l": "mean", "len": "distribution"}, datasets)

    x, ids = jnp.array([1.0, 2.0, 6.0]), jnp.array([0, 1, 1])
    acc = new("a", "b").update_all({"l": x, "len": x}, dataset_ids=ids)
    want = logged(acc)
    for again in (pickle.loads(pickle.dumps(acc)), copy.deepcopy(acc), copy.copy(acc)):
        assert logged(again) == want
    written = flax.serialization.to_bytes({"acc": acc, "step": 3})
    read = flax.serialization.from_bytes({"acc": new("a", "b"), "step": 0}, written)
    assert isinstance(read["acc"], DeviceAccumulator)
    assert logged(read["acc"]) == want
    state = flax.serialization.to_state_dict(acc)
    assert logged(flax.serialization.from_state_dict(new("a", "b"), state)) == want
    with pytest.raises(ValueError, match="in another order"):
        flax.serialization.from_bytes({"acc": new("b", "a"), "step": 0}, written)
    old = dict.fromkeys(("counts", "sums", "extrema", "refused"), state["lanes"])
    with pytest.raises(ValueError, match="from_0_1"):
        flax.serialization.from_state_dict(new("a", "b"), old)
    with pytest.raises(ValueError, match="no arrays of an accumulator"):
        flax.serialization.from_state_dict(new("a", "b"), {"lanes": state["lanes"]})

    step = jax.jit(lambda acc, x: acc.update("l", x, dataset_ids=0))
    exported = jax.export.export(step)(acc, x)
    if find_spec("flatbuffers"):  # which JAX writes with
        exported = jax.export.deserialize(exported.serialize())
    assert logged(exported.call(acc, x)) == logged(step(acc, x))
    assert Layout.from_json(acc.layout.as_json()) == acc.layout
