"""Where reductions may stand: any axes, and inside of any transformation."""

from __future__ import annotations

from jax_devices import on_devices


@on_devices(4)
def test_the_default_name_means_the_one_axis_whatever_it_is_called() -> None:
    import numpy as np
    from jax_ways import ways

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.float32([1, 2, 3, 6])
    for way, run in ways("data").items():
        if way == "vmap":  # JAX does not tell which axes that binds
            continue
        assert run(lambda x: dm.reduce_mean({"x": x})["x"], x) == 3.0, way
        assert run(lambda x: dm.reduce_mean({"x": x}, axis_name=None)["x"], x) == 3.0, way
    for way, run in ways("data").items():
        if way == "bare pmap":
            continue
        assert run(lambda x: dm.reduce_sum({"x": x}, "data")["x"], x) == 12.0, way
        assert run(lambda x: dm.reduce_sum({"x": x}, ("data",))["x"], x) == 12.0, way


@on_devices(8)
def test_over_several_axes_of_a_mesh() -> None:
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    by_axes = {"data": P("model"), "model": P("data"), ("data", "model"): P(), None: P()}
    totals = {
        "data": x.sum(axis=0),
        "model": x.sum(axis=1),
        ("data", "model"): [x.sum()],
        None: [x.sum()],
    }
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(axis_type, data=4, model=2)
        for check_vma in (True, False):
            for axis_name, out in by_axes.items():

                def step(part, axis_name=axis_name):
                    value = {"x": part.reshape(1)}
                    return {
                        "sum": dm.reduce_sum(value, axis_name)["x"],
                        "max": dm.reduce_max(value, axis_name)["x"],
                        "size": dm.reduce_sum({"n": 1}, axis_name)["n"].reshape(1),
                        "gathered": dm.all_gather(value, axis_name)["x"],
                    }

                outs = {"sum": out, "max": out, "size": P(), "gathered": P(None, *out)}
                with jax.set_mesh(mesh):
                    placed = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
                    mapped = jax.shard_map(
                        step,
                        in_specs=P("data", "model"),
                        out_specs=outs,
                        check_vma=check_vma,
                    )
                    found = jax.device_get(jax.jit(mapped)(placed))
                total = np.asarray(totals[axis_name])
                assert found["sum"].tolist() == total.tolist()
                assert found["size"].tolist() == [8 // total.size]
                gathered = x.T if axis_name == "model" else x.reshape(-1, total.size)
                assert found["gathered"].tolist() == gathered.tolist()
                assert found["max"].tolist() == gathered.max(axis=0).tolist()


@on_devices(8)
def test_where_only_some_axes_are_manual_the_layout_over_others_is_kept() -> None:
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DistributedMetrics

    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(axis_type, data=4, model=2)
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
            mapped = jax.shard_map(
                lambda part: DistributedMetrics().reduce_custom(
                    {"sum": part[0], "also": part[0] * 2, "max": part[0], "n": 1, "m": 1.0},
                    {"sum": "sum", "also": "sum", "max": "max", "n": "sum"},
                ),
                axis_names={"data"},
                in_specs=P("data"),
                out_specs=P(),
            )
            found = jax.jit(mapped)(placed)
        assert np.asarray(found["sum"]).tolist() == x.sum(axis=0).tolist()
        assert np.asarray(found["also"]).tolist() == (2 * x).sum(axis=0).tolist()
        assert np.asarray(found["max"]).tolist() == x.max(axis=0).tolist()
        assert int(found["n"]) == 4
        if axis_type is AxisType.Explicit:
            assert found["sum"].sharding.spec == P("model")


@on_devices(4)
def test_vmap_inside_of_pmap_and_without_jit() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.arange(8, dtype=np.float32).reshape(4, 2)

    def step(x):
        axes = {"batch": "batch", "inner": "inner", "both": ("batch", "inner")}
        return {name: dm.reduce_sum({"x": x}, axis)["x"] for name, axis in axes.items()}

    inner = jax.vmap(step, axis_name="inner")
    for outer in (jax.pmap(inner, axis_name="batch"), jax.vmap(inner, axis_name="batch")):
        found = jax.device_get(outer(x))
        assert found["batch"].tolist() == [x.sum(axis=0).tolist()] * 4
        assert found["inner"].tolist() == [[row.sum()] * 2 for row in x]
        assert found["both"].tolist() == [[x.sum()] * 2] * 4
    # A vmap without a name adds a dimension, and no axis.
    each = jax.pmap(jax.vmap(lambda x: dm.reduce_max({"x": x})["x"]))(x)
    assert np.asarray(each).tolist() == [[6.0, 7.0]] * 4
    gathered = jax.vmap(lambda x: dm.all_gather({"x": x}, "b")["x"], axis_name="b")(x[:, 0])
    assert np.asarray(gathered).tolist() == [[0.0, 2.0, 4.0, 6.0]] * 4


@on_devices(4)
def test_inside_of_jit_scan_cond_and_remat() -> None:
    import jax
    import numpy as np
    from jax import lax
    from jax_ways import ways

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.arange(12, dtype=np.float32).reshape(4, 3)

    @jax.jit
    def reduced(value):
        return dm.reduce_custom({"s": value, "m": value, "n": 1}, {"s": "sum", "m": "max"})

    def step(part):
        total, steps = lax.scan(
            lambda carry, value: (carry + reduced(value)["s"], reduced(value)), 0.0, part
        )
        chosen = lax.cond(
            total > 0, lambda: jax.checkpoint(reduced)(part), lambda: reduced(part * 0)
        )
        return total, steps, chosen

    for way, run in ways().items():
        total, steps, chosen = run(step, x)
        assert total == x.sum(), way
        assert steps["s"].tolist() == x.sum(axis=0).tolist(), way
        assert steps["m"].tolist() == x.max(axis=0).tolist(), way
        assert chosen["s"].tolist() == x.sum(axis=0).tolist(), way
        assert chosen["n"] == 1, way


@on_devices(4)
def test_gradients_pass_through_sums_and_means_as_through_lax() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax_ways import ways

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.float32([1, 2, 3, 6])

    def ours(parameter, x):
        value = jnp.sin(parameter * x)
        means = dm.reduce_mean({"a": value, "b": value**2, "count": 3})
        sums = dm.reduce_sum({"a": value})
        aux = dm.reduce_custom({"a": value, "b": value}, {"a": "max", "b": "min"})
        return means["a"] + 2 * means["b"] + 3 * sums["a"], (means, aux)

    def theirs(parameter, x):
        value = jnp.sin(parameter * x)
        return (
            lax.pmean(value, "batch")
            + 2 * lax.pmean(value**2, "batch")
            + 3 * lax.psum(value, "batch")
        )

    def step(x):
        (value, (_, extrema)), gradient = jax.value_and_grad(ours, has_aux=True)(0.5, x)
        expected, as_lax = jax.value_and_grad(theirs)(0.5, x)
        through_extrema = jax.grad(lambda p: dm.reduce_max({"x": p * x})["x"])(0.5)
        _, tangent = jax.jvp(lambda p: dm.reduce_min({"x": p * x})["x"], (0.5,), (1.0,))
        # Under `check_vma=False`, gradients differ between devices; so bring them together.
        gradients = dm.all_gather({"ours": gradient, "lax": as_lax})
        return value, expected, gradients, extrema, dm.all_gather({"x": through_extrema}), tangent

    for way, run in ways().items():
        if way == "bare pmap":
            continue
        value, expected, gradients, extrema, through_extrema, tangent = run(step, x)
        assert value == expected, way
        np.testing.assert_allclose(gradients["ours"], gradients["lax"], rtol=1e-6, err_msg=way)
        assert abs(gradients["lax"]).max() > 0.1
        assert extrema["a"] == np.sin(x * np.float32(0.5)).max()
        assert not through_extrema["x"].any()
        assert tangent == 0


@on_devices(4)
def test_under_plain_jit_values_are_already_those_of_the_whole_batch() -> None:
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DataParallel, DeviceMeshManager, DistributedMetrics

    dm = DistributedMetrics()
    dp = DataParallel()
    mesh = DeviceMeshManager().create_data_parallel_mesh()
    x = dp.shard_batch(np.float32([1, 2, 3, 6]), dp.create_data_parallel_sharding(mesh))

    @jax.jit
    def step(x):
        metrics = {"loss": x.mean(), "n": 4, "b": True}
        return {
            "mean": dm.reduce_mean(metrics, axis_name=None),
            "sum": dm.reduce_sum(metrics, axis_name=None),
            "max": dm.reduce_max(metrics, axis_name=None),
            "packed": dm.reduce_mean(metrics, axis_name=None, packed=True),
            "gathered": dm.all_gather(metrics, axis_name=None),
            "weighted": dm.reduce_mean(metrics, axis_name=None, weights=x.sum()),
        }

    found = jax.device_get(step(x))
    assert found["mean"] == found["weighted"] == {"loss": 3.0, "n": 4.0, "b": 1.0}
    assert found["sum"] == found["max"] == found["gathered"] == {"loss": 3.0, "n": 4, "b": True}
    assert found["packed"].unpack() == {"loss": 3.0, "n": 4.0, "b": 1.0}
    # On an Explicit mesh, what is split stays so in a dict, and is gathered to be packed.
    explicit = jax.device_put(
        np.float32([1, 2, 3, 6]), NamedSharding(mesh_of(AxisType.Explicit, data=4), P("data"))
    )

    @jax.jit
    def both(x):
        metrics = {"rows": x, "loss": x.mean(), "n": 4}
        return (
            dm.reduce_mean(metrics, axis_name=None),
            dm.reduce_mean(metrics, axis_name=None, packed=True),
        )

    as_dict, packed = both(explicit)
    assert as_dict["rows"].sharding.spec == P("data")
    assert packed.unpack()["rows"].tolist() == [1, 2, 3, 6]
    assert packed.unpack()["loss"] == 3.0
    # Outside of any transformation, too.
    assert dm.reduce_sum({"x": 2}, axis_name=None)["x"] == 2


@on_devices(4)
def test_with_nnx_transformations_and_as_part_of_a_module() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from metricfold.jax import DistributedMetrics

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 1, rngs=rngs)
            self.dm = DistributedMetrics()

        def __call__(self, x):
            return self.linear(x)

    def loss_fn(model, batch):
        loss = jnp.mean((model(batch["x"])[:, 0] - batch["y"]) ** 2)
        return loss, {"loss": loss, "largest": jnp.abs(batch["y"]).max()}

    model = Model(nnx.Rngs(0))
    assert jax.tree.leaves(nnx.state(model.dm)) == []
    assert isinstance(model.dm, nnx.Module)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 8, 3)).astype(np.float32)
    batch = {"x": x, "y": x @ np.float32([1, 2, 3])}

    @nnx.pmap(
        in_axes=(nnx.StateAxes({...: None}), nnx.StateAxes({...: None}), 0), axis_name="batch"
    )
    def train_step(model, optimizer, batch):
        (_, metrics), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
        optimizer.update(model, model.dm.reduce_mean(grads))
        return model.dm.reduce_custom(metrics, {"largest": "max"})

    first = None
    for _ in range(20):
        metrics = jax.device_get(train_step(model, optimizer, batch))
        assert len(set(metrics["loss"].tolist())) == 1
        assert metrics["largest"].tolist() == [np.abs(batch["y"]).max()] * 4
        first = metrics["loss"][0] if first is None else first
    assert metrics["loss"][0] < first / 5

    @nnx.jit
    def whole(model, batch):
        return model.dm.reduce_mean(loss_fn(model, batch)[1], axis_name=None)

    flat = {"x": x.reshape(32, 3), "y": batch["y"].reshape(32)}
    assert whole(model, flat)["loss"] < metrics["loss"][0]
