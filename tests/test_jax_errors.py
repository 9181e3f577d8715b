"""What bad input gets: an error at trace time that says what, where and what to do."""

from __future__ import annotations

import pytest
from jax_devices import on_devices


@on_devices(4)
def test_an_axis_that_is_not_bound_is_named_with_those_that_are() -> None:
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DataParallel, DistributedMetrics

    dm = DistributedMetrics()
    x = np.zeros(4, np.float32)
    calls = {
        "reduce_mean": lambda x, axis: dm.reduce_mean({"x": x}, axis),
        "reduce_sum_static": lambda x, axis: DistributedMetrics.reduce_sum_static({"x": x}, axis),
        "reduce_custom": lambda x, axis: dm.reduce_custom({"x": x}, None, axis),
        "all_gather": lambda x, axis: dm.all_gather({"x": x}, axis),
        "no metrics": lambda x, axis: dm.reduce_max({}, axis),
        "gradients": lambda x, axis: DataParallel().all_reduce_gradients(x, axis_name=axis),
    }
    for call in calls.values():
        with pytest.raises(NameError, match="'data' is not bound here, but 'devices' is") as caught:
            jax.pmap(lambda x, call=call: call(x, "data"), axis_name="devices")(x)
        assert "jax.pmap(step, axis_name='data')" in str(caught.value)
        with pytest.raises(
            NameError, match=r"'rows' is not bound here, but '.*' is: leave axis_name out"
        ):
            jax.pmap(lambda x, call=call: call(x, ("rows",)))(x)
        mesh = mesh_of(data=2, model=2)
        for name in ("batch", "rows", ("data", "rows")):
            with pytest.raises(NameError, match=r"'(batch|rows)' is not .* 'data', 'model' are"):
                jax.shard_map(
                    lambda x, call=call, name=name: call(x, name),
                    mesh=mesh,
                    in_specs=P(("data", "model")),
                    out_specs=P(("data", "model")),
                )(x)


@on_devices(4)
def test_where_no_axis_is_bound_at_all_the_error_says_how_to_bind_one() -> None:
    import jax
    import numpy as np
    from jax_ways import mesh_of

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.float32(1)
    for transformed in (lambda f: f, jax.jit, jax.grad):
        with pytest.raises(
            NameError, match="'batch' is not bound here, nor is any other"
        ) as caught:
            transformed(lambda x: dm.reduce_mean({"x": x})["x"])(x)
        for way_out in ("jax.pmap(", "jax.shard_map", "jax.vmap(", "axis_name=None"):
            assert way_out in str(caught.value)
    with (
        jax.set_mesh(mesh_of(data=4)),
        pytest.raises(NameError, match=r"'data' is an axis of the mesh, but .* jax\.shard_map"),
    ):
        jax.jit(lambda x: dm.reduce_mean({"x": x}, "data"))(x)


@on_devices(4)
def test_axis_names_that_make_no_sense() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    x = np.zeros(4, np.float32)
    for axis_name, complaint in (
        ((), r"axis_name=\(\) names no axis"),
        (("batch", "batch"), "names an axis twice"),
    ):
        with pytest.raises(ValueError, match=complaint):
            jax.pmap(
                lambda x, name=axis_name: DistributedMetrics().reduce_sum({"x": x}, name),
                axis_name="batch",
            )(x)
    for axis_name in (0, ("batch", 0), {"batch": 4}.values()):
        with pytest.raises(TypeError, match=r"axis_name=.*give a name, a tuple of names, or None"):
            jax.pmap(lambda x, name=axis_name: DistributedMetrics().reduce_sum({"x": x}, name))(x)


@on_devices(4)
def test_what_is_no_number_is_refused_by_name() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.zeros(4, np.float32)
    no_numbers = [
        "text",
        None,
        np.array(["a"]),
        np.datetime64("2020-01-01"),
        np.array([None]),
        object(),
        jax.random.key(0),
    ]
    for value in no_numbers:
        calls = [dm.reduce_mean, dm.reduce_sum, dm.reduce_max, dm.reduce_min, dm.reduce_custom]
        for call in [*calls, dm.all_gather]:
            with pytest.raises(TypeError, match=r"metrics\['in'\]\['x'\] .*no number"):
                jax.pmap(
                    lambda x, call=call, value=value: call({"fine": x, "in": {"x": value}}) and x
                )(x)
        with pytest.raises(TypeError, match=r"weights\['x'\] .*no number"):
            jax.pmap(lambda x, value=value: dm.reduce_mean({"x": x}, weights={"x": value}))(x)
    with pytest.raises(ValueError, match=r"which no integer type holds: record it on the host"):
        jax.pmap(lambda x: dm.reduce_sum({"x": 2**70}))(x)


@on_devices(4)
def test_unknown_ops_are_refused_with_a_list_of_those_there_are() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DataParallel, DistributedMetrics

    dm = DistributedMetrics()
    x = np.zeros(4, np.float32)

    def custom(reduce_fn):
        return jax.pmap(lambda x: dm.reduce_custom({"x": x, "in": {"y": x}}, reduce_fn))(x)

    ops = "must be one of 'mean', 'sum', 'max', 'min'"
    with pytest.raises(ValueError, match=rf"reduce_fn\['x'\] is 'median', but {ops}"):
        custom({"x": "median"})
    with pytest.raises(ValueError, match=rf"reduce_fn\['in'\]\['y'\] is 'avg', but {ops}"):
        custom({"in": {"y": "avg"}})
    with pytest.raises(ValueError, match=rf"reduce_fn\['not there'\] is 3, but {ops}"):
        custom({"not there": 3})
    with pytest.raises(ValueError, match=r"reduce_fn\['x'\] is a dict of ops, but .* single value"):
        custom({"x": {"y": "sum"}})
    with pytest.raises(TypeError, match="reduce_fn is 'sum', but must be a dict"):
        custom("sum")
    with pytest.raises(ValueError, match="reduce_type is 'max', but must be one of 'mean', 'sum'"):
        DataParallel().all_reduce_gradients({"w": x}, "max")


@on_devices(4)
def test_weights_that_do_not_fit_their_metrics() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    x = np.zeros((4, 3), np.float32)

    def mean(weights):
        def step(x):
            return DistributedMetrics().reduce_mean({"v": x, "s": x[0]}, weights=weights)

        return jax.pmap(step)(x)

    with pytest.raises(ValueError, match=r"weights has shape \(2,\), but metrics\['s'\] .* \(\)"):
        mean(np.ones(2))
    with pytest.raises(ValueError, match=r"weights\['v'\] has shape \(3, 1\).*shape \(3,\)"):
        mean({"v": np.ones((3, 1)), "s": 1})
    with pytest.raises(ValueError, match=r"metrics\['s'\] has no weights: give weights\['s'\]"):
        mean({"v": 1})
    with pytest.raises(ValueError, match=r"metrics\['s'\] has no weight"):
        mean({"v": 1, "s": {"t": 1}})
    with pytest.raises(TypeError, match=r"weights is complex: a weight is a real number"):
        mean(1j)


@on_devices(4)
def test_what_cannot_be_collected() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    metrics = jax.pmap(lambda x: {"loss": x})(np.zeros(4, np.float32))
    with pytest.raises(TypeError, match=r"not a tuple\. .*\(params, metrics\).*item 1 of it"):
        dm.collect_from_devices((jnp.zeros(3), metrics))
    with pytest.raises(TypeError, match=r"takes the dict of metrics .* not a ArrayImpl"):
        dm.collect_from_devices_static(jnp.zeros(3))
    with pytest.raises(TypeError, match=r"metrics\['loss'\] is a traced value.*all_gather"):
        jax.jit(dm.collect_from_devices)(metrics)
    packed = jax.pmap(lambda x: dm.reduce_mean({"x": x}, packed=True))(np.zeros(4, np.float32))
    for given in (packed, {"in": {"packed": packed}}):
        with pytest.raises(TypeError, match=r"packed metrics.*unpack\(\)"):
            dm.collect_from_devices(given)
    metrics["loss"].delete()
    with pytest.raises(RuntimeError, match=r"metrics\['loss'\] was donated or deleted"):
        dm.collect_from_devices(metrics)


@on_devices(4)
def test_meshes_and_batches_that_do_not_fit_the_devices() -> None:
    import numpy as np

    from metricfold.jax import DataParallel, DeviceMeshManager

    manager = DeviceMeshManager()
    with pytest.raises(ValueError, match="data=4 by model=2 needs 8 devices, and there are 4"):
        manager.create_device_mesh({"data": 4, "model": 2})
    with pytest.raises(ValueError, match="data=5 needs 5 devices, and there are 4"):
        manager.create_data_parallel_mesh(5)
    with pytest.raises(ValueError, match="data=2 needs 2 devices, and there are 1"):
        manager.create_device_mesh([("data", 2)], devices=manager.devices[:1])
    for shape in ({}, [], {"data": 0}, {"data": -1}, {"data": 2.0}, [2, 2], [("data",)], {3: 2}):
        with pytest.raises(
            ValueError, match=r"give the size of each axis, at least 1, by its name"
        ):
            manager.create_device_mesh(shape)
    with pytest.raises(ValueError, match="names an axis twice"):
        manager.create_device_mesh([("data", 2), ("data", 2)])

    dp = DataParallel()
    mesh = manager.create_data_parallel_mesh()
    with pytest.raises(ValueError, match="the mesh has no axis 'batch': it has 'data'"):
        dp.create_data_parallel_sharding(mesh, "batch")
    sharding = dp.create_data_parallel_sharding(mesh)
    with pytest.raises(
        ValueError, match=r"batch\['x'\] has 10 rows .* 4 devices .*'data'"
    ) as caught:
        dp.shard_batch({"x": np.zeros((10, 3)), "y": np.zeros(8)}, sharding)
    assert "10 = 4 * 2 + 2" in str(caught.value)
    assert "pad it to 12 rows" in str(caught.value)
    for value in ("text", ["a", "b"], None):
        with pytest.raises(TypeError, match=r"batch\['t'\].* no device holds"):
            dp.shard_batch({"x": np.zeros(8), "t": value}, sharding)


@on_devices(4)
def test_numbers_of_64_bits_are_exact_or_refused() -> None:
    """Floats were rounded to another whole number, and sums of ints wrapped, without a word."""
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()

    def reduced(op: str, value, **options):
        step = lambda x: getattr(dm, f"reduce_{op}")({"x": value}, **options)  # noqa: E731
        return jax.device_get(jax.pmap(step)(np.zeros(4)))["x"][0]

    refused = [
        ("mean", 16_777_217.0),
        ("mean", np.float64(16_777_217)),
        ("max", np.array([1.0, 2.0**53 - 1])),
        ("sum", 3_000_000_001.0),
        ("sum", 1e39),
        ("sum", 3_000_000_001),
        ("max", np.int64(3_000_000_001)),
        ("min", np.uint64(2**63)),
        ("sum", complex(1, 16_777_217)),
        ("sum", 2**70),
        ("sum", 2**29),  # four of them are 2^31
        ("sum", np.int8(100)),  # which is added up in 32 bits
    ]
    for op, value in refused[:-1]:
        with pytest.raises(ValueError, match=r"metrics\['x'\] is .*on the host.*jax_enable_x64"):
            reduced(op, value)
        with jax.enable_x64(True):
            if np.any(value != 2**70):
                assert np.all(reduced(op, value) == (4 * value if op == "sum" else value))
    assert reduced(*refused[-1]) == 400
    with pytest.raises(ValueError, match=r"weights is 16777217.0, which float32 does not hold"):
        reduced("mean", 1.0, weights=16_777_217.0)
    for op, value in (("max", 2**31 - 1), ("mean", 2.0**60), ("mean", 16_777_216), ("min", 3)):
        assert reduced(op, value) == value
    for value in (0.1, np.float64(1e-3), 1e20, float("inf"), np.array([0.5, 1 / 3])):
        assert np.all(reduced("mean", value) == np.float32(value))
    assert np.isnan(reduced("mean", float("nan")))
