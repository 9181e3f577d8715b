"""Ranks on two hosts, each with a network of its own; `make multinode` has more, and delays."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

import pytest
import torch  # noqa: F401 - where there is none, conftest skips this module
from multinode.hosts import Hosts, why_not
from multinode.ranks import run_on

from metricfold import MetricsAggregator, MissingRanksError

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are hosts"),
]

LOOPBACK = ("127.0.1.1", "127.0.1.1")  # where Debian lets a host's own name lead


def raised(aggregator: MetricsAggregator) -> tuple[str, tuple[int, ...], dict[int, str]]:
    """Return what `reduce` raises, whom that names, and where they are."""
    try:
        aggregator.reduce()
    except MissingRanksError as error:
        return str(error), error.missing, error.hosts
    return "ok", (), {}


def total(aggregator: MetricsAggregator) -> float:
    aggregator.record("n", 1.0, "sum")
    return aggregator.get_metrics_for_logging("t")["t/n"]


# -- Interfaces ------------------------------------------------------------------------------------


def both_routes(rank: int) -> list[float]:
    aggregators = [MetricsAggregator(timeout=10, route=route) for route in ("gather", "tree")]
    return [total(aggregator) for aggregator in aggregators for _ in range(2)]


@pytest.mark.parametrize(
    "given",
    [{"resolves": LOOPBACK}, {"own_names": ("copy", "copy")}],
    ids=["to loopback", "to nothing, and both alike"],
)
def test_hosts_whose_own_names_lead_nowhere_reach_each_other_untold(given: dict[str, Any]) -> None:
    """It was an error, which asked for GLOO_SOCKET_IFNAME."""
    with Hosts(**given) as hosts:
        assert run_on(hosts, both_routes, 1) == [[2.0, 4.0, 2.0, 4.0]] * 2


def on_interfaces(rank: int, names: list[str]) -> Any:
    found = []
    for name in names:
        os.environ["GLOO_SOCKET_IFNAME"] = name
        began = time.monotonic()
        found.append((*raised(MetricsAggregator(timeout=20)), time.monotonic() - began))
    return found


def test_an_interface_that_leads_nowhere_is_told_apart_from_a_missing_rank() -> None:
    causes = {
        "lo": "127.0.0.1 is a loopback address, which no other host can reach",
        "br0": "172.17.0.1 is an address of node-1 and of node-2, each of which means itself by it, as by that of a "
        "bridge between containers",
    }
    with Hosts() as hosts:
        for host in hosts:
            host.bridge("br0", "172.17.0.1/16")
        of_ranks = run_on(hosts, on_interfaces, 1, list(causes))
    for found in of_ranks:
        for (text, missing, _, seconds), cause in zip(found, causes.values(), strict=True):
            assert missing == (), text
            assert "no rank is missing, but the connection between them failed" in text
            assert f"{cause}: set GLOO_SOCKET_IFNAME on every host" in text
            assert "such as the one that has 10.77.0." in text
            # The rank that was to be reached heard of it when it gave up itself.
            assert seconds < 15, text


# -- Missing ranks, hosts and links ----------------------------------------------------------------


def some_do_not_come(rank: int, absent: list[tuple[int, ...]]) -> Any:
    found = []
    for missing in absent:
        aggregator = MetricsAggregator(timeout=1)
        aggregator.reduce()
        if rank in missing:
            time.sleep(3.0)
        found.append(raised(aggregator))
    time.sleep(1.0)  # the store ends with rank 0
    return found


def test_missing_ranks_are_named_with_their_hosts() -> None:
    absent: dict[tuple[int, ...], str] = {
        (1, 2): "rank(s) 1 (on node-1), 2 (on node-2) of 4; they did not come",
        (2, 3): "rank(s) 2, 3 (on node-2) of 4; they did not come",
    }
    with Hosts() as hosts:
        of_ranks = run_on(hosts, some_do_not_come, 2, list(absent))
    for found in of_ranks:
        for (text, named, where), missing in zip(found, absent, strict=True):
            assert named == missing, text
            assert where == {rank: f"node-{rank // 2 + 1}" for rank in missing}
            assert absent[missing] in text
            # What one rank does not call is the program's fault, what none of a host does may be the host's.
            alone = (
                "No rank of node-2 is there: look first whether node-2 and the network to it are up"
            )
            assert (alone in text) == (missing == (2, 3))


def link_goes_down(rank: int, route: str) -> Any:
    aggregator = MetricsAggregator(timeout=3, route=route)
    found: list[Any] = [total(aggregator)]
    for seconds in (1.0, 60.0):
        if rank:
            downs = f"ip link set eth0 down; sleep {seconds}; ip link set eth0 up"
            subprocess.Popen(["sh", "-c", downs])
        time.sleep(0.3)
        began = time.monotonic()
        try:
            found.append(total(aggregator))
        except MissingRanksError as error:
            found += [str(error), error.missing, time.monotonic() - began]
    time.sleep(2.5 * (1 - rank))  # the store is rank 0's
    return found


@pytest.mark.parametrize("route", ["gather", "tree"])
def test_a_link_that_comes_back_costs_time_alone_and_one_that_does_not_an_error(route: str) -> None:
    with Hosts() as hosts:
        first, second = run_on(hosts, link_goes_down, 1, route)
    assert first[:2] == second[:2] == [2.0, 4.0]
    text, missing, seconds = first[2:]
    assert missing == (1,)
    assert "rank(s) 1 (on node-2) of 2; they did not come within 3 s" in text
    assert "look first whether node-2 and the network to it are up" in text
    assert seconds < 12
    text, missing, seconds = second[2:]
    assert missing == ()  # of whom it cannot hear
    assert "who is missing cannot be told" in text
    assert "the store at node-1:29500 does not answer" in text
    assert "or the network to it is down" in text
    assert seconds < 12
