"""Where cells stand: axes that users declare, labels that unite, and arrays that hold some of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st

from metricfold._core.fold.axes import axes_of, block_of, cells, described, moved, united


def test_cells_are_in_c_order_and_padded_names_sort() -> None:
    axes = axes_of({"layer": 2, "expert": 11})
    assert cells(axes) == 22
    assert described(axes) == "layer=2,expert=11"
    assert axes[1].names()[:2] == ("00", "01")
    assert cells(()) == 1


def test_labels_are_sorted_and_no_part_of_the_kind() -> None:
    axes = axes_of({"parameter": ["b", "a"], "octave": 3})
    assert axes[0].labels == ("a", "b")
    assert described(axes) == "parameter,octave=3"


@pytest.mark.parametrize(
    ("declared", "error", "says"),
    [
        ({"layer": 0}, ValueError, "needs 1 at least"),
        ({"layer": -1}, ValueError, "needs 1 at least"),
        ({"layer": 1.5}, TypeError, "give its size"),
        ({"layer": "abc"}, TypeError, "give its size"),
        ({"rank": 4}, ValueError, "by="),
        ({"a/b": 4}, ValueError, "'/'"),
        ({"": 4}, ValueError, "an axis"),
        ({"p": ["a", "a"]}, ValueError, "twice"),
        ({"p": ["a", ""]}, ValueError, "label of axis 'p'"),
        ({"a": 2**12, "b": 2**12}, ValueError, "more than"),
        ({"a=3": ["x"]}, ValueError, "'='"),  # until now taken for an axis of that size
        ({"a[": 2}, ValueError, r"'\['"),
        ({"a,b": 2}, ValueError, "','"),
        (["layer"], TypeError, "names with sizes"),
    ],
)
def test_what_are_no_axes_is_refused(declared: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        axes_of(declared)


LABELS = st.lists(st.sampled_from("abcdefgh"), unique=True)


@given(LABELS, LABELS, LABELS, st.integers(1, 3))
@examples(60)
def test_labels_unite_in_any_order_and_cells_find_their_places(
    one: list[str], two: list[str], three: list[str], size: int
) -> None:
    a, b, c = (axes_of({"layer": size, "p": labels}) for labels in (one, two, three))
    whole = united(united(a, b), c)
    assert whole == united(a, united(c, b))
    for part in (a, b, c):
        places = moved(part, whole)
        names = [(layer, label) for layer in range(size) for label in part[1].labels]
        all_names = [(layer, label) for layer in range(size) for label in whole[1].labels]
        found = range(cells(part)) if places is None else places.tolist()
        assert [all_names[place] for place in found] == names


def test_an_array_may_hold_some_of_the_cells() -> None:
    axes = axes_of({"layer": 4, "expert": 3})
    assert block_of(axes, None) == (axes, (4, 3), None)
    some = block_of(axes, {"layer": range(2, 4)})
    assert some.shape == (2, 3)
    assert some.places is not None
    assert some.places.tolist() == [6, 7, 8, 9, 10, 11]
    one = block_of(axes, {"layer": 1, "expert": np.array([2, 0])})
    assert one.shape == (2,)
    assert one.places is not None
    assert one.places.tolist() == [5, 3]
    labelled = axes_of({"p": ["x", "y", "z"]})
    assert block_of(labelled, {"p": "z"}).shape == ()
    assert block_of(labelled, {"p": ["z", "x"]}).places.tolist() == [2, 0]  # type: ignore[union-attr]
    numbered = axes_of({"p": [12, 3]})  # type: ignore[list-item]
    assert block_of(numbered, {"p": [3, 12]}).places.tolist() == [1, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        ({"layer": 4}, ValueError, "0 to 3"),
        ({"layer": -1}, ValueError, "0 to 3"),
        ({"layer": [1, 1]}, ValueError, "twice"),
        ({"layer": 1.0}, TypeError, "whole numbers"),
        ({"position": 1}, ValueError, "'position'"),
        ({"p": "q"}, ValueError, "no label 'q'"),
    ],
)
def test_ids_that_are_none_are_refused(ids: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        block_of(axes_of({"layer": 4, "p": ["x"]}), ids)
