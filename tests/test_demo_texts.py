"""The demo's texts, and the order in which ranks see them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metricfold.demo.mixture import SAMPLES_PER_STEP, Corpus, Mixture, cut_by_time
from metricfold.demo.texts import (
    MAX_BYTES_PER_TEXT,
    Text,
    read_python_code,
    read_python_docs,
    read_texts,
)


@pytest.fixture(scope="module")
def code():
    return read_python_code()


@pytest.fixture(scope="module")
def docs():
    return read_python_docs()


class TestPythonsOwnTexts:
    def test_code_is_functions_classes_and_methods(self, code):
        assert {text.kind for text in code} == {"function", "class", "method"}
        assert len(code) > 3000
        starts = [text.text for text in code if text.text.startswith(("def ", "async def "))]
        assert len(starts) > 1000

    def test_a_class_ends_before_its_first_method(self, code):
        heads = [text.text for text in code if text.kind == "class"]
        assert any(head.startswith("class ") for head in heads)
        assert not any("\n    def __init__(self" in head for head in heads)

    def test_docs_are_paragraphs_of_several_kinds(self, docs):
        kinds = {text.kind for text in docs}
        assert {"prose", "example", "grammar", "list"} <= kinds
        assert len(docs) > 1000
        assert not any("\n\n" in text.text for text in docs)

    def test_every_text_fits_the_model(self, code, docs):
        sizes = [len(text.text.encode()) for text in [*code, *docs]]
        assert max(sizes) == MAX_BYTES_PER_TEXT
        assert min(sizes) >= 2

    @pytest.mark.parametrize(
        ("paragraph", "kind"),
        [
            ("The assert statement.", "prose"),
            ('   stmt ::= "assert" expression', "grammar"),
            ("   if __debug__:\n      raise", "example"),
            (">>> 1 + 1\n2", "example"),
            ("* a point", "list"),
            ("+----+\n| a  |", "table"),
            ("Changed in version 3.8: more", "note"),
        ],
    )
    def test_kinds_of_sections(self, tmp_path, paragraph, kind):
        path = tmp_path / "one.txt"
        path.write_text(paragraph)
        assert read_texts(path) == [Text(paragraph, kind)]


class TestOwnTexts:
    def test_txt_gives_paragraphs(self, tmp_path):
        path = tmp_path / "two.txt"
        path.write_bytes(b"\xef\xbb\xbffirst\r\nparagraph\r\n \r\n\r\nsecond\r\n")
        assert [text.text for text in read_texts(path)] == ["first\nparagraph", "second"]

    def test_jsonl_gives_the_field_text(self, tmp_path):
        path = tmp_path / "two.jsonl"
        lines = [{"text": "one"}, {"text": "two", "kind": "odd", "more": [1]}]
        path.write_text("\n\n".join(map(json.dumps, lines)))
        assert read_texts(path) == [Text("one", "prose"), Text("two", "odd")]

    def test_a_folder_gives_all_files_below_it_in_order(self, tmp_path):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "deep.txt").write_text("deep")
        (tmp_path / "a.jsonl").write_text('{"text": "flat"}')
        (tmp_path / "ignored.csv").write_text("1,2")
        assert [text.text for text in read_texts(tmp_path)] == ["flat", "deep"]

    def test_long_texts_are_cut_between_characters_and_nothing_is_lost(self, tmp_path):
        path = tmp_path / "long.txt"
        text = "a" + "€" * 1000
        path.write_text(text, encoding="utf-8")
        pieces = [piece.text for piece in read_texts(path)]
        assert "".join(pieces) == text
        assert all(len(piece.encode()) <= MAX_BYTES_PER_TEXT for piece in pieces)

    def test_half_a_surrogate_pair_does_not_stop_the_training(self, tmp_path):
        path = tmp_path / "odd.jsonl"
        path.write_text('{"text": "a \\ud800 b"}')
        assert [text.text for text in read_texts(path)] == ["a ? b"]


def texts(*lengths):
    return [Text("x" * length, "prose") for length in lengths]


@pytest.fixture
def mixture():
    return Mixture(
        [
            Corpus.split("small", texts(*range(2, 100))),
            Corpus.split("large", texts(*range(2, 502)) * 8),
        ]
    )


class TestMixture:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
    def test_ranks_share_the_same_samples_whatever_their_number(self, mixture, world_size):
        for step in (1, 2, 77):
            shares = mixture.shares(step, world_size)
            assert len(shares) == world_size
            assert all(shares)
            first = (step - 1) * SAMPLES_PER_STEP
            together = sorted(number for share in shares for number in share)
            assert together == list(range(first, first + SAMPLES_PER_STEP))

    def test_a_sample_is_the_same_for_everyone(self, mixture):
        again = Mixture(mixture.corpora)
        assert [mixture.draw(n) for n in range(50)] == [again.draw(n) for n in range(50)]

    def test_samples_are_drawn_by_weight(self, mixture):
        drawn = [mixture.draw(number).dataset for number in range(2000)]
        assert sum(drawn) / len(drawn) == pytest.approx(mixture.weights[1], abs=0.05)
        assert 0.8 < mixture.weights[1] < 0.9  # sqrt(3800) to sqrt(93)

    def test_ranks_hold_unequal_numbers_of_samples(self, mixture):
        sizes = {len(mixture.shares(step, 2)[0]) for step in range(1, 20)}
        assert sizes != {SAMPLES_PER_STEP // 2}

    def test_what_is_held_out_is_not_trained_on(self):
        corpus = Corpus.split("all", texts(*range(2, 202)))
        assert not set(corpus.training) & set(corpus.validation)
        assert len(corpus.training) + len(corpus.validation) == 200

    def test_a_single_text_is_trained_and_validated_on(self):
        corpus = Corpus.split("one", texts(7))
        assert corpus.training == corpus.validation == texts(7)


@given(st.lists(st.integers(1, 512), min_size=16, max_size=16).map(sorted), st.integers(1, 16))
def test_shares_are_about_equally_quick(lengths, parts):
    def slowest(cuts):
        ends = [0, *cuts, len(lengths)]
        assert all(start < end for start, end in pairwise(ends))
        return max((end - start) * lengths[end - 1] for start, end in pairwise(ends))

    cuts = cut_by_time(lengths, parts)
    assert len(cuts) == parts - 1
    even = [len(lengths) * part // parts for part in range(1, parts)]
    assert slowest(cuts) <= slowest(even)
