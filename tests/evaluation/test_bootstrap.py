"""Intervals against a computation by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from longspan.trainer.evaluation.bootstrap import DocumentBootstrap

LN2 = math.log(2)


def test_two_documents_have_three_resamples_with_known_shares() -> None:
    bootstrap = DocumentBootstrap(np.array([10, 30]), samples=40000, seed=0)
    values = bootstrap._counts @ np.array([1.0, 0.0])  # how often the first document was drawn
    shares = [float(np.mean(values == count)) for count in (0, 1, 2)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    interval = bootstrap.rate(np.array([20.0, 30.0]))
    assert interval.bits_per_byte == pytest.approx(50 / 40 / LN2, abs=1e-15)  # ratio of sums: not (2 + 1) / 2
    assert (interval.ci_low, interval.ci_high) == pytest.approx((1 / LN2, 2 / LN2), abs=1e-15)


def test_the_interval_is_the_percentile_of_all_resamples() -> None:
    nats, counts = np.array([3.0, 9.0, 2.0, 8.0]), np.array([4, 5, 6, 7])
    every = sorted(
        sum(nats[list(draw)]) / (LN2 * sum(counts[list(draw)])) for draw in itertools.product(range(4), repeat=4)
    )
    low, high = np.percentile(every, [10, 90])
    interval = DocumentBootstrap(counts, samples=200_000, seed=1, confidence=0.8).rate(nats)
    assert (interval.ci_low, interval.ci_high) == pytest.approx((low, high), abs=0.01)


def test_differences_are_paired() -> None:
    """Documents differ much more than the modes do: two marginal intervals overlap, the paired one does not."""
    rng = np.random.default_rng(0)
    nats = rng.uniform(50, 500, size=20)
    bootstrap = DocumentBootstrap(np.full(20, 100), samples=2000, seed=0)
    worse = nats + 1.0 + 0.1 * rng.standard_normal(20)
    assert bootstrap.rate(nats).ci_high > bootstrap.rate(worse).ci_low
    difference = bootstrap.difference(worse, nats)
    assert 0 < difference.ci_low < difference.bits_per_byte < difference.ci_high
    assert difference.bits_per_byte == pytest.approx(0.01 / LN2, rel=0.05)


def test_no_difference_is_exactly_zero() -> None:
    nats = np.random.default_rng(0).uniform(1, 2, size=33)
    interval = DocumentBootstrap(np.full(33, 7), samples=500, seed=0).difference(nats, nats.copy())
    assert interval.as_dict() == {"bits_per_byte": 0.0, "ci_low": 0.0, "ci_high": 0.0}


def test_the_seed_fixes_the_resamples() -> None:
    nats, counts = np.arange(1.0, 9.0), np.full(8, 3)
    first, same, other = (DocumentBootstrap(counts, 1500, seed).rate(nats) for seed in (4, 4, 5))
    assert first == same and first != other
