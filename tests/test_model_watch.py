"""What a `ModelWatch` reports is what plain code says of the whole tensors, however they are laid out."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from ranks import preload, run_ranks, run_threads
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from watched_trainings import LAYOUTS, all_layouts

from metricfold import MetricsAggregator, ReplicasDiffer
from metricfold.torch import DeviceAccumulator, ModelWatch

preload("torch.distributed.fsdp", "torch.distributed.pipelining", "metricfold.torch")


@pytest.fixture(scope="module")
def watched() -> list[dict[str, Any]]:
    return run_ranks(all_layouts, 4, timeout=120)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_parameter_is_what_its_whole_tensors_say(
    watched: list[dict[str, Any]], layout: str
) -> None:
    for rank in watched:
        assert rank[layout]["bad"] == []
        assert rank[layout]["checked"] > 30


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_watch_asks_nothing_of_other_ranks(watched: list[dict[str, Any]], layout: str) -> None:
    for rank in watched:
        assert rank[layout]["collectives"] == 0
        # A log alone takes one, once its keys are known.
        assert rank[layout]["logs"][2:] == [1, 1]


def test_gradients_that_are_parts_of_sums_are_named_once(watched: list[dict[str, Any]]) -> None:
    for rank in watched:
        (said,) = rank["partial"]
        assert "leaves 2 out of 'grad', such as bias, weight: each rank holds a part" in said


def test_shards_that_do_not_say_so_are_refused(watched: list[dict[str, Any]]) -> None:
    for rank in watched:
        assert "FSDP1" in rank["hidden"]
    model = nn.Linear(2, 1)
    model.weight.ds_id = 7  # as DeepSpeed's ZeRO-3 marks what it has sharded
    with pytest.raises(TypeError, match="ZeRO-3"):
        ModelWatch(model)


def test_one_flipped_bit_is_named_with_its_rank(watched: list[dict[str, Any]]) -> None:
    bias = "the ranks hold different bits of layers.1.down.bias"
    two = [(f"{bias}[dp=1], on ranks 2-3", None)]
    hsdp = [(f"{bias}[shard=0], on ranks 0, 2", None)]
    of_four = [(f"{bias}, on rank 2", 2)]
    named = dict.fromkeys(("alone", "ddp", "ddp of bf16"), of_four)
    named |= {"hsdp": hsdp, "fsdp x tp": two, "fsdp": []}
    for rank in watched:
        assert rank["flipped"] == {how: [[], [], alerts] for how, alerts in named.items()}


@pytest.mark.parametrize("route", ["gather", "tree"])
def test_ranks_that_watch_nothing_merge_what_others_do(route: str) -> None:
    def rank(communicator: Any) -> tuple[list[tuple[str, int | None]], dict[str, float]]:
        aggregator = MetricsAggregator(communicator=communicator, route=route)
        aggregator.alert_on(ReplicasDiffer())
        if communicator.rank:  # the first has no model, as a rank that evaluates
            model = nn.Linear(2, 1, bias=False)
            model.weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            watch = ModelWatch(model, optimizer, grads=False, replicas=True)
            if communicator.rank == 2:
                model.weight.data.view(torch.int32)[0, 0] ^= 1
            optimizer.step()
            aggregator.drain(watch)
        snapshot = aggregator.reduce()
        saved = aggregator.state_dict()
        other = MetricsAggregator()
        other.load_state_dict(saved)
        run = other.get_metrics_for_logging("t")
        return [(one.message, one.rank) for one in snapshot.alerts], run

    everyone = run_threads(rank, 4)
    where = ", on rank 2" if route == "gather" else ""
    for alerts, run in everyone:
        assert alerts == [("the ranks hold different bits of weight" + where, 2 if where else None)]
        assert run["t/param/norm"] == pytest.approx(5.0, rel=1e-6)
        assert run["t/param/replicas"] == 1.0


# -- On one rank


def stepped(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int = 1
) -> None:
    for _ in range(steps):
        model(x).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def linear(**settings: Any) -> tuple[nn.Linear, torch.optim.Optimizer, ModelWatch]:
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return model, optimizer, ModelWatch(model, optimizer, **settings)


X = torch.tensor([[1.0, 2.0]])


def test_it_drains_beside_an_accumulator_and_both_come_back() -> None:
    model, optimizer, watch = linear()
    aggregator, acc = MetricsAggregator(), DeviceAccumulator({"loss": "mean"})
    stepped(model, optimizer, X)
    acc.update("loss", torch.tensor(2.0))
    assert aggregator.drain(acc, watch) == (acc, watch)
    assert aggregator.drain(watch) is watch
    logged = aggregator.get_metrics_for_logging("t")
    assert logged["t/loss"] == 2.0
    assert logged["t/grad/norm"] == pytest.approx((6**2 + 12**2) ** 0.5)


def test_a_drain_of_several_takes_all_or_none() -> None:
    model, optimizer, watch = linear()
    aggregator, acc = MetricsAggregator(), DeviceAccumulator({"grad/norm": "mean"})
    stepped(model, optimizer, X)
    acc.update("grad/norm", torch.tensor(2.0))
    with pytest.raises(ValueError, match="grad/norm"):
        aggregator.drain(watch, acc)
    with pytest.raises(ValueError, match="twice"):
        aggregator.drain(watch, watch)
    with pytest.raises(TypeError, match="not list"):
        aggregator.drain([watch])  # type: ignore[type-var]
    with pytest.raises(TypeError, match="or several"):
        aggregator.drain()  # type: ignore[call-overload]
    aggregator.drain(acc)
    assert aggregator.get_metrics_for_logging("t") == {"t/grad/norm": 2.0}


def test_steps_that_are_not_due_leave_nothing() -> None:
    model, optimizer, watch = linear(every=3)
    aggregator = MetricsAggregator()
    seen = []
    for _ in range(6):
        stepped(model, optimizer, X * 0.1)
        aggregator.drain(watch)
        seen.append(not aggregator.reduce().empty)
    assert seen == [False, False, True] * 2


def test_several_steps_in_one_interval_show_their_mean() -> None:
    model, _, watch = linear()
    aggregator = MetricsAggregator()
    for size in (3.0, 4.0):
        model.weight.grad = torch.tensor([[size, 0.0]])
        watch.grads()
    aggregator.drain(watch)
    snapshot = aggregator.reduce()
    found = {end: snapshot.value(None, f"grad/{end}") for end in ("norm", "mean", "zeros")}
    assert found == {"norm": pytest.approx(12.5**0.5), "mean": 1.75, "zeros": 0.5}


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_and_a_skipped_step_does_not_count(fused: bool) -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    aggregator, watch = MetricsAggregator(), ModelWatch(model, optimizer, updates=True)
    for factor in (1.0, float("inf"), 1.0):
        loss = model(torch.ones(1, 3)).sum() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    aggregator.drain(watch)
    snapshot = aggregator.reduce()
    assert snapshot.value(None, "grad/norm") == pytest.approx(3**0.5, rel=1e-6)
    assert snapshot.value(None, "grad/nonfinite") == 0
    assert snapshot.value(None, "update/zeros") == 0
    clipped = ModelWatch(model, optimizer, params=False)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    aggregator.drain(clipped)
    assert aggregator.reduce().value(None, "grad/norm") == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("on_nan", ["propagate", "skip"])
def test_what_is_not_finite_spoils_a_norm_or_is_counted(on_nan: str) -> None:
    model, _, watch = linear()
    aggregator = MetricsAggregator(on_nan=on_nan)
    model.weight.grad = torch.tensor([[float("nan"), 4.0]])
    watch.grads()
    aggregator.drain(watch)
    logged = aggregator.get_metrics_for_logging("t")
    assert logged["t/grad/nonfinite"] == 1
    if on_nan == "skip":
        assert (logged["t/grad/norm"], logged["t/grad/norm_nan_count"]) == (4.0, 1.0)
    else:
        assert logged["t/grad/norm"] != logged["t/grad/norm"]


def test_values_cannot_be_recorded_as_statistics_of_tensors() -> None:
    aggregator = MetricsAggregator()
    for value in (1.0, torch.ones(1)):
        with pytest.raises(ValueError, match=r"elements of tensors.*use one of categorical_count"):
            aggregator.record("grad/norm", value, "tensor_norm")
    with pytest.raises(ValueError, match="no handler") as caught:
        aggregator.record("x", 1.0, "unknown")
    assert "tensor_" not in str(caught.value)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.act(self.up(x)))
        return out


def test_activations_are_looked_at_when_due_and_in_training() -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    aggregator = MetricsAggregator()
    watch = ModelWatch(
        model, optimizer, every=2, params=False, activations=("act", "up"), octaves=True
    )
    outputs = []
    model.act.register_forward_hook(lambda *args: outputs.append(args[2].detach()))
    x = torch.randn(5, 4)
    for _ in range(2):
        outputs.clear()
        model.eval()(x)
        model.train()
        stepped(model, optimizer, x)
        aggregator.drain(watch)
    snapshot = aggregator.reduce()
    found = {}
    for end in ("rms", "mean", "abs_max", "zeros", "nonfinite"):
        values, (labels,) = snapshot.array(None, f"activation/{end}")
        assert labels == ("act", "up")
        found[end] = values[0]
    y = outputs[-1].double()
    assert found == {
        "rms": pytest.approx(float(y.square().mean().sqrt())),
        "mean": pytest.approx(float(y.mean())),
        "abs_max": float(y.max()),
        "zeros": float((y == 0).double().mean()),
        "nonfinite": 0.0,
    }
    octaves, _ = snapshot.array(None, "activation/octaves", by=("module",))
    assert octaves[0] == float((y != 0).sum())


class Checkpointed(nn.Module):
    """Two blocks whose forward runs a second time in the backward pass, unless `reentrant` is None."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            again = self.reentrant
            x = block(x) if again is None else checkpoint(block, x, use_reentrant=again)
        return x


@pytest.fixture(scope="module")
def eager() -> list[list[float]]:
    return activations_of(None, None)[0]


def activations_of(
    reentrant: bool | None, backend: str | None
) -> tuple[list[list[float]], int, int]:
    """Return what two of four steps report, how many graphs there are, and how many breaks."""
    torch._dynamo.reset()
    counters.clear()
    model = Checkpointed(reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    aggregator = MetricsAggregator()
    watch = ModelWatch(model, optimizer, every=2, activations="*.1", octaves=True)
    graphs = CompileCounterWithBackend(backend) if backend else None
    forward = torch.compile(model, backend=graphs, fullgraph=True) if graphs else model
    found = []
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for step in range(4):
        forward(x).pow(2).sum().backward()
        optimizer.step()
        aggregator.drain(watch)
        snapshot = aggregator.reduce()
        assert snapshot.empty == (step % 2 == 0)
        if not snapshot.empty:
            values = snapshot.array(None, "activation/rms")[0].tolist()
            values += snapshot.array(None, "activation/octaves", by=("module",))[0].tolist()
            found.append(values)
    return found, graphs.frame_count if graphs else 0, sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    ("reentrant", "backend"),
    [(None, None), (False, None), (True, None), (None, "aot_eager"), (False, "aot_eager")],
)
def test_a_forward_that_is_repeated_or_compiled_counts_once(
    eager: list[list[float]], reentrant: bool | None, backend: str | None
) -> None:
    found, graphs, breaks = activations_of(reentrant, backend)
    np.testing.assert_allclose(found, eager, rtol=1e-6)
    # One for the steps that are due, one without anything of it for the others.
    assert (graphs, breaks) == ((2, 0) if backend else (0, 0))


def test_what_is_watched_after_a_model_was_compiled_is_seen() -> None:
    # pytorch/pytorch 117758: a forward hook that comes then never runs. wandb/wandb 10221: names.
    torch._dynamo.reset()
    model = Checkpointed(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    compiled = torch.compile(model, backend="aot_eager")
    stepped(compiled, optimizer, torch.ones(2, 6))
    watch, aggregator = (
        ModelWatch(compiled, optimizer, activations="blocks.*.1"),
        MetricsAggregator(),
    )
    stepped(compiled, optimizer, torch.ones(2, 6))
    aggregator.drain(watch)
    snapshot = aggregator.reduce()
    values, (modules,) = snapshot.array(None, "activation/rms")
    assert modules == ("blocks.0.1", "blocks.1.1")
    assert (values > 0).all()
    _, (parameters,) = snapshot.array(None, "grad/norm")
    assert parameters[0] == "blocks.0.0.bias"


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_a_compiled_optimizer_has_no_graph_more() -> None:
    graphs, norms = [], []
    for watched_too in (False, True):
        torch._dynamo.reset()
        model = Checkpointed(None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        aggregator = MetricsAggregator()
        watch = ModelWatch(model, optimizer, every=2, updates=True) if watched_too else None
        counted = CompileCounterWithBackend("aot_eager")
        step = torch.compile(optimizer.step, backend=counted)
        for _ in range(4):
            model(torch.ones(2, 6)).sum().backward()
            wanted = torch.nn.utils.get_total_norm(
                [one.grad for one in model.parameters() if one.grad is not None]
            )
            step()
            optimizer.zero_grad(set_to_none=False)
            if watch is not None:
                aggregator.drain(watch)
                snapshot = aggregator.reduce()
                found = None if snapshot.empty else snapshot.value(None, "grad/norm")
                norms.append((found, float(wanted)))
        graphs.append(counted.frame_count)
    assert graphs[0] == graphs[1]
    assert [found is None for found, _ in norms] == [True, False] * 2
    for found, wanted in norms[1::2]:
        assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_compiled_code_reports_the_same() -> None:
    arrays = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = Checkpointed(None)
        watch = ModelWatch(model, activations="*.1", octaves=True, compiled=compiled)
        aggregator = MetricsAggregator()
        forward = torch.compile(model) if compiled else model
        with torch.no_grad():
            forward(torch.linspace(-1, 1, 12).reshape(2, 6))
        for place, one in enumerate(model.parameters()):
            one.grad = torch.linspace(-1, 2.0**place, one.numel()).reshape(one.shape)
        watch.grads()
        aggregator.drain(watch)
        snapshot = aggregator.reduce()
        names = [name for _, name in snapshot.names()]
        arrays.append({name: snapshot.array(None, name)[0] for name in names})
    assert len(arrays[0]) == 12
    for name, found in arrays[0].items():
        np.testing.assert_allclose(arrays[1][name], found, rtol=1e-6, err_msg=name)


def test_copies_and_pickles_of_a_watched_model_run_by_themselves() -> None:
    model = Two()
    watch = ModelWatch(model, activations="act")
    x = torch.randn(3, 4)
    same = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in model.parameters():
        nn.init.zeros_(one)
    for one in same:
        assert one(x).abs().sum() > 0
        assert vars(one.act)["forward"].__self__ is one.act
    watch.close()
    assert "forward" not in vars(model.act)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"every": 0}, "every=0"),
        ({"only": "*.bias"}, "matches no parameter of the model, which has: weight"),
        ({"activations": "act"}, "matches no module"),
    ],
)
def test_what_cannot_be_watched_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelWatch(nn.Linear(2, 1, bias=False), **given)


def test_lazy_parameters_and_optimizers_without_hooks_are_refused() -> None:
    with pytest.raises(ValueError, match="run the model once"):
        ModelWatch(nn.LazyLinear(3))
    with pytest.raises(TypeError, match="no hooks"):
        ModelWatch(nn.Linear(2, 1), object())  # type: ignore[arg-type]


def test_sparse_gradients_and_integers_are_left_out_and_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.ModuleDict({"words": nn.Embedding(9, 3, sparse=True), "head": nn.Linear(3, 1)})
    model.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, aggregator = ModelWatch(model, optimizer), MetricsAggregator()
    for _ in range(2):
        model["head"](model["words"](torch.tensor([1, 2]))).sum().backward()
        optimizer.step()
    aggregator.drain(watch)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "ModelWatch leaves 1 out of 'grad', such as words.weight",
        "ModelWatch leaves 1 out of 'param', such as codes",
    ]
    values, (labels,) = aggregator.reduce().array(None, "grad/norm")
    assert [label for label, one in zip(labels, values, strict=True) if np.isfinite(one)] == [
        "head.bias",
        "head.weight",
    ]


def test_a_complex_parameter_has_the_norm_of_its_magnitudes() -> None:
    model = nn.ParameterList([nn.Parameter(torch.tensor([3 + 4j, 0j]))])
    watch, aggregator = ModelWatch(model), MetricsAggregator()
    model[0].grad = torch.tensor([6 + 8j, 0j])
    watch.grads()
    aggregator.drain(watch)
    assert aggregator.reduce().value(None, "grad/norm") == pytest.approx(10.0)


def test_accumulated_gradients_are_looked_at_once_they_are_whole() -> None:
    # wandb/wandb 10100: a hook of each backward pass sees parts.
    model, optimizer, watch = linear(params=False)
    aggregator = MetricsAggregator()
    for _ in range(3):
        model(X).sum().backward()
    optimizer.step()
    aggregator.drain(watch)
    assert aggregator.reduce().value(None, "grad/norm") == pytest.approx(3 * 5**0.5)


def test_a_watch_that_is_closed_is_gone_and_another_takes_its_place() -> None:
    # Of a cell in a notebook that runs again.
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = ModelWatch(model, optimizer, activations="act")
    first.close()
    second = ModelWatch(model, optimizer, activations="act")
    aggregator = MetricsAggregator()
    stepped(model, optimizer, torch.randn(3, 4))
    aggregator.drain(first)
    assert aggregator.reduce().empty
    aggregator.drain(second)
    assert not aggregator.reduce().empty
    second.close()
    assert "forward" not in vars(model.act)


def test_a_parameter_that_was_put_in_the_place_of_another_is_watched() -> None:
    model = nn.Linear(2, 1, bias=False)
    watch, aggregator = ModelWatch(model), MetricsAggregator()
    model.weight = nn.Parameter(torch.ones(1, 2))
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    watch.grads()
    aggregator.drain(watch)
    assert aggregator.reduce().value(None, "grad/norm") == pytest.approx(5.0)


def test_parameters_that_a_wrapper_holds_have_their_own_names() -> None:
    model = nn.DataParallel(nn.Linear(2, 1))
    watch, aggregator = ModelWatch(model), MetricsAggregator()
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    watch.grads()
    aggregator.drain(watch)
    assert aggregator.reduce().array(None, "grad/norm")[1] == (("bias", "weight"),)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        ModelWatch(model, activations="*")


def test_two_models_have_names_of_their_own() -> None:
    aggregator = MetricsAggregator()
    watches = []
    for name, size in (("generator", 3.0), ("critic", 4.0)):
        model = nn.Linear(1, 1, bias=False)
        model.weight.grad = torch.tensor([[size]])
        watches.append(ModelWatch(model, name=name))
        watches[-1].grads()
        with pytest.raises(ValueError, match="is no gradient"):
            watches[-1].grads("param")
    aggregator.drain(*watches)
    logged = aggregator.get_metrics_for_logging("t")
    assert (logged["t/generator/grad/norm"], logged["t/critic/grad/norm"]) == (3.0, 4.0)


def test_an_optimizer_that_a_framework_has_wrapped_is_found() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    watch, aggregator = ModelWatch(model, optimizer), MetricsAggregator()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(X).sum())
            optimizer.step()
    aggregator.drain(watch)
    assert aggregator.reduce().value(None, "grad/norm") == pytest.approx(5**0.5)


def test_what_has_no_numbers_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 1, device="meta")
    model.bias = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([model.bias], lr=0.1)
    watch, aggregator = ModelWatch(model, optimizer), MetricsAggregator()
    optimizer.step()
    aggregator.drain(watch)
    assert aggregator.reduce().value(None, "param/norm") == 1.0
    assert "weight: it lies on the meta device" in caplog.text


def test_activations_inside_of_transforms_are_left_out_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Two()
    watch, aggregator = ModelWatch(model, activations="act"), MetricsAggregator()

    def loss_of(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = functional_call(model, parameters, (x,)).sum()
        return out

    for _ in range(2):
        grads = vmap(grad(loss_of), in_dims=(None, 0))(
            dict(model.named_parameters()), X.repeat(3, 2)
        )
        assert grads["up.weight"].shape == (3, 8, 4)
    (said,) = caplog.records
    assert "transform of torch.func" in said.message
    model(X.repeat(3, 2))
    aggregator.drain(watch)
    assert aggregator.reduce().value(None, "activation/rms") is not None


def test_outputs_that_are_nested_or_no_tensors_are_no_error() -> None:
    class Nested(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"first": (x * 2,), "second": 1}

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            return None

    model = nn.ModuleDict({"nested": Nested(), "nothing": Nothing(), "head": nn.Linear(1, 1)})
    watch = ModelWatch(model, activations=("nested", "nothing"))
    assert model["nested"](torch.ones(2))["second"] == 1
    assert model["nothing"](torch.ones(2)) is None
    aggregator = MetricsAggregator()
    aggregator.drain(watch)
    values, (names,) = aggregator.reduce().array(None, "activation/rms")
    assert names == ("nested", "nothing")
    np.testing.assert_equal(values, [2.0, np.nan])


def test_selective_checkpoints_keep_to_the_operations_of_the_layer() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Two()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(x).sum() * x
            return out

    def saved(_: object, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operation in (torch.ops.aten.sum.default, torch.ops.aten.stack.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def gradients(watched_too: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Layer(), Layer())
        watch = ModelWatch(model, activations="*.act") if watched_too else None
        x = torch.randn(3, 4, requires_grad=True)
        contexts = partial(create_selective_checkpoint_contexts, saved)
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
        x.square().sum().backward()
        assert watch is None or watch.collected()
        return [one.grad for one in model.parameters() if one.grad is not None]

    for with_watch, without in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(with_watch, without)
