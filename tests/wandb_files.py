"""Read the run files that W&B writes offline."""

from __future__ import annotations

import json
import struct
import time
import zlib
from pathlib import Path

from wandb.proto import wandb_internal_pb2


def run_files(folder):
    return sorted(Path(folder).glob("wandb/offline-run-*/run-*.wandb"))


def proto_records(path):
    """Yield what wandb wrote to a run file: protobufs in the log format of LevelDB.

    The package has no reader of its own in Python any more. The format: blocks of 32 KiB; pieces of
    (CRC-32 of type and data, length, type) and data; type 1: whole, 2, 3, 4: first, middle, last.
    """
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, whole = 7, b""
    while position + 7 < len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + 7 : position + 7 + length]
        if len(piece) < length:
            return  # still being written
        assert checksum == zlib.crc32(bytes([kind]) + piece)
        position += 7 + length
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def finished(path):
    """Return the records of a run: wandb's own process goes on writing when finish() returns."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = list(proto_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.02)
    raise AssertionError(f"{path} is not finished")


def history(path):
    """Return the rows of a run as {step: {key: value}}."""
    rows = {}
    for record in finished(path):
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or " ".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = values["_step"]
            assert step not in rows, "a step is shown twice"
            rows[step] = {key: one for key, one in values.items() if not key.startswith("_")}
    return rows
