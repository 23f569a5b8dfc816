"""The lane plan: coverage, order, mixing, boundaries, seeking, and that the checks themselves can fail."""

from __future__ import annotations

import logging
import random
from collections import defaultdict

import pytest
from plan_manifests import manifest_of_lengths

from longspan.data_pipeline.parts import Part
from longspan.data_pipeline.plan import LanePlan, Piece
from longspan.errors import UsageError

Q, T = 4, 16


def make_plan(lengths, lanes=3, **changes):
    settings = {"seed": 5, "lanes": lanes, "segment_tokens": T, "quantum": Q, "boundary": "pack", **changes}
    return LanePlan(manifest_of_lengths(lengths), **settings)


def random_lengths(seed):
    rng = random.Random(seed)
    return {
        source: [rng.choice([2, 3, Q, T - 1, T, T + 1, 2 * T, rng.randint(2, 120)]) for _ in range(rng.randint(1, 9))]
        for source in "abc"[: rng.randint(1, 3)]
    }


def split_document(document, num_tokens, max_tokens):
    """The document as parts of at most `max_tokens` tokens."""
    size = max_tokens or num_tokens
    return [
        Part(document, number, start, min(start + size, num_tokens))
        for number, start in enumerate(range(0, num_tokens, size))
    ]


def placements(pieces_of_step, steps, edge):
    """Each document's stay in a lane, as (step it starts in, lane, column, source, part, whole); checks its order.

    Within a lane the pieces of a part must follow each other without gap, and the next part must start at the
    first multiple of `edge` after it.
    """
    stays, current = [], {}
    for step in range(steps):
        for piece in pieces_of_step(step):
            position = step * T + piece.column
            now = current.get(piece.lane)
            if piece.start == piece.part.start:
                if now is not None:
                    assert now["read"] == now["part"].stop, "a document ends before its last token"
                    assert position == -(-now["position"] // edge) * edge, "a document starts off its edge"
                now = {"part": piece.part, "read": piece.start, "place": (step, piece.lane, piece.column)}
                now["position"] = position
                current[piece.lane] = now
                stays.append(now)
            assert now is not None and piece.part == now["part"], "a document goes on in another lane"
            assert (piece.start, position) == (now["read"], now["position"]), "tokens are left out or repeated"
            assert piece.start < piece.stop <= piece.part.stop
            now["read"] = piece.stop
            now["position"] = position + piece.stop - piece.start
    return sorted(stays, key=lambda stay: stay["place"])


def check_epochs(plan, pieces_of_step, steps):
    """Every part of every source exactly once per epoch, each read whole, in order, in one lane."""
    stays = placements(pieces_of_step, steps, Q if plan.boundary == "pack" else T)
    documents = plan.manifest.documents
    expected = defaultdict(list)
    for index, document in enumerate(documents):
        expected[document.source] += split_document(index, document.num_tokens, plan.max_document_tokens)
    taken = defaultdict(list)
    for stay in stays:
        taken[documents[stay["part"].document].source].append(stay["part"])
    key = lambda part: (part.document, part.number)  # noqa: E731
    for source, parts in expected.items():
        size = len(parts)
        epochs = [taken[source][start : start + size] for start in range(0, len(taken[source]), size)]
        assert len(epochs) > 2, "too few steps to see an epoch"
        for epoch in epochs[:-1]:
            assert sorted(epoch, key=key) == parts, "an epoch does not hold every document once"
        assert len({key(part) for part in epochs[-1]}) == len(epochs[-1])


@pytest.mark.parametrize("boundary", ["pack", "pad"])
@pytest.mark.parametrize("seed", range(12))
def test_every_token_once_per_epoch_in_order_in_one_lane(seed, boundary):
    lanes = 1 + seed % 5
    limit = None if seed % 3 else 2 * Q
    plan = make_plan(random_lengths(seed), lanes, boundary=boundary, seed=seed, max_document_tokens=limit)
    check_epochs(plan, lambda step: plan.pieces(step, 0, lanes), 400)


def shifted(piece: Piece) -> Piece:
    return piece._replace(start=piece.start + 1, stop=min(piece.stop + 1, piece.part.stop))


@pytest.mark.parametrize(
    "bug",
    [
        lambda piece, step: shifted(piece) if step == 7 else piece,
        lambda piece, step: piece._replace(stop=piece.stop - 1) if piece.stop == piece.part.stop > 1 else piece,
        lambda piece, step: piece._replace(lane=(piece.lane + 1) % 3) if step == 9 else piece,
        lambda piece, step: piece._replace(part=Part(0, 0, 0, 40)) if piece.part.document == 1 else piece,
        lambda piece, step: piece._replace(column=piece.column + Q) if 0 < piece.column < T - Q else piece,
    ],
    ids=["token-skipped", "last-token-dropped", "lane-changed", "document-repeated", "edge-missed"],
)
def test_the_coverage_check_fails_for_a_wrong_plan(bug):
    plan = make_plan({"a": [40, 40, 7, 19], "b": [30, 5, 64]})
    check_epochs(plan, lambda step: plan.pieces(step, 0, 3), 200)
    with pytest.raises(AssertionError):
        check_epochs(plan, lambda step: [bug(piece, step) for piece in plan.pieces(step, 0, 3)], 200)


@pytest.mark.parametrize("boundary", ["pack", "pad"])
def test_documents_start_on_their_edge(boundary):
    plan = make_plan({"a": [2, 5, 9, 33]}, boundary=boundary)
    columns = {piece.column for step in range(100) for piece in plan.pieces(step, 0, 3) if piece.start == 0}
    assert columns == ({0, 4, 8, 12} if boundary == "pack" else {0})


def test_slices_of_lanes_are_the_same_global_batch():
    plan = make_plan({"a": [40, 3, 17, 90], "b": [8, 60]}, lanes=8)
    for step in (0, 3, 50, 51):
        whole = plan.pieces(step, 0, 8)
        for ranks in (1, 2, 4, 8):
            size = 8 // ranks
            assert [p for rank in range(ranks) for p in plan.pieces(step, rank * size, rank * size + size)] == whole


def test_seeking_gives_what_going_on_gives():
    lengths = {"a": [40, 3, 17, 90, 5], "b": [8, 60]}
    straight = make_plan(lengths)
    expected = [(straight.pieces(step, 0, 3), straight.progress(step)) for step in range(3000)]
    jumping = make_plan(lengths)
    rng = random.Random(0)
    for step in [2999, 0, 2500, 255, 256, 257, *(rng.randrange(3000) for _ in range(200)), *range(600, 500, -1)]:
        assert (jumping.pieces(step, 0, 3), jumping.progress(step)) == expected[step]


def test_seeking_far_keeps_few_snapshots_and_stays_right():
    plan, straight = make_plan({"a": [2, 3, 5, 40]}), make_plan({"a": [2, 3, 5, 40]})
    far = plan.pieces(40_000, 0, 3)
    early = plan.pieces(1234, 0, 3)
    assert len(plan._windows._snapshots._cursors) <= 512
    assert early == straight.pieces(1234, 0, 3)
    for step in range(39_000, 40_000, 100):
        straight.pieces(step, 0, 3)
    assert far == straight.pieces(40_000, 0, 3) == plan.pieces(40_000, 0, 3)


def test_refills_follow_an_independent_walk():
    """Against a plain step-by-step walk: least squares over (step, lane), written without heap and snapshots."""
    lengths = {"a": [40, 3, 17, 90, 5], "b": [8, 60]}
    plan = make_plan(lengths, source_weights={"a": 0.28, "b": 0.72})
    orders = {}
    for stay in placements(lambda step: plan.pieces(step, 0, 3), 600, Q):
        document = plan.manifest.documents[stay["part"].document]
        orders.setdefault(document.source, []).append(document)
    assigned = {"a": 0, "b": 0}
    free, queues = [0, 0, 0], {source: order[::-1] for source, order in orders.items()}

    def distance(source):
        after = assigned["a"] + queues["a"][-1].num_tokens * (source == "a")
        total = after + assigned["b"] + queues["b"][-1].num_tokens * (source == "b")
        return abs(28 * total - 100 * after), source

    for step in range(500):
        for lane in range(3):
            starts = [p for p in plan.pieces(step, lane, lane + 1) if p.start == 0]
            while free[lane] < (step + 1) * T:
                source = min("ab", key=distance)
                document = queues[source].pop()
                piece = starts.pop(0)
                assert plan.manifest.documents[piece.part.document].id == document.id
                assert step * T + piece.column == free[lane]
                assigned[source] += document.num_tokens
                free[lane] = -(-(free[lane] + document.num_tokens) // Q) * Q
            assert not starts


@pytest.mark.parametrize("weights", [None, {"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.9}, {"a": 1, "b": 0}])
def test_sources_keep_their_share_within_a_document(weights):
    lengths = {"a": [40, 3, 17, 90, 5], "b": [8, 60, 20]}
    plan = make_plan(lengths, source_weights=weights)
    wanted = weights or {source: sum(tokens) for source, tokens in lengths.items()}
    assigned = {"a": 0, "b": 0}
    for stay in placements(lambda step: plan.pieces(step, 0, 3), 500, Q):
        document = plan.manifest.documents[stay["part"].document]
        assigned[document.source] += document.num_tokens
        share = wanted[document.source] / sum(wanted.values()) * sum(assigned.values())
        assert abs(assigned[document.source] - share) <= 90
    assert assigned["b"] > 0 or weights == {"a": 1, "b": 0}


def test_epochs_and_seeds_have_different_orders():
    lengths = {"a": [30 + index for index in range(20)]}

    def order(seed):
        plan = make_plan(lengths, lanes=1, seed=seed)
        stays = placements(lambda step: plan.pieces(step, 0, 1), 150, Q)
        return [stay["part"].document for stay in stays]

    first = order(1)
    assert first == order(1)
    assert first[:20] != first[20:40]
    assert first[:20] != order(2)[:20]


def test_progress_counts_what_was_read():
    plan = make_plan({"a": [40, 3, 17, 90, 5], "b": [8, 60]})
    read = {"a": 0, "b": 0}
    for step in range(200):
        assert dict(zip(plan.sources, plan.progress(step).tokens, strict=True)) == read
        for piece in plan.pieces(step, 0, 3):
            read[plan.manifest.documents[piece.part.document].source] += piece.stop - piece.start


def test_one_warning_for_short_documents_and_one_for_few(caplog):
    with caplog.at_level(logging.WARNING, logger="longspan.data"):
        plan = make_plan({"a": [3, 2, 50, 2], "b": [60]}, lanes=2)
        for step in range(50):
            plan.pieces(step, 0, 2)
    assert [record.getMessage() for record in caplog.records] == plan.warnings
    assert plan.warnings == [
        "3 of 5 documents are shorter than a block of 4 tokens and are padded to it, e.g. a/0 (3 tokens).",
        "few long documents for 2 lanes: 5 documents are fewer than 8 a lane; the longest, b/4 (60 tokens), is 1.03 "
        "of a lane's part of an epoch (more than 1/4). Training goes on, but epochs overlap and a batch shows few "
        "documents at a time; use fewer lanes, or set data.max_document_tokens.",
    ]
    assert make_plan({"a": [16] * 24}).warnings == []
    assert (
        make_plan({"a": [16] * 3}, lanes=4)
        .warnings[0]
        .startswith(
            "few long documents for 4 lanes: 3 documents are fewer than the lanes, so that some are read by two at"
        )
    )
    assert len(make_plan({"a": [16] * 23}).warnings) == 1
    assert len(make_plan({"a": [16] * 24 + [60]}).warnings) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_tokens": 18}, "data.segment_tokens = 18: not a multiple of the model's quantum = 4."),
        ({"boundary": "cut"}, "data.boundary = cut: allowed are pack and pad."),
        ({"split": "held_out"}, "the corpus at nowhere has no held_out documents."),
        (
            {"source_weights": {"a": -1, "c": 1}},
            "data.source_weights: the corpus has no source c; no weight for b; not a number from 0 on: a = -1. "
            "Give a weight for each of a, b; 0 leaves one out.",
        ),
        (
            {"source_weights": {"a": 0, "b": 0}},
            "data.source_weights: the weights sum to 0, shares must sum to 1. "
            "Give a weight for each of a, b; 0 leaves one out.",
        ),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(UsageError) as caught:
        make_plan({"a": [5], "b": [6]}, **changes)
    assert str(caught.value) == message
