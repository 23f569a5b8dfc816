"""Batches of tokenised corpora, local and over http: contents, reading ahead, damage on the way, lasting faults."""

from __future__ import annotations

import gc
import os
import threading
import time

import numpy as np
import pytest
import torch
from reader_corpora import RandomIds, random_document, write_corpus
from shard_server import ShardServer

from longspan.data_pipeline.corpus import StorageSettings, open_corpus
from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.reader import LaneReader
from longspan.data_pipeline.storage.retry import RetryPolicy
from longspan.data_pipeline.storage.store import StorageError
from longspan.errors import UsageError

Q, T, LANES = 8, 32, 4
QUICK = RetryPolicy(attempts=3, first_delay_seconds=0.01, max_delay_seconds=0.02, timeout_seconds=0.5)
LENGTHS = [int(n) for n in np.random.default_rng(2).integers(2, 300, 40)]
TENSORS = ("tokens", "labels", "reset", "doc_ids", "target_bytes", "lane_ids")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of some ten shards that no test changes."""
    return write_corpus(tmp_path_factory.mktemp("tokens"), LENGTHS, shard_bytes=3000)


def lanes_of(manifest, documents=None, **changes):
    plan = LanePlan(manifest, seed=3, lanes=LANES, segment_tokens=T, quantum=Q, boundary="pack")
    return LaneReader(plan, documents or DocumentReader(manifest), 0, LANES, **changes)


def same(one, two):
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in TENSORS)
    assert (one.num_valid, one.num_bytes) == (two.num_valid, two.num_bytes)


@pytest.mark.parametrize("tokenizer", [RandomIds(), RandomIds(size=200_000, token_dtype=np.dtype(np.uint32))])
def test_batches_hold_the_ids_and_lengths_that_were_written(tmp_path, tokenizer):
    manifest = write_corpus(tmp_path, LENGTHS, shard_bytes=3000, tokenizer=tokenizer)
    reader = lanes_of(manifest)
    seen = 0
    for step in range(100):
        batch = reader.batch(step)
        tokens, labels = np.full((LANES, T), tokenizer.pad), np.full((LANES, T), -100)
        lengths = np.zeros((LANES, T), dtype=np.int64)
        for piece in reader.plan.pieces(step, 0, LANES):
            document = random_document(tokenizer, piece.part.document, LENGTHS[piece.part.document])
            ids, size = document.ids.astype(np.int64), piece.stop - piece.start
            tokens[piece.lane, piece.column : piece.column + size] = ids[piece.start : piece.stop]
            following = ids[piece.start + 1 : piece.stop + 1]
            labels[piece.lane, piece.column : piece.column + len(following)] = following
            lengths[piece.lane, piece.column : piece.column + len(following)] = document.num_bytes[
                piece.start + 1 : piece.stop + 1
            ]
            seen += int((following > 65_535).sum())
        assert np.array_equal(batch.tokens, tokens) and np.array_equal(batch.labels, labels)
        assert np.array_equal(batch.target_bytes, lengths)
        assert batch.num_valid == (labels != -100).sum() and batch.num_bytes == lengths.sum()
    assert (seen > 0) == (tokenizer.size > 65_535)


def test_an_epoch_has_exactly_the_bytes_of_the_corpus(corpus):
    """Bits per byte is exact: in whole epochs every document's bytes are counted once each time."""
    reader = lanes_of(corpus)
    total, step, starts = 0, 0, np.zeros(len(LENGTHS), dtype=int)
    ends = dict.fromkeys(range(len(LENGTHS)), 0)
    while min(ends.values()) < 1:
        total += reader.batch(step).num_bytes
        for piece in reader.plan.pieces(step, 0, LANES):
            starts[piece.part.document] += piece.start == 0
            ends[piece.part.document] += piece.stop == LENGTHS[piece.part.document]
        step += 1
    whole = sum(entry.num_bytes * ends[place] for place, entry in enumerate(corpus.documents))
    inside = 0  # of documents that lanes are in the middle of
    for piece in reader.plan.pieces(step, 0, LANES):
        if piece.start > 0 and piece.column == 0:
            document = random_document(RandomIds(), piece.part.document, LENGTHS[piece.part.document])
            inside += int(document.num_bytes[1 : piece.start + 1].sum())
    assert total == whole + inside


@pytest.mark.parametrize("prefetch_steps", [0, 1, 8])
def test_http_batches_are_the_local_ones_whatever_is_read_ahead(corpus, tmp_path, prefetch_steps):
    local = lanes_of(corpus)
    with ShardServer(corpus.folder) as server:
        documents = open_corpus(server.url, StorageSettings(cache_dir=tmp_path, policy=QUICK, start_policy=QUICK))
        reader = lanes_of(documents.manifest, documents, prefetch_steps=prefetch_steps)
        for step in (*range(60), 10, 11, 200):
            same(reader.batch(step), local.batch(step))
        assert documents.counters["downloads"] == len(corpus.shards)
        documents.close()


def test_shards_are_fetched_before_they_are_needed(corpus, tmp_path):
    with ShardServer(corpus.folder) as server:
        documents = open_corpus(server.url, StorageSettings(cache_dir=tmp_path, policy=QUICK, start_policy=QUICK))
        reader = lanes_of(documents.manifest, documents, prefetch_steps=8)
        reader.batch(0)
        ahead = {
            corpus.documents[piece.part.document].shard
            for step in range(9)
            for piece in reader.plan.pieces(step, 0, LANES)
        }
        until = time.monotonic() + 10
        while documents.counters["downloads"] < len(ahead) and time.monotonic() < until:
            time.sleep(0.01)
        assert documents.counters["downloads"] == len(ahead) < len(corpus.shards)


def test_a_small_cache_serves_every_step(corpus, tmp_path):
    """Shards in use are not evicted; what does not fit is read by byte ranges; the limit holds all the time."""
    local = lanes_of(corpus)
    limit = 3 * max(shard.size for shard in corpus.shards)
    with ShardServer(corpus.folder) as server:
        settings = StorageSettings(cache_dir=tmp_path, cache_gib=limit / 2**30, policy=QUICK, start_policy=QUICK)
        documents = open_corpus(server.url, settings)
        reader = lanes_of(documents.manifest, documents, prefetch_steps=2)
        for step in range(150):
            same(reader.batch(step), local.batch(step))
            files = (tmp_path / "shards").glob("*.tar")
            assert sum(size_of(file) for file in files) <= limit
        assert documents.counters["uncached_shards"] > 0 and documents.counters["ranged_reads"] > 0
        documents.close()


def size_of(file):
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_dead_store_ends_the_run_and_a_live_one_goes_on(corpus, tmp_path):
    local = lanes_of(corpus)
    with ShardServer(corpus.folder) as server:
        documents = open_corpus(server.url, StorageSettings(cache_dir=tmp_path, policy=QUICK, start_policy=QUICK))
        reader = lanes_of(documents.manifest, documents, prefetch_steps=1)
        server.choose = lambda path: "close"
        with pytest.raises(StorageError, match=f"{server.url}.*3 attempts"):
            for step in range(100):
                reader.batch(step)
        assert not reader.quarantine and server.counts["close"] >= 3
        server.choose = lambda path: None
        for step in range(60):
            same(reader.batch(step), local.batch(step))


def test_a_cached_shard_that_breaks_under_the_reader_is_fetched_anew(corpus, tmp_path):
    local = lanes_of(corpus)
    with ShardServer(corpus.folder) as server:
        documents = open_corpus(server.url, StorageSettings(cache_dir=tmp_path, policy=QUICK, start_policy=QUICK))
        reader = lanes_of(documents.manifest, documents)
        for step in range(10):
            same(reader.batch(step), local.batch(step))
        for file in (tmp_path / "shards").glob("*.tar"):
            os.truncate(file, 600)
        for step in range(10, 60):
            same(reader.batch(step), local.batch(step))
        assert not reader.quarantine and documents.counters["refetched_documents"] > 0


def test_a_corpus_is_opened_by_address_or_folder(corpus, tmp_path):
    assert open_corpus(str(corpus.folder)).manifest.digest == corpus.digest
    with pytest.raises(UsageError, match="no corpus at"):
        open_corpus(str(tmp_path / "none"))


def test_memory_is_used_again_but_never_under_a_batch_that_is_held(corpus):
    straight, reader = lanes_of(corpus), lanes_of(corpus)
    held = [reader.batch(step) for step in range(12)]
    views = [batch.rows(1, 3) for batch in held]
    for step, (batch, view) in enumerate(zip(held, views, strict=True)):
        expected = straight.batch(step)
        same(batch, expected)
        same(view, expected.rows(1, 3))
    places = set()
    for step in range(12, 40):
        places.add(reader.batch(step).tokens.data_ptr())
    assert len(places) <= 6
    kept = [view.tokens.clone() for view in views]
    del held  # their rows are still referred to
    for step in range(40, 60):
        reader.batch(step)
    assert all(torch.equal(view.tokens, before) for view, before in zip(views, kept, strict=True))


def test_what_another_rank_found_bad_is_masked_from_then_on(corpus):
    reader, straight = lanes_of(corpus), lanes_of(corpus)
    same(reader.batch(0), straight.batch(0))
    place = next(
        int(doc) for doc in straight.batch(0).doc_ids[:, -1] if doc in straight.batch(1).doc_ids[:, 0] and doc >= 0
    )
    reader.adopt_quarantine({corpus.documents[place].id: "found by another rank"})
    expected = straight.batch(1)
    bad = (expected.doc_ids == place).repeat_interleave(Q, dim=1)
    assert bad.any()
    batch = reader.batch(1)
    assert torch.equal(batch.tokens, expected.tokens.masked_fill(bad, RandomIds().pad))
    assert torch.equal(batch.target_bytes, expected.target_bytes.masked_fill(bad, 0))


def test_a_reader_that_is_dropped_leaves_no_file_and_no_thread(corpus):
    gc.collect()  # of what other tests left
    time.sleep(0.1)
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        reader = lanes_of(corpus)
        for step in range(5):
            reader.batch(step)
        del reader
    gc.collect()
    until = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= threads and len(os.listdir("/proc/self/fd")) <= files
