"""Metrics that accumulate on a device say what the same values say when they are recorded."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accumulated import KINDS, NAMES, WEIGHTED, check_equal, logged, recorded
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks, run_threads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metricfold import AggregationType, LogLinearHistogram, MaxAggHandler, MetricsAggregator
from metricfold._core.device.rows import M
from metricfold.torch import DeviceAccumulator

IDS = torch.tensor([0, 1, 1])


def sample(n: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float32 values of both signs and many magnitudes, weights, and dataset ids."""
    rng = np.random.default_rng(seed)
    x = np.float32(rng.lognormal(sigma=2, size=n) * rng.choice([-1, 1], n))
    w = np.float32(rng.random(n) * rng.integers(0, 3, n))
    return torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(rng.integers(0, 3, n))


def fold(acc: DeviceAccumulator, x: Any, w: Any, ids: Any) -> DeviceAccumulator:
    for name in acc.layout.names:
        acc.update(name, x, weights=w if name in WEIGHTED else None, dataset_ids=ids)
    return acc


# -- Against values that were recorded -------------------------------------------------------------


def test_a_drained_accumulator_says_what_record_says() -> None:
    acc = DeviceAccumulator(KINDS, NAMES)
    aggregator, reference = MetricsAggregator(), MetricsAggregator(None)
    for seed in range(3):
        values = sample(seed=seed)
        recorded(reference, *values)
        fold(acc, *values)
        if seed == 1:
            assert aggregator.drain(acc) is acc
    aggregator.drain(acc)
    assert not acc.tensors[0].any()
    snapshot, wanted = aggregator.reduce(), reference.reduce()
    for window in ("run", "interval"):
        check_equal(snapshot.as_dict("t", window), wanted.as_dict("t", window))
    assert snapshot.as_dict("t", rollup=True)["t/max"] == wanted.as_dict("t", rollup=True)["t/max"]
    # The run goes on, the interval begins anew.
    values = sample(seed=3)
    aggregator.drain(fold(acc, *values))
    snapshot, wanted = aggregator.reduce(), recorded(reference, *values).reduce()
    for window in ("run", "interval"):
        check_equal(snapshot.as_dict("t", window), wanted.as_dict("t", window))


numbers = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, 2.0**-126, 3.4e38]),
    st.integers(-5, 5).map(float),
)
weights = st.one_of(st.floats(0, 100, width=32), st.sampled_from([0.0, 1.0, 1.0]))


@given(
    rows=st.lists(
        st.lists(st.tuples(numbers, weights, st.integers(0, 2)), min_size=1, max_size=6), max_size=4
    ),
    on_nan=st.sampled_from(["propagate", "skip"]),
)
@examples(60)
def test_any_values_are_taken_as_the_host_takes_them(rows: Any, on_nan: str) -> None:
    acc = DeviceAccumulator(KINDS, NAMES)
    drained, reference = (MetricsAggregator(None, on_nan=on_nan) for _ in range(2))
    for row in rows:
        x, w, ids = (torch.tensor(column) for column in zip(*row, strict=True))
        fold(acc, x, w, ids)
        for name, kind in KINDS.items():
            for value, weight, place in zip(*(t.tolist() for t in (x, w, ids)), strict=True):
                value = 0.0 if kind == "distribution" and abs(value) < 2.0**-126 else value
                weight = weight if name in WEIGHTED else 1.0
                reference.record(name, value, kind, dataset=NAMES[place], weight=weight)
    drained.drain(acc)
    found, wanted = (one.get_metrics_for_logging("t") for one in (drained, reference))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if "stat_p" not in name and "std" not in name:
            scale = max([abs(v) for row in rows for v, *_ in row if math.isfinite(v)], default=0.0)
            np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-7 * scale)


def test_types_wider_and_narrower_than_float32() -> None:
    kinds = {"sum": "sum", "mean": "mean", "max": "max", "len": "distribution"}
    for values in (
        torch.tensor([2**31 - 1, 2**31 - 3, -(2**31), 2**24 + 1, 1]),
        torch.tensor([2**31 - 1, 7], dtype=torch.int32),
        torch.tensor([127, 127, -128], dtype=torch.int8),
        torch.tensor([200, 255], dtype=torch.uint8),
        torch.tensor([True, True, False]),
        torch.full((3000,), 0.1, dtype=torch.bfloat16),
        torch.full((3000,), 1000.0, dtype=torch.float16),
        torch.tensor([0.1, 1e300, -1e300], dtype=torch.float64),
        torch.tensor([3, 65535]).to(torch.uint16),
        torch.tensor([3, 2**32 - 1]).to(torch.uint32),
        torch.tensor([3, 2**50]).to(torch.uint64),
        torch.tensor([1.5, -448.0]).to(torch.float8_e4m3fn),
        torch.tensor([1.5, -448.0]).to(torch.float8_e5m2),
        3,
        2.5,
        True,
        np.float32(0.1),
        np.int64(7),
    ):
        acc = DeviceAccumulator(kinds)
        for name in kinds:
            acc.update(name, values)
        found = logged(acc)
        exact = torch.as_tensor(values).double()
        assert found["t/sum"] == pytest.approx(exact.sum().item(), rel=1e-14)
        assert found["t/mean"] == pytest.approx(exact.mean().item(), rel=1e-14)
        assert found["t/max"] == exact.max().item()
        if exact.abs().max() < 1e300:
            rounded = exact.float().double()
            assert found["t/len_stat_mean"] == pytest.approx(rounded.mean().item(), rel=1e-12)
            assert found["t/len_stat_count"] == exact.numel()


def test_integers_that_float64_lacks_count_rounded_and_are_warned_of(warned: list[str]) -> None:
    """Version 0.1 said nothing of it."""
    acc = DeviceAccumulator({"n": "sum", "m": "max", "len": "distribution"}, ("a", "b"))
    for values in (
        torch.tensor([2**53, -(2**53), 2**53 + 1, 2**63 - 1, -(2**63), 5]),
        torch.tensor([2**64 - 1, 2**52], dtype=torch.uint64),
    ):
        acc.update_all(
            dict.fromkeys(("n", "m", "len"), values), dataset_ids=torch.ones(len(values)).long()
        )
    found = logged(acc)
    assert found["t_b/n"] == 2.0**64 + 2.0**53 + 2.0**52
    assert found["t_b/m"] == 2.0**64
    assert [text[:57] for text in warned] == [
        "4 values of metric 'n' are integers beyond 2^53, of which",
        "4 values of metric 'm' are integers beyond 2^53, of which",
    ]


@pytest.mark.parametrize("n", [4, 3], ids=["another size", "the same size"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_masks_weights_and_ids_broadcast_as_in_numpy(kind: str, n: int) -> None:
    """Where the first dimension fits, it is meant; version 0.1 took nothing else."""
    x = torch.arange(3.0 * n).reshape(n, 3) - 5
    x[0, 2] = math.nan
    rng = np.random.default_rng(0)
    for shape in ((), (n,), (3,), (n, 1), (1, 3), (1, 1), (n, 3)):
        full = (n, 1) if shape == (n,) else shape
        w = torch.as_tensor(rng.integers(0, 3, shape)).double()
        ids = torch.as_tensor(rng.integers(0, 3, shape))
        for weights in (w, w > 0):
            sparing, every = (
                DeviceAccumulator({"m": kind}, NAMES),
                DeviceAccumulator({"m": kind}, NAMES),
            )
            sparing.update("m", x, weights=weights, dataset_ids=ids)
            wide = (t.reshape(full).expand(n, 3).contiguous() for t in (weights, ids))
            every.update("m", x, weights=next(wide), dataset_ids=next(wide))
            for one, other in zip(sparing.start_read()(), every.start_read()(), strict=True):
                np.testing.assert_array_equal(one, other)
    for shape in ((2,), (n, 2), (2, 3), (n, 3, 1), (1, n, 3)):
        with pytest.raises(ValueError, match="or what NumPy broadcasts to them"):
            sparing.update("m", x, weights=torch.ones(shape), dataset_ids=ids)


def test_weights_mask_padding_in_every_aggregation() -> None:
    x = torch.tensor([[1, 2, 1e30], [math.nan, math.inf, -5]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    for weights in (mask, mask.float(), mask.long()):
        acc = DeviceAccumulator(KINDS)
        for name in KINDS:
            acc.update(name, x, weights=weights)
            acc.update(name, x, weights=0)
            acc.update(name, x[:, :0])  # nothing at all
        found = logged(acc)
        assert found["t/mean"] == 1.5
        assert (found["t/sum"], found["t/max"], found["t/min"]) == (3.0, 2.0, 1.0)
        assert found["t/len_stat_count"] == 2
        assert found["t/len_stat_mean"] == 1.5


def test_one_id_and_one_weight_per_sample_do_for_each_token() -> None:
    x = torch.arange(24.0).reshape(4, 3, 2)
    ids, w = torch.tensor([0, 1, 1, 2]), torch.tensor([3.0, 1.0, 0.0, 2.0])
    every = DeviceAccumulator(KINDS, NAMES)
    sparing = DeviceAccumulator(KINDS, NAMES)
    for name in KINDS:
        wide = [t[:, None, None].expand(4, 3, 2) for t in (ids, w)]
        every.update(name, x, dataset_ids=wide[0], weights=wide[1])
        sparing.update(name, x, dataset_ids=ids, weights=w)
    for one, other in zip(every.start_read()(), sparing.start_read()(), strict=True):
        np.testing.assert_array_equal(one, other)
    found = logged(sparing)
    assert found["t_b/mean"] == x[1].mean().item()
    assert (found["t_a/max"], found["t_c/min"]) == (5.0, 18.0)


def test_metrics_of_the_same_samples_are_folded_together_as_alone() -> None:
    kinds = {"a": "mean", "x": "max", "b": "mean", "n": "sum", "c": "mean", "l": "distribution"}
    alone, together = (DeviceAccumulator(kinds, NAMES) for _ in range(2))
    for seed, weighted in ((0, True), (1, False)):
        x, w, ids = sample(seed=seed)
        values = {
            "l": x,
            "c": x.reshape(60, 1) * torch.ones(1, 4),  # of another shape
            "b": x > 0,
            "a": -x,
            "n": torch.arange(60),
            "x": x * 2,
        }
        options = {"weights": w if weighted else None, "dataset_ids": ids}
        for name, one in values.items():
            alone.update(name, one, **options)
        together.update_all(values, **options)
        together.update_all({}, **options)
    for one, other in zip(alone.tensors, together.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
    before = [tensor.clone() for tensor in together.tensors]
    with pytest.raises(ValueError, match="no metric 'd'"):
        together.update_all({"a": x, "d": x}, dataset_ids=ids)
    with pytest.raises(ValueError, match="dataset_ids of metric 'b' have the shape"):
        together.update_all({"a": x, "b": x[:3]}, dataset_ids=ids)
    for one, other in zip(before, together.tensors, strict=True):
        assert torch.equal(one, other)
    with Watch() as watch:
        DeviceAccumulator({f"m{i}": "mean" for i in range(20)}, NAMES).update_all(
            {f"m{i}": x for i in range(20)}, dataset_ids=ids
        )
    assert watch.seen["scatter_add_"] == 1


def test_the_histogram_is_that_of_the_host_at_64_buckets_per_octave() -> None:
    rng = np.random.default_rng(5)
    edges = np.float32([2**-126, 1, 1.5, 2, np.nextafter(np.float32(2), 0), 3.4e38, 64, 65])
    for values in (
        sample()[0].numpy(),
        np.concatenate([edges, -edges, [0, 0]]).astype(np.float32),
        np.float32(rng.normal(size=5000)),
        np.float32(rng.normal(300, 0.1, 5000)),
    ):
        acc = DeviceAccumulator({"x": "distribution"})
        acc.update("x", torch.from_numpy(values))
        state: Any = next(acc.layout.states(acc.start_read()()))[1]
        fine = LogLinearHistogram(65_536)
        fine.update(values)
        while fine.m > M:
            fine.downscale()
        host = LogLinearHistogram(512)
        host.merge(fine)
        found, wanted = state.sample.older.to_dict(), host.to_dict()
        assert found["totals"] == wanted["totals"]
        assert (found["minimum"], found["maximum"]) == (wanted["minimum"], wanted["maximum"])
        assert len(found["segments"]) == len(wanted["segments"])
        for one, other in zip(found["segments"], wanted["segments"], strict=True):
            assert (one["m"], one["index"]) == (other["m"], other["index"])
            assert one["sums"][0] == other["sums"][0]  # counts, bit for bit
            np.testing.assert_allclose(one["sums"], other["sums"], rtol=1e-12)


def test_a_million_values_do_not_drift() -> None:
    n = 1_000_000
    rng = np.random.default_rng(0)
    kinds = {"mean": "mean", "sum": "sum", "len": "distribution"}
    for stream, x in (
        ("0.1 always", np.full(n, 0.1, np.float32)),
        ("log-normal", np.float32(rng.lognormal(size=n))),
        ("300 ± 0.1", np.float32(rng.normal(300, 0.1, n))),
    ):
        acc = DeviceAccumulator(kinds)
        # One addition after another, as a million updates do, of which each would take 0.1 ms here.
        ids = torch.zeros(n, dtype=torch.long)
        one_by_one = DeviceAccumulator(kinds, ("d",))
        for name in kinds:
            one_by_one.update(name, torch.from_numpy(x), dataset_ids=ids)
            for part in torch.from_numpy(x).chunk(100):
                acc.update(name, part)
        exact = x.astype(np.float64)
        for found, prefix in ((logged(acc), "t"), (logged(one_by_one), "t_d")):
            errors = {
                "sum": abs(found[f"{prefix}/sum"] / exact.sum() - 1),
                "mean": abs(found[f"{prefix}/len_stat_mean"] / exact.mean() - 1),
                "std": abs(found[f"{prefix}/len_stat_std"] - exact.std(ddof=1)) / exact.mean(),
            }
            naive = abs(np.cumsum(x, dtype=np.float32)[-1] / exact.sum() - 1)
            print(f"{stream}: {errors}; a plain float32 sum: {naive:.1e}")
            assert found[f"{prefix}/len_stat_count"] == n
            assert errors["sum"] < 1e-10
            assert errors["mean"] < 1e-10
            assert errors["std"] < 1e-7


# -- Without a wait --------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts the operations that run, and what they allocate in the long run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Counts the calls that bring a tensor, or a number of it, to the host."""

    TO_HOST = ("item", "cpu", "numpy", "tolist", "__bool__", "__float__", "__int__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.TO_HOST or (name == "to" and "cpu" in map(str, args)):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


VIEWS = (
    *("view", "view_as_complex", "expand", "unsqueeze", "select", "slice", "as_strided", "alias"),
    *("detach", "reshape", "scalar_tensor", "empty", "_unsafe_view"),
)
KERNELS_OF_0_1 = {
    "mean": {"": 9, "ids": 10, "mask": 12, "weights": 19},
    "sum": {"": 8, "ids": 9, "mask": 11, "weights": 17},
    "max": {"": 13, "ids": 12, "mask": 17, "weights": 23},
    "min": {"": 13, "ids": 12, "mask": 17, "weights": 23},
    "distribution": {"": 51, "ids": 57, "mask": 63, "weights": 69},
}
"""Of an update with 32 losses; with ids; and of 8 samples of 4 tokens with ids and a mask or weights."""


@pytest.mark.parametrize("kind", KERNELS_OF_0_1)
def test_an_update_takes_half_of_the_kernels_of_0_1(kind: str) -> None:
    flat, tokens = torch.randn(32), torch.randn(8, 4)
    ids = torch.arange(32) % 3
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "": (flat, {}),
        "ids": (flat, {"dataset_ids": ids}),
        "mask": (tokens, {"dataset_ids": ids[:8], "weights": tokens > 0}),
        "weights": (tokens, {"dataset_ids": ids[:8], "weights": tokens.abs()}),
    }
    for way, (values, options) in ways.items():
        acc = DeviceAccumulator({"m": kind}, NAMES if options else ())
        with Watch() as watch:
            acc.update("m", values, **options)
        kernels = sum(n for name, n in watch.seen.items() if name not in VIEWS)
        print(f"{kind} {way}: {KERNELS_OF_0_1[kind][way]} -> {kernels}")
        # A sum with ids takes 5 for 9: place, NaN, index, lanes, addition.
        assert kernels <= (KERNELS_OF_0_1[kind][way] + (kind != "distribution")) // 2 + (
            way == "mask"
        )
    several = DeviceAccumulator({f"m{i}": kind for i in range(10)}, NAMES)
    with Watch() as of_all:
        several.update_all({f"m{i}": flat for i in range(10)}, dataset_ids=ids)
    kernels = sum(n for name, n in of_all.seen.items() if name not in VIEWS)
    print(f"{kind} of ten metrics together: {kernels}")
    assert kernels <= KERNELS_OF_0_1[kind]["ids"] // 2 + 2


WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")


def test_no_step_asks_the_device_and_a_log_reads_once() -> None:
    model = torch.nn.Linear(8, 16)
    acc = DeviceAccumulator({"loss": "mean", **KINDS}, NAMES)
    aggregator = MetricsAggregator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        x, labels, ids = torch.randn(6, 8), torch.randint(0, 16, (6,)), torch.randint(0, 3, (6,))
        loss = acc.token_loss(model(x), labels, ids)
        mark = acc.mark()
        fold(acc, x[:, 0], x[:, 1].abs(), ids)
        acc.rollback(mark, where=loss.isnan())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        with Calls() as calls, Watch() as watch:
            for _ in range(100):
                step()
        assert not calls.seen, "between logs"
        assert not {name: n for name, n in watch.seen.items() if name in WAITING}
        assert watch.seen["scatter_add"] + watch.seen["scatter_add_"] >= 600
        with Calls() as calls:
            aggregator.drain(acc)
            aggregator.reduce()
        assert calls.seen == {"cpu": 1, "numpy": 1}, "one transfer, looked at once it is there"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_synchronises_a_gpu_and_neither_does_a_drain() -> None:
    model = torch.nn.Linear(8, 16, device="cuda")
    acc, plain = (
        DeviceAccumulator({"loss": "mean", **KINDS}, NAMES, device=d) for d in ("cuda", "cpu")
    )
    experts, of_experts = (
        DeviceAccumulator(
            {"t": ("sum", "layer", "expert")}, NAMES, axes={"layer": 2, "expert": 8}, device=d
        )
        for d in ("cuda", "cpu")
    )
    layer, plain_layer = experts.at("t", layer=1), of_experts.at("t", layer=1)
    aggregator, reference = MetricsAggregator(), MetricsAggregator()
    batches = []
    for seed in range(100):
        x, w, ids = sample(48, seed)
        batches.append([x.reshape(6, 8), w[:6], ids[:6], torch.randint(0, 16, (6,))])
    on_gpu = [[tensor.cuda() for tensor in batch] for batch in batches]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, w, ids, labels in on_gpu:
            loss = acc.token_loss(model(x), labels, ids)
            loss.backward()
            mark = acc.mark()
            fold(acc, x[:, 0], w, ids)
            acc.rollback(mark, where=loss.isnan())
            layer.update(w, ids={"expert": x.argmax(1)}, dataset_ids=ids)
        aggregator.drain(acc, experts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    model.cpu()
    for x, w, ids, labels in batches:
        plain.token_loss(model(x), labels, ids)
        fold(plain, x[:, 0], w, ids)
        plain_layer.update(w, ids={"expert": x.argmax(1)}, dataset_ids=ids)
    reference.drain(plain, of_experts)
    found, wanted = (one.get_metrics_for_logging("t") for one in (aggregator, reference))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_no_graph_and_no_values_are_held_by_what_has_been_taken_in() -> None:
    acc = DeviceAccumulator(KINDS)
    x = (torch.ones(3, requires_grad=True) * 2).exp()
    node, values = weakref.ref(told := Counter()), weakref.ref(x)
    x.grad_fn.metadata["told"] = told  # type: ignore[union-attr]
    del told
    acc.update_all(dict.fromkeys(KINDS, x), weights=x)
    acc.update_all(dict.fromkeys(KINDS, x[0]))
    del x
    assert node() is None
    assert values() is None
    assert not any(tensor.requires_grad for tensor in acc.tensors)
    assert logged(acc)["t/sum"] == pytest.approx(math.exp(2) * 4, rel=1e-6)


def test_the_work_of_an_update_does_not_depend_on_how_many_datasets_and_samples_there_are() -> None:
    seen = []
    for datasets, n in ((2, 4), (200, 4), (2, 4000)):
        acc = DeviceAccumulator(KINDS, [f"d{i}" for i in range(datasets)])
        held = [tensor.data_ptr() for tensor in acc.tensors]
        with Watch() as watch:
            fold(acc, torch.ones(n), torch.ones(n), torch.zeros(n, dtype=torch.int32))
        seen.append(watch.seen)
        assert [tensor.data_ptr() for tensor in acc.tensors] == held
    assert seen[0] == seen[1] == seen[2]


def test_it_compiles_into_the_graph_of_the_step() -> None:
    compiled, plain = (DeviceAccumulator({"loss": "mean", **KINDS}, NAMES) for _ in range(2))

    def step(acc: DeviceAccumulator, logits: Any, labels: Any, w: Any, ids: Any) -> torch.Tensor:
        loss = acc.token_loss(logits, labels, ids)
        fold(acc, logits[..., 0], w, ids)
        return loss

    explained = torch._dynamo.explain(step)(compiled, *batch(0))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    compiled.empty()
    # What makes faster code of the graph is not ours, and takes a compiler minutes.
    quick = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        assert torch.equal(quick(compiled, *batch(seed)), step(plain, *batch(seed)))
    check_equal(logged(compiled), logged(plain))


def batch(seed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    logits = torch.randn(4, 5, 7, requires_grad=True)
    return logits, torch.randint(0, 7, (4, 5)), torch.rand(4, 5), torch.randint(0, 3, (4,))


def test_autocast_inference_mode_and_gradients_do_not_matter() -> None:
    x = torch.full((3000,), 0.1, requires_grad=True)
    found = []
    with torch.inference_mode():
        acc = DeviceAccumulator(KINDS, ("a",))  # used outside of it all the same
    for context in (torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            fold(acc, x * 1.5, torch.ones(3000), torch.zeros(3000, dtype=torch.long))
        found.append(logged(acc))
    with torch.inference_mode():
        fold(acc, x * 1.5, torch.ones(3000), torch.zeros(3000, dtype=torch.long))
        found.append(logged(acc))
    assert found[0] == found[1] == found[2]
    assert not any(tensor.requires_grad for tensor in acc.tensors)
    assert found[0]["t_a/sum"] == pytest.approx(450, rel=1e-6)


# -- The loss of each dataset ----------------------------------------------------------------------


def test_token_loss_is_cross_entropy_and_knows_each_dataset() -> None:
    torch.manual_seed(0)
    acc = DeviceAccumulator({"loss": "mean"}, NAMES)
    sums: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(3):
        logits = torch.randn(6, 10, 11, requires_grad=True)
        labels, ids = torch.randint(0, 11, (6, 10)), torch.randint(0, 3, (6,))
        labels[torch.rand(6, 10) < 0.3] = -100
        loss = acc.token_loss(logits, labels, ids)
        (gradient,) = torch.autograd.grad(loss, logits)
        plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        (wanted,) = torch.autograd.grad(plain, logits)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(gradient, wanted)
        for i in range(6):
            for t in range(10):
                if labels[i, t] >= 0:
                    one = F.cross_entropy(logits[i, t].double(), labels[i, t])
                    sums[NAMES[int(ids[i])]].append(one.item())
    found = logged(acc)
    for name, losses in sums.items():
        assert found[f"t_{name}/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_token_loss_divides_by_what_it_is_told() -> None:
    acc = DeviceAccumulator({"loss": "mean", "nll": "mean", "n": "sum"})
    logits, labels = torch.randn(4, 9), torch.tensor([1, 2, -1, 3])
    mean = acc.token_loss(logits, labels, ignore_index=-1)
    total = acc.token_loss(logits, labels, ignore_index=-1, num_items=1, name="nll")
    part = acc.token_loss(logits, labels, ignore_index=-1, num_items=torch.tensor(6), name="nll")
    torch.testing.assert_close(total, mean * 3)
    torch.testing.assert_close(part, mean / 2)
    nothing = acc.token_loss(logits.requires_grad_(), torch.full((4,), -100))
    nothing.backward()  # type: ignore[no-untyped-call]
    assert nothing == 0
    assert not logits.grad.any()  # type: ignore[union-attr]
    found = logged(acc)
    assert found["t/loss"] == found["t/nll"] == pytest.approx(mean.item(), rel=1e-6)
    # Scores of few bits are taken for what they are, and the loss is not rounded like them.
    coarse = logits.detach().bfloat16()
    loss = acc.token_loss(coarse, labels.abs(), name="nll")
    torch.testing.assert_close(loss, F.cross_entropy(coarse.float(), labels.abs()))
    with pytest.raises(ValueError, match="do not go with labels"):
        acc.token_loss(logits, labels[:3])
    with pytest.raises(ValueError, match="so make it a"):
        acc.token_loss(logits, labels, name="n")


# -- Steps that are skipped ------------------------------------------------------------------------


def test_a_rollback_drops_what_came_since_the_mark() -> None:
    acc, kept = DeviceAccumulator(KINDS, NAMES), DeviceAccumulator(KINDS, NAMES)
    for seed in range(6):
        mark = acc.mark()
        fold(acc, *sample(seed=seed))
        if seed % 2:
            acc.rollback(mark)
        else:
            fold(kept, *sample(seed=seed))
        mark = acc.mark()
        fold(acc, *sample(seed=seed))
        acc.rollback(mark, where=torch.tensor(seed != 3))
        if seed == 3:
            fold(kept, *sample(seed=seed))
    assert logged(acc) == logged(kept)
    with pytest.raises(ValueError, match="drained since the mark"):
        acc.rollback(mark)
    with pytest.raises(ValueError, match="another accumulator"):
        kept.rollback(acc.mark())


# -- What the aggregator makes of it ---------------------------------------------------------------


def test_nothing_is_lost_or_counted_twice_when_a_reduction_fails() -> None:
    acc = DeviceAccumulator({"n": "sum", "len": "distribution"})
    acc.update("n", torch.tensor([1.0, 2.0]))
    acc.update("len", torch.tensor([5.0, 6.0]))
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    with pytest.raises(RuntimeError, match="step"):
        aggregator.reduce(step=-5)
    acc.update("n", 4.0)
    aggregator.drain(acc)
    found = aggregator.get_metrics_for_logging("t", "interval")
    assert found["t/n"] == 7.0
    assert found["t/len_stat_count"] == 2.0
    aggregator.drain(acc)
    assert aggregator.get_metrics_for_logging("t")["t/n"] == 7.0


def test_what_comes_in_while_a_drained_part_is_read_belongs_to_the_next() -> None:
    acc = DeviceAccumulator({"n": "sum"})
    aggregator = MetricsAggregator()
    futures = []
    for _ in range(3):
        acc.update("n", 1.0)
        aggregator.drain(acc)
        acc.update("n", 10.0)
        futures.append(aggregator.reduce_async())
    intervals = [future.result().as_dict("t", "interval")["t/n"] for future in futures]
    assert intervals == [1.0, 11.0, 11.0]


def test_a_drain_that_clashes_changes_nothing() -> None:
    acc = DeviceAccumulator({"new": "sum", "loss": "mean"}, ("a", "b"))
    acc.update("new", 1.0, dataset_ids=torch.tensor(0))
    acc.update("loss", 2.0, dataset_ids=torch.tensor(1))
    other = MetricsAggregator()
    other.record("loss", 5.0, "max", dataset="b")
    with pytest.raises(ValueError, match="already registered with aggregation type max"):
        other.drain(acc)
    assert other.get_metrics_for_logging("t") == {"t_b/loss": 5.0}
    other = MetricsAggregator()
    other.record("loss", 5.0)  # of no dataset, where this one has some
    with pytest.raises(ValueError, match="loss"):
        other.drain(acc)

    class Mine(MaxAggHandler):
        pass

    other = MetricsAggregator()
    other.register_handler(AggregationType.MEAN, Mine())
    with pytest.raises(ValueError, match="another handler for 'mean'"):
        other.drain(acc)
    with pytest.raises(TypeError, match="takes an accumulator"):
        other.drain({"loss": 1.0})
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        other.drain(acc)
    assert logged(acc) == {"t_a/new": 1.0, "t_b/loss": 2.0}  # what was refused is still there


def test_ranks_that_drain_nothing_learn_the_keys_from_those_that_do() -> None:
    def rank(communicator: Any, route: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
        aggregator = MetricsAggregator(communicator=communicator, route=route)
        acc = DeviceAccumulator(KINDS, NAMES)
        seen = []
        for turn in range(3):
            if (communicator.rank + turn) % 2:
                aggregator.drain(fold(acc, *sample(60, seed=10 * communicator.rank + turn)))
            seen.append(aggregator.get_metrics_for_logging("t"))
        return seen, aggregator.state_dict()

    reference = MetricsAggregator(None)
    wanted = []
    for turn in range(3):
        for number in range(3):
            if (number + turn) % 2:
                recorded(reference, *sample(60, seed=10 * number + turn))
        wanted.append(reference.get_metrics_for_logging("t"))
    for route in ("narrow", "wide"):
        results = run_threads(lambda c, route=route: rank(c, route), 3)
        assert all(result == results[0] for result in results)
        for one, other in zip(results[0][0], wanted, strict=True):
            check_equal(one, other)


def drain_on_rank(rank: int) -> dict[str, float]:
    acc = DeviceAccumulator(KINDS, NAMES)
    aggregator = MetricsAggregator()
    for seed in range(2):
        fold(acc, *sample(40 + 10 * rank, seed=2 * rank + seed))
    aggregator.drain(acc)
    return aggregator.get_metrics_for_logging("t")


def test_real_ranks_fold_what_each_has_accumulated() -> None:
    reference = MetricsAggregator(None)
    for rank in range(2):
        for seed in range(2):
            recorded(reference, *sample(40 + 10 * rank, seed=2 * rank + seed))
    results = run_ranks(drain_on_rank, 2)
    assert results[0] == results[1]
    check_equal(results[0], reference.get_metrics_for_logging("t"))


def test_a_checkpoint_goes_on_where_the_run_was() -> None:
    acc, reference = DeviceAccumulator(KINDS, NAMES), MetricsAggregator(None)
    first, resumed = MetricsAggregator(), MetricsAggregator()
    first.drain(fold(acc, *sample(seed=1)))
    resumed.load_state_dict(first.state_dict())
    resumed.drain(fold(acc, *sample(seed=2)))
    for seed in (1, 2):
        recorded(reference, *sample(seed=seed))
    check_equal(resumed.get_metrics_for_logging("t"), reference.get_metrics_for_logging("t"))


# -- Bad input -------------------------------------------------------------------------------------


def test_what_cannot_be_placed_is_left_out_and_counted(warned: list[str]) -> None:
    x = torch.tensor([1.0, 2, 4, 8, 16, 32])
    ids = torch.tensor([0, 1, 2, -1, 1, 2**31 - 1])
    w = torch.tensor([1, 1, math.nan, 1, -1, 1])
    for typed in (ids, ids.int()):
        warned.clear()
        acc = DeviceAccumulator({"loss": "mean", "n": "sum", "len": "distribution"}, ("a", "b"))
        acc.update("loss", x, dataset_ids=typed, weights=w)
        acc.update("n", x, dataset_ids=typed)
        acc.update("len", x, dataset_ids=typed)
        found = logged(acc)
        counts = {name: v for name, v in found.items() if "len" not in name}
        assert counts == {"t_a/loss": 1.0, "t_b/loss": 2.0, "t_a/n": 1.0, "t_b/n": 18.0}
        assert (found["t_a/len_stat_count"], found["t_b/len_stat_count"]) == (1, 2)
        assert len(warned) == 4
        assert warned[0].startswith(
            "3 values of metric 'loss' came with dataset_ids outside of 0..1"
        )
        assert warned[1].startswith("1 values of metric 'loss' came with weights")
        assert warned[2].startswith("3 values of metric 'n'")
    # Padding may have any id.
    warned.clear()
    acc.update("n", x, dataset_ids=ids, weights=(ids == 0) | (ids == 1))
    assert logged(acc) == {"t_a/n": 1.0, "t_b/n": 18.0}
    assert not warned


def test_what_several_threads_bring_at_once_all_counts() -> None:
    """Of two additions to one cell at once, one was lost."""
    acc, ones = DeviceAccumulator({"n": "sum"}), torch.ones(5000)

    def bring() -> None:
        for _ in range(150):
            acc.update("n", ones)

    threads = [threading.Thread(target=bring) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logged(acc) == {"t/n": 4 * 150 * 5000}


def test_the_imaginary_part_of_a_conjugate_is_taken_as_its_numbers() -> None:
    """Of which torch keeps the negative; a distribution of it was torch's error, half taken in."""
    acc = DeviceAccumulator({"len": "distribution"})
    acc.update("len", torch.tensor([1 + 2j, 1 - 4j]).conj().imag)
    found = logged(acc)
    assert (found["t/len_stat_min"], found["t/len_stat_max"]) == (-2.0, 4.0)
    assert found["t/len_stat_count"] == 2


def test_a_graph_of_open_sizes_takes_weights_of_a_fixed_one() -> None:
    """The sizes were compared such that Dynamo took equal ones for different."""
    acc = DeviceAccumulator({"loss": "mean"})
    step = torch.compile(
        lambda x, w: acc.update("loss", x, weights=w), backend="eager", fullgraph=True
    )
    w = torch.tensor([[1.0], [0.0]])
    torch._dynamo.mark_static(w)
    for size in (2, 3):
        x = torch.arange(2.0 * size).view(2, size)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        step(x, w)
    assert logged(acc) == {"t/loss": 4 / 5}


def test_wrong_shapes_types_and_names_are_errors_that_change_nothing() -> None:
    acc = DeviceAccumulator({"loss": "mean"}, ("a", "b"))
    x, ids = torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
    acc.update("loss", x, dataset_ids=ids)
    before = acc.tensors[0].clone()
    elsewhere = torch.ones(4, 3, device="meta")
    for error, complaint, name, values, options in (
        (ValueError, r"no metric 'lost', but 'loss'", "lost", x, {}),
        (ValueError, r"of one of 2 datasets: give dataset_ids", "loss", x, {}),
        (ValueError, r"shape \(2,\), but the values \(4, 3\)", "loss", x, {"dataset_ids": ids[:2]}),
        (ValueError, r"weights .* \(4, 3, 1\)", "loss", x, {"weights": x[..., None]}),
        (ValueError, r"weights .* \(2, 3\)", "loss", x, {"weights": x[:2]}),
        (TypeError, "give integers", "loss", x, {"dataset_ids": x}),
        (TypeError, "are a list: give a tensor on cpu", "loss", x, {"dataset_ids": [0, 1, 0, 1]}),
        (TypeError, "complex", "loss", x * 1j, {}),
        (TypeError, "are a str", "loss", "text", {}),
        (ValueError, "on meta, but this accumulator is on cpu", "loss", elsewhere, {}),
        (ValueError, "weights .* on meta", "loss", x, {"weights": elsewhere}),
    ):
        options = {"dataset_ids": ids, **options} if complaint[0] != "o" else options
        if "one of 2" in complaint:
            options = {}
        with pytest.raises(error, match=complaint):
            acc.update(name, values, **options)
    assert torch.equal(acc.tensors[0], before)
    with pytest.raises(ValueError, match="belongs to no dataset"):
        DeviceAccumulator({"n": "sum"}).update("n", x, dataset_ids=ids)
    for error, complaint, metrics, datasets in (
        (ValueError, "'categorical_count', which no accumulator", {"x": "categorical_count"}, ()),
        (TypeError, "by name", ["loss"], ()),
        (TypeError, "give a list of names", {"x": "sum"}, "alpaca"),
        (ValueError, "each name once", {"x": "sum"}, ("a", "a")),
    ):
        with pytest.raises(error, match=complaint):
            DeviceAccumulator(metrics, datasets)


def in_grad(acc: DeviceAccumulator) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        acc.update("loss", x.sum())
        return x.square().sum()

    torch.func.grad(loss)(torch.ones(3))


def in_vmap(acc: DeviceAccumulator) -> None:
    torch.func.vmap(lambda x: (acc.update("loss", x), x)[1])(torch.ones(3))


def fake(acc: DeviceAccumulator) -> None:
    with FakeTensorMode():
        acc.update("loss", torch.ones(3))


def nested(acc: DeviceAccumulator) -> None:
    parts = [torch.ones(2), torch.ones(3)]
    acc.update("loss", torch.nested.nested_tensor(parts, layout=torch.jagged))


BEYOND: list[tuple[Any, type[Exception], str]] = [
    (in_grad, RuntimeError, r"inside of torch.func .* return the values from the function"),
    (in_vmap, RuntimeError, r"inside of torch.func .* update\(\) with them where the transform"),
    (
        fake,
        TypeError,
        "are a FakeTensor, which has no numbers: make the accumulator under the same",
    ),
    (nested, TypeError, r"of layout torch.jagged.*\.values\(\) of a nested"),
    (lambda acc: acc.update("loss", torch.eye(2).to_sparse()), TypeError, r"\.to_dense\(\)"),
    (lambda acc: acc.update("loss", 10**400), ValueError, "too large for a 64-bit float"),
    (lambda acc: acc.update("loss", 1.0, weights=-1), ValueError, "-1 is not a finite number of 0"),
    (lambda acc: acc.update("loss", 1.0, weights=math.nan), ValueError, "nan is not a finite"),
]


@pytest.mark.parametrize(("update", "error", "complaint"), BEYOND, ids=range(len(BEYOND)))
def test_what_no_kernel_can_take_is_an_error_that_says_what_to_do(
    update: Any, error: type[Exception], complaint: str
) -> None:
    acc = DeviceAccumulator({"loss": "mean"})
    acc.update("loss", 3.0)
    with pytest.raises(error, match=complaint) as caught:
        update(acc)
    assert "'loss'" in str(caught.value)
    assert logged(acc) == {"t/loss": 3.0}


def test_an_accumulator_without_numbers_takes_in_and_is_refused_by_a_drain() -> None:
    with FakeTensorMode():
        of_fakes = DeviceAccumulator(KINDS)
        fold(of_fakes, torch.ones(3), torch.ones(3), None)
    meta = DeviceAccumulator(KINDS, device="meta")
    fold(meta, *(torch.ones(3, device="meta") for _ in range(2)), None)
    aggregator = MetricsAggregator()
    aggregator.record("n", 1.0)
    for acc, place in ((meta, "on the meta device"), (of_fakes, "as FakeTensors")):
        with pytest.raises(ValueError, match=f"lies {place}, and has no numbers"):
            aggregator.drain(acc)
    assert aggregator.get_metrics_for_logging("t") == {"t/n": 1.0}


def test_a_tensor_that_a_collective_still_works_on_and_a_replicated_one_count(
    tmp_path: Path,
) -> None:
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        metrics = {"loss": "mean", "n": "sum", "t": ("sum", "expert")}
        acc = DeviceAccumulator(metrics, ("a", "b"), axes={"expert": 2})
        x, ids = torch.arange(3.0), torch.tensor([0, 1, 1])
        acc.update("loss", functional.all_reduce(x, "sum", (mesh, 0)), dataset_ids=ids)

        def placed(tensor: torch.Tensor, placement: Any) -> DTensor:
            return DTensor.from_local(tensor, mesh, [placement], run_check=False)

        whole = placed(x, Replicate())
        acc.update("loss", whole, weights=whole, dataset_ids=placed(ids, Replicate()))
        for experts in (placed(ids, Replicate()), functional.all_reduce(ids, "sum", (mesh, 0))):
            acc.update("t", whole, ids={"expert": experts}, dataset_ids=placed(ids, Replicate()))
        # As the last layer of a model under tensor parallelism gives them, beside labels from a loader.
        logits, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 3, -100])
        losses = DeviceAccumulator({"loss": "mean"})
        loss = losses.token_loss(placed(logits, Replicate()), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        wanted = F.cross_entropy(logits, labels)
        torch.testing.assert_close(loss, wanted)
        assert logits.grad is not None
        assert logged(losses)["t/loss"] == pytest.approx(wanted.item(), rel=1e-6)
        with pytest.raises(ValueError, match="logits of metric 'loss': a DTensor placed as"):
            losses.token_loss(placed(logits, Shard(0)), labels)
        for placement in (Partial(), Shard(0)):
            for what, values, options in (
                ("values", placed(x, placement), {"dataset_ids": ids}),
                ("weights", x, {"weights": placed(x, placement), "dataset_ids": ids}),
                ("dataset_ids", x, {"dataset_ids": placed(ids, placement)}),
            ):
                with pytest.raises(
                    ValueError, match=f"{what} of metric 'n': .*full_tensor"
                ) as caught:
                    acc.update("n", values, **options)
                assert "to_local()" in str(caught.value)
            with pytest.raises(ValueError, match=r"ids of axis 'expert' .*full_tensor"):
                acc.update("t", x, ids={"expert": placed(ids, placement)}, dataset_ids=ids)
    finally:
        dist.destroy_process_group()
    assert logged(acc) == {
        "t_a/loss": 0.0,
        "t_b/loss": (1 + 2 + 1 + 4) / 5,
        "t_a/t": 0.0,
        "t_b/t": 6.0,
    }


def test_what_is_copied_and_unpickled_in_inference_mode_goes_on_outside_of_it() -> None:
    acc = DeviceAccumulator(KINDS)
    acc.update("sum", 1.0)
    with torch.inference_mode():
        others = [copy.deepcopy(acc), pickle.loads(pickle.dumps(acc))]
    for tensor in acc.tensors:
        tensor.share_memory_()
    for one in (*others, acc):
        fold(one, torch.ones(3), torch.ones(3), None)
        assert logged(one)["t/sum"] == 4.0


# -- Copies ----------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """A module that has an accumulator, and gives it its losses."""

    def __init__(self, name: str = "loss") -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.name = name
        self.acc = DeviceAccumulator({name: "sum", "most": "max"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.acc.update_all({self.name: 1.0, "most": float("nan")})
        return self.linear(x)


def test_a_copy_of_an_accumulator_holds_what_it_held_and_goes_its_own_way() -> None:
    model = Model()
    model(torch.ones(2))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    model(torch.ones(2))
    copied = averaged.module.acc
    mark = copied.mark()
    copied.update("loss", 5.0)
    copied.rollback(mark)
    copied.update("loss", 10.0)
    assert logged(model.acc)["t/loss"] == 2.0
    assert logged(copied)["t/loss"] == 11.0


def test_a_module_that_is_cast_leaves_its_accumulator_in_float64() -> None:
    # As DeepSpeed does, which made float16 of the states of other libraries' metrics.
    model = Model("cast")
    model.half().to(torch.bfloat16)
    for _ in range(3000):
        model.acc.update("cast", 1.0)
    assert logged(model.acc)["t/cast"] == 3000.0


def test_a_copy_that_is_updated_and_dropped_undrained_is_warned_of_once(warned: list[str]) -> None:
    aggregator, model = MetricsAggregator(), Model("of a copy")
    model(torch.ones(2))
    drained = copy.deepcopy(model)
    drained(torch.ones(2))
    aggregator.drain(drained.acc)
    del drained
    untouched = copy.deepcopy(model)
    del untouched
    gc.collect()
    assert not warned
    for _ in range(2):
        dropped = copy.deepcopy(model)
        dropped(torch.ones(2))
        del dropped
        gc.collect()
    (text,) = warned
    assert "took in of metric 'of a copy', 'most' is lost" in text
    drained = copy.deepcopy(Model("drained too early"))
    aggregator.drain(drained.acc)
    aggregator.reduce()  # until which what has been drained is on its way
    drained(torch.ones(2))
    del drained
    gc.collect()
    assert "'drained too early'" in warned[1]
    model.acc.update("of a copy", 1.0)
    del model  # which is no copy
    gc.collect()
    assert len(warned) == 2
