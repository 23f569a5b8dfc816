"""Shares of sources, fairness within a source, padding: on very unequal documents."""

from __future__ import annotations

import logging
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from plan_manifests import manifest_of_columns, manifest_of_lengths

from longspan.data_pipeline import trial
from longspan.data_pipeline.mixing import integer_weights
from longspan.data_pipeline.plan import LanePlan
from longspan.errors import UsageError

LANES, SEGMENT, QUANTUM = 32, 4096, 512


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """Without the plan's warnings of few documents."""
    caplog.set_level(logging.ERROR, logger="longspan.data")


def unequal_documents(seed=0):
    """Lengths of 85 documents of 56.9 M tokens in all, the longest of 8.8 M, and a source of two for each."""
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.lognormal(12.6, 1.3, 84))
    while lengths.max() > 8.7e6 or not np.isclose(lengths.sum(), 48.1e6):
        lengths = np.minimum(lengths * (48.1e6 / lengths.sum()), 8.7e6)
    return np.append(lengths, 8.8e6).astype(np.int64), rng.integers(0, 2, 85)


def make_plan(shares, seed=0):
    manifest = manifest_of_columns(*unequal_documents(seed), ["prose", "code"])
    settings = {"lanes": LANES, "segment_tokens": SEGMENT, "quantum": QUANTUM, "boundary": "pack"}
    return LanePlan(manifest, seed=seed, source_weights=shares, **settings)


def share_error(plan, shares, step):
    tokens = dict(zip(plan.sources, plan.progress(step).tokens, strict=True))
    return max(abs(tokens[name] / sum(tokens.values()) - share) for name, share in shares.items())


AFTER_TEN_MILLION = -(-10_000_000 // (LANES * SEGMENT))


def errors(seeds, shares_of_prose):
    """Errors of the shares of two sources after 10 M tokens, over sets of lengths and weights."""
    return [
        share_error(make_plan(shares, seed), shares, AFTER_TEN_MILLION)
        for seed in seeds
        for shares in ({"prose": share, "code": 1 - share} for share in shares_of_prose)
    ]


def test_shares_after_ten_million_tokens_of_85_very_unequal_documents():
    """Within 0.5%, whichever lengths and order the documents have."""
    assert 10e6 * 0.98 < sum(make_plan({"prose": 0.5, "code": 0.5}).progress(AFTER_TEN_MILLION).tokens) < 10.1e6
    assert max(errors(range(6), (0.3, 0.5, 0.7))) < 0.005


@pytest.mark.long
def test_shares_after_ten_million_tokens_over_many_sets_of_documents():
    assert max(errors(range(24), (0.3, 0.37, 0.5, 0.7))) < 0.005
    # A tenth of 32 lanes is 3.2 of them: where three documents are longer than 10 M tokens last, it is not held.
    tenth = np.array(errors(range(24), (0.9,)))
    assert np.mean(tenth < 0.005) > 0.8 and max(tenth) < 0.012


def test_shares_stay_right_where_the_weights_are_whole_lanes():
    """Whichever documents are long, lanes enough are free to hold the shares at any later time."""
    shares = {"prose": 0.25, "code": 0.75}
    for seed in range(3):
        plan = make_plan(shares, seed)
        assert max(share_error(plan, shares, step) for step in range(AFTER_TEN_MILLION, 4000, 97)) < 0.005


def test_without_trials_shares_are_worse(monkeypatch):
    """What the test above would not show if trials were never made."""
    shares = (0.3, 0.37, 0.5, 0.7)
    tried = errors(range(3), shares)
    monkeypatch.setattr(trial, "TRIED_SHARE", 0)
    assert np.mean(errors(range(3), shares)) > 1.2 * np.mean(tried)


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.5), (0.34, 0.33, 0.33), (0.25, 0.25, 0.5)])
def test_shares_of_three_sources_of_very_unequal_documents(shares):
    for seed in range(3):
        lengths, _ = unequal_documents(seed)
        sources = np.random.default_rng(1000 + seed).integers(0, 3, 85)
        wanted = dict(zip("abc", shares, strict=True))
        settings = {"lanes": LANES, "segment_tokens": SEGMENT, "quantum": QUANTUM, "boundary": "pack"}
        manifest = manifest_of_columns(lengths, sources, list(wanted))
        plan = LanePlan(manifest, seed=seed, source_weights=wanted, **settings)
        assert share_error(plan, wanted, AFTER_TEN_MILLION) < 0.005


def test_little_padding_and_no_document_is_taken_more_than_once_more_often():
    """Counted are starts, that is lanes that took the document: one that is still read while its source goes on into
    the next epochs is taken again there, by another lane, like all others."""
    plan = make_plan({"prose": 0.7, "code": 0.3})
    steps, taken, held = 3000, Counter(), 0
    sources = plan.manifest.documents.source_index
    totals = [np.flatnonzero(sources == source) for source in (0, 1)]
    for step in range(steps):
        table = plan.table(step, 0, LANES)
        held += int((table.stop - table.start).sum())
        taken.update(plan.parts.document[table.part[table.start == 0]].tolist())
        counts = [[taken[place] for place in places.tolist()] for places in totals]
        assert all(max(count) - min(count) <= 1 for count in counts)
    assert min(taken[place] for place in range(85)) >= 4
    assert 1 - held / (steps * LANES * SEGMENT) < 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_short_documents_are_mixed_exactly(count):
    """Documents below the look-ahead count whole: shares are within one document at every refill."""
    rng = np.random.default_rng(count)
    lengths = {f"s{index}": rng.integers(2, 90, 40).tolist() for index in range(count)}
    shares = {name: Fraction(index + 1, count * (count + 1) // 2) for index, name in enumerate(lengths)}
    plan = LanePlan(
        manifest_of_lengths(lengths),
        seed=1,
        lanes=3,
        segment_tokens=16,
        quantum=4,
        boundary="pack",
        source_weights=shares,
    )
    weight_sum = sum(plan.weights.values())
    for step in range(400):
        assert max(map(abs, plan.progress(step).deficits)) <= 90 * weight_sum


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"a": 1, "b": 1},
            r"the weights sum to 2, shares must sum to 1; in this ratio they are \{a: 0.500000, b: 0.50",
        ),
        ({"a": 0.5, "b": 0.499}, "the weights sum to 0.999, shares must sum to 1; in this ratio"),
        ({"a": 0, "b": 0}, r"the weights sum to 0, shares must sum to 1\. Give a weight for each of a, b"),
        ({"a": 0.5, "c": 0.5}, "the corpus has no source c; no weight for b. Give"),
        ({"a": -0.5, "b": 1.5}, "not a number from 0 on: a = -0.5. Give"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weights, message):
    with pytest.raises(UsageError, match=f"^data.source_weights: {message}"):
        integer_weights({"a": 10, "b": 30}, weights)


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ({"a": 10, "b": 30}, None, {"a": 1, "b": 3}),
        ({"a": 10, "b": 30}, {"a": 0.1, "b": 0.9}, {"a": 1, "b": 9}),
        ({"a": 10, "b": 30}, {"a": 0.333333, "b": 0.666667}, {"a": 333333, "b": 666667}),
        ({"a": 10, "b": 30}, {"a": 1.0, "b": 0}, {"a": 1, "b": 0}),
        ({"a": 10, "b": 30}, {"a": Fraction(1, 3), "b": Fraction(2, 3)}, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2**40}, None, {"a": 1, "b": 2**30 - 1}),
    ],
)
def test_weights_are_integers_in_lowest_terms(sizes, weights, expected):
    assert integer_weights(sizes, weights) == expected
