"""The colours of the page can be told apart by usual eyes, and by those without red or green cones."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import metricfold

CSS = (Path(metricfold.__file__).parent / "look" / "page" / "page.css").read_text()
SCRIPT = (Path(metricfold.__file__).parent / "look" / "page" / "page.js").read_text()

# Machado, Oliveira, Fernandes 2009, "A physiologically-based model for simulation of color vision
# deficiency", severity 1.0; on linear RGB.
EYES = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}
XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)  # of linear sRGB


def theme(selector):
    block = re.search(re.escape(selector) + r" \{(.*?)\}", CSS, re.DOTALL).group(1)
    return dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", block))


def linear(text):
    channels = np.array([int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    scaled = XYZ @ rgb / (XYZ @ np.ones(3))
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
    low, high = sorted(float(XYZ[1] @ linear(text)) for text in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("selector", [":root", ":root.dark"])
def test_curves_are_apart_for_all_eyes(selector, eyes):
    colours = theme(selector)
    names = ["fg", *(f"c{i}" for i in range(8))]
    seen = {name: lab(np.clip(EYES[eyes] @ linear(colours[name]), 0, 1)) for name in names}
    apart = {
        pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]]))
        for pair in combinations(names, 2)
    }
    closest = min(apart, key=apart.get)
    assert apart[closest] >= 17, closest


@pytest.mark.parametrize("selector", [":root", ":root.dark"])
def test_curves_and_texts_stand_out_from_the_card(selector):
    colours = theme(selector)
    assert min(contrast(colours[f"c{i}"], colours["card"]) for i in range(8)) >= 3
    assert min(contrast(colours[name], colours["card"]) for name in ("fg", "dim", "bad")) >= 4.5


@pytest.mark.parametrize("name", ["light", "dark"])
def test_heat_maps_go_one_way_in_lightness_from_the_card(name):
    """The prototype's light one painted zero yellow."""
    stops = re.findall(r'"([0-9a-f]{6})"', re.search(rf"  {name}: \[(.*?)\]", SCRIPT).group(1))
    assert stops[0] == theme(":root" if name == "light" else ":root.dark")["card"]
    for matrix in EYES.values():
        light = [float(lab(np.clip(matrix @ linear(stop), 0, 1))[0]) for stop in stops]
        steps = np.diff(light) * (-1 if name == "light" else 1)
        assert steps.min() > 5


def test_curves_beyond_the_eighth_differ_by_dashes():
    dashes = re.search(r"const DASHES = \[(.*)\];", SCRIPT).group(1)
    assert len(set(re.findall(r"\[[^\]]*\]", dashes))) >= 4
