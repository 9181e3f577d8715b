"""Heat maps: the cells of a metric with axes as an image, for backends that show images.

A row for each index of all axes but the last, a column for each of the last. Colours go from the
smallest value of the image, dark, to its largest, yellow. What is infinite is red; cells without a
value are grey, as is NaN.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from metricfold.sinks.loud import mention
from metricfold.sinks.record import Record

__all__ = ["HeatMaps", "heat_map", "png"]

Image: TypeAlias = npt.NDArray[np.uint8]
"""Red, green and blue of each pixel, shape (height, width, 3)."""

_MOST = 1024  # cells along a side; of more, neighbours are shown by their mean
_WIDE = 512  # pixels that a smaller image is enlarged to
_LEAST = 16  # pixels of a side
_NONE, _INFINITE = (160, 160, 160), (214, 39, 40)
_ANCHORS = np.array(
    [
        *([68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142]),
        *([31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]),
    ]
)
"""Colours that are told apart in black and white too, and by the colour-blind (viridis)."""
_COLOURS = np.stack(
    [np.interp(np.linspace(0, 9, 256), np.arange(10), part) for part in _ANCHORS.T], axis=-1
).astype(np.uint8)


class HeatMaps:
    """Makes the images of records, each under the name of its metric and ``/cells``.

    That is a name of its own, for a backend shows one thing under one name.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()

    def of(self, record: Record) -> dict[str, Image]:
        """Return the images of a record; one whose name is taken is left out, which is said once."""
        found: dict[str, Image] = {}
        for key, array in record.arrays.items():
            name = f"{key}/cells"
            if name not in record.metrics and name not in record.histograms:
                found[name] = heat_map(array["values"])
            elif name not in self._said:
                self._said.add(name)
                mention(
                    f"the heat map of {key!r} is left out, for there is a metric {name!r}: give that "
                    "another name"
                )
        return found


def heat_map(values: Any) -> Image:
    """Return the image of an array of whatever shape.

    >>> heat_map(np.arange(6.0).reshape(2, 3)).shape
    (340, 510, 3)
    """
    cells = np.asarray(values, dtype=np.float64)
    cells = cells.reshape(math.prod(cells.shape[:-1]), cells.shape[-1] if cells.ndim else 1)
    for axis in (0, 1):
        cells = _coarsened(cells, axis)
    finite = np.isfinite(cells)
    low, high = (cells[finite].min(), cells[finite].max()) if finite.any() else (0.0, 0.0)
    # By halves: the largest floats of both signs lie further apart than the largest one.
    shares = np.where(finite, cells, low) / 2 - low / 2
    places = np.round(255 * (shares / ((high / 2 - low / 2) or 1.0))).astype(np.intp)
    image = np.where(finite[..., np.newaxis], _COLOURS[places], np.array(_NONE, dtype=np.uint8))
    image[np.isinf(cells)] = _INFINITE
    height, width = cells.shape
    zoom = max(_WIDE // max(height, width), 1)
    for axis, size in ((0, height), (1, width)):
        image = image.repeat(max(zoom, -(-_LEAST // size)), axis=axis)
    return image


def _coarsened(cells: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
    """Return the cells, or where they are too many along an axis the means of neighbours."""
    size = cells.shape[axis]
    if size <= _MOST:
        return cells
    starts = np.linspace(0, size, _MOST + 1).round().astype(np.intp)[:-1]
    finite = np.isfinite(cells)
    sums, counts, infinite = (
        np.add.reduceat(part, starts, axis=axis, dtype=np.float64)
        for part in (np.where(finite, cells, 0.0), finite, np.isinf(cells))
    )
    with np.errstate(invalid="ignore", over="ignore"):
        means: npt.NDArray[np.float64] = np.where(infinite, np.inf, sums / counts)
    return means


def png(image: Image) -> bytes:
    """Return an image as a PNG file."""
    height, width, _ = image.shape
    lines = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each begins with its filter, none
    lines[:, 1:] = image.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
