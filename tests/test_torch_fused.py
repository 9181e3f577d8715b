"""An update is one kernel where a compiler can make it, and several that do the same where not."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accumulated import check_equal, logged
from torch._dynamo.utils import counters
from torch._functorch import config as aot_config
from torch._inductor import config, metrics
from torch.utils._python_dispatch import TorchDispatchMode

from metricfold.torch import DeviceAccumulator
from metricfold.torch.fused import FusedFolds

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of the compiler

NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[FusedFolds]:
    """Yield those of a process that has compiled nothing, on a machine that has not either."""
    torch._dynamo.reset()
    folds = FusedFolds()
    monkeypatch.setattr("metricfold.torch.accumulator.FOLDS", folds)
    with config.patch(fx_graph_cache=False), aot_config.patch(enable_autograd_cache=False):
        yield folds


def losses(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(n)
    x = torch.randn(n) * 100
    x[::5] = float("nan")
    return x, torch.randint(-1, 4, (n,))


def test_an_update_of_any_size_is_one_kernel_that_is_compiled_once(folds: FusedFolds) -> None:
    fused, plain = (DeviceAccumulator({"loss": "mean"}, NAMES, fused=by) for by in (True, False))
    metrics.reset()
    for n in (11, 32, 7):
        x, ids = losses(n)
        for acc in (fused, plain):
            acc.update("loss", x, dataset_ids=ids)
    assert metrics.generated_kernel_count == 1
    assert len(folds.compiled) == 1
    copied, pickled = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
    other = DeviceAccumulator({"n": "sum", "loss": "mean"}, NAMES[:2], fused=True)
    for acc in (copied, pickled, other):
        acc.update("loss", x, dataset_ids=ids.clamp(max=1))
    assert metrics.generated_kernel_count == 1
    plain.update("loss", x, dataset_ids=ids.clamp(max=1))
    wanted = logged(plain)
    for acc in (copied, pickled):
        check_equal(logged(acc), wanted)
    assert logged(other).keys() == {"t_a/loss", "t_b/loss"}


def test_where_nothing_can_be_compiled_it_is_said_once_and_all_counts(
    folds: FusedFolds, caplog: pytest.LogCaptureFixture
) -> None:
    fused, plain = (
        DeviceAccumulator({"n": "sum", "most": "max"}, NAMES, fused=by) for by in (True, False)
    )
    with (
        caplog.at_level(logging.WARNING, "metricfold"),
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
    ):
        for n in (5, 9):
            x, ids = losses(n)
            for acc in (fused, plain):
                acc.update("n", x, dataset_ids=ids)
                acc.update("most", x, dataset_ids=ids)
    (text,) = (record.getMessage() for record in caplog.records)
    assert "could not be compiled to one kernel, and takes several" in text
    assert "fused=False" in text
    assert folds.failed
    check_equal(logged(fused), logged(plain))


def test_who_watches_all_operations_sees_those_of_an_update(folds: FusedFolds) -> None:
    class Watch(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen += func.overloadpacket.__name__ == "scatter_add_"
            return func(*args, **(kwargs or {}))

    acc = DeviceAccumulator({"n": "sum"}, fused=True)
    with Watch() as watch:
        acc.update("n", torch.ones(3))
    assert watch.seen == 1
    assert logged(acc) == {"t/n": 3.0}


def test_without_a_gpu_nothing_is_compiled_unasked(folds: FusedFolds) -> None:
    acc = DeviceAccumulator({"n": "sum"}, device="cpu")
    acc.update("n", torch.ones(3))
    assert not folds.compiled


def test_all_layers_and_sizes_are_one_kind_of_update(
    folds: FusedFolds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels come from another compiler here, which is quicker; what is compiled is the same."""
    quick = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr("metricfold.torch.fused.torch.compile", quick)
    metrics = {
        "n": ("sum", "layer", "expert"),
        "p": ("mean", "layer", "expert"),
        "top": ("max", "expert"),
    }
    fused, plain = (
        DeviceAccumulator(metrics, NAMES, axes={"layer": 9, "expert": 5}, fused=by)
        for by in (True, False)
    )
    kinds = []
    counters.clear()
    for layer, n in enumerate((13, 7, 20, 5, 9, 2)):
        torch.manual_seed(n)
        x, ids = torch.randn(n, 2), {"expert": torch.randint(-1, 6, (n, 2))}
        x[0], datasets = float("nan"), torch.randint(-1, 4, (n,))
        for acc in (fused, plain):
            acc.at("n", layer=layer).update(x, ids=ids, dataset_ids=datasets)
            acc.update("n", x, ids={"layer": layer, **ids}, dataset_ids=datasets)
            acc.at("p", layer=layer).update(x, ids=ids, dataset_ids=datasets, weights=x)
            acc.update("top", x[:, :1].expand(n, 5), dataset_ids=datasets)
        kinds.append((len(folds.compiled), counters["stats"]["unique_graphs"]))
    assert not folds.failed
    assert kinds == [(3, 3)] * 6
    for found, wanted in zip(fused.tensors, plain.tensors, strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True)
