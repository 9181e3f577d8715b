"""Transforms tag samples with metrics and never alter what the caller holds."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterator, MutableMapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest

from metricfold import AggregationType, DefaultTrainingMetricTransform, Metric, MetricTransform

torch: Any = importlib.import_module("torch") if find_spec("torch") else None


def counting(dataset: str = "alpaca") -> DefaultTrainingMetricTransform:
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name(dataset)
    return transform


def values(sample: Any) -> list[tuple[str, Any]]:
    return [(metric.name, metric.value) for metric in sample["metrics"]]


class Storage(MutableMapping[str, Any]):
    """A mapping whose storage `copy.copy` shares."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


# -- What comes out ------------------------------------------------------------------------------


def test_samples_seen_tokens_seen_and_seq_len_come_in_that_order() -> None:
    assert counting()({"tokens": [1, 2, 3]})["metrics"] == [
        Metric("alpaca", "samples_seen", 1, AggregationType.SUM),
        Metric("alpaca", "tokens_seen", 3, AggregationType.SUM),
        Metric("alpaca", "seq_len", 3, AggregationType.DISTRIBUTION),
    ]


@pytest.mark.parametrize(
    ("sample", "length"),
    [
        ({"tokens": [1, 2], "input_ids": [1, 2, 3]}, 2),
        ({"input_ids": [1, 2, 3]}, 3),
        ({"tokens": None, "input_ids": [1, 2, 3]}, 3),
        ({"tokens": []}, 0),
        ({"tokens": (1, 2)}, 2),
        ({"tokens": b"abcd"}, 4),
        ({"tokens": ["hel", "lo"]}, 2),
        ({"tokens": [np.int32(1), np.int32(2)]}, 2),
        ({"tokens": UserList([1, 2, 3])}, 3),
        ({"tokens": deque([1, 2])}, 2),
        ({"tokens": range(4)}, 4),
        ({"tokens": np.arange(5)}, 5),
        *([({"tokens": torch.arange(6)}, 6)] if torch else []),
        *([({"tokens": [np.int32(1), torch.tensor(2)]}, 2)] if torch else []),
    ],
    ids=str,
)
def test_tokens_are_read_else_input_ids(sample: dict[str, Any], length: int) -> None:
    assert values(counting()(sample))[1:] == [("tokens_seen", length), ("seq_len", length)]


def test_metrics_of_an_earlier_transform_come_first() -> None:
    class Second(MetricTransform):
        def _generate_metrics(self, sample: Any) -> list[Metric]:
            return [Metric(self.dataset_name, "second", 2, AggregationType.MAX)]

    second = Second()
    second.set_dataset_name("alpaca")
    sample = second(counting()({"tokens": [1]}))
    assert [name for name, _ in values(sample)] == [
        "samples_seen",
        "tokens_seen",
        "seq_len",
        "second",
    ]


# -- The caller's sample -------------------------------------------------------------------------


def test_a_cached_dataset_has_three_metrics_a_sample_in_every_epoch() -> None:
    transform = counting()
    cached = [{"tokens": [1, 2]}, {"tokens": [3]}]
    before = copy.deepcopy(cached)
    for _ in range(3):
        assert [len(transform(sample)["metrics"]) for sample in cached] == [3, 3]
    assert cached == before


def test_a_sample_that_is_tagged_again_keeps_its_own_list() -> None:
    transform = counting()
    once = transform({"tokens": [1]})
    for _ in range(3):
        assert len(transform(once)["metrics"]) == 6
    assert len(once["metrics"]) == 3


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        ({"tokens": [1]}, dict),
        (OrderedDict(tokens=[1]), OrderedDict),
        (defaultdict(list, tokens=[1]), defaultdict),
        (UserDict(tokens=[1]), UserDict),
        # Nobody knows how to copy these.
        (Storage(tokens=[1]), dict),
        (MappingProxyType({"tokens": [1]}), dict),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_mapping_is_copied_never_altered(sample: Any, kind: type) -> None:
    tagged = counting()(sample)
    assert type(tagged) is kind
    assert tagged is not sample
    assert tagged["tokens"] is sample["tokens"]
    assert len(tagged["metrics"]) == 3
    assert list(sample) == ["tokens"]


def test_a_batch_encoding_stays_one() -> None:
    transformers = pytest.importorskip("transformers")
    sample = transformers.BatchEncoding({"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]})
    tagged = counting()(sample)
    assert type(tagged) is transformers.BatchEncoding
    assert values(tagged)[1] == ("tokens_seen", 3)
    assert list(sample) == ["input_ids", "attention_mask"]


def test_what_a_transform_keeps_for_itself_is_not_handed_out() -> None:
    class Same(MetricTransform):
        always: ClassVar = [Metric("d", "always", 1, AggregationType.SUM)]

        def _generate_metrics(self, sample: Any) -> list[Metric]:
            return self.always

    transform = Same()
    transform.set_dataset_name("d")
    transform({})["metrics"].append("something else")
    assert len(transform({})["metrics"]) == 1


# -- Its name ------------------------------------------------------------------------------------


def test_used_unnamed_it_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"DefaultTrainingMetricTransform.*set_dataset_name\(\)"):
        DefaultTrainingMetricTransform()({"tokens": [1]})


def test_one_instance_belongs_to_one_dataset() -> None:
    transform = counting("alpaca")
    transform.set_dataset_name("alpaca")
    with pytest.raises(ValueError, match=r"'alpaca'.*another instance for 'orca'"):
        transform.set_dataset_name("orca")
    assert transform({"tokens": [1]})["metrics"][0].dataset_name == "alpaca"
    assert counting("orca")({"tokens": [1]})["metrics"][0].dataset_name == "orca"


@pytest.mark.parametrize(
    ("name", "error", "complaint"),
    [
        ("", ValueError, "is empty"),
        ("a\nb", ValueError, r"'a\\nb' holds a line break"),
        (None, TypeError, "must be a string, but is None"),
        (3, TypeError, "must be a string, but is 3"),
    ],
)
def test_a_name_that_cannot_be_printed_is_refused(
    name: Any, error: type[Exception], complaint: str
) -> None:
    transform = DefaultTrainingMetricTransform()
    with pytest.raises(error, match=f"dataset name of a Default.*{complaint}"):
        transform.set_dataset_name(name)
    transform.set_dataset_name("fine")


def test_it_pickles_with_its_name() -> None:
    transform = pickle.loads(pickle.dumps(counting()))
    assert len(transform({"tokens": [1]})["metrics"]) == 3


# -- Samples that it cannot use ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "error", "complaint"),
    [
        (
            {"text": "hi", "id": 3},
            ValueError,
            r"'alpaca' has neither 'tokens' nor 'input_ids'; its keys are \['id', 'text'\]",
        ),
        ({}, ValueError, r"neither 'tokens' nor 'input_ids'; its keys are \[\]"),
        ({"tokens": 5}, TypeError, "'alpaca' are of type int, which has no length"),
        ({"tokens": np.ones((1, 7))}, ValueError, r"'alpaca' have the shape \(1, 7\): give those"),
        ({"tokens": np.ones(())}, ValueError, r"have the shape \(\)"),
        *([({"tokens": torch.ones(())}, ValueError, r"have the shape \(\)")] if torch else []),
        ([1, 2], TypeError, "takes samples that are mappings.*'alpaca' has a list"),
        ({"tokens": [1], "metrics": {"bleu": 3}}, TypeError, "'metrics' of a sample is a dict"),
        (
            {"tokens": [1], "metrics": Metric("d", "n", 1, "sum")},
            TypeError,
            "'metrics' of a sample is a Metric",
        ),
    ],
    ids=str,
)
def test_a_sample_that_it_cannot_use_is_named(
    sample: Any, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint) as caught:
        counting()(sample)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokens", "input_ids"])
@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ("hello world", "are text, 'hello world'"),
        ("many\nwords " * 1000, r"are text, 'many.*\.\.\..*'"),
        ({"input_ids": [1, 2, 3]}, "are a dict"),
        (UserDict(input_ids=[1, 2, 3]), "are a UserDict"),
        ([[1, 2, 3]], "are nested, since the first is a list"),
        (([1, 2], [3]), "are nested, since the first is a list"),
        (UserList([(1, 2)]), "are nested, since the first is a tuple"),
        ([{"id": 1}], "are nested, since the first is a dict"),
        ([np.ones(3)], "are nested, since the first is a ndarray"),
        *([([torch.ones(3)], "are nested, since the first is a Tensor")] if torch else []),
    ],
    ids=lambda case: repr(case)[:40],
)
def test_tokens_that_are_no_flat_sequence_are_refused_instead_of_miscounted(
    name: str, tokens: Any, found: str
) -> None:
    complaint = f"tokens of a sample of dataset 'alpaca' {found}.*: give a flat sequence of token"
    with pytest.raises(TypeError, match=complaint) as caught:
        counting()({name: tokens})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("returned", [None, Metric("d", "n", 1, "sum"), "loss"], ids=str)
def test_generate_metrics_must_return_a_list(returned: Any) -> None:
    class Wrong(MetricTransform):
        def _generate_metrics(self, sample: Any) -> list[Metric]:
            return returned

    transform = Wrong()
    transform.set_dataset_name("alpaca")
    with pytest.raises(TypeError, match=r"Wrong\._generate_metrics.*'alpaca': return a list"):
        transform({"tokens": [1]})
