"""What a log takes of one rank: bytes, CPU time, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.scale.meter import Cost, traced, undisturbed
from benchmarks.scale.model import Collective
from benchmarks.scale.results import First, Results, Samples, Steady
from benchmarks.scale.sizes import Sizes
from benchmarks.scale.workloads import feed, many_samples
from benchmarks.scale.world import SimulatedCommunicator, World
from benchmarks.workloads import Workload
from metricfold import Metric, MetricsAggregator, Snapshot

__all__ = ["Simulation", "first_log", "measure", "samples_log", "steady_log"]

_WARM_UPS = 2
"""So many logs bring the schema, its capacities and the windows to where they stay."""


def measure(sizes: Sizes, machine: str, say: Callable[[str], None]) -> Results:
    """Simulate all worlds; `say` hears how far it has come."""
    results = Results(machine, sizes.real, sizes.most_gathered)
    for workload in sizes.workloads:
        sent = 0
        for ranks in sizes.worlds:
            say(f"{workload.title}, {ranks:,} ranks")
            results.steady.append(steady_log(workload, "wide", ranks, sizes.real, sizes.logs))
            if sent * ranks > sizes.most_gathered:
                continue
            narrow = steady_log(workload, "narrow", ranks, sizes.real, sizes.few_logs)
            results.steady.append(narrow)
            sent = narrow.collectives[0].sent
    for workload in sizes.workloads:
        for different in sizes.different:
            for ranks in sizes.worlds:
                say(f"{workload.title}, first log, {different} different, {ranks:,} ranks")
                results.first.append(first_log(workload, ranks, different))
    for route, ranks in (("narrow", sizes.worlds[0]), ("wide", sizes.many_ranks)):
        for samples in sizes.samples:
            say(f"{samples:,} samples, {route}, {ranks:,} ranks")
            results.samples.append(samples_log(samples, route, ranks, sizes.real, sizes.few_logs))
    return results


class Simulation:
    """Aggregators on the real ranks of a world, which log one workload.

    Args:
        workload: what they log.
        route: on which route.
        ranks: size of the world.
        real: how many ranks have values of their own.
        own: whether each of those has a category that nobody else has.

    Attributes:
        aggregators: one for each real rank.
    """

    def __init__(
        self, workload: Workload, route: str, ranks: int, real: int, *, own: bool = False
    ) -> None:
        self._world = World(ranks, real)
        self._workload = workload
        self._own = own
        self._logs = 0
        self.aggregators = [
            MetricsAggregator(workload.window, communicator=communicator, route=route)
            for communicator in self._world.communicators
        ]

    @property
    def collectives(self) -> list[Collective]:
        """What rank 0 took part in during the last log."""
        return list(self._world.communicators[0].taken)

    def log(self) -> tuple[Snapshot, Cost, Cost]:
        """Return rank 0's snapshot, and what it and its dict have taken."""
        self._logs += 1
        return self._world.run(self._log)[0]

    def only_log(self) -> tuple[Snapshot, Cost, Cost]:
        """Do the same for a log that is the last one: only rank 0 gets to its end."""
        return self._world.run(self._log, first_only=True)[0]

    def _log(self, communicator: SimulatedCommunicator) -> tuple[Snapshot, Cost, Cost]:
        rank, meter = communicator.rank, communicator.meter
        aggregator = self.aggregators[rank]
        feed(aggregator, self._workload, rank, self._logs)
        if self._own:
            aggregator.update([Metric("own", "kind", f"rank {rank}", "categorical_count")])
        communicator.taken.clear()
        meter.begin()
        snapshot = aggregator.reduce()
        reduced = meter.end()
        meter.begin()
        if rank == 0:
            snapshot.as_dict("train", "auto")
        return snapshot, reduced, meter.end()


@undisturbed()
def steady_log(workload: Workload, route: str, ranks: int, real: int, logs: int) -> Steady:
    """Measure `logs` logs in the steady state, and one more for its memory."""
    simulation = Simulation(workload, route, ranks, real)
    for _ in range(_WARM_UPS):
        simulation.log()
    agreed = simulation.aggregators[0].schema_rounds
    costs = [simulation.log()[1:] for _ in range(logs)]
    with traced():
        _, reduced, reported = simulation.log()
    if simulation.aggregators[0].schema_rounds != agreed:
        raise AssertionError("the keys still change: this is not the steady state")
    turns = zip(*(cost.phases for cost, _ in costs), strict=True)
    pack, *between, merge = (statistics.median(phases) for phases in turns)
    return Steady(
        workload.title,
        route,
        ranks,
        simulation.collectives,
        pack,
        sum(between),
        merge,
        statistics.median(cost.seconds for _, cost in costs),
        reduced.peak,
        max(reduced.peak, reduced.kept + reported.peak),
        reduced.kept + reported.kept,
    )


@undisturbed()
def first_log(workload: Workload, ranks: int, different: int) -> First:
    """Measure the first log of as many real ranks, whose news differ if they are several."""

    def begin() -> Simulation:
        return Simulation(workload, "auto", ranks, different, own=different > 1)

    simulation = begin()
    _, timed, _ = simulation.only_log()
    with traced():
        _, weighed, _ = begin().only_log()
    return First(
        workload.title,
        ranks,
        different,
        simulation.collectives,
        timed.seconds,
        weighed.peak,
    )


@undisturbed()
def samples_log(samples: int, route: str, ranks: int, real: int, logs: int) -> Samples:
    """Measure a log after so many values of each distribution on each rank, all in one interval."""
    simulation = Simulation(many_samples(samples), route, ranks, real)
    for _ in range(_WARM_UPS):
        simulation.log()
    costs = [simulation.log()[1:] for _ in range(logs)]
    with traced():
        snapshot, reduced, reported = simulation.log()
    counts = snapshot.as_dict("train", "interval")
    return Samples(
        route,
        ranks,
        samples,
        int(next(count for key, count in counts.items() if key.endswith("_stat_count"))),
        simulation.collectives,
        statistics.median(cost.seconds for cost, _ in costs),
        statistics.median(cost.seconds for _, cost in costs),
        max(reduced.peak, reduced.kept + reported.peak),
    )
