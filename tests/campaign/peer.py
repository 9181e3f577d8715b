"""What a peer rank can send: news, headers, sizes, vectors and results that no rank sends.

Ranks are threads here, and one of them tampers with what it sends. Right is one error on all ranks,
the same on each, that changes nothing; or, where what is sent could be true, the same numbers on all.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import resource
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from handlers_of_users import MyTypes, ProductHandler

from campaign.forks import divided
from campaign.table import Options, Row, Table, Trial, main
from metricfold import MetricsAggregator
from metricfold._core.reduce.header import HEADER_SIZE, Field
from metricfold.communicator import Communicator, MissingRanksError
from metricfold.communicator.threads import thread_world
from metricfold.metric import is_name

Change = Callable[[int, str, Any], Any]
TIMEOUT = 5.0
MOST_MEMORY = 400 * 2**20


class Tampering(Communicator):
    """A rank that sends what `change` makes of each vector.

    Args:
        inner: its real connection.
        change: is given which collective this is, from 1 on, what it does, and the vector; what it
            returns is sent, cut or filled up to the size that the others wait for.
    """

    def __init__(self, inner: Communicator, change: Change) -> None:
        self._inner, self._change = inner, change
        self.rank, self.world_size = inner.rank, inner.world_size
        self._number = 0

    def _changed(self, op: str, vector: Any) -> Any:
        self._number += 1
        changed = self._change(self._number, op, vector.copy())
        return np.resize(changed, vector.size) if changed.size else vector

    def _all_gather(self, vector: Any) -> Any:
        return self._inner._all_gather(self._changed("gather", vector))

    def _tree(self, vector: Any, merge: Any) -> Any:
        return self._inner._tree(self._changed("tree", vector), merge)

    def _tree(self, vector: Any, merge: Any) -> Any:
        return self._inner._tree(self._changed("tree", vector), merge)

    def all_gather_bytes(self, data: bytes, sizes: Any) -> list[bytes]:
        sent = self._change(self._number, "bytes", data)
        return super().all_gather_bytes(data if isinstance(sent, np.ndarray) else sent, sizes)


def world(size: int, change: Change, body: Callable[[Communicator], Any]) -> list[Any]:
    """Return what `body` returned or raised on each rank; the last one tampers."""
    ranks: list[Communicator] = [*thread_world(size, TIMEOUT)]
    ranks[-1] = Tampering(ranks[-1], change)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(body, rank) for rank in ranks]
        return [future.exception(60.0) or future.result() for future in futures]


def aggregator_of(communicator: Communicator, chance: random.Random | None = None) -> Any:
    route = chance.choice(["gather", "tree"]) if chance else "gather"
    window = chance.choice([5, 5, None]) if chance else 5
    aggregator = MetricsAggregator(window, communicator=communicator, route=route)
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    return aggregator


def train(communicator: Communicator, seed: int, *, custom: bool) -> list[Any]:
    """Record, reduce and save a few times."""
    aggregator = aggregator_of(communicator, random.Random(seed))
    out: list[Any] = []
    for step in range(3):
        aggregator.record("loss", float(step + communicator.rank))
        aggregator.record("n", 1, "sum", dataset="d")
        for value in range(20 if step else 3):
            aggregator.record("len", float(value), "distribution", weight=1 + step % 2)
        aggregator.record("most", float(step), "max", per_rank=True)
        aggregator.record("kind", "ab"[step % 2], "categorical_count")
        if custom:
            aggregator.record("product", 2.0, MyTypes.PRODUCT)
        out.append(aggregator.reduce().as_dict("t"))
    out.append(aggregator.state_dict())
    return out


def judge(row: Row, trial: Trial, outcomes: list[Any], *, refused: bool = False) -> None:
    """Count what came of one attack.

    Args:
        row: where it is counted.
        trial: which it was.
        outcomes: what each rank returned or raised.
        refused: whether nothing but an error that names the last rank is right.
    """
    failures = [one for one in outcomes if isinstance(one, BaseException)]
    texts = {f"{type(one).__name__}: {one}" for one in failures}
    if any(isinstance(one, MissingRanksError | TimeoutError) for one in failures):
        row.has_hung(repr(texts), trial)
    elif not failures:
        if refused:
            row.went_wrong("it was taken", trial)
        elif len({repr(one) for one in outcomes}) > 1:
            row.went_wrong("the ranks differ", trial)
        elif not all(is_name(key) for log in outcomes[0][:-1] for key in log):
            row.went_wrong("a name that cannot be printed", trial)
        else:
            row.went_right()
    elif len(failures) < len(outcomes) or len(texts) > 1:
        row.went_wrong(f"not the same on all ranks: {sorted(texts)}", trial)
    elif not all(isinstance(one, RuntimeError | ValueError | TypeError) for one in failures):
        row.went_wrong(repr(texts), trial)
    elif not is_name(str(failures[0])):
        row.went_wrong(f"an error that is not printable: {failures[0]!r}", trial)
    elif refused and f"rank {len(outcomes) - 1}" not in str(failures[0]):
        row.went_wrong(f"nobody is named: {failures[0]}", trial)
    else:
        row.went_right()


# -- News ----------------------------------------------------------------------------------------

HOSTILE = ["\x1b[31mred", "a\nb", "\ud800", "a\u202eb", "\x00", 7, None, "", [], {}, True]
NUMBERS = [-1, 1.5, 10**9, 2**63, 10**400, True, None, "3", [], float("nan"), float("inf")]


def bad_entry(chance: random.Random) -> dict[str, Any]:
    """Return how a key travels, with something wrong about it."""
    entry: dict[str, Any] = {"key": ["", "x"], "kind": "mean"}
    counts = {"kind": "counts", "most": 10, "suffixes": ["_count_\0"]}
    wrong = chance.randrange(12)
    if wrong == 0:
        entry["key"] = ["", chance.choice(HOSTILE)]
    elif wrong == 1:
        entry["key"] = [chance.choice(HOSTILE[:5] + HOSTILE[5:7] + HOSTILE[8:]), "x"]
    elif wrong == 2:
        entry["key"] = chance.choice([None, [], ["a"], ["a", "b", "c"], "ab", {"a": "b"}])
    elif wrong == 3:
        entry["kind"] = chance.choice(HOSTILE)
    elif wrong == 4:
        lanes = chance.choice(["mine/{}+0", "mine/3+{}", "mine/{}"])
        if chance.random() < 0.5:
            entry["kind"] = lanes.format(chance.choice([one for one in NUMBERS if one != "3"]))
        else:
            entry["capacity"] = chance.choice(NUMBERS)
    elif wrong == 5:
        bad = chance.choice([None, [], "", ["\x1b"], [3], ["\0\0"], [["a"]], ["a"] * 10**4])
        entry["suffixes"] = bad
    elif wrong == 6:
        flags = ["per_rank", "drained", "weighted", "condensed", "full"]
        entry[chance.choice(flags)] = chance.choice([0, 1, None, "", "true", []])
    elif wrong == 7:
        bad = chance.choice([["a", "a"], "ab", [3], [""], ["\x1b"], None, {"a": 1}])
        entry |= counts | {"categories": bad}
    elif wrong == 8:
        entry[chance.choice(["capacity", "weighted", "condensed", "drained"])] = chance.choice(
            [1, True]
        )
    elif wrong == 9:
        entry["kind"] = chance.choice(["mine/0+3", "mine/1+3", "mine/3+3/some", "mean/4+0"])
    elif wrong == 10:
        entry[chance.choice(["colour", "__class__", "", "sum"])] = 1
    else:
        del entry[chance.choice(["key", "kind"])]
    return entry


def bad_news(chance: random.Random) -> bytes:
    """Return news that are none."""
    good = {"key": ["", "x"], "kind": "mean"}
    many = [{**good, "key": ["", f"x{place}"], "kind": "mine/3+65536"} for place in range(100)]
    wrong = chance.choice([*range(8), *range(10, 12)] * 9 + [8, 9])
    if wrong < 6:
        text = json.dumps([bad_entry(chance)])
    elif wrong == 6:
        text = json.dumps(chance.choice([[good, good], {"a": 1}, [3], [[]], 7, None, "x", many]))
    elif wrong == 7:
        text = chance.choice(["[" * 100_000, '{"a":' * 50_000, "", "{", "[NaN]", '["\\ud800"]'])
    elif wrong == 8:
        return _bomb(b" ", 2**27)
    elif wrong == 9:
        return _bomb(b"[],", 2**23)
    elif wrong == 10:
        return chance.randbytes(chance.randrange(1, 200))
    else:
        blob = zlib.compress(json.dumps([good]).encode())
        place = chance.randrange(len(blob))
        return chance.choice([blob[:place], blob + b"x", blob[:place] + b"?" + blob[place + 1 :]])
    return zlib.compress(text.encode("utf-8", "surrogatepass"))


@functools.cache
def _bomb(part: bytes, times: int) -> bytes:
    """Return a list of which there is far more than there is of the bytes on the wire."""
    packed, block = zlib.compressobj(9), part * 2**16
    blobs = [packed.compress(b"[")]
    blobs += [packed.compress(block) for _ in range(times >> 16)]
    return b"".join([*blobs, packed.compress(b"[]]"), packed.flush()])


_thread = threading.local()


def attack_by_news(row: Row, trial: Trial, blob: bytes) -> None:
    """Send `blob` in the place of a rank's own news."""
    from metricfold._core.exchange import reducer

    real = reducer.encoded

    def encoded(entries: Any) -> bytes:
        return blob if entries and getattr(_thread, "evil", False) else real(entries)

    def body(communicator: Communicator) -> list[Any]:
        _thread.evil = communicator.rank == 1
        aggregator = aggregator_of(communicator)
        aggregator.record("m" if communicator.rank == 0 else "x", 1.0)
        try:
            first = aggregator.reduce().as_dict("t")
        except (RuntimeError, ValueError) as error:
            _thread.evil = False
            # It has changed nothing: once that rank is honest, all go on.
            if aggregator.reduce().as_dict("t") != {"t/m": 1.0, "t/x": 1.0}:
                raise AssertionError("something was lost") from error
            raise
        return [first, None]

    reducer.encoded = encoded
    try:
        outcomes = world(2, lambda number, op, vector: vector, body)
    finally:
        reducer.encoded = real
    harmless = len(blob) > 2 and _is_good(blob)
    judge(row, trial, outcomes, refused=not harmless)


def _is_good(blob: bytes) -> bool:
    """Return whether a damaged blob is by chance what it was."""
    stream = zlib.decompressobj()
    try:
        parsed = json.loads(stream.decompress(blob, 1000))
    except (ValueError, zlib.error, RecursionError):
        return False
    good = {"key": ["", "x"], "kind": "mean"}
    return bool(parsed == [good] and stream.eof and not stream.unused_data)


# -- Vectors -------------------------------------------------------------------------------------

WAYS = ["bits", "normal", "nan", "inf", "flip", "header", "zero", "huge", "negative", "fraction"]


def changed(chance: random.Random, how: str, vector: Any) -> Any:
    """Return a vector with something wrong about it."""
    g = np.random.default_rng(chance.randrange(2**32))
    place = g.integers(vector.size)
    if how == "bits":
        return g.integers(0, 2**63, vector.size, dtype=np.int64).view(np.float64).copy()
    if how == "normal":
        return g.normal(size=vector.size) * 10.0 ** chance.randint(0, 12)
    if how == "nan":
        vector[place] = np.nan
    elif how == "inf":
        vector[place] = chance.choice([np.inf, -np.inf])
    elif how == "flip":
        vector.view(np.uint64)[place] ^= np.uint64(1 << chance.randrange(64))
    elif how == "header":
        numbers = [-1.0, 1.0, 2.0, 1e9, 0.5, 1e300, np.nan, -1e18, 2.0**24, 2.0**26]
        vector[g.integers(min(HEADER_SIZE, vector.size))] = chance.choice(numbers)
    elif how == "zero":
        vector[:] = 0
    elif how == "huge":
        vector *= 1e200
    elif how == "negative":
        vector[place] = -1.0 - abs(vector[place])
    elif how == "fraction":
        vector[place] += 0.5
    return vector


def attack_by_vectors(row: Row, trial: Trial, how: str) -> None:
    chance = trial.random
    when, seed, custom = chance.randint(1, 9), chance.randrange(2**32), chance.random() < 0.3
    again = random.Random(seed)

    def change(number: int, op: str, vector: Any) -> Any:
        return changed(again, how, vector) if number == when and op != "bytes" else vector

    before = _peak()
    with np.errstate(all="ignore"):
        outcomes = world(2, change, lambda rank: train(rank, seed, custom=custom))
    if _peak() - before > MOST_MEMORY:
        row.went_wrong(f"{(_peak() - before) >> 20} MiB more", trial)
    else:
        judge(row, trial, outcomes)


def attack_by_sizes(row: Row, trial: Trial) -> None:
    """Announce sizes, or kinds, that no rank announces."""
    chance = trial.random
    field = chance.choice(
        [Field.BLOB_SIZE, Field.CUSTOM_SIZE, Field.PENDING, Field.ERROR, Field.KIND, Field.ROUTE]
    )
    number = chance.choice([-1.0, 0.5, 1e9, 1e15, 1e300, np.nan, np.inf, 2.0**27, 7.0])
    seed = chance.randrange(2**32)

    def change(collective: int, op: str, vector: Any) -> Any:
        if op == "gather" and collective == 1:
            vector[field] = number
        return vector

    # There are no such results yet: nobody reads how many bytes they would be.
    unread = field is Field.CUSTOM_SIZE and number == 7.0
    outcomes = world(2, change, lambda rank: train(rank, seed, custom=True))
    judge(row, trial, outcomes, refused=not unread)


def attack_by_results(row: Row, trial: Trial) -> None:
    """Send results of custom handlers that are none."""
    chance = trial.random
    good = {"results": {"run": [], "interval": []}, "saved": {"run": [], "interval": []}}
    good |= {"unsent": "", "unsaved": ""}
    result = ["", "x", "mean", ["", "x"], 1, {}]
    state = {"dataset": "", "name": "x", "type": "mean", "value": 1, "metadata": {}}
    bad = chance.choice(
        [
            b"{",
            b"[" * 100_000,
            b"7",
            b"\xff\xfe",
            {**good, "results": {"run": [result[:5]], "interval": []}},
            {**good, "results": {"run": [[*result[:2], "\x1b", *result[3:]]], "interval": []}},
            {**good, "results": {"run": [[*result[:3], 7, *result[4:]]], "interval": []}},
            {**good, "results": {"run": 3, "interval": []}},
            {**good, "saved": {"run": [{**state, "name": "\x1b"}], "interval": []}},
            {**good, "saved": {"run": [{**state, "more": 1}], "interval": []}},
            {**good, "saved": {"run": [3], "interval": []}},
            {**good, "saved": {"run": {}, "interval": []}},
            {**good, "unsent": 3},
            {"results": {}},
        ]
    )
    blob = bad if isinstance(bad, bytes) else json.dumps(bad).encode()

    def body(communicator: Communicator) -> list[Any]:
        aggregator = aggregator_of(communicator)
        aggregator.record("product", 2.0, MyTypes.PRODUCT)
        aggregator.reduce()
        if communicator.rank == 1:
            aggregator._held.inbox.custom.results = lambda *_: blob
        aggregator.record("product", 2.0, MyTypes.PRODUCT)
        return [aggregator.reduce().as_dict("t"), None]

    judge(row, trial, world(2, lambda number, op, vector: vector, body), refused=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(options: Options, table: Table) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("metricfold").setLevel(logging.CRITICAL)
    divided(options, table, attacked, patience=60.0)


def attacked(options: Options, table: Table) -> None:
    """Try this process's share."""
    row = table.row("a peer's news")
    before = _peak()
    for trial in options.trials(row, full=400, quick=60, least=400):
        attack_by_news(row, trial, bad_news(trial.random))
    row.figures = f"{(_peak() - before) >> 20} MiB more at most"
    row = table.row("sizes that a peer announces")
    for trial in options.trials(row, full=150, quick=25, least=150):
        attack_by_sizes(row, trial)
    row = table.row("a peer's results of custom handlers")
    for trial in options.trials(row, full=100, quick=20, least=100):
        attack_by_results(row, trial)
    for how in WAYS:
        row = table.row(f"a peer's vectors: {how}")
        for trial in options.trials(row, full=80, quick=8, least=80):
            attack_by_vectors(row, trial, how)


if __name__ == "__main__":
    main(run, __doc__)
