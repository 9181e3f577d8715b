"""Meshes, batches split over them, gradients brought together, and values collected."""

from __future__ import annotations

from jax_devices import on_devices


@on_devices(8)
def test_meshes_from_dicts_and_lists() -> None:
    import jax
    from jax.sharding import AxisType

    from metricfold.jax import DeviceMeshManager

    manager = DeviceMeshManager()
    assert manager.devices == jax.devices()
    for shape in ({"data": 4, "model": 2}, [("data", 4), ("model", 2)]):
        mesh = manager.create_device_mesh(shape)
        assert dict(mesh.shape) == {"data": 4, "model": 2}
        assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
        assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
    explicit = manager.create_device_mesh({"data": 2}, axis_type=AxisType.Explicit)
    assert explicit.axis_types == (AxisType.Explicit,)
    assert explicit.size == 2
    assert dict(manager.create_data_parallel_mesh().shape) == {"data": 8}
    named = manager.create_data_parallel_mesh(num_devices=3, axis_name="batch")
    assert dict(named.shape) == {"batch": 3}
    some = DeviceMeshManager(jax.devices()[4:])
    assert {d.id for d in some.create_data_parallel_mesh().devices.flat} == {4, 5, 6, 7}


@on_devices(4)
def test_batches_are_split_by_rows_and_numbers_go_everywhere() -> None:
    import jax.numpy as jnp
    import numpy as np

    from metricfold.jax import DataParallel, DeviceMeshManager

    dp = DataParallel()
    mesh = DeviceMeshManager().create_device_mesh({"data": 2, "model": 2})
    sharding = dp.create_data_parallel_sharding(mesh)
    batch = {
        "x": np.arange(12).reshape(4, 3),
        "on a device": jnp.arange(4.0),
        "in": [np.array([True, False]), 7, 0.5],
    }
    placed = dp.shard_batch(batch, sharding)
    assert placed["x"].tolist() == batch["x"].tolist()
    for shard in placed["x"].addressable_shards:
        assert shard.data.shape == (2, 3)
    assert {s.data.shape for s in placed["on a device"].addressable_shards} == {(2,)}
    assert placed["in"][0].tolist() == [True, False]
    assert placed["in"][1].is_fully_replicated
    assert [int(placed["in"][1]), float(placed["in"][2])] == [7, 0.5]
    by_name = dp.create_data_parallel_sharding(mesh, data_axis="model")
    assert dp.shard_batch(batch["x"], by_name).sharding == by_name
    assert tuple(by_name.spec) == ("model",)


@on_devices(4)
def test_gradients_are_averaged_or_added_up_in_their_own_types() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax_ways import ways

    from metricfold.jax import DataParallel

    dp = DataParallel()
    grads = {
        "w": np.random.default_rng(0).normal(size=(4, 50, 400)).astype(np.float32),
        "b": np.float32([[1, 2], [3, 4], [5, 6], [7, 12]]),
        "half": np.float16([60_000, 60_000, 60_000, 60_000]),
        "bf": jnp.array([256, 1, 1, 1], jnp.bfloat16),
    }
    for way, run in ways().items():
        mean, total = run(
            lambda g: (dp.all_reduce_gradients(g), dp.all_reduce_gradients(g, "sum")), grads
        )
        for name, given in grads.items():
            assert mean[name].dtype == total[name].dtype == given.dtype, way
        np.testing.assert_allclose(mean["w"], grads["w"].mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(total["w"], grads["w"].sum(axis=0), atol=1e-6)
        assert mean["b"].tolist() == [4.0, 6.0]
        assert total["b"].tolist() == [16.0, 24.0]
        assert mean["half"] == 60_000  # though their sum is more than a float16 holds
        assert float(mean["bf"]) == 65.0  # 64.75, rounded once; bfloat16 cannot count past 256

    def step(p, n, x):
        gradients = jax.grad(lambda p, n: p["w"] * x * n, argnums=(0, 1), allow_int=True)(p, n)
        return dp.all_reduce_gradients({"of": gradients[0], "ints": gradients[1]}, "sum")["of"]

    with_gaps = {"w": np.float32([1, 1, 1, 1]), "frozen": None}
    found = jax.pmap(step)(with_gaps, np.int32([2, 2, 2, 2]), np.float32([1, 2, 3, 4]))
    assert found["frozen"] is None
    assert np.asarray(found["w"]).tolist() == [20.0] * 4


@on_devices(4)
def test_training_on_parts_of_the_batch_equals_training_on_all_of_it() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from metricfold.jax import DataParallel, DeviceMeshManager

    dp = DataParallel()
    mesh = DeviceMeshManager().create_data_parallel_mesh()
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(8, 3)).astype(np.float32), jnp.ones(3)

    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    def unchecked(w, x):
        return dp.all_reduce_gradients(jax.grad(loss)(w, x))

    def checked(w, x):  # here JAX adds up by itself
        return jax.grad(lambda w: jax.lax.pmean(loss(w, x), "data"))(w)

    sharded = dp.shard_batch(x, dp.create_data_parallel_sharding(mesh))
    whole = jax.jit(lambda w, x: dp.all_reduce_gradients(jax.grad(loss)(w, x)))(w, sharded)
    np.testing.assert_allclose(whole, jax.grad(loss)(w, x), rtol=1e-5)
    for step, check_vma in ((unchecked, False), (checked, True)):
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
        )
        np.testing.assert_allclose(jax.jit(mapped)(w, sharded), whole, rtol=1e-5)
    # Without an axis, whatever it is given comes back as it is.
    kept = {"a": object()}
    assert dp.all_reduce_gradients(kept) is kept
    assert dp.all_reduce_gradients(kept, axis_name=None) is kept


@on_devices(4)
def test_collected_values_are_lists_and_the_rest_stays_as_it_is() -> None:
    import json

    import jax
    import jax.numpy as jnp
    import numpy as np

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.float32([0.5, 1.5, 2.5, 3.5])
    metrics = jax.pmap(
        lambda x: {
            "loss": x,
            "in": {"n": x.astype(jnp.int32), "half": x.astype(jnp.bfloat16), "up": x > 2},
            "vector": jnp.stack([x, -x]),
        }
    )(x)
    scalar = jnp.float32(3)
    rest = {"scalar": scalar, "text": "a", "none": None, "number": 4, "list": [1, "b"]}
    collected = dm.collect_from_devices({**metrics, **rest, "host": np.arange(3)})
    assert collected["loss"] == [0.5, 1.5, 2.5, 3.5]
    assert json.loads(json.dumps(collected["in"])) == {
        "n": [0, 1, 2, 3],
        "half": [0.5, 1.5, 2.5, 3.5],
        "up": [False, False, True, True],
    }
    assert [type(v) for v in collected["loss"]] == [float] * 4
    assert [v.tolist() for v in collected["vector"]] == [[v, -v] for v in x.tolist()]
    assert all(isinstance(v, np.ndarray) for v in collected["vector"])
    assert collected["host"] == [0, 1, 2]
    assert {name: collected[name] for name in rest} == rest
    assert collected["scalar"] is scalar
    assert DistributedMetrics.collect_from_devices_static(metrics)["loss"] == x.tolist()


@on_devices(4)
def test_all_arrays_are_collected_in_one_transfer() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    metrics = jax.pmap(lambda x: {f"m{i}": x + i for i in range(20)})(np.zeros(4))
    calls = []
    device_get = jax.device_get
    jax.device_get = lambda tree: calls.append(tree) or device_get(tree)
    try:
        # Slicing on the device would be a transfer in the other direction, of the index.
        with jax.transfer_guard_host_to_device("disallow"):
            DistributedMetrics().collect_from_devices(metrics)
    finally:
        jax.device_get = device_get
    assert [len(tree) for tree in calls] == [20]


@on_devices(4)
def test_both_forms_of_a_method_take_and_give_the_same() -> None:
    import inspect

    import jax
    import numpy as np
    from flax import nnx

    from metricfold.jax import DistributedMetrics

    assert issubclass(DistributedMetrics, nnx.Module)
    methods = ("all_gather", "reduce_mean", "reduce_sum", "reduce_max", "reduce_min")
    for name in (*methods, "reduce_custom", "collect_from_devices"):
        of_instances = inspect.signature(getattr(DistributedMetrics(), name))
        static = inspect.signature(getattr(DistributedMetrics, f"{name}_static"))
        assert of_instances == static, name
    parameters = inspect.signature(DistributedMetrics().reduce_custom).parameters
    assert list(parameters)[:3] == ["metrics", "reduce_fn", "axis_name"]
    assert [parameters[name].default for name in ("reduce_fn", "axis_name")] == [None, "batch"]

    def step(x):
        return [
            (
                getattr(DistributedMetrics(), m)({"x": x}),
                getattr(DistributedMetrics, f"{m}_static")({"x": x}),
            )
            for m in (*methods, "reduce_custom")
        ]

    for one, other in jax.device_get(jax.pmap(step)(np.float32([1, 2, 3, 6]))):
        assert one["x"].tolist() == other["x"].tolist()
