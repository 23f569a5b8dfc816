"""Drain mode: every document once, in the manifest's order, and a known number of steps."""

from __future__ import annotations

import random

import pytest
from plan_manifests import manifest_of_lengths
from test_plan_reference import check_stays, rows

from longspan.data_pipeline.fork import fork_plan
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.plan_state import check_plan_state, plan_state
from longspan.errors import UsageError


def drained(lengths, lanes=3, boundary="pack", **changes):
    settings = {"seed": 0, "segment_tokens": 16, "quantum": 4, **changes}
    return LanePlan(manifest_of_lengths(lengths), lanes=lanes, boundary=boundary, drain=True, **settings)


@pytest.mark.parametrize("seed", range(40))
def test_every_document_once_in_order_and_then_nothing(seed):
    rng = random.Random(seed)
    lengths = {source: [rng.randint(2, 90) for _ in range(rng.randint(1, 12))] for source in "ab"[: 1 + seed % 2]}
    limit = None if seed % 3 else 11
    plan = drained(lengths, 1 + seed % 7, ("pack", "pad")[seed % 2], max_document_tokens=limit)
    all_rows = [rows(plan, step) for step in range(plan.num_steps + 5)]
    assert check_stays(plan, all_rows, limit) == len(plan.parts)
    assert all_rows[plan.num_steps - 1] and not any(all_rows[plan.num_steps :])
    read = [(document, token) for pieces in all_rows for *_, document, _, a, b in pieces for token in range(a, b)]
    tokens = [tokens for of_source in lengths.values() for tokens in of_source]
    assert sorted(read) == [(document, token) for document, size in enumerate(tokens) for token in range(size)]
    starts = [
        (step, lane, document) for step, p in enumerate(all_rows) for lane, _, document, part, a, _ in p if not part + a
    ]
    assert [document for *_, document in sorted(starts)] == list(range(len(tokens)))
    progress = plan.progress(plan.num_steps)
    assert progress.tokens == [sum(of_source) for of_source in lengths.values()]
    assert progress.epochs == [1] * len(lengths)


def test_an_ended_lane_has_no_pieces():
    plan = drained({"a": [40, 5, 5]})
    assert [(row[0], row[4:]) for row in rows(plan, 0)] == [(0, (0, 16)), (1, (0, 5)), (1, (0, 5))]
    assert [row[0] for row in rows(plan, 1)] == [0]
    assert plan.num_steps == 3
    assert plan.pieces(1, 1, 3) == []


def test_more_lanes_than_documents():
    plan = drained({"a": [40, 5]}, lanes=8)
    assert plan.num_steps == 3 and not plan.warnings
    assert [row[0] for row in rows(plan, 0)] == [0, 1]


def test_every_slice_of_lanes_has_the_same_number_of_steps():
    """All ranks make the whole plan: slices of it, also those that end early, know its last step."""
    lengths = {"a": [100, 3, 3, 3]}
    assert {drained(lengths, lanes=4).num_steps for _ in range(4)} == {7}
    assert drained(lengths, lanes=1).num_steps == -(-(100 + 3 * 4) // 16)


def test_the_order_and_length_do_not_depend_on_the_seed():
    lengths = {"a": [30, 7, 50], "b": [9, 80]}
    one, two = drained(lengths, seed=1), drained(lengths, seed=2)
    assert [rows(one, step) for step in range(9)] == [rows(two, step) for step in range(9)]


def test_a_state_within_and_after_the_end():
    plan = drained({"a": [40, 5, 5]})
    for step in range(plan.num_steps + 2):
        state = plan_state(plan, step, {"a/1": "bad"})
        assert check_plan_state(drained({"a": [40, 5, 5]}), state) == {"a/1": "bad"}
    assert state["lanes"] == [None] * 3


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match="source_weights: a plan that reads every document once has no shares"):
        drained({"a": [40], "b": [40]}, source_weights={"a": 0.5, "b": 0.5})
    with pytest.raises(UsageError, match="only a lane plan without end can be forked"):
        fork_plan(drained({"a": [40]}), 1, lanes=2)


def test_a_training_plan_has_no_last_step():
    plan = LanePlan(manifest_of_lengths({"a": [40]}), seed=0, lanes=1, segment_tokens=16, quantum=4, boundary="pack")
    assert plan.num_steps is None
