"""Metrics of an accumulator in JAX that have axes: each cell says what its values say when recorded."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from jax_devices import on_devices
from jax_processes import end_processes

METRICS = {
    "loss": "mean",
    "position": ("mean", "position"),
    "tokens": ("sum", "layer", "expert"),
    "top": ("max", "expert"),
}
AXES = {"position": 4, "layer": 2, "expert": ["e0", "e1", "e2"]}
NAMES = ("web", "code")
SHAPE = {"position": (4,), "tokens": (2, 3), "top": (3,)}


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Any:
    yield
    end_processes()


def batch(seed: int = 0) -> dict[str, Any]:
    import numpy as np

    rng = np.random.default_rng(seed)
    return {
        "loss": rng.normal(size=(8, 4)).astype(np.float32),
        "mask": rng.integers(0, 2, (8, 4)).astype(np.float32) * 0.5,
        "dataset": rng.integers(0, 2, 8).astype(np.int32),
        "expert": rng.integers(0, 3, (2, 8, 2)).astype(np.int32),
    }


def step(acc: Any, b: Any) -> Any:
    """Take in a batch: by `ids` that broadcast, by the last dimensions, and by `at` in a scan over layers."""
    import jax
    import jax.numpy as jnp

    acc = acc.update_all(
        {"loss": b["loss"], "position": b["loss"]},
        weights=b["mask"],
        dataset_ids=b["dataset"],
        ids={"position": jnp.arange(4)[None]},
    )

    def layer(acc: Any, of: Any) -> Any:
        place, expert = of
        tokens = acc.at("tokens", layer=place)
        ones = jnp.ones_like(expert)
        return tokens.update(ones, ids={"expert": expert}, dataset_ids=b["dataset"]), None

    acc, _ = jax.lax.scan(layer, acc, (jnp.arange(2), b["expert"]))
    return acc.update("top", b["loss"][:, :3], dataset_ids=b["dataset"])


def wanted(*batches: Any) -> dict[tuple[str, str], Any]:
    """Return the same from NumPy."""
    import numpy as np

    found = {}
    for place, dataset in enumerate(NAMES):
        mine = [
            {k: np.moveaxis(v, 1, 0) if k == "expert" else v for k, v in b.items()} for b in batches
        ]
        mine = [{k: v[b["dataset"] == place] for k, v in b.items()} for b in mine]
        x, w = (np.concatenate([b[k] for b in mine]).astype(float) for k in ("loss", "mask"))
        found[dataset, "position"] = (x * w).sum(0) / w.sum(0)
        tokens = np.zeros((2, 3))
        for b in mine:
            for layer in range(2):
                tokens[layer] += np.bincount(b["expert"][:, layer].ravel(), minlength=3)
        found[dataset, "tokens"] = tokens
        found[dataset, "top"] = x[:, :3].max(0)
    return found


def check(aggregator: Any, *batches: Any) -> None:
    import numpy as np

    snapshot = aggregator.reduce()
    for (dataset, name), values in wanted(*batches).items():
        found, labels = snapshot.array(dataset, name)
        np.testing.assert_allclose(found, values, rtol=1e-6)
        assert tuple(map(len, labels)) == SHAPE[name]
    dict_ = snapshot.as_dict("t")
    assert dict_["t_web/position"] == pytest.approx(dict_["t_web/loss"], rel=1e-6)


@on_devices(4)
def test_each_cell_says_what_its_values_say_under_jit_on_a_mesh_and_in_shard_map() -> None:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    mesh = Mesh(np.array(jax.devices()), ("data",))
    specs = {"loss": P("data"), "mask": P("data"), "dataset": P("data"), "expert": P(None, "data")}
    batches = batch(0), batch(1)
    placed = [
        jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), b, specs)
        for b in batches
    ]
    jitted = jax.jit(step)
    acc = DeviceAccumulator(METRICS, NAMES, axes=AXES, mesh=mesh)
    for b in placed:
        acc = jitted(acc, b)
    assert jitted._cache_size() == 1
    aggregator = MetricsAggregator()
    empty = aggregator.drain(acc)
    check(aggregator, *batches)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), specs), out_specs=P())
    def sharded(acc: Any, b: Any) -> Any:
        acc = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), acc)
        return step(acc, b).reduce()

    again = MetricsAggregator()
    again.drain(sharded(empty, placed[0]).merge(sharded(empty, placed[1])))
    check(again, *batches)


@on_devices(4)
def test_arrays_with_axes_are_kept_and_those_of_other_axes_refused() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import serialization

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    made = DeviceAccumulator(METRICS, NAMES, axes=AXES)
    ids = {"expert": "e2", "layer": 1}
    acc = made.update("tokens", np.float32([1, 2]), ids=ids, dataset_ids=[0, 1])
    saved = serialization.to_state_dict(acc)
    for kept in (
        pickle.loads(pickle.dumps(acc)),
        jax.device_get(acc),
        serialization.from_state_dict(made, saved),
    ):
        aggregator = MetricsAggregator()
        aggregator.drain(kept)
        values, labels = aggregator.reduce().array("code", "tokens")
        np.testing.assert_array_equal(np.nan_to_num(values), [[0, 0, 0], [0, 0, 2]])
        assert labels == (("0", "1"), ("e0", "e1", "e2"))
    other = DeviceAccumulator(METRICS, NAMES, axes=AXES | {"expert": ["e0", "e2", "e1"]})
    with pytest.raises(
        ValueError, match="axes, datasets or trees, or with the same in another order"
    ):
        serialization.from_state_dict(other, saved)
    with pytest.raises(ValueError, match="only accumulators of the same metrics merge"):
        acc.merge(other)
    with pytest.raises(ValueError, match="added up, averaged"):
        MetricsAggregator().drain(jax.tree.map(jnp.add, acc, acc))
    # Numbers of the host are no constants of a program.
    from metricfold.jax import accumulator as module

    programs = module._updated._cache_size()
    for layer in range(2):
        acc = acc.at("tokens", layer=layer).update(1.0, ids={"expert": "e1"}, dataset_ids=0)
    assert module._updated._cache_size() == programs + 1


@on_devices(4)
def test_ids_that_name_no_cell_are_refused_or_left_out() -> None:
    import logging

    import jax.numpy as jnp
    import numpy as np

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator(
        {"n": "sum", "t": ("sum", "layer", "expert")}, axes={"layer": 2, "expert": 3}
    )
    one = jnp.ones(3)
    for call, message in (
        (
            lambda: acc.update("t", one, ids={"layer": 2}),
            "axis 'layer' has the cells 0 to 1, but not 2",
        ),
        (lambda: acc.update("t", one, ids={"depth": 0}), "names the axis 'depth'"),
        (
            lambda: acc.update("n", one, ids={"layer": 0}),
            "names the axis 'layer', but metric 'n' has none",
        ),
        (lambda: acc.update("t", one), r"no ids= for 'layer', 'expert'"),
        (
            lambda: acc.update("t", one, ids={"layer": 0, "expert": jnp.arange(2)}),
            r"ids\['expert'\] of",
        ),
        (lambda: acc.at("t", layer=7), "axis 'layer' has the cells"),
        (lambda: acc.at("t", layer=0).update(one, ids={"layer": 1}), "which at"),
        (lambda: DeviceAccumulator({"t": ("sum", "x")}), "'x'"),
        (lambda: DeviceAccumulator({"t": ("distribution", "x")}, axes={"x": 2}), "distribution"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"ids\['expert'\] of metric 't' are of type float32"):
        acc.update("t", one, ids={"layer": 0, "expert": one})

    heard: list[str] = []
    logger = logging.getLogger("metricfold")
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        expert, mask = np.array([1, 3, -1, 2**40]), np.array([1, 1, 0, 1])
        acc = acc.update("t", jnp.ones(4), ids={"layer": 0, "expert": expert}, weights=mask)
        aggregator = MetricsAggregator()
        aggregator.drain(acc)
        values, _ = aggregator.reduce().array(None, "t")
    finally:
        logger.removeHandler(handler)
    np.testing.assert_array_equal(np.nan_to_num(values), [[0, 1, 0], [0, 0, 0]])
    assert len(heard) == 1
    assert heard[0].startswith("2 values of metric 't' came with ids outside of 0..1 of 'layer'")
