"""The shard-major plan and its reader: coverage, resume at every step, one reading of each shard, damage."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from reader_corpora import RandomIds, random_document, write_corpus
from shard_server import ShardServer

from longspan.data_pipeline.corpus import StorageSettings, open_corpus
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.fork import continue_plan
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.reader import LaneReader
from longspan.data_pipeline.storage.retry import RetryPolicy
from longspan.data_pipeline.streaming import StreamedDocuments
from longspan.data_pipeline.streaming_plan import StreamPlan
from longspan.errors import UsageError

Q, T, LANES = 8, 32, 4
QUICK = RetryPolicy(attempts=4, first_delay_seconds=0.01, max_delay_seconds=0.05, timeout_seconds=0.5)
LENGTHS = [int(n) for n in np.random.default_rng(1).integers(2, 400, 40)]
OPENED: list[StreamedDocuments] = []
TENSORS = ("tokens", "labels", "reset", "doc_ids", "target_bytes", "lane_ids")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of some ten shards that no test changes."""
    manifest = write_corpus(tmp_path_factory.mktemp("stream"), LENGTHS, shard_bytes=4000)
    assert len(manifest.shards) >= 8
    return manifest


@pytest.fixture(autouse=True)
def closed():
    """End the threads of a test's streams."""
    yield
    while OPENED:
        OPENED.pop().close()


def plan_of(manifest, **changes):
    return StreamPlan(
        manifest, **{"seed": 3, "lanes": LANES, "segment_tokens": T, "quantum": Q, "boundary": "pack", **changes}
    )


def lane_plan(manifest):
    return LanePlan(manifest, seed=3, lanes=LANES, segment_tokens=T, quantum=Q, boundary="pack")


def open_stream(manifest, start=0, stop=LANES, documents=None, prefetch_steps=4, **changes):
    plan = plan_of(manifest, **changes)
    streamed = StreamedDocuments(plan, documents or DocumentReader(manifest), start, stop)
    OPENED.append(streamed)
    return LaneReader(plan, streamed, start, stop, prefetch_steps=prefetch_steps)


def ranged(manifest, **changes):
    return LaneReader(plan_of(manifest, **changes), DocumentReader(manifest), 0, LANES)


def same(one, two):
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in TENSORS)
    assert (one.num_valid, one.num_bytes) == (two.num_valid, two.num_bytes)


@pytest.mark.parametrize("limit", [None, 2 * Q])
@pytest.mark.parametrize("boundary", ["pack", "pad"])
def test_every_token_comes_once_an_epoch_in_order_in_one_lane(corpus, boundary, limit):
    reader = open_stream(corpus, boundary=boundary, max_document_tokens=limit)
    straight = ranged(corpus, boundary=boundary, max_document_tokens=limit)
    size = len(reader.plan.parts)
    order = []
    read = defaultdict(list)
    for step in range(400):
        for piece in reader.plan.pieces(step, 0, LANES):
            if piece.start == piece.part.start:
                order.append((piece.part.document, piece.part.number))
            read[piece.part.document, piece.part.number].append((step, piece.lane, piece.start, piece.stop))
        same(reader.batch(step), straight.batch(step))
        if len(order) > 2.2 * size:
            break
    first, second = order[:size], order[size : 2 * size]
    assert sorted(first) == sorted(second) == sorted(set(first)) and first != second
    documents = corpus.documents
    for epoch in (first, second):  # shard after shard, each as the archive has it
        shards = [documents[document].shard for document, _ in epoch]
        assert len([s for s, before in zip(shards, [None, *shards], strict=False) if s != before]) == len(corpus.shards)
        offsets = [(documents[document].offset, number) for document, number in epoch]
        assert all(
            one < two for one, two, s, t in zip(offsets, offsets[1:], shards, shards[1:], strict=False) if s == t
        )
    for part, runs in read.items():
        ends = 0
        for (_, lane, _, stop), (_, next_lane, start, _) in pairwise(runs):
            assert (start == stop and lane == next_lane) or start == runs[0][2]
            ends += start != stop
        assert ends <= 3, part


def test_each_shard_is_read_once_an_epoch(corpus):
    reader = open_stream(corpus)
    steps = 0
    while reader.plan.progress(steps).epochs[0] < 3:
        reader.batch(steps)
        steps += 1
    counters = reader._documents.counters
    assert counters["undelivered_documents"] == 0
    assert 3 * len(corpus.shards) <= counters["passes"] <= 3 * len(corpus.shards) + 3


def test_resume_at_every_step_with_another_number_of_ranks(corpus):
    straight = open_stream(corpus)
    expected = [straight.batch(step) for step in range(120)]
    for step in range(118):
        ranks = (1, 2, 4)[step % 3]
        size = LANES // ranks
        parts = [open_stream(corpus, rank * size, rank * size + size) for rank in range(ranks)]
        for ahead in range(2):
            batches = [part.batch(step + ahead) for part in parts]
            for name in TENSORS:
                whole = torch.cat([getattr(batch, name) for batch in batches])
                assert torch.equal(whole, getattr(expected[step + ahead], name))
        for part in parts:
            part._documents.close()


def test_a_resume_reads_only_shards_of_documents_in_lanes(corpus):
    plan = plan_of(corpus)
    step = 150
    reader = open_stream(corpus, prefetch_steps=0)
    reader.batch(step)
    in_lanes = {corpus.documents[piece.part.document].shard for piece in plan.pieces(step, 0, LANES)}
    assert reader._documents.counters["passes"] <= len(in_lanes)
    assert reader._documents.counters["undelivered_documents"] == 0
    readings = list(islice(plan.passes(step, 0, LANES), 3))
    assert readings[0].shard in in_lanes and readings[0].stop == readings[1].start


def test_the_state_resumes_a_stream_and_nothing_else(corpus):
    reader = open_stream(corpus)
    expected = [reader.batch(step) for step in range(60)]
    state = json.loads(json.dumps(reader.state(30)))
    resumed = open_stream(corpus)
    resumed.check_state(state)
    for step in range(30, 60):
        same(resumed.batch(step), expected[step])
    from longspan.data_pipeline.plan import LanePlan

    other = LanePlan(corpus, seed=3, lanes=LANES, segment_tokens=T, quantum=Q, boundary="pack")
    with pytest.raises(UsageError, match="order"):
        LaneReader(other, DocumentReader(corpus), 0, LANES).check_state(state)
    with pytest.raises(UsageError, match="order"):
        resumed.check_state(LaneReader(other, DocumentReader(corpus), 0, LANES).state(30))


def test_jumping_about_gives_the_same_batches(corpus):
    straight, jumping = ranged(corpus), open_stream(corpus)
    for step in (0, 1, 50, 3, 3, 52, 51, 54, 200, 0):
        same(jumping.batch(step), straight.batch(step))


def test_progress_counts_what_was_read_of_each_source(corpus):
    reader = open_stream(corpus)
    for step in range(30):
        reader.batch(step)
    counts = Counter()
    for step in range(30):
        for piece in reader.plan.pieces(step, 0, LANES):
            counts[corpus.documents[piece.part.document].source] += piece.stop - piece.start
    assert dict(zip(reader.plan.sources, reader.plan.progress(30).tokens, strict=True)) == dict(counts)


@pytest.mark.parametrize("where", ["content", "header", "end"])
def test_damage_costs_the_damaged_document_and_no_other(tmp_path, where):
    manifest = write_corpus(tmp_path, LENGTHS, shard_bytes=4000)
    expected = [ranged(manifest).batch(step) for step in range(100)]
    shard = tmp_path / manifest.shards[3].url
    inside = [entry for entry in manifest.documents if entry.shard == shard.name]
    data = bytearray(shard.read_bytes())
    victim = inside[1]
    if where == "content":
        data[victim.offset + 3] ^= 1
    elif where == "header":  # of the last document: ranges still reach every text
        data[inside[-1].offset - 512 + 150] ^= 0xFF
    else:
        victim = inside[-1]
        del data[victim.lengths_offset + 1 :]
    shard.write_bytes(data)
    reader = open_stream(manifest)
    place = manifest.documents.find(victim.id)
    for step, before in enumerate(expected):
        batch = reader.batch(step)
        if where == "header":
            same(batch, before)
            continue
        bad = (before.doc_ids == place).repeat_interleave(Q, dim=1)
        assert torch.equal(batch.tokens, before.tokens.masked_fill(bad, RandomIds().pad))
        assert torch.equal(batch.labels, before.labels.masked_fill(bad, -100))
    assert list(reader.quarantine) == ([] if where == "header" else [victim.id])
    assert reader._documents.counters["undelivered_documents"] > 0


@pytest.mark.parametrize("cache_gib", [1.0, 0.00001, 0])
def test_a_stream_over_http(corpus, tmp_path, cache_gib):
    with ShardServer(corpus.folder) as server:
        faults = iter(["status500", "truncate", "wrong_bytes", "close"])
        server.choose = lambda path: next(faults, None) if path.endswith(".tar") else None
        settings = StorageSettings(cache_dir=tmp_path, cache_gib=cache_gib, policy=QUICK, start_policy=QUICK)
        documents = open_corpus(server.url, settings)
        reader = open_stream(documents.manifest, documents=documents)
        straight = ranged(corpus)
        for step in range(150):
            same(reader.batch(step), straight.batch(step))
        assert all(server.counts[name] == 1 for name in ("status500", "truncate", "wrong_bytes", "close"))
        assert not reader.quarantine
        assert (documents.counters["downloads"] > 0) == (cache_gib > 0)


def test_documents_are_the_ones_that_were_written(corpus):
    assert Manifest.load(corpus.folder).digest == corpus.digest
    reader = open_stream(corpus)
    batch = reader.batch(0)
    for row in range(LANES):
        number = int(batch.doc_ids[row, 0])
        ids = random_document(RandomIds(), number, LENGTHS[number]).ids
        size = min(T, len(ids))
        assert np.array_equal(batch.tokens[row, :size].numpy(), ids[:size])


def test_a_stream_goes_on_as_it_was_and_is_not_forked(corpus):
    state = json.loads(json.dumps(ranged(corpus).state(30)))
    plan = plan_of(corpus)
    assert continue_plan(plan, state, allow_fork=True) is plan
    for other in (plan_of(corpus, segment_tokens=2 * T), plan_of(corpus, seed=4), lane_plan(corpus)):
        with pytest.raises(UsageError, match=r"data.reader = streaming\) cannot be forked: set them back to resume"):
            continue_plan(other, state, allow_fork=True)
    saved = json.loads(json.dumps(LaneReader(lane_plan(corpus), DocumentReader(corpus), 0, LANES).state(30)))
    with pytest.raises(UsageError, match="order: None saved, shards now"):
        continue_plan(plan, saved, allow_fork=True)


@pytest.mark.parametrize("settings", [{"source_weights": {"letters": 1, "poems": 0}}, {"drain": True}])
def test_a_stream_takes_documents_as_they_come(corpus, settings):
    with pytest.raises(UsageError, match="takes documents as they come: it has no source weights, does not end"):
        plan_of(corpus, **settings)
