"""Synthetic tasks: right by brute force, the same everywhere, apart across splits, fair, without the known traps."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from synthetic_checkers import CHECKERS

from longspan.data_pipeline.synthetic.brackets import balanced
from longspan.data_pipeline.synthetic.config import TaskConfig, UnaryConfig
from longspan.data_pipeline.synthetic.draws import Draws
from longspan.data_pipeline.synthetic.samples import NO_LABEL, Sample, split_of
from longspan.data_pipeline.synthetic.suites import SUITES
from longspan.data_pipeline.synthetic.tasks import distinct, sample
from longspan.errors import UsageError

GOLDEN = Path(__file__).parent / "golden" / "synthetic_tasks.json"
COUNTS = {"variable_tracking": 400, "passkey": 400, "listops": 600, "logical_inference": 400, "program": 400}
COUNTERS = ("aa_star", "abab_star", "a_n_b_n", "a_n_b_n_c_n")


def task(kind: str, **sizes: object) -> TaskConfig:
    return TypeAdapter(TaskConfig).validate_python({"kind": kind, **sizes})


def digest(samples: list[Sample]) -> str:
    """sha256 over everything in the samples, in a form that no platform changes."""
    whole = hashlib.sha256()
    for drawn in samples:
        labels = b"" if drawn.labels is None else drawn.labels.astype("<i2").tobytes()
        parts = [drawn.text, drawn.answers.astype("<i8").tobytes(), labels, b"%d" % drawn.size, *drawn.choices]
        for part in parts:
            whole.update(b"%d:" % len(part) + part)
    return whole.hexdigest()


def check(kind: str, drawn: Sample, **rules: int) -> None:
    answers, labels = CHECKERS[kind](drawn.text.decode("ascii"), **rules)
    assert [drawn.answer(number) for number in range(len(drawn.answers))] == answers
    assert not drawn.choices or set(answers) <= set(drawn.choices)
    if drawn.labels is not None:
        assert {int(place): int(drawn.labels[place]) for place in np.flatnonzero(drawn.labels != NO_LABEL)} == labels
    else:
        assert not labels


@pytest.mark.parametrize("kind", SUITES)
def test_a_brute_force_evaluator_agrees(kind):
    for index in range(COUNTS.get(kind, 1000)):
        check(kind, sample(SUITES[kind].train, 7, index))


def all_tests():
    return [pytest.param(kind, name, id=f"{kind}-{name}") for kind, suite in SUITES.items() for name in suite.tests]


@pytest.mark.parametrize(("kind", "name"), all_tests())
def test_every_published_test_set_is_right_and_of_its_size(kind, name):
    config = SUITES[kind].tests[name]
    bounds = next(
        (value for field, value in config.model_dump().items() if field in SIZES),
        (config.model_dump().get("tokens"),) * 2,
    )
    for index in range(2 if name in ("256k", "1024k", "long_range") else 6):
        drawn = sample(config, 3, index, "test")
        check(kind, drawn)
        slack = 100 if "num_bytes" in config.model_dump() else 0  # a line of filler
        assert bounds[0] - slack <= drawn.size <= bounds[1]


SIZES = ("lengths", "instructions", "operators", "moves", "statements", "num_bytes")


@pytest.mark.parametrize(
    ("kind", "sizes", "rules"),
    [
        ("dyck", {"bracket_types": 4, "lengths": (2, 30)}, {}),
        ("dyck", {"bracket_types": 1, "lengths": (3, 5)}, {}),
        ("dyck", {"bracket_types": 3, "lengths": (2001, 2001)}, {}),
        ("shuffle_2", {"lengths": (2, 4)}, {}),
        ("reset_dyck", {"lengths": (13, 13), "resets": 3}, {}),
        ("reset_dyck", {"lengths": (4, 4)}, {}),
        ("flip_flop", {"instructions": (2, 9), "ignore_probability": 0}, {}),
        ("listops", {"lengths": (4, 12), "max_arguments": 4, "max_depth": 3}, {}),
        ("random_walk", {"moves": (1, 11), "board": 2}, {"board": 2}),
        ("random_walk", {"moves": (1000, 1003), "board": 9}, {"board": 9}),
        ("program", {"statements": (2, 20), "variables": 2}, {}),
        ("variable_tracking", {"num_bytes": (600, 700), "chains": 2, "hops": 1}, {}),
        ("associative_recall", {"tokens": 8, "pairs": 2}, {}),
        ("associative_recall", {"tokens": 2704, "pairs": 676, "power": 1}, {}),
        ("passkey", {"num_bytes": (512, 600), "keys": 1}, {}),
        ("logical_inference", {"operators": (0, 1)}, {}),
    ],
    ids=str,
)
def test_other_sizes(kind, sizes, rules):
    config = task(kind, **sizes)
    for index in range(60):
        check(kind, sample(config, 1, index), **rules)


@pytest.mark.parametrize("kind", SUITES)
def test_the_first_hundred_samples_never_change(kind):
    golden = json.loads(GOLDEN.read_text())
    assert digest([sample(SUITES[kind].train, 0, index) for index in range(100)]) == golden[kind]


@pytest.mark.parametrize("kind", SUITES)
def test_a_sample_depends_on_seed_split_and_index_alone(kind):
    config = SUITES[kind].train
    forwards = [sample(config, 5, index) for index in range(8)]
    backwards = [sample(config, 5, index) for index in reversed(range(8))][::-1]
    assert digest(forwards) == digest(backwards)
    assert digest(forwards) != digest([sample(config, 6, index) for index in range(8)])
    assert sample(config, 5, 10**15).text == sample(config, 5, 10**15).text  # no walk up to the index


@pytest.mark.parametrize("kind", [kind for kind in SUITES if kind not in COUNTERS])
def test_no_string_is_in_two_splits(kind):
    config = SUITES[kind].train
    count = COUNTS.get(kind, 1000) // 8
    texts = {
        split: {sample(config, seed, index, split).text for seed in (0, 1) for index in range(count // 2)}
        for split in ("train", "validation", "test")
    }
    for one, other in itertools.combinations(texts.values(), 2):
        assert not one & other
    assert all(split_of(kind, text) == split for split, found in texts.items() for text in found)


@pytest.mark.parametrize(
    ("kind", "few", "more"),
    [
        ("parity", {"lengths": (2, 9)}, {"lengths": (2, 11)}),
        ("dyck", {"lengths": (2, 8)}, {"lengths": (2, 9)}),
        ("shuffle_2", {"lengths": (2, 8)}, {"lengths": (2, 9)}),
        ("reset_dyck", {"lengths": (4, 12)}, {"lengths": (4, 14)}),
        ("flip_flop", {"instructions": (2, 5)}, {"instructions": (2, 6), "ignore_probability": 0.1}),
        ("logical_inference", {"operators": (0, 1)}, {"operators": (0, 2)}),
        ("copy", {"lengths": (1, 4), "letters": 3}, {"lengths": (1, 5), "letters": 4}),
        ("listops", {"lengths": (4, 4)}, {"lengths": (4, 4), "max_arguments": 10}),
    ],
)
def test_splits_stay_apart_when_sizes_and_seeds_differ(kind, few, more):
    """Tasks so small that a good part of all strings is drawn."""
    count = 40 if kind == "logical_inference" else 80
    trained = {sample(task(kind, **few), 0, index).text for index in range(3 * count)}
    also = {sample(task(kind, **more), 1, index).text for index in range(3 * count)}
    tested = {sample(task(kind, **more), 1, index, "test").text for index in range(count)}
    assert len(trained & also) > 5 and not (trained | also) & tested


@pytest.mark.parametrize("kind", COUNTERS)
def test_languages_with_few_strings_are_split_by_length(kind):
    suite = SUITES[kind]
    trained = {sample(suite.train, 0, index).text for index in range(600)}
    tested = {sample(config, 0, index, "test").text for config in suite.tests.values() for index in range(300)}
    longest = max(text.index(b"=") for text in trained)
    assert longest <= 50 < min(text.index(b"=") for text in tested)
    for split in ("validation", "test"):
        with pytest.raises(UsageError, match=rf"task {kind}: no {split} string.*longer strings than `longest_train`"):
            sample(suite.train, 0, 0, split)


def test_splits_have_their_shares():
    texts = [b"%d" % number for number in range(8000)]
    counts = Counter(split_of("copy", text) for text in texts)
    assert abs(counts["train"] - 6000) < 150
    assert max(abs(counts[split] - 1000) for split in ("validation", "test")) < 120  # four standard deviations
    assert Counter(split_of("parity", text) for text in texts) != counts  # the kind is part of the hash


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        *[(kind, 0.05) for kind in ("parity", "aa_star", "abab_star", "reset_dyck", "flip_flop", "listops")],
        *[(kind, 0.05) for kind in ("a_n_b_n", "a_n_b_n_c_n", "dyck", "shuffle_2", "logical_inference", "program")],
    ],
)
def test_answers_are_balanced(kind, tolerance):
    """No constant guess is right much more often than one over the number of answers."""
    config = SUITES[kind].train
    if kind == "logical_inference":
        config = task(kind, operators=(2, 6))
    counts = Counter(sample(config, 2, index).answer() for index in range(800))
    fair = 1 / len(counts)
    assert len(counts) == {"a_n_b_n": 3}.get(kind, len(sample(config, 2, 0).choices))
    assert max(counts.values()) / 800 < fair + tolerance + 0.03


def test_walks_end_everywhere():
    counts = Counter(sample(SUITES["random_walk"].train, 0, index).answer() for index in range(3000))
    assert len(counts) == 64 and max(counts.values()) / 3000 < 0.04


def test_parity_has_odd_strings_of_all_lengths():
    drawn = [sample(SUITES["parity"].train, 0, index) for index in range(3000)]
    assert {item.size for item in drawn} == set(range(2, 51))
    assert 0.45 < np.mean([item.text[: item.size].count(b"1") % 2 for item in drawn]) < 0.55


def test_shuffles_cross():
    texts = [sample(SUITES["shuffle_2"].train, 0, index).text for index in range(200)]
    assert sum(bool(re.search(rb"\(\[\)|\[\(\]", text)) for text in texts) > 60


def test_the_last_symbol_does_not_tell_abab():
    assert {sample(SUITES["abab_star"].train, 0, index).text[-3:-2] for index in range(100)} == {b"b"}


def test_filler_of_recall_is_never_a_key():
    text = sample(task("associative_recall", tokens=1024, pairs=16), 0, 0).text
    words = Counter(re.findall(rb"..", text))
    assert [count for word, count in words.items() if word.isupper()] == [2] * 16


def test_queries_of_recall_come_soon():
    config = task("associative_recall", tokens=1024, pairs=16)
    slots = [(sample(config, 0, index).answers[:, 0] - 66) // 4 for index in range(200)]
    assert np.mean(np.concatenate(slots) < 49) > 0.55  # uniform slots: a tenth


def test_flip_flop_has_its_probabilities():
    text = sample(task("flip_flop", instructions=(20000, 20000), ignore_probability=0.1), 0, 0).text
    shares = Counter(text[::2])
    for letter, share in zip(b"wri", (0.45, 0.45, 0.1), strict=True):
        assert abs(shares[letter] / 20000 - share) < 0.015


def test_a_passkey_lies_anywhere_and_has_distractors():
    config = SUITES["passkey"].train
    drawn = [sample(config, 0, index) for index in range(300)]
    places = [item.text.index(item.answer()) / len(item.text) for item in drawn]
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() > 45
    assert Counter(item.choices.index(item.answer()) for item in drawn).keys() == {0, 1, 2, 3}
    assert all(len(set(item.choices)) == 4 and all(item.text.count(n) >= 1 for n in item.choices) for item in drawn)


def test_variables_of_other_chains_are_there_too():
    text = sample(SUITES["variable_tracking"].train, 0, 0).text
    assert text.count(b"VAR ") == 4 * 5 + 4 * 4 and len(sample(SUITES["variable_tracking"].train, 0, 0).answers) == 5


@pytest.mark.parametrize("pairs", [2, 3, 4])
def test_balanced_words_are_uniform(pairs):
    catalan = {2: 2, 3: 5, 4: 14}[pairs]
    draws = Draws("words", pairs)
    counts = Counter(balanced(draws, pairs).tobytes() for _ in range(300 * catalan))
    assert len(counts) == catalan
    assert sum((count - 300) ** 2 / 300 for count in counts.values()) < {2: 11, 3: 19, 4: 35}[pairs]  # chi-square, 0.1%


def test_distinct_samples_differ_and_keep_their_order():
    config = task("parity", lengths=(4, 6))
    drawn = [item.text for item in distinct(config, 0, 40, "train")]
    assert len(set(drawn)) == 40
    assert drawn[:5] == list(dict.fromkeys(sample(config, 0, index).text for index in range(30)))[:5]
    with pytest.raises(UsageError, match=r"only \d+ different train strings in \d+ draws, 500 wanted"):
        list(distinct(config, 0, 500, "train"))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"kind": "parity", "lengths": (50, 2)}, "from 50 to 2 is empty"),
        ({"kind": "parity", "lengths": (0, 2)}, "from 0 to 2; allowed are bounds from 2 to 16777216"),
        ({"kind": "parity", "length": (2, 50)}, "Extra inputs"),
        ({"kind": "paritee"}, "does not match any of the expected tags"),
        ({"kind": "copy", "lengths": (1, 2**40)}, "from 1 to 1099511627776; allowed are"),
        ({"kind": "associative_recall", "tokens": 64, "pairs": 17}, "17 pairs need at least 68 tokens; tokens = 64"),
        ({"kind": "passkey", "keys": 16, "num_bytes": (600, 600)}, "num_bytes = 600: these keys need 1152 or more"),
        ({"kind": "variable_tracking", "num_bytes": (512, 600)}, "these chains and hops need 544 or more"),
        ({"kind": "reset_dyck", "resets": 5}, "5 resets need strings of at least 12 symbols"),
        ({"kind": "abab_star", "lengths": (7, 7)}, "at even lengths only"),
        ({"kind": "flip_flop", "ignore_probability": 1.0}, "less than 1"),
        ({"kind": "logical_inference", "operators": (0, 100)}, "more than 64 operators"),
    ],
    ids=str,
)
def test_impossible_sizes_are_named(sizes, words):
    with pytest.raises(ValidationError, match=re.escape(words)):
        TypeAdapter(TaskConfig).validate_python(sizes)


def test_sizes_without_enough_strings_are_named():
    config = task("dyck", lengths=(2, 2), bracket_types=1)  # one string: it is in one split only
    outcomes = []
    for split in ("train", "validation", "test"):
        try:
            outcomes.append(sample(config, 0, 0, split).text)
        except UsageError as error:
            assert "Allow a wider range of sizes" in str(error)
    assert outcomes == [b"()=."]


def test_raw_words_are_philox():
    """Known answers of Random123 for philox4x64-10: counter and key zero."""
    words = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    assert [f"{word:016x}" for word in words.tolist()] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]


def test_bounded_integers_are_fair_where_words_must_be_refused():
    bound = 3 * 2**61  # a quarter of all words would favour the lower two thirds
    thirds = Counter((Draws("fair").integers(bound, 6000) // 2**61).tolist())
    draws = Draws("fair", "one")
    ones = Counter(draws.below(bound) // 2**61 for _ in range(6000))
    for counts in (thirds, ones):
        assert sorted(counts) == [0, 1, 2] and max(counts.values()) < 2150


def test_subsets_are_uniform():
    draws = Draws("subsets")
    counts = Counter(draws.subset(2, 5).tobytes() for _ in range(3000))
    assert len(counts) == 10 and sum((count - 300) ** 2 / 300 for count in counts.values()) < 28  # chi-square, 0.1%
    assert not draws.subset(0, 9).any() and draws.subset(9, 9).all()


def test_unary_sizes_are_the_symbols_of_the_whole_string():
    for kind in COUNTERS:
        config = SUITES[kind].train
        assert isinstance(config, UnaryConfig)
        assert {sample(config, 0, index).size for index in range(500)} <= set(range(2, 51))
