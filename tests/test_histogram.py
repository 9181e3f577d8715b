"""The log-linear histogram: its bound, its algebra, its wire and its checkpoint."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypotheses import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metricfold import LogLinearHistogram
from metricfold._core import sketch as sketches
from metricfold._core.sketch import BUCKETS, Histogram, bucket_index, plain
from metricfold._core.sketch.contents import FEWEST_BUCKETS

SMALLEST = 2.0**-1074
LARGEST = float(np.finfo(np.float64).max)

# -- Streams -------------------------------------------------------------------------------------

EDGES = [0.0, SMALLEST, 2.0**-1022, LARGEST, 1.0, 1e30, 1e-30, 2.5, 300.0, 2.0 - 2.0**-52, 2.0**53]
specials = st.sampled_from([*EDGES, *(-edge for edge in EDGES)])
numbers = st.one_of(specials, st.floats(allow_nan=False, allow_infinity=False))


@st.composite
def clusters(draw: st.DrawFn) -> np.ndarray:
    """Many values about one place: narrow, an octave, or hundreds of octaves wide."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([1, 7, 60, 700]))
    place = draw(st.sampled_from([1.0, 2.5, 300.0, 256.0, 1e30, 1e-30, 1e300, 1e-310, 3.0]))
    spread = draw(st.sampled_from([0.0, 1e-12, 1e-4, 0.01, 0.7]))
    octaves = draw(st.sampled_from([0, 0, 4, 60, 600]))
    sign = draw(st.sampled_from([(1,), (-1,), (-1, 1)]))
    values = place * (1.0 + spread * rng.standard_normal(size))
    with np.errstate(over="ignore", under="ignore"):
        values = np.ldexp(values, rng.integers(-octaves, octaves + 1, size).astype(np.int32))
    return np.nan_to_num(values) * rng.choice(sign, size)


streams = st.lists(st.one_of(clusters(), st.lists(numbers, max_size=40)), max_size=4).map(
    lambda parts: np.concatenate([np.zeros(0), *parts])
)
dirty_streams = st.tuples(
    streams, st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=5)
).map(np.concatenate)
budgets = st.sampled_from([FEWEST_BUCKETS, 512, 2048])


def histogram_of(values: Any, weights: Any = None, max_buckets: int = 2048) -> LogLinearHistogram:
    histogram = LogLinearHistogram(max_buckets)
    histogram.update(values, weights)
    return histogram


def counts(histogram: LogLinearHistogram) -> dict[str, Any]:
    """Everything that must not depend on order or split, not even in its last bit."""
    state = histogram.to_dict()
    state.pop("checksum")
    for segment in state["segments"]:
        segment["sums"] = segment["sums"][0]
    return state


def moments(histogram: LogLinearHistogram) -> np.ndarray:
    """Sums of u and u² per value."""
    sums = [np.zeros((3, 0)), *(s["sums"] for s in histogram.to_dict()["segments"])]
    joined = np.concatenate(sums, axis=1)
    return joined[1:] / joined[0]


def assert_same(one: LogLinearHistogram, other: LogLinearHistogram) -> None:
    assert counts(one) == counts(other)
    np.testing.assert_allclose(moments(one), moments(other), rtol=1e-9, atol=1e-12)


def merged(parts: list[LogLinearHistogram]) -> LogLinearHistogram:
    whole = LogLinearHistogram(max(part.max_buckets for part in parts))
    for part in parts:
        whole.merge(part)
    together = parts[0].copy()
    together.merge(*parts[1:])
    assert_same(whole, together)
    return whole


def split(values: np.ndarray, cuts: list[float]) -> list[np.ndarray]:
    return np.split(values, sorted(int(cut * values.size) for cut in cuts))


# -- The bound -----------------------------------------------------------------------------------


@given(streams, budgets)
@examples(300)
def test_every_order_statistic_is_within_the_guaranteed_bound(values, max_buckets):
    # 2^k + 1 values: then q = j / 2^k asks for order statistic j exactly.
    size = 2 ** max(0, math.ceil(math.log2(max(values.size - 1, 1)))) + 1
    values = np.sort(np.resize(np.append(values, 1.0), size))
    histogram = histogram_of(values, max_buckets=max_buckets)
    estimates = histogram.quantile(np.arange(size) / (size - 1))
    low, high = histogram.kept_range
    magnitudes = np.abs(values)
    kept = (values == 0) | ((low <= magnitudes) & (magnitudes < high))
    allowed = np.maximum(magnitudes, 2.0**-1022) * 2.0**-histogram.m
    with np.errstate(over="ignore"):
        wrong = np.abs(estimates - values) > allowed
    assert not (wrong & kept).any()
    assert ((estimates >= values[0]) & (estimates <= values[-1])).all()
    assert (estimates[1:] >= estimates[:-1]).all()
    assert (np.sign(estimates) == np.sign(values)).all()
    assert 4 <= histogram.m <= 16


@given(streams, budgets)
@settings(deadline=None)
def test_memory_is_bounded(values, max_buckets):
    state = histogram_of(values, max_buckets=max_buckets).to_dict()
    assert sum(len(segment["index"]) for segment in state["segments"]) <= max_buckets


@given(dirty_streams)
@settings(deadline=None)
def test_extremes_and_counts_are_exact(values):
    histogram = histogram_of(values)
    finite = values[np.isfinite(values)]
    assert histogram.count == finite.size
    assert histogram.nan_count == np.isnan(values).sum()
    assert histogram.posinf_count == (values == math.inf).sum()
    assert histogram.neginf_count == (values == -math.inf).sum()
    if finite.size:
        assert (histogram.min, histogram.max) == (finite.min(), finite.max())
        assert histogram.quantile([0.0, 1.0]).tolist() == [finite.min(), finite.max()]
        assert finite.min() <= histogram.mean <= finite.max()
    else:
        assert math.isnan(histogram.min)
        assert math.isnan(histogram.max)
        assert math.isnan(histogram.mean)
        assert math.isnan(histogram.std)
        assert math.isnan(histogram.quantile(0.5))


RNG = np.random.default_rng(7)
N = 200_000
NARROW = {
    "a loss at 2.5": RNG.normal(2.5, 0.01, N),
    "a temperature at 300": RNG.normal(300.0, 0.1, N),
    "evenly about 2.5": RNG.uniform(2.49, 2.51, N),
    "about a power of two": RNG.normal(256.0, 0.1, N),
}
WIDE = {
    "log-normal": RNG.lognormal(6.0, 1.0, N),
    "lengths": np.ceil(RNG.lognormal(6.0, 1.0, N)),
    "normal around 0": RNG.normal(0.0, 1.0, N),
    "Pareto": RNG.pareto(1.5, N) + 1.0,
    "bimodal": np.where(RNG.random(N) < 0.3, RNG.normal(-5.0, 0.1, N), RNG.normal(20.0, 3.0, N)),
    "constant": np.full(N, 3.14),
    "sixty octaves": np.exp2(RNG.uniform(-30.0, 30.0, N)),
}
OUTLIERS = {
    f"{name}, one outlier of {outlier:g}": np.append(values, outlier)
    for name, values in NARROW.items()
    for outlier in (1e30, 1e-30, -1e30, -1e-30, 0.0)
}
HARD = {
    "narrow, outliers everywhere": np.append(
        NARROW["a temperature at 300"], WIDE["sixty octaves"][:999]
    ),
    "narrow after a slow rise": np.append(
        np.linspace(20.0, 300.0, N // 99), NARROW["a temperature at 300"]
    ),
}


def rank_error(values: np.ndarray, q: np.ndarray, estimates: np.ndarray) -> float:
    """Return how far `q` is from the part of the values below the estimates, at most."""
    ordered = np.sort(values)
    least = np.searchsorted(ordered, estimates, side="left") / values.size
    most = np.searchsorted(ordered, estimates, side="right") / values.size
    return float(np.maximum(least - q, q - most).max())


PERCENTILES = np.arange(1, 1000) / 1000.0


@pytest.mark.parametrize("name", [*NARROW, *WIDE, *OUTLIERS, *HARD])
@pytest.mark.parametrize("max_buckets", [512, 2048])
def test_ranks_are_right_to_half_a_percent(name, max_buckets):
    values = {**NARROW, **WIDE, **OUTLIERS, **HARD}[name]
    histogram = histogram_of(values, max_buckets=max_buckets)
    estimates = histogram.quantile(PERCENTILES)
    assert rank_error(values, PERCENTILES, estimates) <= 0.005
    exact = np.quantile(values, PERCENTILES)
    np.testing.assert_allclose(estimates, exact, rtol=2.0**-histogram.m, atol=1e-12)


@pytest.mark.parametrize("name", NARROW)
def test_narrow_values_in_one_or_two_coarse_buckets_still_have_their_ranks(name):
    histogram = histogram_of(NARROW[name])
    while histogram.m > 6:
        histogram.downscale()
    assert rank_error(NARROW[name], PERCENTILES, histogram.quantile(PERCENTILES)) <= 0.005


@pytest.mark.parametrize("name", [*NARROW, *WIDE])
def test_mean_and_deviation_are_those_of_the_values(name):
    values = {**NARROW, **WIDE}[name]
    histogram = histogram_of(values)
    assert histogram.mean == pytest.approx(values.mean(), rel=1e-12, abs=1e-15)
    assert histogram.std == pytest.approx(values.std(ddof=1), rel=1e-11)


@given(st.lists(numbers, min_size=1, max_size=60))
@settings(deadline=None)
def test_mean_and_deviation_of_any_values(values):
    histogram = histogram_of(values)
    # Means of subnormal numbers are rounded to one of those; deviations may be beyond all floats.
    scale = max(*map(abs, values), 1e-290)
    scaled = np.array(values) / scale
    assert histogram.mean / scale == pytest.approx(scaled.mean(), abs=1e-12)
    if len(values) > 1:
        expected = min(scaled.std(ddof=1), LARGEST / scale)
        assert min(histogram.std, LARGEST) / scale == pytest.approx(expected, abs=1e-7)
    else:
        assert math.isnan(histogram.std)


def test_equal_values_have_no_deviation():
    histogram = histogram_of(np.full(1000, 0.1))
    assert histogram.mean == histogram.quantile(0.3) == 0.1
    assert histogram.std == 0.0


@pytest.mark.parametrize("n", [1, 2, 3, 10, 32])
def test_few_values_are_exact(n):
    values = RNG.normal(10.0, 5.0, n)
    q = np.linspace(0.0, 1.0, 41)
    np.testing.assert_allclose(histogram_of(values).quantile(q), np.quantile(values, q), rtol=1e-11)


def test_the_median_of_one_to_ten_is_five_and_a_half():
    assert histogram_of(range(1, 11)).quantile(0.5) == 5.5


# -- The algebra ---------------------------------------------------------------------------------

cuts = st.lists(st.floats(0.0, 1.0), max_size=5)


@given(dirty_streams, cuts, st.randoms(use_true_random=False), budgets)
@examples(200)
def test_neither_order_nor_split_matters(values, cuts, random, max_buckets):
    whole = histogram_of(values, max_buckets=max_buckets)
    order = list(range(values.size))
    random.shuffle(order)
    parts = [histogram_of(part, max_buckets=max_buckets) for part in split(values[order], cuts)]
    random.shuffle(parts)
    assert_same(merged(parts), whole)

    bit_by_bit = LogLinearHistogram(max_buckets)
    for part in split(values[order], cuts):
        bit_by_bit.update(part)
        if random.random() < 0.5:
            bit_by_bit.quantile(0.5)
    assert_same(bit_by_bit, whole)


@given(streams, streams, streams, budgets, budgets)
@settings(deadline=None)
def test_merge_is_associative_and_commutative(a, b, c, some, others):
    one, two, three = histogram_of(a, max_buckets=some), histogram_of(b), histogram_of(c)
    three = histogram_of(c, max_buckets=others)
    left = merged([merged([one, two]), three])
    right = merged([one, merged([two, three])])
    assert_same(left, right)
    assert_same(merged([three, two, one]), left)
    assert_same(merged([left, LogLinearHistogram()]), left)


def test_merging_leaves_the_other_as_it_was():
    one, other = histogram_of([1.0, 2.0]), histogram_of([3.0, math.nan])
    before = other.to_dict()
    one.merge(other)
    assert other.to_dict() == before
    assert (one.count, one.nan_count) == (3, 1)
    one.merge(one)
    assert (one.count, one.nan_count) == (6, 2)


def test_a_copy_goes_its_own_way():
    one = histogram_of([1.0, 2.0])
    before = one.to_dict()
    other = one.copy()
    other.update([1.0, 1.5, 0.0])
    assert other.count == 5
    other.update([1e30])
    assert other.max == 1e30
    assert one.to_dict() == before


@given(streams, st.integers(1, 8))
@settings(deadline=None)
def test_downscaling_is_exact(values, steps):
    histogram = histogram_of(values)
    finer = histogram.m
    low, high = histogram.kept_range
    for _ in range(steps):
        if histogram.m:
            histogram.downscale()
    assert histogram.m == max(finer - steps, 0)
    values = values[(values != 0) & (np.abs(values) >= low) & (np.abs(values) < high)]
    indices, expected = np.unique(bucket_index(values, histogram.m), return_counts=True)
    segments = [s for s in histogram.to_dict()["segments"] if s["m"] == histogram.m]
    got = {
        index: count
        for segment in segments
        for index, count in zip(segment["index"], segment["sums"][0], strict=True)
    }
    assert got == dict(zip(indices.tolist(), expected.tolist(), strict=True))


def test_downscaling_keeps_mean_and_deviation():
    values = WIDE["log-normal"]
    histogram = histogram_of(values)
    while histogram.m:
        histogram.downscale()
        assert histogram.mean == pytest.approx(values.mean(), rel=1e-12)
        assert histogram.std == pytest.approx(values.std(ddof=1), rel=1e-11)
    with pytest.raises(ValueError, match="one bucket per octave"):
        histogram.downscale()
    assert histogram.count == N


def test_a_downscaled_histogram_stays_coarse():
    histogram = LogLinearHistogram()
    for _ in range(10):
        histogram.downscale()
    histogram.update(NARROW["a loss at 2.5"])
    assert histogram.m == 6
    histogram.merge(histogram_of(NARROW["a loss at 2.5"]))
    assert histogram.m == 6


# -- The shares ------------------------------------------------------------------------------------


def octaves_of(values: np.ndarray) -> dict[int, np.ndarray]:
    """Return the finest buckets that are occupied, of each octave of either sign."""
    index = np.unique(bucket_index(values[values != 0], 16))
    octave = np.where(index > 0, (index - 1) >> 16, -1 - ((-index - 1) >> 16))
    return {o: np.abs(index[octave == o]) - 1 for o in np.unique(octave).tolist()}


@given(streams, budgets)
@settings(deadline=None)
def test_each_octave_is_as_fine_as_the_largest_common_share_allows(values, budget):
    octaves = octaves_of(values)
    histogram = histogram_of(values, max_buckets=budget)
    segments = histogram.to_dict()["segments"]
    if len(octaves) > budget:
        assert {segment["m"] for segment in segments} <= {-1, -2, -3, -4}
        assert histogram.kept_range == (1.0, 1.0)
        return

    def needed(share: int, reach: int) -> int:
        return sum(
            min(share if away(o) <= reach else 1, finest.size) for o, finest in octaves.items()
        )

    share = max(share for share in range(budget + 1) if needed(share, 1024) <= budget)
    reach = 1024
    if share < 16:
        share, reach = 16, max(r for r in range(-1, 1024) if needed(16, r) <= budget)
        assert histogram.kept_range == (2.0 ** (-reach - 1), 2.0 ** (reach + 1))
    found = {}
    for segment in segments:
        (first, *_), m = segment["index"], segment["m"]
        found[(first - 1) >> m if first > 0 else -1 - ((-first - 1) >> m)] = segment
    assert found.keys() == octaves.keys()
    for octave, finest in octaves.items():
        most = share if away(octave) <= reach else 1
        m = max(m for m in range(17) if np.unique(finest >> (16 - m)).size <= most)
        segment = found[octave]
        assert (segment["m"], segment["cut"]) == (m, finest.size > most)
        assert len(segment["index"]) == np.unique(finest >> (16 - m)).size


def away(octave: int) -> int:
    """Return how many octaves it is from those on both sides of 1."""
    exponent = (octave if octave >= 0 else -1 - octave) - 1023
    return exponent if exponent >= 0 else -1 - exponent


@pytest.mark.parametrize("budget", [320, 512])
def test_more_octaves_than_buckets_are_grouped_and_keep_counts_mean_and_deviation(budget):
    rng = np.random.default_rng(0)
    values = np.ldexp(rng.uniform(1, 2, 20_000), rng.integers(-300, 300, 20_000).astype(np.int32))
    values *= rng.choice([-1, 1], values.size)
    whole, parts = (
        histogram_of(values, max_buckets=budget),
        np.array_split(rng.permutation(values), 7),
    )
    for part in parts:
        part.sort()
    assert_same(merged([histogram_of(part, max_buckets=budget) for part in parts]), whole)
    assert whole.kept_range == (1.0, 1.0)
    assert whole.mean == pytest.approx(values.mean(), rel=1e-9)
    assert whole.std == pytest.approx(values.std(ddof=1), rel=1e-9)
    assert rank_error(values, PERCENTILES, whole.quantile(PERCENTILES)) < 0.005


def given_at(values: np.ndarray, m: int) -> LogLinearHistogram:
    """Return the histogram of a device, which counts at a resolution of its own."""
    index = bucket_index(values, m)
    places, at = np.unique(index, return_inverse=True)
    low = (np.abs(index) - 1 << 52 - m).view(np.float64)
    unit = np.ldexp(1.0, ((np.abs(index) - 1 >> m) - 1023 - m).astype(np.int32))
    u = (np.abs(values) - low) / unit
    return LogLinearHistogram.from_buckets(
        places,
        [np.bincount(at, one) for one in (np.ones_like(u), u, u * u)],
        m,
        count=values.size,
        squares=values.size,
        minimum=values.min(),
        maximum=values.max(),
        max_buckets=BUCKETS,
    )


@given(st.lists(clusters(), min_size=2, max_size=6), st.randoms(use_true_random=False))
@examples(100)
def test_hosts_devices_and_downscaled_histograms_merge_along_any_tree(parts, random):
    histograms = []
    for values in parts:
        values = values[np.abs(values) > 1e-300]
        kind = random.choice(["host", "device", "coarse"])
        if kind == "device" and values.size:
            histograms.append(given_at(values, random.choice([4, 6])))
            continue
        histograms.append(histogram_of(values, max_buckets=BUCKETS))
        for _ in range(3):
            if kind == "coarse" and histograms[-1].m:
                histograms[-1].downscale()

    def along_a_tree() -> LogLinearHistogram:
        live = [histogram.copy() for histogram in histograms]
        while len(live) > 1:
            random.shuffle(live)
            live[0].merge(live.pop())
        return live[0]

    first = along_a_tree()
    for _ in range(3):
        assert_same(along_a_tree(), first)


# -- Slots ---------------------------------------------------------------------------------------


def packed(values: Any, weights: Any = None) -> np.ndarray:
    return sketches.pack(histogram_of(values, weights, BUCKETS))[np.newaxis]


@given(st.lists(dirty_streams, min_size=4, max_size=4))
@examples(150)
def test_slots_merge_like_histograms_along_any_tree(streams):
    parts = [packed(values) for values in streams]
    before = np.concatenate(parts)
    pairs = sketches.joined(before[[0, 2]], before[[1, 3]])
    left = sketches.joined(pairs[:1], pairs[1:])
    right = sketches.joined(
        parts[2], sketches.joined(sketches.joined(parts[3], parts[1]), parts[0])
    )
    whole = merged([histogram_of(values, max_buckets=BUCKETS) for values in streams])
    for slot in (left, right):
        assert sketches.fitting(slot).all()
        received = sketches.unpack(slot[0])
        if received is None:
            assert whole.fingerprint() == LogLinearHistogram(BUCKETS).fingerprint()
        else:
            assert_same(received, whole)
    assert (np.concatenate(parts) == before).all()


@given(dirty_streams, dirty_streams)
@examples(150)
def test_joining_is_commutative_to_the_last_bit_and_nothing_is_its_identity(one, other):
    weights = np.linspace(0.1, 3.0, one.size)
    one, other, nothing = packed(one, weights), packed(other), sketches.pack(None)[np.newaxis]
    assert not nothing.any()
    assert sketches.joined(one, other).tobytes() == sketches.joined(other, one).tobytes()
    assert sketches.joined(one, nothing).tobytes() == one.tobytes()
    assert sketches.joined(nothing, nothing).tobytes() == nothing.tobytes()


@given(dirty_streams)
@example(np.array([-1.0, -0.0]))
@settings(deadline=None)
def test_one_histogram_arrives_bit_for_bit(values):
    sent = histogram_of(values, max_buckets=BUCKETS)
    received = sketches.unpack(sketches.pack(sent))
    if received is None:
        assert not values.size
    else:
        assert received.to_dict() == sent.to_dict()
        assert received.fingerprint() == sent.copy().fingerprint() == sent.fingerprint()
    assert merged([sent, LogLinearHistogram(BUCKETS)]).to_dict() == sent.to_dict()


def test_somebody_with_no_finite_value_travels_too():
    received = sketches.unpack(sketches.joined(packed([math.nan]), packed([1.0, math.inf]))[0])
    assert (received.count, received.nan_count, received.posinf_count) == (1, 1, 1)
    assert received.quantile(0.5) == 1.0
    assert sketches.unpack(sketches.pack(None)) is None


def test_what_is_unpacked_can_go_on():
    values = WIDE["normal around 0"]
    halfway = sketches.unpack(sketches.joined(packed(values[:100]), packed(values[100:200]))[0])
    halfway.update(values[200:])
    assert_same(halfway, histogram_of(values, max_buckets=BUCKETS))


def test_only_a_histogram_of_the_size_of_a_slot_travels():
    with pytest.raises(ValueError, match="max_buckets=2048 does not travel"):
        sketches.pack(LogLinearHistogram())
    with pytest.raises(ValueError, match=f"a slot has {sketches.slot_width()} numbers"):
        sketches.unpack(np.zeros(3))


HOSTILE = [math.nan, math.inf, -math.inf, -1.0, 0.5, 1e300, -1e300, 2.0**62, 5e-324, 2.0**40, 64.0]


@given(st.integers(0, 2**32), st.integers(1, 4))
@examples(300)
def test_no_numbers_of_a_hostile_rank_raise_or_take_memory(seed, changes):
    rng = np.random.default_rng(seed)
    kinds = (
        np.exp(rng.normal(size=300) * 9),
        rng.normal(300, 0.1, 9),
        np.zeros(0),
        rng.normal(size=99),
    )
    slot = packed(kinds[seed % 4])
    held = np.flatnonzero(slot[0])
    for _ in range(changes):
        place = (
            int(rng.choice(held)) if held.size and rng.random() < 0.7 else rng.integers(slot.size)
        )
        how = rng.integers(4)
        change = [rng.choice(HOSTILE), -slot[0, place], slot[0, place] + 1, slot[0, place] * 2**20][
            how
        ]
        slot[0, place] = change
    with np.errstate(all="raise", under="ignore"):
        fits = sketches.fitting(slot)[0]
        joined = sketches.joined(
            np.repeat(slot, 2, axis=0), np.concatenate([packed([1.0, 2.0]), slot])
        )
    assert joined.shape == (2, sketches.slot_width())
    if not fits:
        assert np.isnan(joined).all()
        assert not sketches.fitting(joined).any()
        with pytest.raises(ValueError, match="not the numbers of a sketch"):
            sketches.unpack(slot[0])
        return
    for one in (slot[0], *joined[sketches.fitting(joined)]):
        histogram = sketches.unpack(one)
        if histogram is not None and histogram.count:
            found = histogram.quantile(PERCENTILES)
            assert np.isfinite(found).all()
            assert np.isfinite(histogram.histogram(16).edges).all()
            histogram.update([0.1, 1e30])


def test_the_sum_of_slots_is_no_slot():
    slot = packed([1.0, 2.0, 3.0])
    assert not sketches.fitting(slot + packed([5.0])).any()
    assert not sketches.fitting(slot[:, ::-1]).any()


# -- By MAX and SUM, for one more minor version ----------------------------------------------------


goes = pytest.mark.filterwarnings("ignore:LogLinearHistogram.* goes in the next minor version")


def summed(parts: list[LogLinearHistogram], max_buckets: int) -> LogLinearHistogram:
    extents = reduce(np.maximum, [part.extents() for part in parts])
    lanes = reduce(np.add, [part.pack(extents, max_buckets) for part in parts])
    return LogLinearHistogram.unpack(extents, lanes, max_buckets)


def test_what_merges_by_maximum_and_sum_says_that_it_goes():
    with pytest.warns(DeprecationWarning, match="extents goes in the next minor version"):
        LogLinearHistogram().extents()


@goes
@given(st.lists(dirty_streams, min_size=1, max_size=4), budgets)
@example([np.array([0.0])], 320)
@example(
    [np.array([1.0, 1e300, 1.00001e300, 1.7976931348623157e308, -1.7976931348623157e308])], 320
)
@examples(60)
def test_maximum_and_sum_merge_like_merge_but_coarser(streams, max_buckets):
    """The layout was a function of the extremes; it is of the octaves that are occupied now."""
    parts = [histogram_of(values) for values in streams]
    whole = merged(parts)
    octaves = np.unique(whole.contents().buckets.index >> 16)
    if octaves.size > max_buckets or whole.kept_range[1] < math.inf:
        return
    received = summed(parts, max_buckets)
    counts = ("count", "nan_count", "posinf_count", "neginf_count")
    for what in counts:
        assert getattr(received, what) == getattr(whole, what)
    if whole.count:
        assert (received.min, received.max) == (whole.min, whole.max)
        largest = max(abs(whole.min), abs(whole.max))  # which may cancel
        assert received.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-12 * largest)
        assert received.contents().sound().all()
        finest = (max_buckets // max(octaves.size, 1)).bit_length() - 1
        assert received.m >= min(whole.m, finest)


@goes
def test_packing_without_covering_extents_is_refused():
    one, other = histogram_of([1.0, 2.0]), histogram_of([3.0, 4.0])
    wide = histogram_of(np.ldexp(1.0, np.arange(-500, 500, dtype=np.int32)))
    with pytest.raises(ValueError, match="do not cover this histogram"):
        one.pack(other.extents(), 2048)
    with pytest.raises(ValueError, match="extents are 4098 numbers"):
        one.pack(np.zeros(3), 2048)
    with pytest.raises(ValueError, match="is packed in"):
        LogLinearHistogram.unpack(one.extents(), np.zeros(3), 2048)
    with pytest.raises(ValueError, match="1000 octaves are occupied"):
        wide.pack(wide.extents(), 512)


# -- Where a value stands ------------------------------------------------------------------------


@given(streams, budgets)
@settings(deadline=None)
def test_the_part_at_or_below_a_value_is_the_inverse_of_the_quantile(values, max_buckets):
    histogram = histogram_of(values, max_buckets=max_buckets)
    if not values.size:
        assert math.isnan(histogram.cdf(0.0))
        return
    places = np.concatenate([[-math.inf], np.sort(values), [math.inf]])
    found = histogram.cdf(places)
    assert (np.diff(found) >= -1e-12).all()
    assert (found[0], found[-2:].tolist()) == (0.0, [1.0, 1.0])
    assert ((found >= 0.0) & (found <= 1.0)).all()


@pytest.mark.parametrize("name", [*NARROW, *WIDE])
def test_the_part_at_or_below_a_value_is_right_to_half_a_percent(name):
    values = np.sort({**NARROW, **WIDE}[name])
    at = np.quantile(values, PERCENTILES)
    least, most = (
        np.searchsorted(values, at, side=side) / values.size for side in ("left", "right")
    )
    for most_buckets in (512, 2048):
        found = histogram_of(values, max_buckets=most_buckets).cdf(at)
        assert (found >= least - 0.005).all()
        assert (found <= most + 0.005).all()


def test_the_part_at_or_below_a_few_values_is_exact():
    histogram = histogram_of([1.0, 2.0, 2.0, 5.0], [1.0, 2.0, 2.0, 5.0])
    assert histogram.cdf([0.5, 1.0, 1.5, 2.0, 4.9, 5.0]).tolist() == [0, 0.1, 0.1, 0.5, 0.5, 1]
    assert histogram.cdf(2) == 0.5
    with pytest.raises(ValueError, match="NaN is neither below nor above"):
        histogram.cdf(math.nan)


# -- What other sketches were reported for ---------------------------------------------------------

TDIGEST_4 = [3.249696, 8.566236, 10.157393, 12.757881, 12.882931, 38.585662, 48.822837]
TDIGEST_4 += [55.881150, 60.400374, 69.476553, 77.267742, 83.499431, 86.896817, 91.439196]
REPORTED = {
    "DataDog/sketches-js#22: negative values were lost by merge": ([-1.0] * 1000, [-3.0] * 1000),
    "DataDog/sketches-js#18: zeros were lost by merge": ([0.0] * 9, [0.0, 1.0]),
    "mheffner/rust-sketches-ddsketch#16: extremes of negatives": ([-5.0, -1.0], [-10.0, -2.0]),
    "tdunning/t-digest#114: merged into an empty one": (
        [],
        [1.0, *[2.0] * 6, *[3.0] * 4, 4, 5, 6, 7],
    ),
    "tvondra/tdigest#4: p93 was above p97": (TDIGEST_4[::2], TDIGEST_4[1::2]),
    "DataDog/saluki#2654: counts lost far from the others": ([1.0] * 50, [1e300, 1e-300, 5e-324]),
    "tdunning/t-digest#94: the median depended on the order": (
        RNG.normal(size=50),
        RNG.pareto(1, 50),
    ),
}


@pytest.mark.parametrize("report", REPORTED)
def test_merges_that_other_sketches_were_reported_for_are_those_of_the_values(report):
    parts = [np.array(part, dtype=np.float64) for part in REPORTED[report]]
    values = np.concatenate(parts)
    for order in (parts, parts[::-1]):
        whole = merged([histogram_of(part, max_buckets=512) for part in order])
        assert_same(whole, histogram_of(values, max_buckets=512))
        assert (whole.count, whole.min, whole.max) == (values.size, values.min(), values.max())
        found = whole.quantile(PERCENTILES)
        assert (np.diff(found) >= 0).all()
        assert rank_error(values, PERCENTILES, found) <= 1 / values.size


def test_counts_beyond_2_to_the_31_are_counts():
    """tdunning/t-digest#93: frequencies of billions overflowed."""
    histogram = histogram_of([1.0, 2.0, 3.0], [3e9, 1e9, 5e9])
    for _ in range(5):
        histogram.merge(histogram)
    assert histogram.quantile([0.1, 0.4, 0.9]).tolist() == [1.0, 2.0, 3.0]
    assert histogram.cdf(1.5) == 3 / 9


# -- The checkpoint ------------------------------------------------------------------------------


@given(dirty_streams, budgets, st.booleans())
@settings(deadline=None)
def test_a_state_survives_json_bit_for_bit(values, max_buckets, weighted):
    weights = np.linspace(0.0, 3.0, values.size) if weighted else None
    histogram = histogram_of(values, weights, max_buckets)
    state = histogram.to_dict()
    restored = LogLinearHistogram.from_dict(json.loads(json.dumps(state, allow_nan=False)))
    assert restored.to_dict() == state
    q = np.linspace(0.0, 1.0, 11)
    np.testing.assert_array_equal(restored.quantile(q), histogram.quantile(q))
    restored.update(values, weights)
    histogram.update(values, weights)
    assert restored.to_dict() == histogram.to_dict()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_clone_holds_the_same_and_goes_its_own_way(clone):
    histogram = histogram_of(WIDE["bimodal"][:20_000])
    same = clone(histogram)
    assert same.to_dict() == histogram.to_dict()
    same.update([1.0])
    assert (same.count, histogram.count) == (20_001, 20_000)
    assert b"_core" not in pickle.dumps(histogram)


def leaves(state: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(state, dict):
        return [path, *(leaf for key in state for leaf in leaves(state[key], (*path, key)))]
    if isinstance(state, list):
        return [path, *(leaf for k, item in enumerate(state) for leaf in leaves(item, (*path, k)))]
    return [path]


STATE = histogram_of([1.0, 1.5, -2.0, 0.0, 1e30, math.nan, 3e-310]).to_dict()
WRECKS = [None, "x", -1, 0.5, math.nan, math.inf, [], {}, True, 10**400, "remove"]


@pytest.mark.parametrize("path", leaves(STATE)[1:], ids=str)
def test_a_damaged_state_is_refused(path):
    for wreck in WRECKS:
        state = json.loads(json.dumps(STATE))
        holder = reduce(lambda inner, key: inner[key], path[:-1], state)
        if wreck == "remove":
            del holder[path[-1]]
        else:
            holder[path[-1]] = wreck
        if state == STATE:
            continue
        with pytest.raises(ValueError, match="not the state of a histogram, or it is damaged: "):
            LogLinearHistogram.from_dict(state)


# What version 0.1.0 wrote of these values, where it had dropped the segments far from 1.
FAR = [1e300, 1e-300, 3e-300, 5e-324, 1.7e308, -1e200, 0.0, 1.0, 1.5]
BEFORE = {
    "format": "metricfold histogram",
    "version": 1,
    "max_buckets": 320,
    "finest": 16,
    "dropped": 2,
    "minimum": -1e200,
    "maximum": 1.7e308,
    "totals": {
        "count": 9.0,
        "squares": 9.0,
        "nan": 1.0,
        "zero": 1.0,
        "positive_infinity": 0.0,
        "negative_infinity": 0.0,
    },
    "segments": [
        {
            "m": -1,
            "index": [1],
            "sums": [[3.0], [1.824976247048878e-107], [2.0815864389328803e-214]],
        },
        {"m": 4, "index": [16369, 16377], "sums": [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]},
        {
            "m": -1,
            "index": [1280],
            "sums": [[2.0], [3.7260759152323785e115], [1.3883641562737847e231]],
        },
        {"m": -1, "index": [-1280], "sums": [[1.0], [21918093.49008403], [480402822240063.94]]},
    ],
    "checksum": 4260383798,
}


def test_a_state_of_version_1_goes_on_with_its_counts_mean_and_deviation():
    histogram = LogLinearHistogram.from_dict(json.loads(json.dumps(BEFORE)))
    assert (histogram.count, histogram.nan_count, histogram.max_buckets) == (9, 1, 320)
    assert (histogram.min, histogram.max) == (-1e200, 1.7e308)
    assert histogram.mean == pytest.approx(np.mean(FAR), rel=1e-12)
    assert histogram.std / 1e300 == pytest.approx(np.std(np.array(FAR) / 1e300, ddof=1), rel=1e-9)
    assert histogram.quantile(0.5) == pytest.approx(3e-300, rel=1)
    assert LogLinearHistogram.from_dict(histogram.to_dict()).to_dict() == histogram.to_dict()
    histogram.update(FAR)
    assert histogram.count == 18
    with pytest.raises(ValueError, match="its checksum is wrong"):
        LogLinearHistogram.from_dict({**BEFORE, "minimum": -1e201})
    with pytest.raises(ValueError, match="dropped more segments than there are"):
        LogLinearHistogram.from_dict({**BEFORE, "dropped": 95})


@pytest.mark.parametrize(
    "path", [path for path in leaves(STATE)[1:] if "checksum" not in path], ids=str
)
def test_a_state_that_was_forged_is_refused_or_can_be_used(path, monkeypatch):
    """Its checksum fits: what else is wrong must not raise later."""
    checksums = []
    real = plain._checksum
    monkeypatch.setattr(
        plain, "_checksum", lambda *args: checksums.append(real(*args)) or checksums[-1]
    )
    for wreck in [*WRECKS[2:-2], 1, 2**40, 5e-324, 1e308]:
        state = json.loads(json.dumps(STATE))
        reduce(lambda inner, key: inner[key], path[:-1], state)[path[-1]] = wreck
        for _ in range(2):
            try:
                histogram = LogLinearHistogram.from_dict(state)
            except ValueError:
                state["checksum"] = checksums[-1] if checksums else 0
                continue
            histogram.update([1.0, 1e30, -3e-310])
            histogram.merge(LogLinearHistogram.from_dict(histogram.to_dict()))
            assert not np.isnan(histogram.quantile(PERCENTILES)).any()
            histogram.histogram(8)


@pytest.mark.parametrize("state", [None, [], {}, "x", {"format": "metricfold"}])
def test_a_foreign_state_is_refused(state):
    with pytest.raises(ValueError, match="not the state of a histogram"):
        LogLinearHistogram.from_dict(state)


# -- Values and weights --------------------------------------------------------------------------


@given(st.binary(min_size=4, max_size=400), st.integers(0, 16))
@examples(300)
def test_indices_of_float32_and_float64_agree(data, m):
    narrow = np.frombuffer(data[: len(data) // 4 * 4], dtype=np.float32)
    narrow = np.append(narrow[np.isfinite(narrow)], np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-38]))
    wide = narrow.astype(np.float64)
    np.testing.assert_array_equal(bucket_index(narrow, m), bucket_index(wide, m))


@given(st.lists(numbers, min_size=2, max_size=50), st.integers(0, 16))
def test_indices_grow_with_the_values(values, m):
    ordered = np.sort(values)
    indices = bucket_index(ordered, m)
    assert (np.diff(indices) >= 0).all()
    assert (np.sign(indices) == np.sign(ordered)).all()
    positive = indices[ordered > 0] - 1
    np.testing.assert_array_equal(
        np.abs(bucket_index(ordered[ordered > 0], max(m - 1, 0))) - 1,
        positive >> (1 if m else 0),
    )


def test_indices_refuse_what_has_none():
    with pytest.raises(ValueError, match="in no bucket"):
        bucket_index([1.0, math.nan], 6)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.16"):
        bucket_index([1.0], 17)


@pytest.mark.parametrize(
    "values",
    [
        [True, False, True],
        [3, -7, 2**60],
        np.arange(12, dtype=np.int8).reshape(3, 4),
        np.array([1.5, 2.5], dtype=np.float16),
        np.array([1.5, 1e-45, 3e38], dtype=np.float32),
        np.array([1.5, 2.5], dtype=">f8"),
        np.arange(30.0)[::-3],
        np.arange(20000, dtype=np.float32)[::2],
        7.5,
        [],
    ],
    ids=repr,
)
def test_numbers_of_every_kind_and_shape_have_their_place(values):
    plain = np.array(values, dtype=np.float64).ravel()
    assert_same(histogram_of(values), histogram_of(plain))
    assert histogram_of(values).count == plain.size


def test_the_callers_buffer_is_not_kept():
    buffer = np.array([1.0, 2.0])
    histogram = histogram_of(buffer)
    buffer[:] = 99.0
    assert histogram.max == 2.0
    large = np.arange(1.0, 20_001.0)
    histogram_of(large)
    assert (large == np.arange(1.0, 20_001.0)).all()


def test_the_part_below_a_value_of_a_constant_stream_is_known_whatever_rounding_left():
    for number in (5_000, 20_000, 100_000):
        for value in np.random.default_rng(0).lognormal(0.0, 2.0, 30):
            asked = [0.9 * value, value, 1.1 * value]
            assert histogram_of(np.full(number, value)).cdf(asked).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("batch", [1, 3, 100, 4096, 16_384, 20_000])
def test_batches_of_any_size_add_up(batch):
    values = WIDE["normal around 0"][:30_000]
    whole, parts = histogram_of(values), LogLinearHistogram()
    for begin in range(0, values.size, batch):
        parts.update(values[begin : begin + batch])
    assert_same(parts, whole)


def test_a_stream_that_is_watched_does_not_pile_up():
    histogram = LogLinearHistogram()
    for scale in range(200):
        histogram.update(WIDE["normal around 0"][:100] * 1.5**scale)
        assert histogram.count == 100 * (scale + 1)
    assert histogram._strays.size <= 2 * 16_384


def exact_quantile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    """Return the mean of the ascending values over a stretch of cumulated weight, 1 wide."""
    order = np.argsort(values)
    standing = max(weights.sum(), values.size)
    values, weights = values[order], weights[order] * (standing / weights.sum())
    start = (standing - 1.0) * q
    ends = np.cumsum(weights)
    covered = np.minimum(ends, start + 1.0) - np.maximum(ends - weights, start)
    return float(np.maximum(covered, 0.0) @ values)


@given(st.integers(1, 40), st.integers(0, 2**32))
@settings(deadline=None)
def test_weighted_quantiles_follow_the_rule_of_the_exact_ones(n, seed):
    rng = np.random.default_rng(seed)
    values, weights = rng.normal(5.0, 100.0, n), rng.choice([0.0, 0.25, 1.0, 3.0], n)
    weights[0] = 1.0
    histogram = histogram_of(values, weights)
    values, weights = values[weights > 0], weights[weights > 0]
    q = np.linspace(0.0, 1.0, 21)
    exact = np.array([exact_quantile(values, weights, at) for at in q])
    np.testing.assert_allclose(histogram.quantile(q), exact, rtol=2.0**-histogram.m * 2, atol=1e-9)
    mean = np.average(values, weights=weights)
    assert histogram.mean == pytest.approx(mean, rel=1e-9)
    if values.size > 1:
        freedom = weights.sum() - (weights**2).sum() / weights.sum()
        square = (weights * (values - mean) ** 2).sum() / freedom
        assert histogram.std == pytest.approx(math.sqrt(square), rel=1e-9)


def test_weights_of_one_are_no_weights():
    values = WIDE["bimodal"]
    weighted, plain = histogram_of(values, np.ones(N)), histogram_of(values)
    assert weighted.to_dict() == plain.to_dict()
    scaled = histogram_of(values, np.full(N, 0.1))
    np.testing.assert_allclose(scaled.quantile(PERCENTILES), plain.quantile(PERCENTILES), rtol=1e-9)


def test_some_batches_may_have_weights():
    mixed = histogram_of([1.0, 2.0])
    mixed.update([3.0], [2.0])
    mixed.update(np.full(100, 4.0))
    assert mixed.mean == pytest.approx((1 + 2 + 6 + 400) / 104)
    assert mixed.count == 103


def test_a_weight_of_zero_adds_nothing_not_even_a_nan():
    histogram = histogram_of([1.0, math.nan, math.inf, 1e30], [1.0, 0.0, 0.0, 0.0])
    assert histogram.to_dict() == histogram_of([1.0]).to_dict()


@pytest.mark.parametrize("scale", [5e-324, 1e-200, 1e-100, 1e100, 1e149])
def test_weights_may_be_huge_or_tiny(scale):
    weights = np.array([1.0, 2.0, 1.0]) * scale
    histogram = histogram_of([1.0, 2.0, 3.0], weights)
    assert histogram.mean == pytest.approx(2.0)
    assert histogram.quantile(0.5) == pytest.approx(2.0)
    # Where they come to less than one each, 3 values stand for 3: each end is a quarter of them.
    ends = [1.0, 3.0] if scale > 1 else [1.25, 2.75]
    assert histogram.quantile([0.0, 1.0]).tolist() == pytest.approx(ends)
    assert LogLinearHistogram.from_dict(histogram.to_dict()).to_dict() == histogram.to_dict()


@pytest.mark.parametrize(
    ("values", "weights", "error", "message"),
    [
        ([1.0, 2.0], [1.0], ValueError, r"weights of shape \(1,\) for values of shape \(2,\)"),
        ([1.0, 2.0], 1.0, ValueError, r"weights of shape \(\) for values of shape \(2,\)"),
        ([1.0], [-1.0], ValueError, "must lie in 0"),
        ([1.0], [math.nan], ValueError, "must lie in 0"),
        ([1.0], [math.inf], ValueError, "must lie in 0"),
        (["a"], None, TypeError, "not real numbers"),
        ([None], None, TypeError, "not real numbers"),
        ([1j], None, TypeError, "not real numbers"),
        ([1.0], ["x"], TypeError, "weights are not real numbers"),
    ],
)
def test_bad_values_and_weights_change_nothing(values, weights, error, message):
    histogram = histogram_of([1.0, 2.0])
    before = histogram.to_dict()
    with pytest.raises(error, match=message):
        histogram.update(values, weights)
    assert histogram.to_dict() == before


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan, [0.5, 2.0]])
def test_a_quantile_outside_of_the_unit_interval_is_refused(q):
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        histogram_of([1.0]).quantile(q)


def test_quantiles_have_the_shape_of_what_was_asked():
    histogram = histogram_of(np.arange(100))
    assert isinstance(histogram.quantile(0.5), float)
    assert histogram.quantile([]).shape == (0,)
    assert histogram.quantile(np.full((2, 3), 0.5)).shape == (2, 3)


@pytest.mark.parametrize("max_buckets", [0, -1, 319, 2048.5, "many", True, None])
def test_a_histogram_of_too_few_buckets_is_refused(max_buckets):
    with pytest.raises(ValueError, match="give a whole number, 320 or more"):
        LogLinearHistogram(max_buckets)


def test_only_histograms_merge():
    with pytest.raises(TypeError, match="cannot merge a dict"):
        LogLinearHistogram().merge({})


# -- For those who draw --------------------------------------------------------------------------


@given(streams)
@settings(deadline=None)
def test_native_buckets_hold_what_numpy_counts_between_their_edges(values):
    histogram = histogram_of(values)
    if not values.size:
        with pytest.raises(ValueError, match="is empty"):
            histogram.histogram()
        return
    drawn = histogram.histogram()
    assert isinstance(drawn, Histogram)
    assert (drawn.edges[:-1] < drawn.edges[1:]).all()
    assert np.isfinite(drawn.edges).all()
    expected = np.diff(
        np.append(np.searchsorted(np.sort(values), drawn.edges[:-1], side="left"), values.size)
    )
    assert drawn.counts.tolist() == expected.tolist()
    assert (drawn.minimum, drawn.maximum) == (values.min(), values.max())


@pytest.mark.parametrize("name", [*NARROW, *WIDE])
def test_bins_of_equal_width_hold_nearly_what_numpy_counts(name):
    values = {**NARROW, **WIDE}[name]
    drawn = histogram_of(values).histogram(bins=40)
    assert drawn.counts.sum() == pytest.approx(N)
    if values.min() < values.max():
        expected, edges = np.histogram(values, bins=40)
        np.testing.assert_allclose(drawn.edges, edges)
        assert np.abs(drawn.counts - expected).max() <= 0.01 * N
    assert drawn.total == pytest.approx(values.sum(), rel=1e-9, abs=1e-6)
    assert drawn.total_squares == pytest.approx((values**2).sum(), rel=1e-9)


@pytest.mark.parametrize("bins", [0, -1, 1.5, "x", True])
def test_a_wrong_number_of_bins_is_refused(bins):
    with pytest.raises(ValueError, match="give a whole number, 1 or more"):
        histogram_of([1.0]).histogram(bins)


# -- The documentation ---------------------------------------------------------------------------


def test_the_slot_is_as_wide_as_documented():
    assert sketches.slot_width() == 10 + 4 * BUCKETS
    assert 8 * sketches.slot_width() == 16_464


def test_the_examples_of_the_page_run():
    page = (Path(__file__).parent.parent / "docs" / "histograms.md").read_text()
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, namespace)
    assert namespace["whole"].count == 4000
