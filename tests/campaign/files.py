"""Files of records that were torn, mutated or forged: read, gone on with, rewound, and shown.

`read_jsonl` must give back every line that is whole, or refuse the file with a `ValueError` that
names a line; what it gives back must be good for every sink. `JSONLSink` must go on behind what is
there without changing any of it but half a last line, or leave the file as it is.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from campaign.forks import Outcome, Say, World, side_by_side
from campaign.table import Options, Table, Trial, main
from metricfold import ConsoleSink, JSONLSink, read_jsonl
from metricfold._core.sketch import Histogram
from metricfold.metric import is_name
from metricfold.sinks import Record

# -- Files ---------------------------------------------------------------------------------------


def records(chance: random.Random) -> list[Record]:
    """Return what a run may have logged."""
    found = []
    for step in range(chance.randint(2, 12)):
        numbers = [1.5, -0.0, math.nan, math.inf, -math.inf, 1e308, 5e-324, 0.1 + 0.2, float(step)]
        metrics = {f"t/m{n}": chance.choice(numbers) for n in range(chance.randint(1, 6))}
        histograms = {}
        if chance.random() < 0.3:
            counts = np.array([1.0, 2.0, 0.0])
            histograms["t/len"] = Histogram(np.arange(4.0), counts, 0.5, 2.5, 4.0, 9.0)
        found.append(
            Record(step, 1.0 + step, metrics, histograms, chance.choice(["t", "", "größe"]))
        )
    return found


def written(path: Path, those: list[Record]) -> list[bytes]:
    """Write records, and return their lines."""
    sink = JSONLSink(path)
    for one in those:
        sink.write(one)
    sink.close()
    return in_lines(path.read_bytes())


def in_lines(text: bytes) -> list[bytes]:
    """Return lines with their line breaks, which none but a newline is."""
    lines = [line + b"\n" for line in text.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def same(one: Record, other: Record) -> bool:
    return repr(one) == repr(other)  # NaN is itself


# -- Torn ----------------------------------------------------------------------------------------


def torn(lines: list[bytes], how: str, chance: random.Random) -> tuple[bytes, set[int]]:
    """Return a file as a crash leaves it, and which lines are left."""
    kept, text = set(range(len(lines))), b"".join(lines)
    if how == "cut anywhere":
        size = chance.randrange(1, len(text))
        ends = [len(b"".join(lines[: n + 1])) for n in range(len(lines))]
        return text[:size], {n for n, end in enumerate(ends) if end - 1 <= size}
    if how == "with zeros at its end":
        return text + bytes(chance.randint(1, 5000)), kept
    for n in {0, *(chance.randrange(len(lines)) for _ in range(2))}:
        if n == 0 and chance.random() < 0.5:
            continue
        half = lines[n][: chance.randrange(1, len(lines[n]) - 1)]
        if "zeros" in how:
            half += bytes(chance.randint(1, 600)) if n else b""
        # What nothing has closed runs into the next line.
        lines[n] = half + (b"" if "unclosed" in how else b"\n")
        kept.discard(n)
    return b"".join(lines), kept


def crashed(name: str, trial: Trial) -> Iterator[Outcome]:
    """Tear lines, and go on: whatever was whole is read, and nothing else."""
    chance = trial.random
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        those = records(chance)
        text, kept = torn(written(path, those), name.removeprefix("a file "), chance)
        path.write_bytes(text)
        more = Record(1000, 0.0, {"x": 1.0})
        wanted = [those[n] for n in sorted(kept)]
        rewinds = chance.random() < 0.5
        step = chance.randrange(len(those))
        sink = JSONLSink(path)
        try:
            if rewinds:
                sink.rewind(step)
                wanted = [one for one in wanted if one.step <= step]
            sink.write(more)
            sink.close()
            wrong = differing(read_jsonl(path), [*wanted, more])
        except Exception as error:
            wrong = f"{error!r:.300}"
        yield Outcome(name, "wrong" if wrong else "right", wrong)


def differing(got: list[Record], wanted: list[Record]) -> str:
    if len(got) == len(wanted) and all(map(same, got, wanted)):
        return ""
    return f"steps {[one.step for one in got]}, not {[one.step for one in wanted]}"


# -- Mutated and forged --------------------------------------------------------------------------

ESCAPES = ["\\u001b[31m", "\\n", "\\u0000", "\\u202e", "\\ud800", "\\u009b2J", "\\r"]
HUGE = ["1" + "0" * 400, "1e999", "-1e999", "1" * 5000, "NaN", "-Infinity", "Infinity"]


def mutated(lines: list[bytes], chance: random.Random) -> bytes:
    """Return a file in which some bytes are others."""
    text = bytearray(b"".join(lines))
    for _ in range(chance.choice([1, 1, 2, 5])):
        place, how = chance.randrange(len(text)), chance.randrange(5)
        if how == 0:
            text[place] ^= 1 << chance.randrange(8)
        elif how == 1:
            del text[place : place + chance.choice([1, 2, 50])]
        elif how == 2:
            text[place:place] = chance.randbytes(chance.choice([1, 3, 40]))
        elif how == 3:
            text[place:place] = chance.choice(lines)
        else:
            text[place:place] = chance.choice(
                [b"\n", b"\r\n", b"\0", b"\xef\xbb\xbf", b'"', b"{", b"[" * 9, b"true", b"1e9"]
            )
        text = text or bytearray(b"x")
    return bytes(text)


def _line(chance: random.Random) -> dict[str, Any]:
    """Return what a line holds, as text of JSON by key."""
    return {
        "step": str(chance.randrange(100)),
        "wall_time": "1.5",
        "prefix": '"t"',
        "metrics": '{"t/a": 1.5, "t/b": "NaN"}',
        "histograms": "{}",
    }


def _histogram(chance: random.Random) -> str:
    parts: dict[str, Any] = {
        "edges": [0.0, 1.0, 2.0],
        "counts": [1.0, 2.0],
        "minimum": 0.5,
        "maximum": 1.5,
        "total": 3.0,
        "total_squares": 4.0,
    }
    bad = [[], [1.0], [2.0, 1.0, 0.0], [1.0, -1.0], ["NaN", 1.0], [[1.0], [2.0]], None, "x", {}]
    bad += [True, -1.0, "Infinity", 10**400, [1.0] * 3, [True, False], 1e308]
    for _ in range(chance.choice([1, 1, 2])):
        parts[chance.choice(list(parts))] = chance.choice(bad)
    if chance.random() < 0.2:
        del parts[chance.choice(list(parts))]
    return json.dumps({"t/h": parts})


def forged(lines: list[bytes], chance: random.Random, how: str) -> bytes:
    """Return a file with a line that somebody else has written."""
    line = _line(chance)
    if how == "deep nesting":
        depth = chance.choice([50, 500, 5_000, 100_000])
        deep = chance.choice(
            ["[" * depth + "]" * depth, "[" * depth, '{"a":' * depth + "1" + "}" * depth]
        )
        line[chance.choice([*line, "more"])] = deep
    elif how == "steps that are none":
        bad = ["true", "false", "null", "1.0", "1e3", '"1"', "[1]", "-1", "{}", *HUGE]
        line["step"] = chance.choice(bad)
    elif how == "huge numbers":
        place = chance.choice(["wall_time", "metrics", "step"])
        number = chance.choice(HUGE)
        line[place] = f'{{"t/a": {number}}}' if place == "metrics" else number
    elif how == "wrong histograms":
        line["histograms"] = _histogram(chance)
    elif how == "hostile names":
        name = chance.choice(ESCAPES)
        if chance.random() < 0.3:
            line["prefix"] = f'"{name}"'
        elif chance.random() < 0.5:
            line["metrics"] = f'{{"t/{name}": 1.0}}'
        else:
            line["histograms"] = _histogram(chance).replace("t/h", f"t/{name}")
    else:
        junk = [
            "null",
            "true",
            "[]",
            "{}",
            '""',
            '{"t/a": null}',
            '{"t/a": true}',
            '{"": 1}',
            "[[1]]",
        ]
        line[chance.choice(list(line))] = chance.choice(
            [*junk, '{"t/a": "1.5"}', '{"t/a": [1]}', "7"]
        )
    items = [f'"{key}": {value}' for key, value in line.items()]
    if chance.random() < 0.1:
        chance.shuffle(items)
    if chance.random() < 0.1:
        items.append(items[0])
    place = chance.randrange(len(lines) + 1)
    lines.insert(place, ("{" + ", ".join(items) + "}\n").encode())
    return b"".join(lines)


FORGERIES = (
    "deep nesting",
    "steps that are none",
    "huge numbers",
    "wrong histograms",
    "hostile names",
    "anything else",
)


def hostile(name: str, trial: Trial) -> Iterator[Outcome]:
    """Read a file that somebody has altered, go on with it, and show what it holds."""
    chance = trial.random
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        lines = written(path, records(chance))
        how = name.removeprefix("a file with ")
        text = forged(lines, chance, how) if how in FORGERIES else mutated(lines, chance)
        path.write_bytes(text)
        try:
            wrong = read(path, Path(folder)) or gone_on_with(path, text)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error!s:.300}"
        yield Outcome(
            name, "wrong" if wrong else "right", f"{wrong} {text[:2000]!r}" if wrong else ""
        )


def read(path: Path, folder: Path) -> str:
    """Return what is wrong with what is read, if it is read."""
    try:
        those = read_jsonl(path)
    except ValueError as error:
        told = str(error).removeprefix(str(path))
        return "" if is_name(told) and "line " in told else f"an error that says {error}"
    for one in those:
        if type(one.step) is not int or not math.isfinite(one.wall_time):
            return f"a record of {one.step!r} at {one.wall_time!r}"
        if not all(type(value) is float for value in one.metrics.values()):
            return f"numbers that are none: {one.metrics}"
    screen = io.StringIO()
    console = ConsoleSink(Console(file=screen, width=200))
    for one in those:
        console.write(one)
    console.close()
    if not all(character == "\n" or is_name(character) for character in screen.getvalue()):
        return f"shown as {screen.getvalue()!r:.300}"
    those = [one for one in those if one.metrics or one.histograms]  # else nothing is written
    if not those:
        return ""
    written(folder / "again.jsonl", those)
    return differing(read_jsonl(folder / "again.jsonl"), those)


def gone_on_with(path: Path, text: bytes) -> str:
    """Go on with a file; what is there stays, but for half a last line."""
    sink = JSONLSink(path)
    try:
        sink.write(Record(1000, 0.0, {"x": 1.0}))
    except FileExistsError:
        return "" if path.read_bytes() == text else "a file that is refused has been changed"
    finally:
        sink.close()
    now = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if not now.startswith(whole):
        return "what was there has been changed"
    added = in_lines(now[len(whole) :])
    if added[-1][:14] != b'{"step": 1000,' or not added[-1].endswith(b"\n") or len(added) > 2:
        return f"what was added is {added}"
    return ""


# -- Rewinds -------------------------------------------------------------------------------------


def rewound(name: str, trial: Trial) -> Iterator[Outcome]:
    """Kill a process in the middle of a rewind: the old file is there, or the new one."""
    chance = trial.random
    folder = Path(tempfile.mkdtemp(prefix="campaign"))
    path = folder / "x.jsonl"
    old = [*range(300), 7]  # steps out of order: a new file takes the old one's place
    line = '{"step": %d, "wall_time": 0.0, "prefix": "", "metrics": {"x": 1.0}, "histograms": {}}\n'
    path.write_text("".join(line % step for step in old))

    def body(rank: int, say: Say) -> None:
        say(ready=True)
        JSONLSink(path).rewind(100)

    world = World(1, body)
    time.sleep(chance.random() * 0.05)
    os.kill(world.pids[0], signal.SIGKILL)
    world.wait(10)
    steps = [json.loads(one)["step"] for one in path.read_text().splitlines()]
    well = steps in (old, [*range(101), 7])
    yield Outcome(name, "right" if well else "wrong", "" if well else f"{steps}")
    world.end()
    shutil.rmtree(folder)


CRASHES = (
    "a file cut anywhere",
    "a file with zeros at its end",
    "a file with torn lines",
    "a file with torn, unclosed lines",
    "a file with torn lines full of zeros",
)
KINDS: dict[str, tuple[Callable[[str, Trial], Iterator[Outcome]], int, int]] = {
    **dict.fromkeys(CRASHES, (crashed, 400, 20)),
    "a file with other bytes": (hostile, 1_500, 60),
    **{f"a file with {how}": (hostile, 300, 20) for how in FORGERIES},
    "killed in a rewind": (rewound, 60, 4),
}
"""What befalls a file; how many of it, and how many in a few seconds."""


def run(options: Options, table: Table) -> None:
    trials = [
        (name, Trial(number, random.Random(f"{options.seed}/{name}/{number}")))
        for name, (_, full, quick) in KINDS.items()
        for number in range(options.pick(full, quick))
    ]

    def one(name: str, trial: Trial) -> Iterator[Outcome]:
        return KINDS[name][0](name, trial)

    side_by_side(options, table, trials, one, crews=2, patience=60.0)


if __name__ == "__main__":
    main(run, __doc__)
