"""Statistics of each leaf of a tree, in a compiled step, are those of NumPy on the whole arrays."""

from __future__ import annotations

import functools
import pickle
import re
from typing import Any

import pytest
from jax_devices import on_devices
from jax_processes import end_processes

ENDS = ("norm", "mean", "abs_max", "zeros", "nonfinite")


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Any:
    yield
    end_processes()


def grads() -> Any:
    """Return leaves of every magnitude, among them a bfloat16, a number, stacked layers, NaN and infinity."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    tree = {
        "embed": rng.normal(size=(32, 16)),
        "head": rng.normal(size=(8, 32)) * 1e25,
        "layers": {
            "b": np.where(rng.random((4, 8)) < 0.3, 0, rng.normal(size=(4, 8))),
            "w": rng.normal(size=(4, 16, 8)) * 1e-25,
        },
        "scale": rng.normal(),
        "steps": 3,  # no floating-point number
    }
    tree = jax.tree.map(lambda x: x if isinstance(x, int) else np.float32(x), tree)
    tree["layers"]["b"][2, 3], tree["layers"]["b"][1, 1] = np.nan, np.inf
    tree["embed"][:4] = np.float32(1e-41)  # subnormal, and not 0
    tree["half"] = jnp.asarray(rng.normal(size=(64,)) + 3, jnp.bfloat16)
    return tree


def specs() -> Any:
    from jax.sharding import PartitionSpec as P

    layers = {"b": P(None, "data"), "w": P(None, "model")}
    return {
        "embed": P("data", "model"),
        "head": P(("data", "model")),
        "layers": layers,
        "scale": P(),
        "steps": P(),
        "half": P("model"),
    }


def truth(values: Any) -> dict[str, float]:
    import numpy as np

    x = np.asarray(values).astype(np.float64).ravel()
    finite = x[np.isfinite(x)]
    return {
        "norm": np.sqrt(np.square(finite).sum()),
        "mean": finite.mean(),
        "abs_max": np.abs(finite).max(),
        "zeros": (x == 0).mean(),
        "nonfinite": (~np.isfinite(x)).sum(),
    }


def octaves(values: Any) -> Any:
    """Return how many magnitudes lie in each octave."""
    import numpy as np

    x = np.abs(np.asarray(values).astype(np.float64).ravel())
    x = x[np.isfinite(x) & (x > 0)]
    return np.bincount(np.clip(np.floor(np.log2(x)) + 64, 0, 127).astype(int), minlength=128)


def check(acc: Any, tree: Any, name: str = "grad") -> None:
    """Check what is logged of each leaf and layer, and of all."""
    import jax
    import numpy as np

    from metricfold import MetricsAggregator

    aggregator = MetricsAggregator(on_nan="skip")
    aggregator.drain(acc)
    snapshot = aggregator.reduce()
    wanted = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        label = jax.tree_util.keystr(path, simple=True, separator="/")
        if label.startswith("layers/"):
            wanted |= {(label, str(place)): truth(layer) for place, layer in enumerate(leaf)}
        elif label != "steps":
            wanted[label, "outside"] = truth(leaf)
    for end in ENDS:
        values, (parameters, layers) = snapshot.array(None, f"{name}/{end}")
        for (row, column), found in np.ndenumerate(values):
            cell = wanted.get((parameters[row], layers[column]))
            if cell is None:
                assert np.isnan(found)
                continue
            # A mean may be near 0, where it is right to 1e-6 of the values.
            room = {"norm": 1e-6 * cell["norm"], "mean": 1e-6 * cell["norm"]}.get(end, 0)
            assert found == pytest.approx(cell[end], rel=0, abs=room), (end, parameters[row])
    if acc.layout.trees[0].octaves:
        found, labels = snapshot.array(None, f"{name}/octaves", by=("parameter", "octave"))
        for row, label in enumerate(labels[0]):
            leaf = functools.reduce(lambda part, key: part[key], label.split("/"), tree)
            np.testing.assert_array_equal(found[row], octaves(leaf))
    said = snapshot.as_dict("t")
    whole = truth(
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)[:-1]])
    )
    norm = np.sqrt(sum(cell["norm"] ** 2 for cell in wanted.values()))
    assert said[f"t/{name}/norm"] == pytest.approx(norm, rel=1e-6)
    assert said[f"t/{name}/nonfinite"] == sum(cell["nonfinite"] for cell in wanted.values())
    assert said[f"t/{name}/abs_max"] == whole["abs_max"]


def collectives(text: str) -> list[str]:
    return re.findall(r" (all-[a-z]+|reduce-scatter|collective-[a-z]+)\(", text)


@on_devices(4)
def test_statistics_are_those_of_the_whole_arrays_however_they_are_cut() -> None:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from metricfold.jax import DeviceAccumulator

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    tree, cut = grads(), specs()
    how: Any = {"trees": {"grad": tree}, "stacked": "layers/*", "octaves": True}
    empty = DeviceAccumulator({}, **how, mesh=mesh)
    check(empty.watch_tree("grad", tree), tree)

    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, cut)
    global_ = jax.jit(lambda acc, tree: acc.watch_tree("grad", tree)).lower(empty, placed).compile()
    acc = global_(empty, placed)
    check(acc, tree)
    check(global_(acc, placed), tree)  # collected twice: their mean
    # A sum and a maximum for each way in which leaves are cut, and no more: data, model, and both.
    assert collectives(global_.as_text()).count("all-reduce") <= 6
    assert {*collectives(global_.as_text())} == {"all-reduce"}

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), cut), out_specs=P())
    def sharded(acc: Any, tree: Any) -> Any:
        return acc.watch_tree("grad", tree, specs=cut, axes=("data", "model"))

    compiled = sharded.lower(empty, placed).compile()
    check(compiled(empty, placed), tree)
    assert collectives(compiled.as_text()) == ["all-reduce", "all-reduce"]


@on_devices(4)
def test_layers_that_lie_on_several_devices_are_each_in_their_place() -> None:
    import jax
    import numpy as np
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    from metricfold.jax import DeviceAccumulator

    mesh = Mesh(np.array(jax.devices()).reshape(4), ("stage",))
    tree = {"layers": grads()["layers"], "scale": np.float32(2), "steps": 1}
    empty = DeviceAccumulator({}, trees={"grad": tree}, stacked=["layers/*"], mesh=mesh)
    cut = {"layers": P("stage"), "scale": P(), "steps": P()}

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), cut), out_specs=P())
    def sharded(acc: Any, tree: Any) -> Any:
        return acc.watch_tree("grad", tree, specs=cut)

    check(sharded(empty, tree), tree)


@on_devices(4)
def test_steps_that_do_not_collect_have_nothing_of_it_and_there_are_two_programs() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(4, 8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(8, 1, use_bias=False, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(jnp.tanh(self.first(x)))

    model = Model(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    acc = DeviceAccumulator({"loss": "mean"}, trees={"grad": params, "param": model})

    @functools.partial(jax.jit, static_argnames="due")
    def step(params: Any, acc: Any, x: Any, due: bool) -> Any:
        def loss(params: Any) -> Any:
            return jnp.square(nnx.merge(graph, params, rest)(x)).mean()

        value, grads = jax.value_and_grad(loss)(params)
        acc = acc.update("loss", value)
        if due:
            acc = acc.watch_tree("grad", grads).watch_tree("param", params)
        return acc, grads

    x = jnp.ones((2, 4))
    for number in range(1, 5):
        acc, found = step(params, acc, x, due=number % 2 == 0)
    assert step._cache_size() == 2
    off, due = (step.lower(params, acc, x, due=due).as_text() for due in (False, True))
    plain = DeviceAccumulator({"loss": "mean"})
    bare = step.lower(params, plain, x, due=False).as_text()
    assert off.count("stablehlo.reduce") == bare.count("stablehlo.reduce")
    assert due.count("stablehlo.reduce") > off.count("stablehlo.reduce")

    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    snapshot = aggregator.reduce()
    wanted = {
        "first/bias": found["first"]["bias"],
        "first/kernel": found["first"]["kernel"],
        "last/kernel": found["last"]["kernel"],
    }
    values, (labels,) = snapshot.array(None, "grad/norm")
    assert labels == tuple(wanted)
    norms = [truth(leaf[...])["norm"] for leaf in wanted.values()]
    np.testing.assert_allclose(values, norms, rtol=1e-6)
    printed = snapshot.as_dict("t", by={"grad/norm": "parameter"})
    assert printed["t/grad/norm/parameter_last/kernel"] == pytest.approx(norms[2], rel=1e-6)
    assert {key for key in printed if key.startswith("t/param")} == {
        f"t/param/{end}" for end in ENDS
    }


@on_devices(4)
def test_trees_in_an_accumulator_are_merged_reduced_kept_and_guarded_like_metrics() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import serialization

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    tree = grads()
    empty = DeviceAccumulator({"n": "sum"}, trees={"grad": tree}, stacked="layers/*")
    acc = empty.watch_tree("grad", tree).update("n", 1)
    saved = serialization.to_state_dict(acc)
    for kept in (
        pickle.loads(pickle.dumps(acc)),
        jax.device_get(acc),
        serialization.from_state_dict(empty, saved),
        empty.merge(acc).merge(acc),
    ):
        check(kept, tree)
    assert type(acc.layout).from_json(acc.layout.as_json()) == acc.layout

    # Each device of a pmap has collected the same: it counts once.
    one = jax.device_get((acc.empty(), tree))  # a mesh that other tests have made is not asked for
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (4, *np.shape(x))), one)
    together = jax.pmap(lambda acc, tree: acc.watch_tree("grad", tree).reduce())(*many)
    check(jax.tree.map(lambda x: x[0], together), tree)

    for broken in (jax.tree.map(jnp.add, acc, acc), jax.tree.map(jnp.zeros_like, acc)):
        with pytest.raises(ValueError, match="added up, averaged"):
            MetricsAggregator().drain(broken)
    other = DeviceAccumulator({"n": "sum"}, trees={"grad": tree})
    with pytest.raises(ValueError, match=r"its lanes have the shape|other metrics"):
        serialization.from_state_dict(other, saved)


@on_devices(4)
def test_what_cannot_be_watched_is_said_when_the_step_is_traced() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    from metricfold.jax import DeviceAccumulator

    tree = {"a": jnp.ones((4, 2)), "b": jnp.ones(3)}
    acc = DeviceAccumulator({"loss": "mean"}, trees={"grad": tree})
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def inside(cut: Any, **how: Any) -> Any:
        def watch(acc: Any, tree: Any) -> Any:
            return acc.watch_tree("grad", tree, **how)

        run = jax.shard_map(watch, mesh=mesh, in_specs=(P(), cut), out_specs=P())
        return lambda: jax.eval_shape(run, acc, tree)

    by_a = {"a": P("data"), "b": P()}
    for call, message in (
        (lambda: acc.watch_tree("param", tree), "watches no tree 'param', but 'grad'"),
        (
            lambda: acc.watch_tree("grad", tree | {"c": jnp.ones(2)}),
            "leaf 'c' of the tree 'grad' was not",
        ),
        (
            lambda: acc.watch_tree("grad", {"a": jnp.ones((2, 2))}),
            "Inside of shard_map give specs=",
        ),
        (lambda: acc.watch_tree("grad", tree, stacked="a"), r"DeviceAccumulator\(..., trees="),
        (lambda: acc.watch_tree("grad", tree, axes="data"), "give both"),
        (inside(by_a), r"leaf 'a' of the tree 'grad' has the shape \(1, 2\), but \(4, 2\)"),
        (inside(by_a, specs=P()), "do not come to that: see specs="),
        (lambda: DeviceAccumulator({}, trees={"g": {"n": 1}}), "no leaf that holds floating-point"),
        (
            lambda: DeviceAccumulator({}, trees={"g": tree}, stacked="c"),
            "stacked='c' is no leaf of 'g'",
        ),
        (
            lambda: DeviceAccumulator({"g/norm": "mean"}, trees={"g": tree}),
            "metric 'g/norm' is what a watched",
        ),
        (lambda: DeviceAccumulator({}, trees={}), "give each metric's aggregation"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    with pytest.raises(NameError, match="leave specs= out"):
        acc.watch_tree("grad", tree, specs=P())
    with pytest.raises(TypeError, match="specs= say nothing of leaf 'b'"):
        inside(by_a, specs={"a": P("data")})()

    def partial_sums(acc: Any, x: Any) -> Any:
        return acc.watch_tree("grad", {"b": x[0] * jnp.ones(3)}, specs=P())

    run = jax.shard_map(partial_sums, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(
        ValueError, match=r"'b' of the tree 'grad' differs over the axis 'data'.*psum"
    ):
        jax.eval_shape(run, acc, jnp.arange(4.0))


@on_devices(4)
def test_what_others_have_reported_is_right_here() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    def drained(acc: Any) -> Any:
        aggregator = MetricsAggregator()
        aggregator.drain(acc)
        return aggregator.reduce()

    def watched(tree: Any, **how: Any) -> Any:
        return drained(DeviceAccumulator({}, trees={"g": tree}, **how).watch_tree("g", tree))

    # jax #39899: of float16 the norm was infinite; e3x #32: 5e-20 was 0.
    half = {"x": jnp.full((3, 3), 100, jnp.float16)}
    assert watched(half).value(None, "g/norm") == 300
    far = {"large": jnp.array([3e30, 4e30]), "small": jnp.array([3e-20, 4e-20])}
    np.testing.assert_allclose(watched(far).array(None, "g/norm")[0], [5e30, 5e-20], rtol=1e-6)
    # numba #10647, jax #23236: beyond 2^24 elements their number was rounded.
    many = np.zeros(2**24 + 1, np.float32)
    many[0] = 2**24 - 1
    snapshot = watched({"x": many})
    assert snapshot.value(None, "g/zeros") == 2**24 / many.size
    assert snapshot.value(None, "g/mean") == (2**24 - 1) / many.size
    # Megatron-LM #7227: a tied weight counted twice.

    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Param(jnp.full(4, 10.0))
            self.head = self.embed

    values, labels = watched(Tied()).array(None, "g/norm")
    assert (values.tolist(), labels) == ([20.0], (("embed",),))
    # marin #8688: scanned layers had one norm, and no layer could be told.
    stack = {"blocks": {"w": jnp.stack([jnp.full(4, float(layer)) for layer in range(12)])}}
    printed = watched(stack, stacked="blocks/*").as_dict("t", by={"g/norm": "layer"})
    assert [printed[f"t/g/norm/layer_{layer:02}"] for layer in (0, 1, 11)] == [0, 2, 22]
    # NeMo-RL #3788: what tensor parallelism leaves replicated counted once on each device.
    tree, cut = {"norm": np.full(5, 3.0), "w": np.full((8, 2), 2.0)}, {"norm": P(), "w": P("model")}
    mesh = Mesh(np.array(jax.devices()), ("model",))

    @jax.shard_map(mesh=mesh, in_specs=(P(), cut), out_specs=P())
    def sharded(acc: Any, tree: Any) -> Any:
        return acc.watch_tree("g", tree, specs=cut)

    found = drained(sharded(DeviceAccumulator({}, trees={"g": tree}, mesh=mesh), tree))
    assert found.value(None, "g/norm") == pytest.approx(np.sqrt(16 * 4 + 5 * 9), rel=1e-6)
