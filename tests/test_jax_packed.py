"""Packed metrics: one array on the device, a dict of floats on the host."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

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
    assert jax.tree.map(lambda words: words[0], packed).unpack() == packed.unpack()


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


def packed_by_pmap(values: Any, op: str = "sum") -> Any:
    """Return packed metrics as a pmap returns them: a copy from each device."""
    import jax
    import numpy as np

    from metricfold.jax import DistributedMetrics

    def step(x: Any) -> Any:
        metrics = {"loss": x, "vector": x[None] * 2}
        return DistributedMetrics().reduce_custom(metrics, {"loss": op}, packed=True)

    return jax.pmap(step)(np.float32(values))


@on_devices(4)
def test_computing_with_packed_metrics_is_an_error_and_never_a_number() -> None:
    """The bits were averaged, added up and cast like numbers, and unpacked to nonsense."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax import lax

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    steps = [
        jax.tree.map(lambda words: words[0], packed_by_pmap([k, -2.0 * k, 3.0, -6.0], op))
        for k, op in ((1, "sum"), (2, "sum"), (3, "sum"))
    ]
    first, second, third = steps
    as_uint32 = jnp.uint32

    def tree(function: Any, *packed: Any) -> Any:
        return lambda: jax.tree.map(function, *packed)

    def again(collective: Any) -> Any:
        step = lambda x: collective(dm.reduce_mean({"l": x}, packed=True), "i")  # noqa: E731
        return lambda: jax.pmap(step, axis_name="i")(jnp.arange(4.0))

    computed = {
        "sum of steps": tree(lambda *words: sum(words), *steps),
        "mean of steps": tree(lambda *words: jnp.stack(words).mean(0), *steps),
        "mean, cast back": tree(lambda *w: jnp.stack(w).mean(0).astype(as_uint32), *steps),
        "whole mean": tree(lambda *w: sum(w) // len(w), *steps),
        "mean of equals": tree(lambda *w: (9 * w[0] + w[1]) // 10, first, first),
        "largest": tree(lambda *words: jnp.stack(words).max(0), *steps),
        "smallest": tree(jnp.minimum, first, third),
        "some words of each": tree(
            lambda a, b: jnp.where(jnp.arange(a.size) % 2, a, b), *steps[:2]
        ),
        "difference": tree(lambda a, b, c: a - b + c, *steps),
        "twice": tree(lambda words: words * 2, first),
        "negated": tree(lambda words: -words, first),
        "float32": tree(lambda words: words.astype(jnp.float32), first),
        "float32 and back": tree(lambda w: w.astype(jnp.float32).astype(as_uint32), first),
        "float64 on the host": tree(lambda words: np.asarray(words, np.float64), first),
        "int32": tree(lambda words: words.astype(jnp.int32), first),
        "zeros": tree(jnp.zeros_like, first),
        "zeros of its shape": lambda: jax.tree.map(
            lambda words: jnp.zeros(words.shape, words.dtype), jax.eval_shape(lambda: first)
        ),
        "ones": tree(jnp.ones_like, first),
        "exponential average": lambda: optax.incremental_update(first, second, 0.1),
        "psum": again(lax.psum),
        "pmean": again(lax.pmean),
        "sorted": tree(jnp.sort, first),
        "rolled": tree(lambda words: jnp.roll(words, 1), first),
        "cut": tree(lambda words: words[1:], first),
    }
    for name, compute in computed.items():
        with pytest.raises(
            ValueError, match=r"computed with them|filled with zeros|were cut"
        ) as caught:
            print(name, compute().unpack())
        assert "unpack" in str(caught.value).lower() or "cut" in str(caught.value), name
    assert first.unpack() == {"loss": -4.0, "vector": [-2.0]}


@on_devices(4)
def test_packed_metrics_of_other_names_are_not_taken_for_these() -> None:
    import dataclasses

    import jax

    from metricfold.jax import DistributedMetrics

    def packed(metrics: dict[str, float]) -> Any:
        reduce = DistributedMetrics().reduce_sum
        return jax.jit(lambda: reduce(metrics, axis_name=None, packed=True))()

    ours = packed({"loss": 1.0, "norm": 2.0})
    for others in ({"loss": 1.0, "rate": 2.0}, {"loss": 1.0, "norm": 2}, {"a": 1.0, "b": 2.0}):
        restored = dataclasses.replace(ours, words=packed(others).words)
        with pytest.raises(ValueError, match="of other metrics"):
            restored.unpack()
    with pytest.raises(
        ValueError, match=r"have 4 words, and these are 3: they are of other metrics"
    ):
        dataclasses.replace(ours, words=packed({"loss": 1.0}).words).unpack()
    assert dataclasses.replace(ours, words=ours.words + 0).unpack() == {"loss": 1.0, "norm": 2.0}


@on_devices(4)
def test_packed_metrics_mean_the_same_wherever_they_lie() -> None:
    """On the host, the copies of a pmap were so many steps; steps split over devices were one."""
    import pickle

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DistributedMetrics

    dm, mesh = DistributedMetrics(), mesh_of(data=4)
    x = np.arange(16, dtype=np.float32).reshape(4, 4)  # as many steps as devices

    def packed(value: Any) -> Any:
        return dm.reduce_sum({"x": value, "v": value[None]}, packed=True)

    def steps(part: Any) -> Any:
        return lax.scan(lambda carry, value: (carry, packed(value)), None, part)[1]

    def mapped(function: Any, out: Any, check: bool = True) -> Any:
        step = jax.shard_map(
            function, mesh=mesh, in_specs=P("data"), out_specs=out, check_vma=check
        )
        return jax.jit(step)(jax.device_put(x, NamedSharding(mesh, P("data"))))

    one, each = x[:, 0].sum(), x.sum(axis=0).tolist()
    made = {
        "pmap": (jax.pmap(lambda part: packed(part[0]))(x), one),
        "pmap, one of them": (
            jax.tree.map(lambda words: words[0], jax.pmap(lambda part: packed(part[0]))(x)),
            one,
        ),
        "pmap of scan": (jax.pmap(steps)(x), each),
        "pmap of scan, one": (jax.tree.map(lambda w: w[0], jax.pmap(steps)(x)), each),
        "shard_map, unchecked": (mapped(lambda p: packed(p[0, 0]), P(), False), one),
        "shard_map, own dimension": (
            mapped(lambda p: jax.tree.map(lambda w: w[None], packed(p[0, 0])), P("data"), False),
            one,
        ),
        "shard_map of scan": (mapped(lambda p: steps(p[0]), P(None)), each),
        "shard_map of scan, end to end": (mapped(lambda p: steps(p[0]), P(None, "data")), each),
    }
    for check in (True, False):
        for out in (P(), P("data")):
            made[f"shard_map, {out}, {check}"] = (
                mapped(lambda p: packed(p[0, 0]), out, check),
                one,
            )
    moves = {
        "nothing": lambda packed: packed,
        "jit": jax.jit(lambda packed: packed),
        "device_get": jax.device_get,
        "np.asarray": lambda packed: jax.tree.map(np.asarray, packed),
        "pickle": lambda packed: pickle.loads(pickle.dumps(jax.device_get(packed))),
        "one device": lambda packed: jax.device_put(packed, jax.devices()[1]),
        "replicated": lambda packed: jax.device_put(packed, NamedSharding(mesh, P())),
        "back": lambda packed: jax.tree.map(jnp.asarray, jax.device_get(packed)),
    }
    for name, (metrics, expected) in made.items():
        for move, moved in moves.items():
            found = moved(metrics).unpack()
            assert np.asarray(found["x"]).tolist() == expected, (name, move)
            assert (
                np.asarray(found["v"]).tolist()
                == np.reshape(expected, (-1, 1)).squeeze(0 if expected is one else ()).tolist()
            ), (name, move)
    split = jax.device_put(made["shard_map of scan"][0], NamedSharding(mesh, P("data")))
    assert split.unpack()["x"].tolist() == each
    # Reduced over two axes, and joined over one of them.
    both = mesh_of(data=2, model=2)

    def over_both(part: Any) -> Any:
        return dm.reduce_sum({"x": part[0, 0]}, ("data", "model"), packed=True)

    step = jax.shard_map(over_both, mesh=both, in_specs=P("data", "model"), out_specs=P("data"))
    joined = jax.jit(step)(x[:2, :2])
    assert joined.unpack() == jax.device_get(joined).unpack() == {"x": x[:2, :2].sum()}


class Pair(NamedTuple):
    loss: Any
    more: Any


@on_devices(2)
def test_metrics_of_any_pytree_are_packed_and_pickled() -> None:
    import pickle

    import jax
    import jax.numpy as jnp
    from flax import nnx, struct

    from metricfold.jax import DistributedMetrics

    @struct.dataclass
    class Struct:
        loss: Any
        more: Any = None

    class Node:
        def __init__(self, loss: Any) -> None:
            self.loss = loss

    jax.tree_util.register_pytree_with_keys(
        Node,
        lambda node: (((jax.tree_util.GetAttrKey("loss"), node.loss),), None),
        lambda _, children: Node(*children),
    )

    def packed(make: Any) -> Any:
        reduce = DistributedMetrics().reduce_custom
        step = lambda x: reduce(make(x), {"loss": "sum", 0: "sum"}, packed=True)  # noqa: E731
        return jax.pmap(step)(jnp.array([1.0, 2.0]))

    found = packed(lambda x: Pair(x, [x, (x, {"y": x})])).unpack()
    assert found == Pair(3.0, [1.5, (1.5, {"y": 1.5})])
    assert pickle.loads(
        pickle.dumps(jax.device_get(packed(lambda x: Pair(x, x))))
    ).unpack() == Pair(3.0, 1.5)
    assert packed(lambda x: Struct(x, x * 2)).unpack() == Struct(3.0, 3.0)
    assert packed(lambda x: [x, x]).unpack() == [3.0, 1.5]
    assert packed(Node).unpack().loss == 3.0
    # What stands for an array is a number once it is unpacked.
    variables = packed(lambda x: {"loss": nnx.Variable(x), "lr": nnx.Param(jnp.float32(0.5))})
    assert variables.unpack() == {"loss": 3.0, "lr": 0.5}


@on_devices(2)
def test_packed_metrics_are_saved_by_flax_and_exported_by_jax() -> None:
    import jax
    import jax.export
    import jax.numpy as jnp
    from flax import serialization

    from metricfold.jax import DistributedMetrics, PackedMetrics

    dm = DistributedMetrics()

    def step(x: Any) -> Any:
        metrics = {"loss": x.sum(), "in": [x.astype(jnp.bfloat16), (1, {3: x.max()})]}
        return dm.reduce_max(metrics, axis_name=None, packed=True)

    x = jnp.array([1.0, 2.0])
    packed, other = jax.jit(step)(x), jax.jit(step)(x * 2)
    expected = packed.unpack()
    restored = serialization.from_bytes(other, serialization.to_bytes(packed))
    found = restored.unpack()
    assert found["in"][1] == expected["in"][1]
    of_others = jax.jit(lambda: dm.reduce_sum({"a": 1.0}, axis_name=None, packed=True))()
    with pytest.raises(ValueError, match="of other metrics"):
        serialization.from_bytes(of_others, serialization.to_bytes(packed)).unpack()
    # What JAX saves of a function's result is its names; to write that down it needs this package.
    exported = jax.export.export(jax.jit(step))(x)
    in_pair = jax.jit(lambda: dm.reduce_sum(Pair(1, 2), axis_name=None, packed=True))
    if find_spec("flatbuffers"):
        found = jax.export.deserialize(exported.serialize()).call(x).unpack()
        assert found["loss"] == expected["loss"] == 3.0
        assert found["in"][0].tolist() == [1.0, 2.0]
        assert found["in"][1] == (1.0, {3: 2.0})
        with pytest.raises(TypeError, match=r"a Pair cannot be exported: let .* return a dict"):
            jax.export.export(in_pair)().serialize()
    known = import_module("jax._src.export._export")
    (name, to_bytes), names = known.serialization_registry[PackedMetrics], exported.out_tree
    from_bytes, unflatten = known.deserialization_registry[name][1:]
    fields = from_bytes(to_bytes(names.node_data()[1]))
    assert jax.tree.structure(unflatten(fields, [packed.words])) == names
    with pytest.raises(TypeError, match=r"a Pair cannot be exported: let .* return a dict"):
        to_bytes(jax.tree.structure(in_pair()).node_data()[1])


@on_devices(1)
def test_packed_metrics_that_were_donated_say_so() -> None:
    import jax

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()
    packed = jax.jit(lambda: dm.reduce_sum({"a": 1.0}, axis_name=None, packed=True))()
    packed.words.delete()
    with pytest.raises(ValueError, match="were donated to a compiled function, or deleted"):
        packed.unpack()
    shape = jax.eval_shape(lambda: dm.reduce_sum({"a": 1.0}, axis_name=None, packed=True))
    with pytest.raises(TypeError, match=r"unpack\(\) reads values"):
        shape.unpack()


@on_devices(2)
def test_metrics_are_packed_in_what_is_differentiated_checkpointed_and_looped() -> None:
    import jax
    import jax.numpy as jnp
    from jax import lax

    from metricfold.jax import DistributedMetrics

    def loss(weight: Any, x: Any) -> Any:
        value = (weight * x) ** 2
        return value, DistributedMetrics().reduce_mean({"loss": value, "x": x}, packed=True)

    def step(x: Any) -> Any:
        (_, packed), _ = jax.value_and_grad(loss, has_aux=True)(jnp.float32(2), x)
        again = jax.checkpoint(loss)(jnp.float32(2), x)[1]
        chosen = lax.cond(x > 100, lambda: again, lambda: packed)
        carried = lax.fori_loop(0, 3, lambda _, old: jax.tree.map(lambda w: w, old), chosen)
        return packed, again, carried

    for packed in jax.pmap(step)(jnp.array([1.0, 3.0])):
        assert packed.unpack() == {"loss": 20.0, "x": 2.0}


@on_devices(2)
def test_a_step_on_a_mesh_that_takes_the_packed_metrics_of_the_step_before_compiles_once() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from jax_ways import mesh_of

    from metricfold.jax import DistributedMetrics

    mesh = mesh_of(data=2)
    x = jax.device_put(np.float32([1, 3]), NamedSharding(mesh, P("data")))

    def step(packed: Any, x: Any, due: Any) -> Any:
        new = DistributedMetrics().reduce_mean({"x": x.mean()}, axis_name=None, packed=True)
        return new if packed is None else lax.cond(due, lambda: new, lambda: packed)

    compiled = jax.jit(step, donate_argnums=0)
    packed = compiled(None, x, jnp.array(True))
    for i in range(4):
        packed = compiled(packed, x * (i + 1), jnp.array(i == 2))
    assert packed.unpack() == {"x": 6.0}
    assert compiled._cache_size() == 2  # with metrics of a step before, and without


@on_devices(1)
def test_who_records_or_logs_packed_metrics_is_told_to_unpack_them() -> None:
    import jax

    from metricfold import MetricsAggregator, MetricsLogger
    from metricfold.jax import DistributedMetrics

    packed = jax.jit(lambda: DistributedMetrics().reduce_sum({"a": 1.0}, None, packed=True))()
    aggregator = MetricsAggregator()
    with MetricsLogger([]) as logger:
        for call in (
            lambda: aggregator.record("a", packed),
            lambda: aggregator.record_all(packed),
            lambda: aggregator.update(packed),
            lambda: logger.log(0, packed),
            lambda: logger.log(0, {"a": packed}),
        ):
            with pytest.raises(TypeError, match=r"unpack packed metrics first, .*packed\.unpack"):
                call()
