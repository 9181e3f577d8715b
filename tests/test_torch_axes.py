"""Metrics with axes that accumulate on a device say of each cell what a plain metric of it would."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from ranks import run_threads
from test_torch_accumulator import VIEWS, WAITING, Calls, Watch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metricfold import MetricsAggregator, Snapshot
from metricfold.torch import DeviceAccumulator

AXES = {"layer": 3, "expert": 4}
NAMES = ("web", "code")
KINDS = ("sum", "mean", "max", "min")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)


def drained(*accumulators: DeviceAccumulator) -> Snapshot:
    aggregator = MetricsAggregator()
    for acc in accumulators:
        aggregator.drain(acc)
    return aggregator.reduce()


def cells(
    snapshot: Snapshot, dataset: str | None, name: str, kind: str = "sum"
) -> np.ndarray[Any, Any]:
    values = snapshot.array(dataset, name)[0]
    return np.where(np.isnan(values), 0.0, values) if kind == "sum" else values


class Truth:
    """The same values, recorded one by one, a plain metric for each cell."""

    def __init__(self) -> None:
        self.aggregator = MetricsAggregator(None)
        self.known: set[tuple[str | None, str]] = set()

    def record(
        self, kind: str, values: Any, weights: Any, datasets: Any, layers: Any, experts: Any
    ) -> None:
        columns = (values, weights, datasets, layers, experts)
        for value, weight, dataset, layer, expert in zip(
            *(column.reshape(-1).tolist() for column in columns), strict=True
        ):
            inside = 0 <= dataset < 2 and 0 <= layer < 3 and 0 <= expert < 4
            if inside and weight:
                key = NAMES[dataset], f"{kind}.{layer}.{expert}"
                self.known.add(key)
                weight = weight if kind == "mean" else 1.0
                self.aggregator.record(key[1], value, kind, dataset=key[0], weight=weight)

    def cells(self, snapshot: Snapshot, dataset: str, kind: str) -> np.ndarray[Any, Any]:
        """Return what is known of each cell of a dataset."""
        found = np.full((3, 4), 0.0 if kind == "sum" else math.nan)
        for layer, expert in product(range(3), range(4)):
            if (dataset, f"{kind}.{layer}.{expert}") in self.known:
                found[layer, expert] = snapshot.value(dataset, f"{kind}.{layer}.{expert}")
        return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighing", ["none", "mask", "weights"])
def test_any_cell_is_what_its_values_recorded_one_by_one_are(kind: str, weighing: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    acc = DeviceAccumulator({"plain": "mean", kind: (kind, "layer", "expert")}, NAMES, axes=AXES)
    truth = Truth()
    everything = torch.arange(3).view(3, 1), torch.arange(4)
    for turn, dtype in enumerate(DTYPES * 2):
        # What ids name: both axes, one, the other, or none; as one place or as one for each value.
        layer_last, expert_last = turn % 4 in (2, 3), turn % 4 in (1, 3)
        shape = (5, 2, *((3,) if layer_last else ()), *((4,) if expert_last else ()))
        values = torch.from_numpy(rng.integers(0, 100, shape) / 4.0).to(dtype)
        if dtype.is_floating_point and kind != "sum":
            values.view(-1)[rng.integers(values.numel())] = rng.choice([math.nan, -math.inf])
        datasets = torch.from_numpy(rng.integers(-1, 3, 5))
        ids: dict[str, Any] = {}
        if not layer_last:
            ids["layer"] = (
                1 if turn > 6 else torch.from_numpy(rng.integers(-1, 4, 5)).to(torch.int32)
            )
        if not expert_last:
            ids["expert"] = torch.from_numpy(rng.integers(-2, 6, shape))
        weights: Any = None
        if weighing != "none":
            weights = torch.from_numpy(rng.integers(0, 3, shape))
            weights = weights > 0 if weighing == "mask" else weights.double()
        acc.update(kind, values, ids=ids, dataset_ids=datasets, weights=weights)

        def wide(given: Any, shape: tuple[int, ...] = shape) -> torch.Tensor:
            tensor = torch.as_tensor(given)
            if tensor.ndim == 1 and len(tensor) == 5:
                tensor = tensor.view(5, *(1 for _ in shape[1:]))
            return tensor.expand(shape)

        last_layer = everything[0] if expert_last else everything[0].view(3)
        truth.record(
            kind,
            values,
            wide(1 if weights is None else weights),
            wide(datasets),
            wide(ids.get("layer", last_layer)),
            wide(ids.get("expert", everything[1])),
        )
    snapshot, merged = drained(acc), truth.aggregator.reduce()
    for dataset in NAMES:
        wanted = truth.cells(merged, dataset, kind)
        np.testing.assert_allclose(cells(snapshot, dataset, kind, kind), wanted, rtol=1e-12)


@pytest.mark.parametrize("kind", ["sum", "mean", "max"])
def test_what_is_no_cell_or_weighs_wrong_is_left_out_and_said(kind: str, warned: list[str]) -> None:
    acc = DeviceAccumulator({"t": (kind, "layer", "expert")}, NAMES, axes=AXES)
    good, bad = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([-1, 2, 2**40, -(2**40), 7])
    layers, experts = torch.tensor([0, 3, 1, -1, 2]), torch.tensor([0, 0, 4, 0, -3])
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])  # what weighs nothing may have any id
    ids = {"layer": layers, "expert": experts}
    acc.update("t", torch.ones(5), ids=ids, dataset_ids=good, weights=weights)
    acc.update("t", torch.ones(5), ids=ids, dataset_ids=bad, weights=weights > 0)
    acc.update(
        "t",
        torch.ones(5),
        ids={"layer": 0, "expert": good},
        dataset_ids=good,
        weights=torch.tensor([1.0, -1.0, math.nan, math.inf, 0.0]),
    )
    snapshot = drained(acc)
    assert snapshot.array("web", "t")[0][0, 0] == {"sum": 2}.get(kind, 1)
    assert snapshot.as_dict("t").keys() == {"t_web/t"}
    outside, weighs = warned
    assert outside == (
        "7 values of metric 't' came with ids or dataset_ids outside of 0..2 of 'layer', 0..3 of "
        "'expert', 0..1 of the datasets and were left out: each must be the place of a cell along its "
        "axis, or of a name in datasets=('web', 'code')"
    )
    assert weighs.startswith("3 values of metric 't' came with weights that are negative")


def test_ids_that_cannot_be_are_errors_that_change_nothing() -> None:
    metrics = {"t": ("sum", "layer", "expert"), "norm": ("mean", "parameter"), "loss": "mean"}
    acc = DeviceAccumulator(metrics, axes=AXES | {"parameter": ["w", "b"]})
    three = torch.arange(3)
    layer = acc.at("t", layer=1)
    for update, said in (
        (lambda: acc.update("t", torch.ones(3), ids={"layer": 3, "expert": three}), "0 to 2"),
        (lambda: acc.update("t", torch.ones(3), ids={"layer": -1, "expert": three}), "0 to 2"),
        (lambda: acc.update("t", torch.ones(3), ids={"layer": 0}), r"no ids= for 'expert'.*\(4,\)"),
        (lambda: acc.update("t", torch.ones(4, 3)), r"shape \(4, 3\).*'layer', 'expert'.*\(3, 4\)"),
        (lambda: acc.update("t", 1.0, ids={"position": 0}), "'position', but metric 't' has"),
        (lambda: acc.update("loss", 1.0, ids={"layer": 0}), "metric 'loss' has none"),
        (
            lambda: acc.update("t", torch.ones(3), ids={"layer": 0, "expert": three[:2]}),
            "ids of axis 'expert' of metric 't' have the shape",
        ),
        (lambda: acc.update("norm", 1.0, ids={"parameter": "bias"}), "no label 'bias'"),
        (lambda: acc.at("t", layer=5), "metric 't': axis 'layer'"),
        (lambda: acc.at("loss", layer=5), "metric 'loss' has none"),
        (lambda: acc.at("T", layer=1), "no metric 'T'"),
        (
            lambda: layer.update(torch.ones(4), ids={"layer": 0}),
            r"at\('t', layer=1\) has its place",
        ),
        (lambda: acc.token_loss(torch.ones(3, 2), three % 2, ids={"layer": 0}), "'layer'"),
    ):
        with pytest.raises(ValueError, match=said):
            update()
    for update, said in (
        (lambda: acc.update("t", torch.ones(3), ids={"layer": 0, "expert": three / 2}), "integers"),
        (lambda: acc.update("t", torch.ones(3), ids={"layer": 0, "expert": [0, 1, 2]}), "a list"),
        (lambda: acc.update("t", torch.ones(3), ids=three), "say by axis"),
        (lambda: acc.at("t", layer=1.5), "whole numbers"),
    ):
        with pytest.raises(TypeError, match=said):
            update()
    assert not drained(acc).as_dict("t")


def test_metrics_of_the_same_samples_take_the_ids_of_the_axes_that_they_have() -> None:
    metrics = {
        "loss": ("mean", "position"),
        "tokens": ("sum", "position"),
        "worst": "max",
        "of_expert": ("mean", "expert", "position"),
    }
    together, alone = (
        DeviceAccumulator(metrics, NAMES, axes={"position": 2, "expert": 2}) for _ in range(2)
    )
    x, y = torch.randn(5, 3), torch.randint(0, 9, (5, 3))
    ids = {"position": torch.tensor([[0, 0, 1]]), "expert": torch.tensor([0, 1, 1, 0, 0])}
    datasets, mask = torch.tensor([0, 1, 1, 0, 1]), x > -0.5
    values = {"loss": x, "tokens": y, "worst": x, "of_expert": x}
    together.update_all(values, ids=ids, dataset_ids=datasets, weights=mask)
    for name, one in values.items():
        has = {axis.name for axis in alone.layout.axes[alone.layout.place(name)]}
        own = {axis: given for axis, given in ids.items() if axis in has}
        alone.update(name, one, ids=own, dataset_ids=datasets, weights=mask)
    assert all(map(torch.equal, together.tensors, alone.tensors))
    assert together.tensors[3].any()


def test_labels_stand_in_the_order_in_which_they_are_given() -> None:
    acc = DeviceAccumulator({"norm": ("max", "parameter")}, axes={"parameter": ["w", "b", "a"]})
    acc.update("norm", torch.tensor([3.0, 2.0, 1.0]))
    acc.update("norm", torch.tensor([7.0]), ids={"parameter": torch.tensor([2])})
    acc.at("norm", parameter="b").update(5.0)
    acc.update("norm", 4.0, ids={"parameter": "w"})
    values, labels = drained(acc).array(None, "norm")
    assert dict(zip(labels[0], values.tolist(), strict=True)) == {"a": 7.0, "b": 5.0, "w": 4.0}


def test_loss_by_position_is_that_of_the_tokens_there() -> None:
    """The last dimensions of the values are an axis of their size; ids may be buckets of it."""
    logits, labels = torch.randn(6, 8, 5, requires_grad=True), torch.randint(0, 5, (6, 8))
    labels[:3, 6:] = -100
    datasets = torch.tensor([0, 1, 0, 1, 0, 1])
    acc = DeviceAccumulator(
        {"loss": ("mean", "position"), "bucketed": ("mean", "bucket")},
        NAMES,
        axes={"position": 8, "bucket": 3},
    )
    buckets = {"bucket": (torch.arange(8) // 3)[None]}
    first = acc.token_loss(logits, labels, datasets)
    second = acc.token_loss(logits, labels, datasets, ids=buckets, name="bucketed")
    assert first.item() == second.item()
    assert first.item() == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    )
    first.backward()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(6, 8)
    snapshot = drained(acc)
    for place, dataset in enumerate(NAMES):
        mine, counted = datasets == place, (labels != -100)[datasets == place]
        kept = torch.where(counted, losses[mine].double(), math.nan)
        np.testing.assert_allclose(
            snapshot.array(dataset, "loss")[0], np.nanmean(kept.detach().numpy(), axis=0), rtol=1e-6
        )
        for bucket in range(3):
            part = kept[:, 3 * bucket : 3 * bucket + 3].detach().numpy()
            found = snapshot.array(dataset, "bucketed")[0][bucket]
            np.testing.assert_allclose(found, np.nanmean(part), rtol=1e-6)


# -- Inside the model ------------------------------------------------------------------------------

LAYERS, EXPERTS, TOP = 11, 6, 2


class Router(torch.nn.Module):
    """A layer that says which experts its tokens choose."""

    def __init__(self, acc: DeviceAccumulator, layer: int) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(4, EXPERTS, bias=False)
        self.tokens = acc.at("tokens", layer=layer)
        self.mass = acc.at("mass", layer=layer)
        self.chosen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, datasets: torch.Tensor) -> torch.Tensor:
        scores = self.gate(x).softmax(-1)
        p, top = scores.topk(TOP)
        self.tokens.update(torch.ones_like(p), ids={"expert": top}, dataset_ids=datasets)
        self.mass.update(scores, dataset_ids=datasets)
        return (x + p.sum(-1, keepdim=True)).tanh()


def routed(acc: DeviceAccumulator) -> torch.nn.ModuleList:
    torch.manual_seed(0)
    return torch.nn.ModuleList(Router(acc, layer) for layer in range(LAYERS))


def of_routers() -> DeviceAccumulator:
    metrics = {"tokens": ("sum", "layer", "expert"), "mass": ("mean", "layer", "expert")}
    return DeviceAccumulator(metrics, NAMES, axes={"layer": LAYERS, "expert": EXPERTS})


@pytest.mark.parametrize("how", ["compiled", "checkpointed", "both"])
def test_layers_share_one_graph_and_count_once(how: str) -> None:
    """An int in ids= would be a graph for each layer, and an error after eight."""
    plain, acc = of_routers(), of_routers()
    x, datasets = torch.randn(10, 4), torch.arange(10) % 2
    before = x
    for layer in routed(plain):
        before = layer(before, datasets)
    torch._dynamo.reset()
    counters.clear()
    after = x.clone().requires_grad_()
    layers = routed(acc)
    for layer in layers:
        if how != "checkpointed":
            layer.compile(backend="aot_eager", fullgraph=True)
    out = after
    for layer in layers:
        if how == "compiled":
            out = layer(out, datasets)
        else:
            out = checkpoint(layer, out, datasets, use_reentrant=False)
    out.sum().backward()
    if how != "checkpointed":
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
    np.testing.assert_allclose(out.detach().numpy(), before.detach().numpy(), rtol=1e-5)
    wanted, found = drained(plain), drained(acc)
    for dataset in NAMES:
        tokens = cells(found, dataset, "tokens")
        np.testing.assert_array_equal(tokens, cells(wanted, dataset, "tokens"))
        assert tokens.sum(-1).tolist() == [5.0 * TOP] * LAYERS
        masses = (one.array(dataset, "mass")[0] for one in (found, wanted))
        np.testing.assert_allclose(*masses, rtol=1e-6)


def test_a_compiled_update_changes_cells_as_a_whole() -> None:
    """Of a part of a tensor, a compiler copies the whole: 24 MB in 10 ms, in each update, for 60 x 256 cells."""
    acc = of_routers()
    plain = DeviceAccumulator({"a": "mean", "b": "mean"})
    tokens, mass = acc.at("tokens", layer=3), acc.at("mass", layer=3)
    seen: list[str] = []

    def seen_by(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    @torch.compile(fullgraph=True, backend=aot_autograd(fw_compiler=seen_by))
    def update(x: torch.Tensor, top: torch.Tensor, datasets: torch.Tensor, part: bool) -> None:
        tokens.update(x, ids={"expert": top}, dataset_ids=datasets)
        mass.update(x, weights=x, ids={"expert": top}, dataset_ids=datasets)
        if part:
            plain.update("b", x)

    x, top = torch.rand(8, 2), torch.randint(0, EXPERTS, (8, 2))
    for part in (False, True):
        seen.clear()
        update(x, top, torch.zeros(8).long(), part)
        assert "aten.index_put.default" in seen
        assert part is any("scatter" in target and "select" in target for target in seen)
    assert cells(drained(acc), "web", "tokens")[3].sum() == pytest.approx(2 * x.sum().item())


def test_marks_copies_and_pickles_hold_cells_too() -> None:
    acc = of_routers()
    layer = acc.at("tokens", layer=1)
    one = {"expert": torch.tensor([0, 5])}, torch.tensor([0, 0])

    def count(snapshot: Snapshot) -> list[float]:
        return cells(snapshot, "web", "tokens")[1].tolist()

    layer.update(torch.ones(2), ids=one[0], dataset_ids=one[1])
    mark = acc.mark()
    layer.update(torch.ones(2), ids=one[0], dataset_ids=one[1])
    acc.rollback(mark, where=torch.tensor(False))
    acc.rollback(mark, where=torch.tensor(True))
    module = torch.nn.Linear(1, 1)
    module.acc, module.layer = acc, layer
    copied = copy.deepcopy(module)
    copied.layer.update(torch.ones(2), ids=one[0], dataset_ids=one[1])
    unpickled = pickle.loads(pickle.dumps(layer))
    unpickled.update(torch.ones(2), ids=one[0], dataset_ids=one[1])
    unpickled.update(torch.ones(2), ids=one[0], dataset_ids=one[1])
    alone, twice, thrice = [1.0, 0, 0, 0, 0, 1], [2.0, 0, 0, 0, 0, 2], [3.0, 0, 0, 0, 0, 3]
    assert count(drained(acc)) == alone
    assert count(drained(copied.acc)) == twice
    assert count(drained(unpickled._accumulator)) == thrice
    assert not drained(acc).as_dict("t")


def test_threads_that_update_cells_lose_nothing() -> None:
    acc = DeviceAccumulator({"n": ("sum", "expert")}, axes={"expert": 3})
    ids = {"expert": torch.arange(300) % 3}
    threads = [
        threading.Thread(
            target=lambda: [acc.update("n", torch.ones(300), ids=ids) for _ in range(20)]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cells(drained(acc), None, "n").tolist() == [8000.0] * 3


# -- Without a wait --------------------------------------------------------------------------------


def test_the_kernels_of_an_update_are_few_and_none_asks_the_device() -> None:
    """Two for each axis that is given by tensors; none for a place that is kept."""
    acc = DeviceAccumulator(
        {"plain": "sum", "t": ("sum", "layer", "expert"), "m": ("mean", "layer", "expert")},
        NAMES,
        axes=AXES,
    )
    values, whole = torch.ones(8, 2), torch.ones(8, 4)
    top, datasets = torch.zeros(8, 2).long(), torch.zeros(8).long()
    layer = acc.at("t", layer=1), acc.at("m", layer=1)
    options = {"ids": {"expert": top}, "dataset_ids": datasets}
    updates = {
        "plain": (lambda: acc.update("plain", values, dataset_ids=datasets), 5),
        "at": (lambda: layer[0].update(values, **options), 8),
        "whole": (lambda: layer[0].update(whole, dataset_ids=datasets), 7),
        "mean": (lambda: layer[1].update(values, **options), 8),
        "weighed": (lambda: layer[1].update(values, weights=values, **options), 14),
    }
    for name, (update, most) in updates.items():
        with Calls() as calls, Watch() as watch:
            update()
        kernels = sum(n for op, n in watch.seen.items() if op not in VIEWS)
        assert kernels <= most, (name, watch.seen)
        assert not calls.seen
        assert not {op for op in watch.seen if op in WAITING}
    assert not any(tensor.ndim == 0 for tensor in acc.tensors)  # of which torch loses additions


# -- On ranks --------------------------------------------------------------------------------------


def staged(stage: int, turn: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return which experts the tokens of a stage choose in each of its two layers, with datasets."""
    rng = np.random.default_rng(10 * stage + turn)
    top = torch.from_numpy(rng.integers(0, 4, (2, 20 + stage, 2)))
    p = torch.from_numpy(rng.random(top.shape))
    return top, p, torch.from_numpy(rng.integers(0, 2, 20 + stage))


def take_stage(acc: DeviceAccumulator, stage: int, turn: int) -> None:
    """Take in what a pipeline stage of two layers sees in a turn."""
    top, p, datasets = staged(stage, turn)
    for number in range(2):
        layer = acc.at("tokens", layer=2 * stage + number), acc.at("p", layer=2 * stage + number)
        ids = {"expert": top[number]}
        layer[0].update(torch.ones_like(p[number]), ids=ids, dataset_ids=datasets)
        layer[1].update(p[number], ids=ids, dataset_ids=datasets, weights=p[number])


def wanted_of(stages: int, turns: int) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    """Return tokens and probabilities of each layer and expert, by dataset."""
    sums = {(name, what): np.zeros((2 * stages, 4)) for name in NAMES for what in ("n", "w", "wp")}
    for stage, turn in product(range(stages), range(turns)):
        top, p, datasets = staged(stage, turn)
        for number, token, choice in product(range(2), range(top.shape[1]), range(2)):
            cell = 2 * stage + number, int(top[number, token, choice])
            name, w = NAMES[int(datasets[token])], float(p[number, token, choice])
            for what, term in (("n", 1.0), ("w", w), ("wp", w * w)):
                sums[name, what][cell] += term
    return {
        (name, what): sums[name, "n"] if what == "tokens" else sums[name, "wp"] / sums[name, "w"]
        for name, what in product(NAMES, ("tokens", "p"))
    }


@pytest.mark.parametrize("route", ["gather", "tree"])
def test_stages_of_a_pipeline_hold_their_layers_and_resume_on_other_ranks(route: str) -> None:
    """Each rank has other layers, drains and logs; the run goes on with other numbers of ranks."""
    stages = 6
    metrics = {"tokens": ("sum", "layer", "expert"), "p": ("mean", "layer", "expert")}
    axes = {"layer": 2 * stages, "expert": 4}

    def rank(communicator: Any, state: Any, turn: int) -> tuple[Any, Any]:
        aggregator = MetricsAggregator(communicator=communicator, route=route)
        if state is not None:
            aggregator.load_state_dict(state)
        acc = DeviceAccumulator(metrics, NAMES, axes=axes)
        mine = range(communicator.rank, stages, communicator.world_size)
        for stage in mine:
            take_stage(acc, stage, turn)
        aggregator.drain(acc)
        aggregator.reduce()
        for stage in mine:
            take_stage(acc, stage, turn + 1)
        aggregator.drain(acc)
        snapshot = aggregator.reduce()
        return aggregator.state_dict(), {
            (name, what): snapshot.array(name, what, window="run")[0]
            for name, what in product(NAMES, ("tokens", "p"))
        }

    state = None
    for turn, ranks in ((0, 2), (2, 7), (4, 1)):  # of seven, one has no layer
        results = run_threads(lambda c, s=state, t=turn: rank(c, s, t), ranks)
        state, found = results[0]
        wanted = wanted_of(stages, turn + 2)
        for _, other in results:
            for key, values in other.items():
                np.testing.assert_array_equal(values, found[key])
                np.testing.assert_allclose(values, wanted[key], rtol=1e-12)


def test_an_expert_that_no_rank_chose_is_dead_and_has_no_tokens() -> None:
    """Of ranks that each miss other experts, the mean of what they find says that more are dead."""

    def rank(communicator: Any) -> tuple[dict[str, float], Any]:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.derive("dead", lambda m: (m["tokens"] == 0).sum())
        aggregator.derive("imbalance", lambda m: (m["tokens"].max(-1) / m["tokens"].mean(-1)).max())
        acc = DeviceAccumulator({"tokens": ("sum", "expert")}, axes={"expert": 4})
        top = torch.tensor([[0, 0, 1], [1, 3, 3]])[communicator.rank]
        acc.update("tokens", torch.ones(3), ids={"expert": top})
        aggregator.drain(acc)
        snapshot = aggregator.reduce()
        return snapshot.as_dict("t"), snapshot.array(None, "tokens", by=("rank", "expert"))[0]

    for logged, ranks in run_threads(rank, 2):
        assert (logged["t/dead"], logged["t/imbalance"]) == (1.0, 2 / 1.5)
        own = np.nan_to_num(ranks)
        assert np.mean((own == 0).sum(-1)) == 2.0
        assert np.mean(own.max(-1) / own.mean(-1)) == pytest.approx(2 / 0.75)


def test_ranks_with_other_sizes_of_an_axis_are_told_on_all_of_them() -> None:
    def rank(communicator: Any) -> str:
        aggregator = MetricsAggregator(communicator=communicator)
        acc = DeviceAccumulator({"t": ("sum", "expert")}, axes={"expert": 4 + communicator.rank})
        acc.update("t", torch.ones(4), ids={"expert": torch.arange(4)})
        aggregator.drain(acc)
        with pytest.raises(Exception, match="expert=") as caught:
            aggregator.reduce()
        return str(caught.value)

    first, second = run_threads(rank, 2)
    assert first == second
    assert "expert=4" in first
    assert "expert=5" in first
