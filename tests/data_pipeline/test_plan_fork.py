"""Forks: other weights, lengths or lanes from a step on, without losing or repeating a token; and resume after them."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter

import pytest
from plan_manifests import manifest_of_lengths
from test_plan_reference import rows

from longspan.data_pipeline import plan_state as plan_state_module
from longspan.data_pipeline.fork import continue_plan, fork_plan, plan_from_description
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.plan_state import check_plan_state, plan_state, state_digest
from longspan.errors import DataError, UsageError

LENGTHS = {"a": [40, 3, 17, 90, 5, 61], "b": [8, 60, 33]}
CHANGES = [
    {"source_weights": {"a": 0.2, "b": 0.8}},
    {"segment_tokens": 32},
    {"segment_tokens": 8, "boundary": "pad"},
    {"quantum": 8},
    {"lanes": 7},
    {"lanes": 1},
    {"lanes": 2, "segment_tokens": 64, "source_weights": {"a": 1, "b": 0}},
]


def make_plan(lengths=None, **changes):
    settings = {"seed": 5, "lanes": 4, "segment_tokens": 16, "quantum": 4, "boundary": "pack", **changes}
    return LanePlan(manifest_of_lengths(lengths or LENGTHS), **settings)


def counted(plan, start, stop):
    """How often each (document, token) is read in steps `start` to `stop`."""
    return Counter(
        (document, token)
        for step in range(start, stop)
        for *_, document, _, first, last in rows(plan, step)
        for token in range(first, last)
    )


def check_no_token_lost(read, plan, last_step, lengths=LENGTHS):
    """Each token was read as often as its source's epochs say, but for documents that a lane has begun or waits for."""
    sizes = [size for of_source in lengths.values() for size in of_source]
    table = plan.table(last_step, 0, plan.lanes)
    unfinished = set(plan.parts.document[table.part].tolist())
    counts = [[read[place, token] for token in range(size)] for place, size in enumerate(sizes)]
    progress = plan.progress(last_step)
    begin = 0
    for epoch, of_source in zip(progress.epochs, lengths.values(), strict=True):
        for place in range(begin, begin + len(of_source)):
            if place in unfinished:
                continue
            assert len(set(counts[place])) == 1, f"document {place}: some tokens more often than others"
            assert counts[place][0] in (epoch, epoch + 1)
        begin += len(of_source)


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("step", [0, 1, 7, 30])
def test_no_token_is_lost_or_read_twice(change, step):
    before = make_plan()
    after = fork_plan(before, step, **change)
    last = step + 400
    read = counted(before, 0, step) + counted(after, step, last)
    check_no_token_lost(read, after, last)
    assert sum(after.progress(last).tokens) == sum(read.values())


def test_random_chains_of_forks_lose_nothing():
    for seed in range(30):
        rng = random.Random(seed)
        lengths = {source: [rng.randint(2, 120) for _ in range(rng.randint(2, 8))] for source in "ab"}
        plan, step, read = make_plan(lengths, seed=seed), 0, Counter()
        for _ in range(4):
            until = step + rng.randint(0, 12)
            read += counted(plan, step, until)
            change = {"lanes": rng.randint(1, 9), "segment_tokens": rng.choice([8, 16, 48])}
            if rng.random() < 0.5:
                change["source_weights"] = rng.choice([{"a": 0.9, "b": 0.1}, {"a": 0.25, "b": 0.75}])
            plan, step = fork_plan(plan, until, **change), until
        read += counted(plan, step, step + 250)
        check_no_token_lost(read, plan, step + 250, lengths)
        again = plan_from_description(plan.manifest, json.loads(json.dumps(plan.description())))
        for later in (step, step + 3, step + 200):
            assert rows(again, later) == rows(plan, later)
            assert again.progress(later) == plan.progress(later)


def test_lanes_that_stay_go_on_with_their_documents():
    before = make_plan()
    for step in (5, 9, 20):
        after = fork_plan(before, step, lanes=6, segment_tokens=32)
        goes_on = {p.lane: p for p in before.pieces(step, 0, 4) if p.column == 0 and p.start != p.part.start}
        assert goes_on
        for lane, piece in goes_on.items():
            first = after.pieces(step, lane, lane + 1)[0]
            assert (first.part, first.start, first.column) == (piece.part, piece.start, 0)


def test_documents_of_lanes_that_are_gone_are_read_next_from_where_they_were():
    before = make_plan()
    step = 9
    gone = [p for p in before.pieces(step, 1, 4) if p.column == 0 and p.start != p.part.start]
    assert len(gone) > 1
    after = fork_plan(before, step, lanes=1)
    starts = [p for s in range(step, step + 40) for p in after.pieces(s, 0, 1) if p.start == p.part.start]
    rests = starts[: len(gone)]
    assert [(p.part.document, p.part.start) for p in rests] == [(p.part.document, p.start) for p in gone]
    assert all(p.start > 0 for p in rests)  # a reset in the middle of the document: its state stayed behind


def test_new_shares_hold_from_the_fork_on():
    rng = random.Random(1)
    lengths = {source: [rng.randint(20, 60) for _ in range(50)] for source in "ab"}
    before = make_plan(lengths, source_weights={"a": 0.9, "b": 0.1})
    after = fork_plan(before, 2000, source_weights={"a": 0.5, "b": 0.5})
    at_fork, later = before.progress(2000).tokens, after.progress(2500).tokens
    assert after.progress(2000).tokens == at_fork
    assert at_fork[0] / sum(at_fork) == pytest.approx(0.9, abs=0.01)
    gained = [now - then for now, then in zip(later, at_fork, strict=True)]
    assert gained[0] / sum(gained) == pytest.approx(0.5, abs=0.01)


def test_the_state_after_a_fork_rebuilds_the_plan():
    before = make_plan()
    after = fork_plan(fork_plan(before, 9, lanes=2), 20, segment_tokens=32)
    state = json.loads(json.dumps(plan_state(after, 26, {})))
    history = state["plan"]["history"]
    assert [(phase["until_step"], phase["lanes"], phase["segment_tokens"]) for phase in history] == [
        (9, 4, 16),
        (20, 2, 16),
    ]
    wanted = make_plan(lanes=2, segment_tokens=32)
    resumed = continue_plan(wanted, state, allow_fork=False)
    assert check_plan_state(resumed, state) == {}
    for step in range(20, 80):
        assert rows(resumed, step) == rows(after, step)
        assert plan_state(resumed, step, {}) == plan_state(after, step, {})
    assert any(rows(wanted, step) != rows(after, step) for step in range(26, 30))
    with pytest.raises(UsageError, match="history: "):
        check_plan_state(wanted, state)


def test_a_document_keeps_the_step_in_which_it_started():
    before = make_plan({"a": [200, 201, 202, 203]})
    after = fork_plan(fork_plan(before, 3, segment_tokens=32), 5, segment_tokens=8)
    assert [lane["started_step"] for lane in plan_state(after, 6, {})["lanes"]] == [0] * 4
    later = {lane["started_step"] for lane in plan_state(after, 40, {})["lanes"]}
    assert later and all(5 <= step <= 40 for step in later)


def test_a_changed_configuration_forks_only_if_asked():
    state = plan_state(make_plan(), 9, {})
    wanted = make_plan(lanes=6, source_weights={"a": 0.5, "b": 0.5})
    with pytest.raises(UsageError) as caught:
        continue_plan(wanted, state, allow_fork=False)
    message = str(caught.value)
    assert "lanes: 4 saved, 6 now" in message and "weights: {'a': 216, 'b': 101} saved, {'a': 1, 'b': 1} now" in message
    assert "seed" not in message and "--fork-data" in message
    forked = continue_plan(wanted, state, allow_fork=True)
    assert forked.first_step == 9 and forked.lanes == 6
    assert rows(forked, 12) == rows(fork_plan(make_plan(), 9, lanes=6, source_weights={"a": 0.5, "b": 0.5}), 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 6}, "seed: 5 saved, 6 now"), ({"max_document_tokens": 9}, "max_document_tokens: None saved, 9 now")],
)
def test_what_no_fork_can_change(change, message):
    state = plan_state(make_plan(), 9, {})
    with pytest.raises(UsageError, match=f"{message}[^?]*cannot change within a run"):
        continue_plan(make_plan(**change), state, allow_fork=True)


def test_another_corpus_is_refused():
    with pytest.raises(UsageError, match="the saved data plan does not fit this corpus or version:\n  manifest_digest"):
        plan_from_description(manifest_of_lengths({"a": [5], "b": [7]}), make_plan().description())


def test_steps_before_the_fork_are_asked_of_the_plan_before():
    after = fork_plan(make_plan(), 9, lanes=2)
    with pytest.raises(UsageError, match="step 8 lies before the fork at step 9"):
        after.pieces(8, 0, 2)
    with pytest.raises(UsageError, match="step 3 lies before"):
        fork_plan(after, 3, lanes=3)


def test_states_of_other_versions_and_damaged_ones_are_refused():
    plan = make_plan()
    state = plan_state(plan, 9, {})
    with pytest.raises(UsageError, match="data state version 9; this version reads 2"):
        check_plan_state(plan, {**state, "version": 9})
    with pytest.raises(DataError, match="does not match its digest"):
        continue_plan(plan, {**state, "step": 10}, allow_fork=True)


def test_the_first_lane_that_stands_elsewhere_is_named():
    plan = make_plan()
    state = copy.deepcopy(plan_state(plan, 9, {}))
    for lane in (2, 3):
        state["lanes"][lane]["offset"] += 4
    state["digest"] = state_digest(state)
    with pytest.raises(DataError, match=r"lane 2 at step 9: saved .*, the plan says "):
        check_plan_state(plan, state)
    assert plan_state_module.STATE_VERSION == 2
