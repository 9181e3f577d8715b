"""No two metrics print one name, and finding that out takes the same time however many there are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from work import lines_run

from metricfold._core.fold import names as naming
from metricfold._core.fold.builtin import DistributionAggHandler
from metricfold._core.fold.names import ANYTHING, Claims, printed

SUFFIXES: tuple[tuple[str, ...], ...] = (
    ("",),
    ("", "_nan_count"),
    DistributionAggHandler().suffixes(),
    ("_stat_mean", "_count"),
    (f"_count_{ANYTHING}",),
    (f"_x{ANYTHING}",),
    ("", f"_count_a{ANYTHING}"),
    (ANYTHING,),
)
PARTS = (
    *("a", "b", "c", "a/b", "b/c", "/a", "a/", "_a", "x", "a_x", "ab"),
    *("a_count_", "a_count_x", "a_count_a", "b_stat_mean", "a_nan_count", "x_count_a/b"),
)


class Pairwise:
    """The rules as they were first written: each name is held against all others."""

    def __init__(self) -> None:
        self.claimed: dict[str, tuple[str, str]] = {}
        self.derived: set[str] = set()

    def add(self, keys: Any) -> None:
        """Claim the names of all keys, or raise and claim none."""
        before = dict(self.claimed)
        try:
            for key, suffixes in keys:
                self._add(key, suffixes)
        except ValueError:
            self.claimed = before
            raise

    def _add(self, key: tuple[str, str], suffixes: tuple[str, ...]) -> None:
        owners = [key, (ANYTHING, key[1])] if key[0] else [key]
        texts = [
            (printed(("" if owner[0] == ANYTHING else owner[0], owner[1])) + suffix, owner)
            for owner in owners
            for suffix in suffixes
        ]
        for text, owner in texts:
            for taken, other in self.claimed.items():
                if other != owner and meet(text, taken):
                    raise ValueError("claims already")
            if any(may_print(text, name) for name in self.derived):
                raise ValueError("derived metric")
        self.claimed.update(texts)

    def derive(self, name: str) -> None:
        if name in self.derived or any(may_print(text, name) for text in self.claimed):
            raise ValueError("derived metric")
        self.derived.add(name)


def meet(one: str, other: str) -> bool:
    """Return whether two claims have a name in common; in what is open, anything may follow."""
    a, b = one.rstrip(ANYTHING), other.rstrip(ANYTHING)
    if one.endswith(ANYTHING) and other.endswith(ANYTHING):
        return a.startswith(b) or b.startswith(a)
    if one.endswith(ANYTHING) or other.endswith(ANYTHING):
        return b.startswith(a) if one.endswith(ANYTHING) else a.startswith(b)
    return one == other


def may_print(text: str, derived: str) -> bool:
    rests = (text[place + 1 :] for place, character in enumerate(text) if character == "/")
    return any(
        derived.startswith(rest[:-1]) if rest.endswith(ANYTHING) else derived == rest
        for rest in rests
    )


def asked(claims: Any, call: str, *args: Any) -> bool:
    """Return whether a call is granted."""
    try:
        getattr(claims, call)(*args)
    except ValueError:
        return False
    return True


names = st.sampled_from(PARTS)
keys = st.tuples(st.tuples(st.one_of(st.just(""), names), names), st.sampled_from(SUFFIXES))
calls = st.one_of(
    st.tuples(st.just("add"), st.lists(keys, min_size=1, max_size=3)),
    st.tuples(st.just("derive"), names),
)


@given(st.lists(calls, max_size=14))
@examples(60)
def test_the_same_is_granted_as_if_each_name_were_held_against_all_others(story: Any) -> None:
    new, old = Claims(), Pairwise()
    for call, argument in story:
        assert asked(new, call, argument) == asked(old, call, argument), (call, argument)


def random_calls(seed: int, number: int) -> Iterator[tuple[str, Any]]:
    choose = random.Random(seed)
    for _ in range(number):
        if choose.random() < 0.1:
            yield "derive", choose.choice(PARTS)
        else:
            yield (
                "add",
                [
                    ((choose.choice(("", *PARTS)), choose.choice(PARTS)), choose.choice(SUFFIXES))
                    for _ in range(choose.randint(1, 3))
                ],
            )


def test_thousands_of_calls_are_answered_as_they_were() -> None:
    granted = refused = 0
    for seed in range(400):
        new, old = Claims(), Pairwise()
        for call, argument in random_calls(seed, 12):
            answer = asked(new, call, argument)
            assert answer == asked(old, call, argument), (seed, call, argument)
            granted, refused = granted + answer, refused + (not answer)
    assert granted > 1000
    assert refused > 1000


def test_a_check_claims_nothing_and_a_commit_takes_over_what_it_found() -> None:
    claims = Claims()
    found = claims.check([(("d", "n"), (f"_count_{ANYTHING}",))])
    claims.derive("n_count_a")
    with pytest.raises(ValueError, match="name of the derived metric 'n_count_a'"):
        claims.check([(("d", "n"), (f"_count_{ANYTHING}",))])
    again = Claims()
    again.commit(again.check([(("d", "n"), (f"_count_{ANYTHING}",))]))
    with pytest.raises(
        ValueError, match=r"would print 'd/n_count_a', which .* \(as 'd/n_count_\*'\)"
    ):
        again.add([(("d", "n_count_a"), ("",))])
    again.add([(("e", "n"), (f"_count_{ANYTHING}",))])
    assert found is not claims


@pytest.mark.parametrize("kinds", [(("",),), ((f"_count_{ANYTHING}",), ("",))])
def test_the_work_for_a_key_does_not_grow_with_their_number(kinds: Any) -> None:
    def work(number: int) -> int:
        """Return the lines that Python runs while more keys are claimed and one is refused."""
        claims = Claims()
        for index in range(number):
            claims.add([((f"set_{index % 7}", f"layer{index}/load"), kinds[index % len(kinds)])])
            if index % 9 == 0:
                claims.derive(f"derived_{index}")

        def few_more() -> None:
            for suffixes in kinds:
                claims.add([(("set_1", f"new{len(suffixes[0])}"), suffixes)])
            asked(claims, "add", [(("", "layer1/load"), ("",))])
            claims.derive("another")

        return lines_run(few_more, naming)

    assert work(3000) <= 1.2 * work(300)
