"""How many collectives a compiled step holds, whatever the number of metrics."""

from __future__ import annotations

from jax_devices import on_devices


def collectives(step, *inputs):
    """Return the collectives in the optimised program of `step` over an axis of all devices."""
    import re

    import jax
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    mesh = mesh_of(data=jax.device_count())
    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P())
    program = jax.jit(mapped).lower(*inputs).compile().as_text()
    return sorted(re.findall(r" (all-reduce|all-gather)(?:-start)?\(", program))


@on_devices(4)
def test_metrics_of_a_type_share_one_sum_and_one_maximum() -> None:
    import numpy as np

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.arange(4, dtype=np.float32)

    def many(x):
        return {f"metric {i}": x[0] * i for i in range(100)}

    ops = {f"metric {i}": ("mean", "sum", "max", "min")[i % 4] for i in range(100)}
    for packed in (False, True):
        assert collectives(lambda x, p=packed: dm.reduce_mean(many(x), packed=p), x) == [
            "all-reduce"
        ]
        found = collectives(lambda x, p=packed: dm.reduce_custom(many(x), ops, packed=p), x)
        assert found == ["all-reduce"] * 2
    weighted = collectives(lambda x: dm.reduce_mean(many(x), weights=x[0]), x)
    assert weighted == ["all-reduce"]
    assert collectives(lambda x: dm.all_gather(many(x)), x) == ["all-gather"]


@on_devices(4)
def test_small_types_travel_with_the_wide_ones() -> None:
    import numpy as np

    from metricfold.jax import DistributedMetrics

    def step(x):
        metrics = {
            dtype: x[0].astype(dtype)
            for dtype in ("float32", "bfloat16", "float16", "int8", "int32", "bool")
        }
        return DistributedMetrics().reduce_mean(metrics), DistributedMetrics().reduce_max(metrics)

    assert collectives(step, np.arange(4, dtype=np.float32)) == ["all-reduce"] * 2


@on_devices(4)
def test_large_arrays_go_alone_and_come_out_right() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    def step(x):
        metrics = {"a": x[0], "b": x[0] + 1, "small": x[0, 0], "also": x[0, 1]}
        return DistributedMetrics().reduce_mean(metrics)

    x = np.random.default_rng(0).normal(size=(4, 200, 100)).astype(np.float32)
    assert len(collectives(step, x)) <= 3
    found = jax.device_get(jax.pmap(lambda x: step(x[None]))(x))
    np.testing.assert_allclose(found["a"][0], x.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found["b"][0], x.mean(axis=0) + 1, atol=1e-6)
    np.testing.assert_allclose(found["also"][0], x.mean(axis=0)[1], atol=1e-6)
