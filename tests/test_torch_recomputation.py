"""A forward that runs a second time counts once: on the host and on the device, eager and compiled."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from metricfold import AggregationType, Metric, MetricBatch, MetricsAggregator
from metricfold.torch import DeviceAccumulator, once, recomputing
from metricfold.torch.recomputing import asked

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

KINDS = {"n": "sum", "mean": "mean", "most": "max", "least": "min", "values": "distribution"}
SEEN = [Metric("docs", "seen", 1, AggregationType.SUM)]


class Layer(torch.nn.Module):
    """Says, each time it runs, that it did; `hook` says it of a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.aggregator = MetricsAggregator()
        self.acc = DeviceAccumulator({"ran_there": "sum", "hook_there": "sum"})
        self.linear = torch.nn.Linear(4, 4)

    def say(self) -> None:
        self.aggregator.record("ran", 1, "sum")
        self.aggregator.record_all({"runs": 1, "rows": 3}, "sum")
        self.aggregator.update(SEEN)
        self.aggregator.update(MetricBatch.from_metrics(SEEN))
        with torch.no_grad():
            self.acc.update("ran_there", 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.say()
        return self.linear(x).tanh()

    def hook(self, gradient: object) -> None:
        self.aggregator.record("hook", 1, "sum")
        self.acc.update("hook_there", 1.0)

    def hooked(self, x: torch.Tensor) -> torch.Tensor:
        y = self(x)
        if y.requires_grad:
            y.register_hook(self.hook)
        return y

    def counted(self) -> tuple[float, float]:
        """Return how often it ran, and how often its hook, in which all ways agree."""
        self.aggregator.drain(self.acc)
        logged = self.aggregator.get_metrics_for_logging("t")
        ran, hook = logged.get("t/ran", 0.0), logged.get("t/hook", 0.0)
        assert logged.get("t/ran_there", 0.0) == ran
        assert logged.get("t/hook_there", 0.0) == hook
        assert logged.get("t/runs", 0.0) == ran
        assert logged.get("t/rows", 0.0) == 3 * ran
        assert logged.get("t_docs/seen", 0.0) == 2 * ran
        return ran, hook


@pytest.fixture
def layer() -> Layer:
    return Layer()


def given() -> torch.Tensor:
    return torch.randn(3, 4, requires_grad=True)


def again(f: Callable[..., Any], reentrant: bool = False, **options: Any) -> Callable[..., Any]:
    return lambda x: checkpoint(f, x, use_reentrant=reentrant, **options)


def backward(f: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> None:
    f(given()).sum().backward(**options)


def twice(f: Callable[..., Any], reentrant: bool = False) -> Callable[..., Any]:
    return again(lambda x: again(f, reentrant)(f(x)), reentrant)


def double_backward(f: Callable[..., Any]) -> None:
    x = given()
    (gradient,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (gradient**2).sum().backward()


def force(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Take a gradient inside of the forward, as a model of forces does."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    layer.say()
    return gradient


class Own(torch.autograd.Function):
    """Repeats its forward as Megatron's and DeepSpeed's checkpoints do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, run: Callable[..., Any]) -> Any:
        ctx.save_for_backward(x)
        ctx.run = run
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, gradient)
        return x.grad, None


class Watched(torch.autograd.Function):
    """Says something of a gradient in its own backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Layer) -> Any:
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.layer.aggregator.record("hook", 1, "sum")
        ctx.layer.acc.update("hook_there", 1.0)
        return gradient, None


class WatchedOnce(Watched):
    backward = staticmethod(torch.autograd.function.once_differentiable(Watched.backward))


class WithoutOutput:
    """Repeats a forward in the hook of a later tensor, as Megatron's CheckpointWithoutOutput does."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x.detach().requires_grad_()
        with torch.no_grad():
            y = self.run(self.x)
        later = x + y
        later.register_hook(self._recompute)
        return later

    def _recompute(self, gradient: torch.Tensor) -> None:
        with torch.enable_grad():
            self.run(self.x)


def in_unpacking(f: Callable[..., Any]) -> Callable[..., Any]:
    """Repeat a forward when a saved tensor is asked for, as DeepSpeed's non-reentrant checkpoint."""

    def run(x: torch.Tensor) -> torch.Tensor:
        def unpack(packed: object) -> torch.Tensor:
            with torch.enable_grad():
                f(x)
            return x.detach()

        y = f(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: None, unpack):
            return x.square() + y.detach()

    return run


def selective(policy: Callable[..., Any]) -> dict[str, Any]:
    return {"context_fn": partial(create_selective_checkpoint_contexts, policy)}


def save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op == torch.ops.aten.addmm.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def save_on_cpu(layer: Layer) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = again(layer)(given()).sum()
    loss.backward()


def two_backwards(layer: Layer) -> None:
    loss = again(layer)(given()).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def beside_a_backward(layer: Layer) -> None:
    """Run a forward while another thread is in a backward."""
    inside, go_on = threading.Event(), threading.Event()
    y = given() * 1

    def wait(gradient: torch.Tensor) -> None:
        inside.set()
        go_on.wait(30)

    y.register_hook(wait)
    other = threading.Thread(target=lambda: y.sum().backward())
    other.start()
    assert inside.wait(30)
    layer(given())
    go_on.set()
    other.join()


FORWARDS: dict[str, tuple[int, Callable[[Layer], Any]]] = {
    "reentrant": (1, lambda m: backward(again(m, True))),
    "non-reentrant": (1, lambda m: backward(again(m))),
    "nested, reentrant": (2, lambda m: backward(twice(m, True))),
    "nested, non-reentrant": (2, lambda m: backward(twice(m))),
    "one of each around a layer": (1, lambda m: backward(again(again(m, True)))),
    "non-reentrant in reentrant": (2, lambda m: backward(again(lambda x: again(m)(m(x)), True))),
    "reentrant in non-reentrant": (2, lambda m: backward(again(lambda x: again(m, True)(m(x))))),
    "three deep, reentrant": (
        3,
        lambda m: backward(again(lambda x: twice(m, True)(m(x)), True)),
    ),
    "three deep, non-reentrant": (3, lambda m: backward(again(lambda x: twice(m)(m(x))))),
    "without gradients, reentrant": (1, lambda m: torch.no_grad()(again(m, True))(given())),
    "without gradients, non-reentrant": (1, lambda m: torch.no_grad()(again(m))(given())),
    "not stopped early": (1, lambda m: backward(again(m, early_stop=False))),
    "a sequence": (
        1,
        lambda m: backward(
            lambda x: checkpoint_sequential([m, torch.nn.Tanh()], 2, x, use_reentrant=True)
        ),
    ),
    "selective": (1, lambda m: backward(again(m, **selective(save_products)))),
    "a wrapped module": (1, lambda m: backward(checkpoint_wrapper(m))),
    "saved on the CPU": (1, save_on_cpu),
    "a Function of one's own": (1, lambda m: backward(lambda x: Own.apply(x, m))),
    "a Function in a checkpoint": (1, lambda m: backward(again(lambda x: Own.apply(x, m)))),
    "a checkpoint in a Function": (1, lambda m: backward(lambda x: Own.apply(x, again(m)))),
    "a hook that recomputes": (1, lambda m: backward(WithoutOutput(m))),
    "an unpacking of one's own": (1, lambda m: backward(in_unpacking(m))),
    "two backwards": (1, two_backwards),
    "a double backward": (1, lambda m: double_backward(m)),
    "a double backward, checkpointed": (1, lambda m: double_backward(again(m))),
    "a double backward, nested": (2, lambda m: double_backward(twice(m))),
    "a gradient in the forward": (2, lambda m: backward(partial(force, m))),
    "the same, checkpointed": (2, lambda m: backward(again(partial(force, m)))),
    "the same, reentrant": (2, lambda m: backward(again(partial(force, m), True))),
    "a jacobian": (1, lambda m: torch.autograd.functional.jacobian(m, torch.randn(3, 4))),
    "beside another thread's backward": (1, beside_a_backward),
    "no backward": (2, lambda m: (m(given()), m(given()))),
}


@pytest.mark.parametrize("how", FORWARDS)
def test_a_forward_counts_once_however_often_it_runs(layer: Layer, how: str) -> None:
    times, run = FORWARDS[how]
    run(layer)
    assert layer.counted() == (times, 0)


def on_the_parameter(layer: Layer) -> None:
    layer.linear.weight.register_post_accumulate_grad_hook(layer.hook)
    backward(again(layer))


def on_the_module(layer: Layer, **options: Any) -> None:
    layer.linear.register_full_backward_hook(lambda module, ins, outs: layer.hook(outs))
    backward(again(layer, **options))


def on_several(layer: Layer) -> None:
    x = given()
    y = again(layer)(x)
    torch.autograd.graph.register_multi_grad_hook((x, y), layer.hook)
    y.sum().backward()


def on_the_node(layer: Layer) -> None:
    y = again(layer)(given())
    y.grad_fn.register_hook(lambda ins, outs: layer.hook(outs))
    y.sum().backward()


def step_in_a_hook(layer: Layer) -> None:
    """Take the optimizer's step as soon as a gradient is there, and run the next forward at once."""

    def step(parameter: torch.Tensor) -> None:
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        layer.hook(parameter)

    layer.linear.weight.register_post_accumulate_grad_hook(step)
    backward(layer)


HOOKS: dict[str, Callable[[Layer], Any]] = {
    "of a tensor": lambda m: backward(m.hooked),
    "of a tensor, with a graph": lambda m: backward(m.hooked, create_graph=True),
    "beside a checkpoint": lambda m: backward(lambda x: again(torch.tanh)(m.hooked(x))),
    "after a checkpoint": lambda m: backward(lambda x: m.hooked(again(torch.tanh)(x))),
    "in a checkpoint, reentrant": lambda m: backward(again(m.hooked, True)),
    "in a checkpoint, non-reentrant": lambda m: backward(again(m.hooked)),
    "in a checkpoint, with a graph": lambda m: backward(again(m.hooked), create_graph=True),
    "in a reentrant one, with a graph": lambda m: backward(
        again(m.hooked, True), create_graph=True
    ),
    "in a Function": lambda m: backward(lambda x: Own.apply(x, m.hooked)),
    "in a checkpoint in a reentrant one": lambda m: backward(again(again(m.hooked), True)),
    "of a parameter": on_the_parameter,
    "of a module": on_the_module,
    "of several tensors": on_several,
    "of a node": on_the_node,
    "that takes the step": step_in_a_hook,
    "the backward of a Function": lambda m: backward(lambda x: Watched.apply(m(x), m)),
    "the same, in a checkpoint": lambda m: backward(again(lambda x: Watched.apply(m(x), m))),
    "the same, differentiable once": lambda m: backward(lambda x: WatchedOnce.apply(m(x), m)),
}


@pytest.mark.parametrize("how", HOOKS)
def test_what_a_hook_says_in_the_backward_pass_counts(layer: Layer, how: str) -> None:
    HOOKS[how](layer)
    assert layer.counted() == (1, 1)


def test_a_hook_in_a_repeated_forward_is_repeated(layer: Layer) -> None:
    def force(x: torch.Tensor) -> torch.Tensor:
        y = layer.hooked(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return gradient

    backward(force)
    plainly = layer.counted()
    assert plainly == (1, 2)  # y has a gradient in the forward, and in the backward pass
    layer.aggregator.reset()
    backward(again(force))
    assert layer.counted() == plainly


def test_a_functional_gradient_is_a_forward_like_any(layer: Layer) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        layer.aggregator.record("ran", 1, "sum")
        return layer.linear(x).sum()

    torch.func.grad(loss)(torch.randn(3, 4))
    assert layer.aggregator.get_metrics_for_logging("t") == {"t/ran": 1.0}


# -- Compiled --------------------------------------------------------------------------------------


class OnDevice(torch.nn.Module):
    """Says in each forward what would show a repetition in its totals."""

    def __init__(self, kinds: dict[str, str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.acc = DeviceAccumulator(kinds)
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.kinds:
            self.acc.update(name, x.detach()[:, 0], weights=x.detach()[:, 1] > 0)
        return self.linear(x).tanh()


def full(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", fullgraph=True)


COMPILED: dict[str, Callable[[OnDevice], Callable[..., Any]]] = {
    "no checkpoint": full,
    "a checkpoint in a graph": lambda m: full(again(m)),
    "two in a graph": lambda m: full(again(lambda x: again(m)(x))),
    "a graph in a checkpoint": lambda m: again(full(m)),
    "a graph in a reentrant one": lambda m: again(full(m), True),
    "a graph in two": lambda m: again(again(full(m))),
    "a graph in a selective one": lambda m: again(full(m), **selective(save_products)),
    "a graph in a Function": lambda m: lambda x: Own.apply(x, full(m)),
    "a Function that breaks a graph": lambda m: torch.compile(
        lambda x: Own.apply(x, m), backend="aot_eager"
    ),
    "a reentrant one in a graph": lambda m: torch.compile(again(m, True), backend="aot_eager"),
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_graph_asks_when_it_runs_whether_it_counts(how: str) -> None:
    assert_as_plain({"n": "sum"}, COMPILED[how])


def test_no_aggregation_changes_in_a_repeated_graph() -> None:
    assert_as_plain(KINDS, lambda m: again(full(m)))


def assert_as_plain(
    kinds: dict[str, str], how: Callable[[OnDevice], Callable[..., torch.Tensor]]
) -> None:
    torch._dynamo.reset()
    plain, compiled = OnDevice(kinds), OnDevice(kinds)
    run = how(compiled)
    for seed in range(2):
        for f in (plain, run):
            torch.manual_seed(seed)
            backward(f)
    logged = []
    for module in (plain, compiled):
        aggregator = MetricsAggregator()
        aggregator.drain(module.acc)
        logged.append(aggregator.get_metrics_for_logging("t"))
    assert logged[0]
    assert logged[1] == pytest.approx(logged[0], rel=1e-12)


def test_a_compiled_step_may_record_in_a_checkpoint(layer: Layer) -> None:
    torch._dynamo.reset()
    for run in (
        torch.compile(again(layer), backend="eager"),
        again(torch.compile(layer, backend="eager")),
    ):
        layer.aggregator.reset()
        backward(run)
        backward(run)
        assert layer.counted() == (2, 0)


def test_the_backward_of_a_function_in_a_graph_counts() -> None:
    torch._dynamo.reset()
    acc = DeviceAccumulator({"gradients": "sum"})

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            acc.update("gradients", gradient)
            return gradient

    backward(full(Counting.apply))
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    assert aggregator.get_metrics_for_logging("t") == {"t/gradients": 12.0}


@pytest.mark.parametrize("reentrant", [True, False])
def test_compiled_autograd_counts_as_any_other(layer: Layer, reentrant: bool) -> None:
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        backward(again(layer.hooked, reentrant))
    assert layer.counted() == (1, 1)


# -- Evaluations that are said to be further ones --------------------------------------------------


def evaluation(layer: Layer, optimizer: torch.optim.Optimizer) -> Callable[[], torch.Tensor]:
    x, target = torch.randn(3, 4), torch.randn(3, 4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (again(layer.hooked)(x) - target).square().mean()
        loss.backward()
        return loss

    return closure


def lbfgs(layer: Layer) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(layer.linear.parameters(), max_iter=5, line_search_fn="strong_wolfe")


def test_of_a_closure_that_lbfgs_evaluates_often_the_first_evaluation_counts(layer: Layer) -> None:
    optimizer = lbfgs(layer)
    closure = evaluation(layer, optimizer)
    assert isinstance(optimizer.step(once(closure)), torch.Tensor)
    assert layer.counted() == (1, 1)
    optimizer.step(closure)  # nothing is taken for a further evaluation unasked
    assert layer.counted()[0] > 2


def test_a_closure_that_is_kept_counts_once_in_each_step(layer: Layer) -> None:
    optimizer = lbfgs(layer)
    closure = once(evaluation(layer, optimizer))
    for _ in range(3):
        optimizer.step(closure)
    optimizer.step(closure=closure)
    assert layer.counted() == (4, 4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_accumulator_counts_the_first_evaluation_of_a_closure(compiled: bool) -> None:
    torch._dynamo.reset()
    acc = DeviceAccumulator({"loss": "mean", "evaluations": "sum"})
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight], max_iter=3, lr=0.1)

    def loss_of() -> torch.Tensor:
        loss = (weight - 3).square().sum()
        acc.update("loss", loss)
        acc.update("evaluations", 1.0)
        return loss

    run = torch.compile(loss_of, backend="aot_eager", fullgraph=True) if compiled else loss_of
    evaluations = 0

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = run()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    firsts = []
    for _ in range(2):
        firsts.append((weight.detach() - 3).square().sum().item())
        optimizer.step(once(closure))  # type: ignore[no-untyped-call]
    assert evaluations > 2
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    logged = aggregator.get_metrics_for_logging("t")
    assert logged == pytest.approx({"t/loss": sum(firsts) / 2, "t/evaluations": 2.0})


def test_a_second_evaluation_at_other_weights_does_not_count(layer: Layer) -> None:
    x = torch.randn(3, 4)
    layer(x).sum().backward()
    with recomputing():
        backward(layer.hooked)
        with recomputing(False):
            layer(x)
    layer(x)
    recomputing()(layer)(x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), recomputing():
        layer(x[:, :2])
    layer(x)
    assert layer.counted() == (4, 0)


def test_what_one_thread_says_is_not_said_of_another(layer: Layer) -> None:
    with recomputing():
        other = threading.Thread(target=backward, args=(layer.hooked,))
        other.start()
        other.join()
    assert layer.counted() == (1, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_said_holds_on_the_threads_of_a_gpu(layer: Layer) -> None:
    layer.cuda()
    x = torch.randn(3, 4, device="cuda", requires_grad=True)
    for reentrant in (True, False):
        again(layer.hooked, reentrant)(x).sum().backward()
        with recomputing():
            again(layer.hooked, reentrant)(x).sum().backward()
    assert layer.counted() == (2, 2)


# -- What is lost is said --------------------------------------------------------------------------


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, "metricfold"):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_what_only_a_repeated_forward_says_is_warned_of_once(
    warned: Callable[[], list[str]],
) -> None:
    # As those do who have worked around that it counted twice: in a reentrant checkpoint, only the
    # repeated forward has gradients.
    torch._dynamo.reset()
    asked.clear()
    aggregator, acc = MetricsAggregator(), DeviceAccumulator({"aux_loss": "mean", "n": "sum"})

    def layer(x: torch.Tensor) -> torch.Tensor:
        aggregator.record("n", 1, "sum")
        aggregator.record("padding", 1, "sum", weight=0)
        acc.update("n", 1)
        if torch.is_grad_enabled():
            aggregator.record("aux_loss", x.mean(), dataset="docs")
            acc.update("aux_loss", x.mean())
        return x * 2

    for _ in range(3):
        backward(again(layer, True))
    on_host, on_device = warned()
    assert on_host.startswith("metric 'aux_loss' of dataset 'docs' came only from a forward that")
    assert on_device.startswith(
        "metric 'aux_loss' came only from a forward that PyTorch runs again"
    )
    assert "inside of `with metricfold.torch.recomputing(False):`" in on_host


def test_what_is_said_to_count_in_a_repeated_forward_does(
    warned: Callable[[], list[str]],
) -> None:
    aggregator = MetricsAggregator()

    def layer(x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            with recomputing(False):
                aggregator.record("aux_loss", 2.0)
        return x * 2

    backward(again(layer, True))
    assert aggregator.get_metrics_for_logging("t") == {"t/aux_loss": 2.0}
    assert not warned()


# -- Selective checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "at", "recorded"])
def test_a_selective_checkpoint_gives_a_layer_none_of_our_results(how: str) -> None:
    """It numbers operations; ours were in the first forward alone, so that what followed got their results.

    Reported of expert loads that a gate counts: "encountered during backward but not found in storage".
    """
    aggregator, ids = MetricsAggregator(), torch.tensor([0, 1, 1])
    acc = DeviceAccumulator(
        {"n": "sum", "t": ("sum", "layer", "expert")}, axes={"layer": 2, "expert": 4}
    )
    at = acc.at("t", layer=1)
    gate = torch.nn.Linear(4, 4, bias=False)

    def layer(x: torch.Tensor, counted: bool) -> torch.Tensor:
        y = torch.add(x, 0.5).clamp(-1, 1)
        if counted and how == "plain":
            acc.update("n", y, weights=y > 0)
        elif counted and how == "at":
            at.update(y.detach().abs(), ids={"expert": ids})
        elif counted:
            aggregator.record("r", y[0, 0])
        z = torch.add(y, gate(y).clone()).clamp(-2, 2)
        return torch.add(z, z * z.clone()).sum()

    def gradient(counted: bool) -> torch.Tensor:
        x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        context = selective(lambda *_, **__: CheckpointPolicy.MUST_SAVE)
        checkpoint(layer, x, counted, use_reentrant=False, **context).backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(counted=True), gradient(counted=False))
    aggregator.drain(acc)
    x = torch.linspace(-1, 1, 12).view(3, 4).add(0.5).clamp(-1, 1)
    wanted = {"plain": x[x > 0].sum(), "at": x.abs().sum(), "recorded": x[0, 0]}[how].item()
    found = aggregator.get_metrics_for_logging("t")
    name = {"plain": "t/n", "at": "t/t", "recorded": "t/r"}[how]
    assert found == pytest.approx({name: wanted})
