"""Packed metrics: one array on the device, a dict of floats on the host."""

from __future__ import annotations

import pytest
from jax_devices import on_devices


def metrics_of(x):
    import jax.numpy as jnp

    return {
        "loss": x,
        "in": {"count": (x > 1).astype(jnp.int8), "big": jnp.int32(2**30 - 1) * (x > 0)},
        "half": x.astype(jnp.float16),
        "any": x > 2,
        "vector": jnp.stack([x, -x, x * 0]),
        "matrix": jnp.ones((2, 2), jnp.int32),
        "number": 3,
    }


OPS = {"in": {"count": "sum", "big": "max"}, "any": "max", "vector": "min", "matrix": "sum"}


@on_devices(4)
def test_packed_metrics_unpack_to_what_the_dict_holds_in_all_ways() -> None:
    import jax
    import numpy as np
    from jax_ways import ways

    from metricfold.jax import DistributedMetrics, PackedMetrics

    dm = DistributedMetrics()
    x = np.float32([0.5, 1.5, 2.5, 3.5])

    def step(x):
        metrics = metrics_of(x)
        return dm.reduce_custom(metrics, OPS), dm.reduce_custom(metrics, OPS, packed=True)

    for way, run in ways().items():
        as_dict, packed = run(step, x)
        assert isinstance(packed, PackedMetrics)
        assert len(jax.tree.leaves(packed)) == 1
        unpacked = packed.unpack()
        assert jax.tree.structure(unpacked) == jax.tree.structure(as_dict)
        assert unpacked["loss"] == 2.0, way
        assert unpacked["in"] == {"count": 3.0, "big": 2.0**30 - 1}
        assert unpacked["any"] == 1.0
        assert unpacked["vector"].tolist() == [0.5, -3.5, 0.0]
        for one, other in zip(jax.tree.leaves(unpacked), jax.tree.leaves(as_dict), strict=True):
            if other.ndim:
                assert one.dtype == other.dtype
                assert one.tolist() == other.tolist()
            else:
                assert type(one) is float
                assert one == float(other)


@on_devices(4)
def test_one_of_the_copies_is_read_and_steps_stay_in_front() -> None:
    import jax
    import numpy as np
    from jax import lax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    totals = x.sum(axis=0).tolist()

    def packed(value):
        return dm.reduce_sum({"x": value, "v": value[None] * 2}, packed=True)

    def steps(part):
        return lax.scan(lambda carry, value: (carry, packed(value)), None, part)[1]

    # Not yet unpacked, it is a pytree like any other.
    from_pmap = jax.pmap(lambda part: packed(part[0]))(x)
    assert from_pmap.unpack()["x"] == totals[0]
    assert jax.jit(lambda p: p)(from_pmap).unpack() == from_pmap.unpack()
    assert jax.tree.map(lambda words: words, from_pmap).unpack() == from_pmap.unpack()

    scanned = jax.pmap(steps)(x).unpack()
    assert scanned["x"].tolist() == totals
    assert scanned["v"].tolist() == [[2 * t] for t in totals]

    mesh = mesh_of(data=4)
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    for out in (P(), P("data")):
        mapped = jax.jit(
            jax.shard_map(lambda p: packed(p[0, 0]), mesh=mesh, in_specs=P("data"), out_specs=out)
        )
        assert mapped(placed).unpack() == {"x": totals[0], "v": [2 * totals[0]]}
    mapped = jax.shard_map(lambda p: steps(p[0]), mesh=mesh, in_specs=P("data"), out_specs=P(None))
    assert jax.jit(mapped)(placed).unpack()["x"].tolist() == totals

    by_vmap = jax.vmap(lambda part: packed(part[0]), axis_name="batch")(x).unpack()
    assert by_vmap["x"].tolist() == [totals[0]] * 4


@on_devices(4)
def test_what_differs_over_an_axis_that_was_not_reduced_stays_apart() -> None:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DistributedMetrics

    mesh = mesh_of(data=2, model=2)
    x = np.float32([[1, 2], [3, 4]])
    placed = jax.device_put(x, NamedSharding(mesh, P("data", "model")))

    def packed(part):
        return DistributedMetrics().reduce_sum({"x": part[0, 0]}, "model", packed=True)

    def run(step):
        return jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=P("data", "model"), out_specs=P("data"))
        )(placed)

    apart = run(lambda part: jax.tree.map(lambda words: words[None], packed(part)))
    assert apart.unpack()["x"].tolist() == [3.0, 7.0]
    with pytest.raises(ValueError, match=r"2 packed metrics end to end.*\('model',\) alone"):
        run(packed).unpack()


@on_devices(1)
def test_one_device_is_enough() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    packed = jax.pmap(lambda x: dm.reduce_mean({"x": x, "n": 2}, packed=True))(np.float32([3]))
    assert packed.unpack() == {"x": 3.0, "n": 2.0}
    assert dm.collect_from_devices({"x": packed.words})["x"][0].shape == (2,)


@on_devices(4)
def test_64_bits_and_complex_numbers_survive_the_packing() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    with jax.enable_x64(True):
        x = np.array([0.1, 0.2, 0.3, 2.0**53 + 2])
        packed = jax.pmap(
            lambda x: dm.reduce_custom(
                {"f": x, "i": x.astype("int64"), "c": 1j * x, "s": x.astype("float32")},
                {"f": "max", "i": "max", "c": "sum"},
                packed=True,
            )
        )(x).unpack()
        assert packed["f"] == packed["i"] == 2.0**53 + 2
        assert packed["c"] == complex(0, x.sum())
        assert packed["s"] == np.float32(2.0**51)


@on_devices(4)
def test_what_cannot_be_packed_or_unpacked_says_why() -> None:
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    x = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"metrics\['x'\] is to stay as it is.*give it an op"):
        jax.pmap(lambda x: dm.reduce_custom({"x": x}, {"x": None}, packed=True))(x)
    with pytest.raises(TypeError, match=r"unpack.*outside"):
        jax.pmap(lambda x: dm.reduce_mean({"x": x}, packed=True).unpack())(x)
    assert jax.pmap(lambda x: dm.reduce_mean({}, packed=True))(x).unpack() == {}
