"""Reductions over devices agree with NumPy over the gathered inputs, however they are run."""

from __future__ import annotations

import pytest
from jax_devices import on_devices

FLOATS = ("float32", "bfloat16", "float16")
INTEGERS = ("int8", "int32", "uint8", "uint32")
DTYPES = (*FLOATS, *INTEGERS, "bool")


def inputs_of(dtype, devices):
    """Return a scalar and a matrix per device: values that a narrow sum cannot hold."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(devices)
    shapes = {"scalar": (), "matrix": (2, 3)}
    if dtype == "bool":
        return {name: rng.random((devices, *shape)) < 0.5 for name, shape in shapes.items()}
    if dtype in FLOATS:
        top = float(jnp.finfo(dtype).max) if dtype == "float16" else 1e4
        return {
            name: rng.uniform(-top, top, (devices, *shape)).astype(jnp.dtype(dtype))
            for name, shape in shapes.items()
        }
    info = np.iinfo(dtype)
    low, high = max(info.min, -(2**28) + 1), min(info.max, 2**28 - 1)
    found = {
        name: rng.integers(low, high, (devices, *shape), dtype, endpoint=True)
        for name, shape in shapes.items()
    }
    if info.bits < 32:
        found["matrix"][0] = info.min  # whose negative its type does not hold
        found["matrix"][1] = info.max
    return found


def numpy_result(op, x):
    """Return what NumPy makes of all devices' values, in the type that a reduction gives back."""
    import jax.numpy as jnp
    import numpy as np

    if op in ("max", "min"):
        # bfloat16 is a stranger to NumPy's extrema of NaN; every value of it is a float32.
        wide = x.astype(np.float32) if x.dtype == jnp.bfloat16 else x
        return getattr(np, op)(wide, axis=0).astype(x.dtype)
    exact = x.astype(np.float64)
    if op == "mean":
        return exact.mean(axis=0).astype(np.float32)
    if x.dtype.kind in "biu":
        return x.sum(axis=0, dtype=np.uint32 if x.dtype.kind == "u" else np.int32)
    return exact.sum(axis=0).astype(np.float32)


def agree(found, expected, magnitude):
    """Integers and extrema agree exactly; float sums within rounding of the sum of magnitudes."""
    import numpy as np

    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if found.dtype != np.float32:
        np.testing.assert_array_equal(found, expected)
        return
    assert (np.isnan(found) == np.isnan(expected)).all()
    ok = np.isclose(found, expected, rtol=0, atol=4 * 2.0**-24 * np.nan_to_num(magnitude))
    assert (ok | np.isnan(found)).all(), (found, expected)


def reduce_by(op, metrics):
    from metricfold.jax import DistributedMetrics

    return getattr(DistributedMetrics, f"reduce_{op}_static")(metrics)


OPS = ("mean", "sum", "max", "min")


@on_devices(4, 8)
def test_all_ops_agree_with_numpy_for_all_types_in_all_ways(devices) -> None:
    import numpy as np
    from jax_ways import ways

    inputs = {dtype: inputs_of(dtype, devices) for dtype in DTYPES}
    of_8 = ("bare pmap", "vmap", "shard_map, Auto, check_vma=True")
    for way, run in ways().items():
        if devices == 8 and way not in of_8:
            continue
        results = run(lambda metrics: {op: reduce_by(op, metrics) for op in OPS}, inputs)
        for op in OPS:
            for dtype, of_dtype in inputs.items():
                for name, x in of_dtype.items():
                    magnitude = np.abs(x.astype(np.float64)).sum(axis=0)
                    found = results[op][dtype][name]
                    try:
                        agree(found, numpy_result(op, x), magnitude)
                    except AssertionError as error:
                        raise AssertionError((way, op, dtype, name)) from error


@on_devices(4, 8)
def test_a_nan_on_any_device_is_the_result_on_all(devices) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    def step(x):
        metrics = {dtype: x.astype(dtype) for dtype in FLOATS}
        return {op: reduce_by(op, metrics) for op in OPS}

    step = jax.pmap(step)
    for at in range(devices):
        for nan in (np.nan, -np.nan):
            x = np.arange(-2.0, devices - 2.0, dtype=np.float32)[:, None] * np.ones(3, np.float32)
            x[at, 1] = nan
            x[at - 1, 2] = np.inf
            for op, by_dtype in step(x).items():
                with np.errstate(invalid="ignore"):
                    expected = numpy_result(op, x)
                for dtype, found in by_dtype.items():
                    for row in np.asarray(found.astype(jnp.float32)):
                        np.testing.assert_array_equal(row, expected, f"{op} {dtype} {at}")


@on_devices(4)
def test_extrema_of_floats_are_exact_from_subnormal_to_infinite() -> None:
    import jax
    import numpy as np

    tiny = np.float32(1e-45)
    edges = np.float32([-np.inf, -3e38, -1.0, -tiny, -0.0, 0.0, tiny, 1e-38, 1.0, 3e38, np.inf])
    rng = np.random.default_rng(0)
    x = rng.choice(edges, (4, 1000))
    extrema = jax.pmap(lambda x: (reduce_by("max", {"x": x}), reduce_by("min", {"x": x})))
    # Taken apart on the host: JAX's own indexing of a split array would add up, and flush.
    largest, smallest = jax.device_get(extrema(x))
    assert np.array_equal(largest["x"], [x.max(axis=0)] * 4)
    assert np.array_equal(smallest["x"], [x.min(axis=0)] * 4)
    largest, smallest = jax.device_get(extrema(np.float32([[0.0], [-0.0], [0.0], [-0.0]])))
    assert not np.signbit(largest["x"]).any()
    assert np.signbit(smallest["x"]).all()


@on_devices(4)
def test_python_and_numpy_numbers_count_once_per_device() -> None:
    import ml_dtypes
    import numpy as np
    from jax_ways import ways

    numbers = {
        "int": 3,
        "float": 0.5,
        "bool": True,
        "float16": np.float16(60_000),
        "bfloat16": ml_dtypes.bfloat16(256),
        "float64": np.float64(0.25),
        "int8": np.int8(-128),
        "int64": np.int64(7),
        "array": np.array([1, 2], np.int32),
        "0-d": np.array(2.5, np.float32),
        "nan": float("nan"),
    }
    for way, run in ways().items():
        results = run(lambda _: {op: reduce_by(op, numbers) for op in OPS}, np.zeros(4, np.float32))
        for name, number in numbers.items():
            as_float = np.asarray(number).astype(np.float64)
            for op in OPS:
                expected = as_float * 4 if op == "sum" else as_float
                np.testing.assert_array_equal(
                    results[op][name].astype(np.float64), expected, f"{way} {op} {name}"
                )
        assert results["sum"]["int"].dtype == np.int32
        assert results["mean"]["int"].dtype == np.float32
        assert results["max"]["float16"].dtype == np.float16


@on_devices(4)
def test_numbers_reduce_as_lax_reduces_them() -> None:
    import jax
    import numpy as np
    from jax import lax

    def step(x):
        return (
            reduce_by("sum", {"n": 3, "f": 0.5, "x": x}),
            {"n": lax.psum(3, "batch"), "f": lax.psum(0.5, "batch"), "x": lax.psum(x, "batch")},
            reduce_by("mean", {"n": 3, "f": 0.5, "x": x}),
            {"n": lax.pmean(3, "batch"), "f": lax.pmean(0.5, "batch"), "x": lax.pmean(x, "batch")},
        )

    results = jax.pmap(step, axis_name="batch")(np.float32([0.1, 0.2, 0.3, 1e-3]))
    ours, theirs, our_mean, their_mean = jax.device_get(results)
    for mine, lax_gives in ((ours, theirs), (our_mean, their_mean)):
        for name in ("n", "f", "x"):
            assert mine[name].tolist() == lax_gives[name].tolist()


@on_devices(4)
def test_metrics_of_all_kinds_nest_and_keep_their_shape() -> None:
    import jax
    import numpy as np

    def step(x):
        metrics = {
            "train": {"loss": x, "inner": {"count": 2, "hits": x > 1}},
            "pair": (x, [x * 2]),
            "none in here": {},
        }
        return reduce_by("sum", metrics)

    result = jax.device_get(jax.pmap(step)(np.arange(4.0, dtype=np.float32)))
    assert list(result) == ["none in here", "pair", "train"]
    assert result["train"]["loss"].tolist() == [6.0] * 4
    assert result["train"]["inner"]["count"].tolist() == [8] * 4
    assert result["train"]["inner"]["hits"].tolist() == [2] * 4
    assert result["pair"][0].tolist() == [6.0] * 4
    assert result["pair"][1][0].tolist() == [12.0] * 4
    assert jax.pmap(lambda x: reduce_by("mean", {}))(np.zeros(4)) == {}


@on_devices(4)
def test_custom_ops_by_name() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.float32([1, 2, 3, 6])

    def run(reduce_fn):
        def step(x):
            metrics = {"a": x, "b": x, "in": {"c": x, "d": x}}
            return dm.reduce_custom(metrics, reduce_fn)

        result = jax.device_get(jax.pmap(step)(x))
        return [result["a"], result["b"], result["in"]["c"], result["in"]["d"]]

    mean, total = [3.0] * 4, [12.0] * 4
    for absent in (None, {}, {"elsewhere": "sum"}, {"in": {"elsewhere": "max"}}):
        assert [m.tolist() for m in run(absent)] == [mean] * 4
    assert [m.tolist() for m in run({"a": "sum", "in": {"d": "max"}, "b": None})] == [
        total,
        x.tolist(),
        mean,
        [6.0] * 4,
    ]
    assert [m.tolist() for m in run({"in": "min", "b": "mean"})] == [
        mean,
        mean,
        [1.0] * 4,
        [1.0] * 4,
    ]
    assert [m.tolist() for m in run({"in": None})] == [mean, mean, x.tolist(), x.tolist()]

    def step_with_text(x):
        kept = dm.reduce_custom({"x": x, "text": "a", "none": None}, {"text": None, "none": None})
        assert kept["text"] == "a"
        assert kept["none"] is None
        return kept["x"]

    assert jax.pmap(step_with_text)(x).tolist() == mean


@on_devices(4)
def test_weighted_means_are_those_of_all_samples() -> None:
    import jax
    import numpy as np
    from jax_ways import ways

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    # Uneven batches, padded: the mean of all real samples, which a mean of means is not.
    rng = np.random.default_rng(0)
    sizes = [5, 1, 0, 3]
    samples = [rng.normal(size=n) for n in sizes]
    means = np.float32([x.mean() if len(x) else np.nan for x in samples])
    counts = np.int32(sizes)
    every = np.concatenate(samples).mean()
    for run in ways().values():
        found = run(lambda a: dm.reduce_mean({"loss": a[0]}, weights=a[1]), (means, counts))
        np.testing.assert_allclose(found["loss"], every, rtol=1e-6)

    def of_each(mean, count):
        metrics = {"a": mean, "in": {"b": mean, "v": np.ones(2, np.float32) * mean}, "n": 7}
        per_element = np.float32([1, 0]) * count
        by_name = {"a": count, "in": {"b": count * 2.0, "v": per_element}, "n": 1}
        for_a_dict = {"a": count, "in": count, "n": count}
        return (
            dm.reduce_mean(metrics, weights=by_name),
            dm.reduce_mean(metrics, weights=for_a_dict),
            dm.reduce_mean({"v": metrics["in"]["v"]}, weights=per_element),
            dm.reduce_mean({"a": mean}, weights=0),
            dm.reduce_mean(metrics, weights=count, packed=True),
        )

    by_name, for_a_dict, arrays, none, packed = jax.pmap(of_each)(means, counts)
    for found in (by_name, for_a_dict):
        np.testing.assert_allclose(found["a"], [every] * 4, rtol=1e-6)
        np.testing.assert_allclose(found["in"]["b"], [every] * 4, rtol=1e-6)
        assert found["n"].tolist() == [7.0] * 4
    np.testing.assert_allclose(by_name["in"]["v"], [[every, np.nan]] * 4, rtol=1e-6)
    np.testing.assert_allclose(for_a_dict["in"]["v"], [[every, every]] * 4, rtol=1e-6)
    np.testing.assert_allclose(arrays["v"], [[every, np.nan]] * 4, rtol=1e-6)
    assert np.isnan(none["a"]).all()
    unpacked = packed.unpack()
    np.testing.assert_allclose([unpacked["a"], *unpacked["in"]["v"]], [every] * 3, rtol=1e-6)


@on_devices(8)
def test_all_gather_gives_the_values_of_all_devices_in_order(devices) -> None:
    import numpy as np
    from jax_ways import ways

    from metricfold.jax import DistributedMetrics

    inputs = {dtype: inputs_of(dtype, devices) for dtype in DTYPES}
    for way, run in ways().items():
        gathered = run(lambda m: DistributedMetrics().all_gather(m | {"number": 3}), inputs)
        assert gathered["number"].tolist() == [3] * devices
        for dtype, of_dtype in inputs.items():
            for name, x in of_dtype.items():
                found = gathered[dtype][name]
                assert found.dtype == x.dtype, way
                assert found.tobytes() == np.ascontiguousarray(x).tobytes(), (way, dtype, name)


@pytest.mark.parametrize("x64", [False, True])
@on_devices(4)
def test_64_bit_types_are_kept_where_they_are_enabled(x64) -> None:
    import jax
    import numpy as np

    # The setting is part of what JAX compiles for, so it does not leak into other tests.
    with jax.enable_x64(x64):
        x = np.array([2**40 + 1, -(2**62), 3, 4])
        y = np.array([1e300, 2.0, np.nan, 1e-300])
        if not x64:
            with pytest.raises(ValueError, match=r"metrics\['n'\] is 1099511627776.*int32"):
                jax.pmap(lambda _: reduce_by("sum", {"n": np.int64(2**40)}))(np.zeros(4))
            with pytest.raises(ValueError, match=r"metrics\['n'\] is -1099511627776.*enable_x64"):
                jax.pmap(lambda _: reduce_by("sum", {"n": -(2**40)}))(np.zeros(4))
            return
        ints, floats = jax.device_get(
            jax.pmap(
                lambda x, y: (
                    {op: reduce_by(op, {"x": x, "n": 2**40})["x"] for op in OPS},
                    {op: reduce_by(op, {"y": y, "z": x * 1.0}) for op in OPS},
                )
            )(x, y)
        )
        assert ints["sum"][0] == x.sum()
        assert ints["max"][0] == x.max()
        assert ints["min"][0] == x.min()
        assert ints["mean"].dtype == np.float64
        assert ints["mean"][0] == x.mean()
        assert all(np.isnan(floats[op]["y"]).all() for op in OPS)
        assert floats["max"]["z"][0] == 2.0**40 + 1
        assert floats["min"]["z"].dtype == np.float64


@on_devices(4)
def test_complex_numbers_have_sums_and_means() -> None:
    import jax
    import numpy as np

    x = np.complex64([1 + 2j, 3, -1j, 4])
    mean, total = jax.pmap(
        lambda x: (reduce_by("mean", {"x": x, "f": x.real}), reduce_by("sum", {"x": x}))
    )(x)
    assert mean["x"][0] == x.mean()
    assert total["x"][0] == x.sum()
    with pytest.raises(TypeError, match=r"metrics\['x'\] is complex.*no max"):
        jax.pmap(lambda x: reduce_by("max", {"x": x}))(x)
