"""The plan against a plain planner, and the properties of lanes, over random manifests."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from fractions import Fraction

import pytest
from plan_manifests import manifest_of_columns, manifest_of_lengths, reference_plan, shares_by_size

from longspan.data_pipeline import mixing, timeline, trial
from longspan.data_pipeline.plan import LanePlan

STEPS = 16


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """Without the plan's warnings of few and short documents."""
    caplog.set_level(logging.ERROR, logger="longspan.data")


def random_settings(seed):
    """(lengths, shares or None, limit, other settings) of a random plan."""
    rng = random.Random(seed)
    quantum = rng.choice([1, 2, 4, 8])
    segment = quantum * rng.choice([1, 2, 4, 8])
    edges = [2, 3, quantum + 2, segment + 1, 2 * segment + 2]
    lengths = {
        source: [rng.choice([*edges, rng.randint(2, 120)]) for _ in range(rng.randint(1, 9))]
        for source in "abc"[: rng.randint(1, 3)]
    }
    shares = None
    if rng.random() < 0.5:
        weights = [rng.randint(1, 9), *(rng.randint(0, 9) for _ in range(len(lengths) - 1))]
        shares = {source: Fraction(weight, sum(weights)) for source, weight in zip(lengths, weights, strict=True)}
    settings = {"seed": seed, "lanes": rng.choice([1, 2, 3, 5, 8]), "segment_tokens": segment, "quantum": quantum}
    settings["boundary"] = rng.choice(["pack", "pad"])
    return lengths, shares, rng.choice([None, None, 2 * quantum + 3]), settings


def rows(plan, step):
    return [
        (piece.lane, piece.column, piece.part.document, piece.part.number, piece.start, piece.stop)
        for piece in plan.pieces(step, 0, plan.lanes)
    ]


def check_stays(plan, all_rows, limit):
    """Each document's tokens exactly once per epoch, in order, in one lane; refills by (step, lane), on edges."""
    edge = plan.quantum if plan.boundary == "pack" else plan.segment_tokens
    current, starts = {}, []
    for step, pieces in enumerate(all_rows):
        for lane, column, document, number, start, stop in pieces:
            position = step * plan.segment_tokens + column
            first = number * (limit or 0)
            if start == first:
                before = current.get(lane)
                if before is not None:
                    assert before[1] == before[2], "a document ends before its last token"
                    assert position == -(-before[3] // edge) * edge, "a document starts off its edge"
                size = plan.manifest.documents[document].num_tokens
                last = min(first + limit, size) if limit else size
                starts.append((step, lane, document, number))
            else:
                document_before, read, last, end = current[lane]
                assert (document_before, read, end) == ((document, number), start, position), "not in order in a lane"
            assert start < stop <= last
            current[lane] = ((document, number), stop, last, position + stop - start)
    assert starts == sorted(starts, key=lambda row: row[:2])
    taken = defaultdict(list)
    for _, _, document, number in starts:
        taken[plan.manifest.documents[document].source].append((document, number))
    for source, order in taken.items():
        places = [place for place, entry in enumerate(plan.manifest.documents) if entry.source == source]
        every = {
            (place, number)
            for place in places
            for number in range(-(-plan.manifest.documents[place].num_tokens // limit) if limit else 1)
        }
        for begin in range(0, len(order), len(every)):
            epoch = order[begin : begin + len(every)]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= every
    return len(starts)


def test_five_hundred_random_plans_equal_the_plain_planner(monkeypatch):
    documents_started = 0
    for seed in range(500):
        rng = random.Random(-seed)
        monkeypatch.setattr(mixing, "LOOKAHEAD_TOKENS", rng.choice([8, 64, 1 << 15]))
        monkeypatch.setattr(trial, "TRIED_SHARE", rng.choice([0, 0, 2, 10, 256]))
        lengths, shares, limit, settings = random_settings(seed)
        plan = LanePlan(manifest_of_lengths(lengths), source_weights=shares, max_document_tokens=limit, **settings)
        shares = shares or shares_by_size(lengths)
        expected = reference_plan(lengths, STEPS, shares=shares, limit=limit, **settings)
        found = [rows(plan, step) for step in range(STEPS)]
        assert found == expected, f"seed {seed}"
        documents_started += check_stays(plan, found, limit)
    assert documents_started > 10_000


@pytest.mark.parametrize("lengths", [(40, 41), (2, 300), (64, 64)], ids=["alike", "unlike", "equal"])
@pytest.mark.parametrize("boundary", ["pack", "pad"])
def test_waves_fill_lanes_as_one_by_one_does(monkeypatch, lengths, boundary):
    """Many lanes and one source: the numpy path against the plain walk, and both by way of small windows."""
    rng = random.Random(0)
    manifest = manifest_of_lengths({"a": [rng.randint(*lengths) for _ in range(300)]})
    settings = {"seed": 1, "lanes": 40, "segment_tokens": 16, "quantum": 4, "boundary": boundary}
    in_waves = LanePlan(manifest, **settings)
    assert in_waves._windows._timeline._takes_waves(in_waves.before(0))
    by_waves = [rows(in_waves, step) for step in range(600)]
    monkeypatch.setattr(timeline, "_FEWEST_LANES_FOR_WAVES", 41)
    plan = LanePlan(manifest, **settings)
    assert by_waves == [rows(plan, step) for step in range(600)]


def test_far_steps_do_not_depend_on_the_way_there():
    rng = random.Random(3)
    manifest = manifest_of_columns([rng.randint(2, 900) for _ in range(500)], [i % 2 for i in range(500)], ["a", "b"])
    settings = {"seed": 1, "lanes": 6, "segment_tokens": 32, "quantum": 8, "boundary": "pack"}
    far = LanePlan(manifest, source_weights={"a": 0.25, "b": 0.75}, **settings)
    walked = LanePlan(manifest, source_weights={"a": 0.25, "b": 0.75}, **settings)
    expected = {step: rows(walked, step) for step in range(30_000) if step % 997 == 0 or step > 29_990}
    for step in sorted(expected, key=lambda step: -step):
        assert rows(far, step) == expected[step]
