"""What only a GPU can show, in one run of some minutes: `make gpu-check`.

    python -m gpu_check                    # says why, and ends well, where there is no GPU
    python -m gpu_check --device cpu       # the same code, for what it is worth there
    python -m gpu_check --only steps jax   # parts by name

Each part returns a section of the benchmarks' table, or raises; the check fails if one raises. It
runs in a process of its own, so that an error on the device does not end the others.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from benchmarks.table import Section, amount, cost
from benchmarks.timing import interleaved
from benchmarks.watch import Trained
from torch import Tensor

from metricfold import MetricsAggregator
from metricfold.torch import DeviceAccumulator, ModelWatch
from metricfold.torch.fused import triton_for

__all__ = ["PARTS", "Place", "main"]

_DATASETS = tuple(f"dataset_{number}" for number in range(8))
_MOST_SECONDS = 85
"""Of each of the seven parts: ten minutes do for them all."""
_KINDS = ("mean", "sum", "max", "min", "distribution")


@dataclass(frozen=True, slots=True)
class Place:
    """Where to run, and how much.

    Args:
        device: "cuda" or "cpu".
        step: seconds that a step without metrics takes.
        rounds: of each comparison.
        folder: of the profiler's trace.
    """

    device: str
    step: float = 0.01
    rounds: int = 20
    folder: Path = Path(tempfile.gettempdir())

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def drained(accumulator: DeviceAccumulator) -> dict[str, float]:
    aggregator = MetricsAggregator(None)
    aggregator.drain(accumulator)
    return aggregator.get_metrics_for_logging("t")


def agree(found: dict[str, float], wanted: dict[str, float], rel: float = 1e-6) -> None:
    """Raise unless both say the same."""
    if found.keys() != wanted.keys():
        raise AssertionError(f"{sorted(found)} are not {sorted(wanted)}")
    for name, value in wanted.items():
        if not math.isclose(found[name], value, rel_tol=rel, abs_tol=1e-12):
            raise AssertionError(f"{name}: {found[name]} on the device, {value} on the host")


def samples(device: str, number: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "x": torch.randn(number, generator=generator) * 10,
        "weights": torch.rand(number, generator=generator),
        "ids": torch.randint(0, len(_DATASETS), (number,), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


# -- The parts -------------------------------------------------------------------------------------


@contextmanager
def forbidden_to_wait(device: str) -> Iterator[None]:
    """Let every wait for the GPU raise; on a CPU there is none."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def syncs(place: Place) -> Section:
    """No update, mark, rollback or drain waits, eager and fused, and the numbers are those of a CPU."""
    found: dict[str, dict[str, float]] = {}
    kinds = dict(zip(_KINDS, _KINDS, strict=True))
    for way, device, fused in (
        ("eager", place.device, False),
        ("fused", place.device, None),
        ("a CPU", "cpu", False),
    ):
        acc = DeviceAccumulator({"loss": "mean", **kinds}, _DATASETS, device=device, fused=fused)
        given = samples(device)
        logits = torch.sin(torch.arange(32 * 4 * 16.0)).reshape(32, 4, 16).to(device)
        logits.requires_grad_()
        labels = (torch.arange(32 * 4) % 16).reshape(32, 4).to(device)

        def step(
            acc: Any = acc, given: Any = given, logits: Any = logits, labels: Any = labels
        ) -> None:
            mark = acc.mark()
            loss = acc.token_loss(logits, labels, given["ids"])
            loss.backward()
            for kind in kinds:
                acc.update(kind, given["x"], weights=given["weights"], dataset_ids=given["ids"])
            acc.update_all(dict.fromkeys(kinds, given["x"]), dataset_ids=given["ids"])
            acc.rollback(mark, where=loss.isnan())

        step()  # compiles what is to be compiled
        with forbidden_to_wait(device):
            for _ in range(20):
                step()
            aggregator = MetricsAggregator(None)
            aggregator.drain(acc)
        found[way] = aggregator.get_metrics_for_logging("t")
    agree(found["eager"], found["a CPU"], 1e-4)
    agree(found["fused"], found["a CPU"], 1e-4)
    section = Section(f"{place.device}: 21 steps of 11 updates, a mark and a rollback, and a drain")
    if place.device == "cuda":
        section.rows = [amount("waits for the GPU, each of which would have raised", 0, "")]
    else:
        section.notes = ["the numbers agree; a CPU is never waited for"]
    return section


def kernels_of(call: Callable[[], object], device: str) -> int:
    """Return the kernels of a call: on a CPU the operations that no other has called, but for views."""
    call()
    cuda = device == "cuda"
    activities = [
        torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    ]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if cuda:
            torch.cuda.synchronize()
    events = profile.events()
    if cuda:
        return sum(str(event.device_type).endswith("CUDA") for event in events)
    views = (
        "view",
        "expand",
        "select",
        "slice",
        "as_strided",
        "reshape",
        "empty",
        "narrow",
        "squeeze",
    )
    return sum(
        event.name.startswith("aten::")
        and event.cpu_parent is None
        and not any(v in event.name for v in views)
        for event in events
    )


def kernels(place: Place) -> Section:
    """Count the kernels of an update, eager and fused, and time what the host does for it."""
    given = samples(place.device)
    section = Section(f"{place.device}: one update of 32 values of 8 datasets")
    for kind in _KINDS:
        ways: dict[str, Callable[[], object]] = {}
        for way, fused in _ways(place):
            acc = DeviceAccumulator({"m": kind}, _DATASETS, device=place.device, fused=fused)
            ways[way] = lambda acc=acc: acc.update("m", given["x"], dataset_ids=given["ids"])  # type: ignore[misc]
        for way, call in ways.items():
            section.rows.append(amount(f"{kind}, {way}", kernels_of(call, place.device), "kernels"))
        times = interleaved(ways, place.rounds)
        section.rows += [
            cost(f"{kind}, {way}: the host", found, "eager", times["eager"])
            for way, found in times.items()
            if way != "eager"
        ]
    return section


def _ways(place: Place) -> list[tuple[str, bool | None]]:
    return [("eager", False), ("fused", None)] if triton_for(place.device) else [("eager", False)]


def steps(place: Place) -> Section:
    """Compare steps: alone, with token_loss of 8 datasets, and with the `.item()` of one loss."""
    device = place.device
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 128, device=device)
    x = torch.randn(16, 64, 64, device=device)
    labels = torch.randint(0, 128, (16, 64), device=device)
    ids = torch.arange(16, device=device) % 8
    acc = DeviceAccumulator({"loss": "mean"}, _DATASETS, device=device)
    matrix = torch.randn(1024 if device == "cuda" else 128, device=device).diag()
    repeats = _repeats(place, matrix)

    def step(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        product = matrix
        for _ in range(repeats):
            product = product @ matrix
        loss = loss_of(head(x)) + 0 * product[0, 0].detach().nan_to_num(0, 0, 0)
        loss.backward()
        return loss

    def plain(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    ways: dict[str, Callable[[], object]] = {
        "the step alone": lambda: step(plain),
        "token_loss of 8 datasets": lambda: step(
            lambda logits: acc.token_loss(logits, labels, ids)
        ),
        "loss.item()": lambda: step(plain).item(),
    }
    for way in ways.values():
        way()
    place.wait()

    def finished(way: Callable[[], object]) -> Callable[[], None]:
        def ten_steps() -> None:
            for _ in range(10):
                way()
            place.wait()

        return ten_steps

    times = interleaved(
        {name: finished(way) for name, way in ways.items()}, place.rounds, calls_per_turn=1
    )
    section = Section(f"{device}: ten steps of {place.step * 1e3:g} ms")
    bare = times["the step alone"]
    section.rows = [
        cost(name, found, "the step alone", bare)
        for name, found in times.items()
        if found is not bare
    ]
    return section


def _repeats(place: Place, matrix: Tensor) -> int:
    """Return how many products take as long as a step is to take."""
    for number in (10, 100):
        place.wait()
        began = time.perf_counter()
        for _ in range(number):
            matrix @ matrix
        place.wait()
        taken = (time.perf_counter() - began) / number
    return max(1, round(place.step / taken))


def trace(place: Place) -> Section:
    """Write a trace of three steps with metrics, to be opened in https://ui.perfetto.dev."""
    given = samples(place.device)
    acc = DeviceAccumulator({"m": "mean", "len": "distribution"}, _DATASETS, device=place.device)
    aggregator = MetricsAggregator(None)
    acc.update("m", given["x"], dataset_ids=given["ids"])
    with torch.profiler.profile() as profile:
        for _ in range(3):
            acc.update("m", given["x"], dataset_ids=given["ids"])
            acc.update("len", given["x"], dataset_ids=given["ids"])
        aggregator.drain(acc)
        aggregator.reduce()
    path = place.folder / f"metricfold-{place.device}.json"
    profile.export_chrome_trace(str(path))
    names = {
        event["name"] for event in json.loads(path.read_text())["traceEvents"] if "name" in event
    }
    copies = {name for name in names if "Memcpy DtoH" in name}
    section = Section(f"{place.device}: a trace of three steps and a log: {path}")
    section.rows = [
        amount("kinds of events", len(names), ""),
        amount("kinds of copies to the host", len(copies), ""),
    ]
    return section


def ranks(place: Place) -> Section:
    """Reduce over ranks of NCCL, of which metrics take gloo: as many as there are GPUs, two at most."""
    import torch.multiprocessing as processes

    number = min(2, torch.cuda.device_count()) if place.device == "cuda" else 2
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        processes.spawn(_rank, (number, place.device, f"file://{folder}/group"), nprocs=number)  # type: ignore[no-untyped-call]
    section = Section(f"{place.device}: {number} ranks")
    section.rows = [amount("seconds of the job", time.perf_counter() - began, "s")]
    return section


def _rank(rank: int, number: int, device: str, address: str) -> None:
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=number)
    reduce_beside(f"cuda:{rank}" if device == "cuda" else device)
    dist.destroy_process_group()


def reduce_beside(device: str) -> None:
    """Log three times while the job's own collectives are under way."""
    import torch.distributed as dist

    rank, number = dist.get_rank(), dist.get_world_size()
    acc = DeviceAccumulator({"n": "sum", "loss": "mean"}, _DATASETS, device=device)
    aggregator = MetricsAggregator()
    given = samples(device)
    for log in range(1, 4):
        gradient = torch.ones(1 << 20, device=device)
        work = dist.all_reduce(gradient, async_op=True)  # what must not be waited for
        acc.update("n", given["x"] * 0 + 1, dataset_ids=given["ids"])
        acc.update("loss", given["x"] + rank, dataset_ids=given["ids"])
        aggregator.drain(acc)
        logged = aggregator.get_metrics_for_logging("t")
        total = sum(value for name, value in logged.items() if name.endswith("/n"))
        if total != 32 * number * log:
            raise AssertionError(f"{total} values of {32 * number * log}")
        assert work is not None
        work.wait()


def jax(place: Place) -> Section:
    """Hold JAX on this device to the host: transfers, packed metrics, accumulators."""
    if not find_spec("jax"):
        return Section("JAX is not installed")
    import jax as framework
    import numpy as np

    platform = {"cuda": "gpu"}.get(place.device, place.device)
    try:
        device = framework.devices(platform)[0]
    except RuntimeError as error:
        return Section(f"JAX has no {platform}: {error}")
    from metricfold.jax import DeviceAccumulator as JaxAccumulator
    from metricfold.jax import DistributedMetrics

    given = {name: np.asarray(tensor) for name, tensor in samples("cpu").items()}
    on_host = DeviceAccumulator({kind: kind for kind in _KINDS}, _DATASETS)
    for kind in _KINDS:
        on_host.update(
            kind, torch.from_numpy(given["x"]), dataset_ids=torch.from_numpy(given["ids"])
        )
    wanted = drained(on_host)
    with framework.default_device(device):
        x, ids = framework.numpy.asarray(given["x"]), framework.numpy.asarray(given["ids"])

        @framework.jit
        def step(acc: Any, x: Any, ids: Any) -> Any:
            return acc.update_all(dict.fromkeys(_KINDS, x), dataset_ids=ids)

        acc = JaxAccumulator({kind: kind for kind in _KINDS}, _DATASETS)
        began = time.perf_counter()
        framework.block_until_ready(step(acc, x, ids))
        compiled = time.perf_counter() - began
        aggregator = MetricsAggregator(None)
        with framework.transfer_guard_device_to_host("disallow"):  # a drain says what it transfers
            updated = step(acc, x, ids)
        aggregator.drain(updated)
        agree(aggregator.get_metrics_for_logging("t"), wanted, 1e-5)
        packed = framework.jit(
            lambda x: DistributedMetrics.reduce_mean_static(
                {f"m{i}": x[i] for i in range(8)}, None, packed=True
            )
        )(x)
        unpacked = packed.unpack()
        for i in range(8):
            if not math.isclose(float(unpacked[f"m{i}"]), float(given["x"][i]), rel_tol=1e-6):
                raise AssertionError(f"m{i}: {unpacked[f'm{i}']} is not {given['x'][i]}")
        recorded = MetricsAggregator(None)
        for i in range(8):
            recorded.record("loss", x[i])
        agree(recorded.get_metrics_for_logging("t"), {"t/loss": float(given["x"][:8].mean())}, 1e-5)
    section = Section(f"JAX on {device.platform}: accumulator, packed metrics, recorded arrays")
    section.rows = [amount("seconds to compile a fold of five kinds", compiled, "s")]
    return section


def watch(place: Place) -> Section:
    """Train with a ModelWatch that nothing waits for, whose numbers are those of a CPU; and compare steps."""
    found = {device: _watched(device) for device in dict.fromkeys((place.device, "cpu"))}
    agree(found[place.device], found["cpu"], 1e-3)
    section = Section(f"{place.device}: a step of a watched transformer, AdamW")
    settings: dict[str, dict[str, Any]] = {
        "not due": {"every": 10**9},
        "due": {},
        "due, octaves": {"octaves": True},
        "due, updates": {"updates": True},
        "due, replicas alone": {"grads": False, "params": False, "replicas": True},
    }
    if place.device == "cuda":
        settings["due, compiled"] = {"compiled": True}
        settings["due, octaves, compiled"] = {"compiled": True, "octaves": True}
    layers = 84 if place.device == "cuda" else 2
    ways = {"the step alone": Trained(layers, 64, place.device).step}
    for name, given in settings.items():
        trained = Trained(layers, 64, place.device)
        ModelWatch(trained.model, trained.optimizer, **given)
        ways[name] = trained.step

    def finished(way: Callable[[], object]) -> Callable[[], None]:
        def one_step() -> None:
            way()
            place.wait()

        return one_step

    for way in ways.values():
        finished(way)()
    calls = {name: finished(way) for name, way in ways.items()}
    times = interleaved(calls, place.rounds, calls_per_turn=1)
    bare = times["the step alone"]
    section.rows = [
        cost(name, taken, "the step alone", bare)
        for name, taken in times.items()
        if taken is not bare
    ]
    return section


def _watched(device: str) -> dict[str, float]:
    """Return what is logged of three steps during which nothing may wait for the device."""
    trained, aggregator = Trained(2, 16, device), MetricsAggregator(None)
    watch = ModelWatch(
        trained.model,
        trained.optimizer,
        updates=True,
        octaves=True,
        replicas=True,
        activations="layers.*.linear1",
    )
    trained.step()  # makes what is made once
    with forbidden_to_wait(device):
        for _ in range(2):
            watch.grads("grad_raw")
            trained.step()
        aggregator.drain(watch)
    logged = aggregator.get_metrics_for_logging("t")
    # What rounding decides: which of many sums is nearly 0, and in which octave a number is.
    return {name: value for name, value in logged.items() if "mean" not in name}


PARTS: dict[str, Callable[[Place], Section]] = {
    "syncs": syncs,
    "kernels": kernels,
    "steps": steps,
    "watch": watch,
    "trace": trace,
    "ranks": ranks,
    "jax": jax,
}


# -- The command -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, each in a process of its own; return 1 if one has failed."""
    parser = argparse.ArgumentParser(prog="python -m gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument(
        "--step", type=float, default=0.01, help="seconds of a step without metrics"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no GPU here; --device cpu runs the same code on the CPU")
        return 0
    if options.part:
        place = Place(options.device, options.step, options.rounds, options.folder)
        print(f"\n{PARTS[options.part](place)}")
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    failed = []
    for part in options.only:
        command = [sys.executable, "-m", "gpu_check", *given, "--part", part]
        try:
            subprocess.run(command, timeout=_MOST_SECONDS, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(error, file=sys.stderr)
            failed.append(part)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall right")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
