"""Under whatever configuration of JAX, metrics are taken, reduced, packed and read alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from jax_devices import on_devices

TYPES = ("int4", "uint4", "int8", "uint32", "bool", "float16", "bfloat16")
FLOAT8 = "float8_e4m3fn"


def configurations() -> dict[str, Callable[[], Any]]:
    import jax

    return {
        "as it is": nullcontext,
        "x64": lambda: jax.enable_x64(True),
        "debug_nans": lambda: jax.debug_nans(True),
        "debug_infs": lambda: jax.debug_infs(True),
        "transfers disallowed": lambda: jax.transfer_guard("disallow"),
        "transfers disallowed, explicit ones too": lambda: jax.transfer_guard("disallow_explicit"),
        "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
        "no promotion of ranks": lambda: jax.numpy_rank_promotion("raise"),
        "leaks checked": jax.checking_leaks,
        "jit disabled": jax.disable_jit,
    }


@on_devices(2)
def test_reductions_and_packed_metrics_are_the_same_under_any_configuration() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DataParallel, DistributedMetrics

    dm, mesh = DistributedMetrics(), mesh_of(data=2)
    # Placed as the step wants it: what the caller moves is the caller's business.
    x = jax.device_put(np.float32([1, 3]), NamedSharding(mesh, P("data")))
    one = jnp.ones(())

    results = {"mean": 2.0, "sum": 4.0, "max": 3.0, "min": 1.0}
    of_bool = {"mean": 1.0, "sum": 2.0, "max": 1.0, "min": 1.0}
    ops = {f"{op} {dtype}": op for op in results for dtype in ("int4", "bool", "bfloat16", FLOAT8)}

    def step(x: Any) -> Any:
        metrics = {name: x[0].astype(name.split()[1]) for name in ops}
        metrics |= {"vector": x, "number": 2, "float": 0.5, "np": np.float32(2)}
        return (
            dm.reduce_custom(metrics, ops),
            dm.reduce_custom(metrics, ops, packed=True),
            dm.reduce_mean({"v": x, "i": x[0].astype("int4")}, weights={"v": x, "i": x[0]}),
            DataParallel().all_reduce_gradients({"w": x}),
        )

    compiled = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P()))
    for name, configuration in configurations().items():
        if name == "jit disabled":  # every operation of a shard_map is then compiled alone
            continue
        with configuration():
            as_dict, packed, weighted, gradients = compiled(x)
            unpacked = packed.unpack()
            collected = dm.collect_from_devices(gradients)
            # Outside of any compiled function, too.
            alone = dm.reduce_mean({"x": one, "n": 2}, axis_name=None, packed=True).unpack()
            batch = DataParallel().shard_batch(
                {"x": np.ones(2, np.float32), "n": 3}, NamedSharding(mesh, P("data"))
            )
        for metric, op in ops.items():
            expected = of_bool[op] if metric.endswith("bool") else results[op]
            assert float(as_dict[metric]) == unpacked[metric] == expected, (name, metric)
        assert unpacked["vector"].tolist() == [2.0], name
        assert [unpacked[key] for key in ("number", "float", "np")] == [2.0, 0.5, 2.0], name
        assert (weighted["v"].tolist(), float(weighted["i"])) == ([2.5], 2.5), name
        assert collected == {"w": [2.0]}, name
        assert alone == {"x": 1.0, "n": 2.0}, name
        assert int(batch["n"]) == 3


@on_devices(1)
def test_reductions_go_on_where_nothing_is_compiled() -> None:
    import jax
    import jax.numpy as jnp

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()

    def step(x: Any) -> Any:
        return dm.reduce_custom({"a": x, "b": x}, {"b": "max"}, "devices", packed=True)

    with jax.disable_jit():
        packed = jax.jit(jax.vmap(step, axis_name="devices"))(jnp.array([1.0, 3.0]))
        assert jax.tree.map(lambda words: words[0], packed).unpack() == {"a": 2.0, "b": 3.0}


@on_devices(1)
def test_values_are_recorded_and_read_under_any_configuration() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from metricfold import Metric, MetricsAggregator

    arrays = {name: jnp.ones((), name) for name in (*TYPES, FLOAT8, "float32")}
    vector, three, variable = jnp.arange(4.0), jnp.float32(3), nnx.Variable(jnp.float32(3))
    for name, configuration in configurations().items():
        aggregator = MetricsAggregator()
        with configuration():
            for dtype, array in arrays.items():
                aggregator.record(dtype, array, weight=three)
            aggregator.record("each", vector, "sum", each=True)
            aggregator.record("weighed", vector, weight=vector)
            aggregator.record("len", vector, "distribution", each=True)
            aggregator.record("variable", variable, weight=variable)
            aggregator.record("host", np.float64(3))
            aggregator.update([Metric("d", "listed", three, "max", 1.0)])
            logged = aggregator.get_metrics_for_logging("t")
        assert [logged[f"t/{dtype}"] for dtype in arrays] == [1.0] * len(arrays), name
        assert (logged["t/each"], logged["t/weighed"]) == (6.0, 14 / 6), name
        assert (logged["t/len_stat_mean"], logged["t_d/listed"]) == (1.5, 3.0), name
        assert logged["t/variable"] == logged["t/host"] == 3.0, name
    assert not jax.config.jax_enable_x64
