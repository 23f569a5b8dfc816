"""Batches: tokens, labels, resets and byte counts against the texts; quarantine; the saved state."""

from __future__ import annotations

import copy
import json
import logging
import os
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from packed_corpora import TEXTS, pack

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.reader import LaneReader
from longspan.data_pipeline.vocabulary import BOS, EOS, NO_LABEL, PAD, ByteVocabulary
from longspan.errors import DataError, UsageError

Q, T = 8, 32
BATCH_TENSORS = ("tokens", "labels", "reset", "doc_ids", "target_bytes", "lane_ids")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus that no test changes."""
    return pack(tmp_path_factory.mktemp("lanes") / "corpus", shard_bytes=300).folder


def open_lanes(folder, start=0, stop=None, lanes=4, max_bad_fraction=0.01, **changes):
    manifest = Manifest.load(folder)
    settings = {"seed": 3, "lanes": lanes, "segment_tokens": T, "quantum": Q, "boundary": "pack", **changes}
    plan = LanePlan(manifest, **settings)
    stop = lanes if stop is None else stop
    return LaneReader(plan, DocumentReader(manifest), start, stop, max_bad_fraction=max_bad_fraction)


def same(one, two):
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in BATCH_TENSORS)
    assert (one.num_valid, one.num_bytes) == (two.num_valid, two.num_bytes)


def stream(folder, steps, lane, **settings):
    """One lane's batches of `steps` steps, one after another, as arrays."""
    reader = open_lanes(folder, **settings)
    batches = [reader.batch(step).rows(lane, lane + 1) for step in range(steps)]
    return [np.concatenate([getattr(b, name)[0].numpy() for b in batches]) for name in BATCH_TENSORS[:5]]


@pytest.mark.parametrize("boundary", ["pack", "pad"])
@pytest.mark.parametrize("limit", [None, 2 * Q])
def test_lanes_hold_documents_with_their_labels(folder, boundary, limit):
    """Each lane, read as one long row, is exactly: parts of documents, padding to the edge, the next part."""
    manifest = Manifest.load(folder)
    edge = Q if boundary == "pack" else T
    seen = set()
    for lane in range(4):
        tokens, labels, reset, doc_ids, target_bytes = stream(
            folder, 60, lane, boundary=boundary, max_document_tokens=limit
        )
        starts = [quantum * Q for quantum in np.flatnonzero(reset)]
        assert starts[0] == 0
        for start, stop in pairwise(starts):
            document = manifest.documents[doc_ids[start // Q]]
            ids = ByteVocabulary.encode(TEXTS[document.id]).astype(np.int64)
            size = int((tokens[start:stop] != PAD).sum())
            parts = [ids] if limit is None else [ids[at : at + limit] for at in range(0, len(ids), limit)]
            (number,) = [n for n, part in enumerate(parts) if np.array_equal(part, tokens[start : start + size])]
            part = parts[number]
            seen.add((document.id, number))
            assert stop == -(-(start + size) // edge) * edge
            assert (tokens[start + size : stop] == PAD).all()
            assert np.array_equal(labels[start : start + size - 1], part[1:])
            assert (labels[start + size - 1 : stop] == NO_LABEL).all()
            assert not reset[start // Q + 1 : stop // Q].any()
            covered = -(-size // Q)
            assert (doc_ids[start // Q : start // Q + covered] == doc_ids[start // Q]).all()
            assert (doc_ids[start // Q + covered : stop // Q] == -1).all()
            expected_bytes = sum(int(token) < 256 for token in part[1:])
            assert target_bytes[start:stop].sum() == expected_bytes
            if limit is None:
                assert expected_bytes == document.num_bytes
                assert labels[start + size - 2] == EOS and target_bytes[start + size - 2] == 0
                assert tokens[start] == BOS and labels[start] == TEXTS[document.id][0]
    assert {document.split for document in manifest.documents if (document.id, 0) in seen} == {"train"}
    assert {name for name, _ in seen} == {document.id for document in manifest.split("train")}


def test_batch_has_the_promised_types_and_sums(folder):
    batch = open_lanes(folder, 1, 3).batch(5)
    assert batch.tokens.shape == batch.labels.shape == batch.target_bytes.shape == (2, T)
    assert batch.reset.shape == batch.doc_ids.shape == (2, T // Q)
    types = {name: getattr(batch, name).dtype for name in BATCH_TENSORS}
    assert types["reset"] == torch.bool and types["target_bytes"] == torch.int32
    assert all(types[name] == torch.int64 for name in ("tokens", "labels", "doc_ids", "lane_ids"))
    assert batch.lane_ids.tolist() == [1, 2]
    assert batch.num_valid == int((batch.labels != NO_LABEL).sum())
    assert batch.num_bytes == int(((batch.labels >= 0) & (batch.labels < 256)).sum()) == int(batch.target_bytes.sum())
    same(batch.to("cpu"), batch)
    rows = batch.rows(1, 2)
    assert rows.lane_ids.tolist() == [2]
    assert rows.num_valid + batch.rows(0, 1).num_valid == batch.num_valid
    assert rows.num_bytes + batch.rows(0, 1).num_bytes == batch.num_bytes


def test_data_parallel_slices_concatenate_to_one_global_batch(folder):
    whole = open_lanes(folder)
    for ranks in (1, 2, 4):
        size = 4 // ranks
        slices = [open_lanes(folder, rank * size, rank * size + size) for rank in range(ranks)]
        for step in (0, 1, 7, 30):
            expected = whole.batch(step)
            parts = [reader.batch(step) for reader in slices]
            for name in BATCH_TENSORS:
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))
            assert sum(part.num_valid for part in parts) == expected.num_valid
            assert sum(part.num_bytes for part in parts) == expected.num_bytes


def test_a_step_is_the_same_however_it_is_reached(folder):
    straight, jumping = open_lanes(folder), open_lanes(folder)
    expected = [straight.batch(step) for step in range(40)]
    for step in (39, 3, 3, 20, 0, 21, 39):
        same(jumping.batch(step), expected[step])


def test_quantum_of_one_token(folder):
    reader = open_lanes(folder, quantum=1)
    batch = reader.batch(0)
    assert batch.reset.shape == (4, T)
    assert all((batch.reset | (batch.tokens != BOS)).flatten())
    assert not (batch.tokens == PAD).any()


def test_two_threads_may_read_and_save(folder):
    reader, straight = open_lanes(folder), open_lanes(folder)
    expected = [straight.batch(step) for step in range(200)]
    states = []
    other = threading.Thread(target=lambda: states.extend(reader.state(step) for step in range(0, 200, 3)))
    other.start()
    read = [reader.batch(step) for step in range(200)]
    other.join()
    for one, two in zip(read, expected, strict=True):
        same(one, two)
    assert states == [straight.state(step) for step in range(0, 200, 3)]


def damage(corpus, document_id):
    entry = corpus.manifest.document(document_id)
    shard = corpus.folder / entry.shard
    data = bytearray(shard.read_bytes())
    data[entry.offset + entry.size // 2] ^= 1
    shard.write_bytes(data)
    return entry


def test_a_corrupt_document_is_masked_and_no_other_lane_moves(tmp_path, caplog):
    corpus = pack(tmp_path / "corpus", shard_bytes=300)
    whole = open_lanes(corpus.folder)
    expected = [whole.batch(step) for step in range(60)]
    entry = damage(corpus, "letters/c.txt")
    bad = corpus.manifest.documents.index(entry)
    reader = open_lanes(corpus.folder)
    masked = 0
    with caplog.at_level(logging.WARNING, logger="longspan.data"):
        for step, before in enumerate(expected):
            batch = reader.batch(step)
            inside = (before.doc_ids == bad).repeat_interleave(Q, dim=1)
            masked += int(inside.sum())
            assert torch.equal(batch.tokens, before.tokens.masked_fill(inside, PAD))
            assert torch.equal(batch.labels, before.labels.masked_fill(inside, NO_LABEL))
            assert torch.equal(batch.target_bytes, before.target_bytes.masked_fill(inside, 0))
            assert torch.equal(batch.doc_ids, before.doc_ids.masked_fill(before.doc_ids == bad, -1))
            assert torch.equal(batch.reset, before.reset)
    assert masked > 0
    assert list(reader.quarantine) == ["letters/c.txt"]
    reason = reader.quarantine["letters/c.txt"]
    assert f"shard {entry.shard}, byte offset {entry.offset} to {entry.offset + entry.size}" in reason
    assert caplog.messages.count(f"quarantined document letters/c.txt (1 so far): {reason}") == 1


def test_the_quarantine_is_part_of_the_state(tmp_path):
    corpus = pack(tmp_path / "corpus", shard_bytes=300)
    shard = corpus.folder / corpus.manifest.document("letters/c.txt").shard
    whole = shard.read_bytes()
    damage(corpus, "letters/c.txt")
    reader = open_lanes(corpus.folder)
    expected = [reader.batch(step) for step in range(60)]
    state = json.loads(json.dumps(reader.state(30)))
    shard.write_bytes(whole)  # mended meanwhile: a resumed run still equals the straight one
    resumed = open_lanes(corpus.folder)
    resumed.check_state(state)
    for step in range(30, 60):
        same(resumed.batch(step), expected[step])


def test_what_another_rank_found_bad_is_masked_from_the_next_step_on(folder):
    """Also where the steps after it are read already."""
    reader, whole = open_lanes(folder), open_lanes(folder)
    for step in range(8):
        reader.batch(step)
        before = whole.batch(step)
    going_on = (before.doc_ids[:, -1] >= 0) & (before.doc_ids[:, -1] == whole.batch(8).doc_ids[:, 0])
    bad = int(before.doc_ids[going_on, -1][0])
    reader.adopt_quarantine({whole.plan.manifest.documents[bad].id: "elsewhere"})
    for step in range(8, 20):
        batch, expected = reader.batch(step), whole.batch(step)
        inside = (expected.doc_ids == bad).repeat_interleave(Q, dim=1)
        assert step > 8 or inside.any()
        assert torch.equal(batch.tokens, expected.tokens.masked_fill(inside, PAD))
        assert torch.equal(batch.labels, expected.labels.masked_fill(inside, NO_LABEL))


@pytest.mark.parametrize("changes", [{}, {"boundary": "pad"}, {"max_document_tokens": 2 * Q}, {"drain": True}])
def test_steps_read_together_are_those_read_alone(folder, changes):
    together, alone = open_lanes(folder, **changes), open_lanes(folder, **changes)
    backwards = [alone.batch(step) for step in reversed(range(60))]
    for step, expected in enumerate(reversed(backwards)):
        same(together.batch(step), expected)


def test_too_many_bad_documents_end_the_run(tmp_path):
    corpus = pack(tmp_path / "corpus", shard_bytes=300)
    names = ["letters/b.txt", "letters/c.txt", "poems/i.txt"]
    for name in names:
        damage(corpus, name)
    with pytest.raises(DataError, match=r"2 documents are bad, 1 are tolerated: \S+, \S+\. Last: document ") as caught:
        reader = open_lanes(corpus.folder)
        for step in range(60):
            reader.batch(step)
    assert caught.value.exit_code == 70
    tolerant = open_lanes(corpus.folder, max_bad_fraction=0.4)
    for step in range(60):
        tolerant.batch(step)
    assert sorted(tolerant.quarantine) == names


def test_truncated_and_missing_shards(tmp_path):
    corpus = pack(tmp_path / "corpus", shard_bytes=300)
    entry = corpus.manifest.document("poems/i.txt")
    shard = corpus.folder / entry.shard
    documents = DocumentReader(corpus.manifest)
    assert documents.bytes(entry) == TEXTS["poems/i.txt"]
    shard.write_bytes(shard.read_bytes()[: entry.offset + 7])  # after it was verified: still no crash, and named
    with pytest.raises(
        DataError, match=rf"is cut off: shard {entry.shard} ends at byte offset {entry.offset + 7}, 193 "
    ):
        documents.bytes(entry)
    documents.close()
    shard.unlink()
    with pytest.raises(DataError, match=rf"cannot be read: shard {entry.shard}, .*No such file"):
        documents.bytes(entry)
    with pytest.raises(DataError, match=rf"1 of 4 shards are missing in .*, e.g. {entry.shard}"):
        DocumentReader(corpus.manifest)


def test_documents_by_range_equal_whole_documents(folder):
    manifest = Manifest.load(folder)
    documents = DocumentReader(manifest)
    for entry in manifest.documents:
        ids = documents.tokens(entry)
        assert ids.dtype == np.int64
        assert np.array_equal(ids, ByteVocabulary.encode(TEXTS[entry.id]))
        for start in range(0, entry.num_tokens, 5):
            for stop in (start, start + 1, start + 2, start + 6, entry.num_tokens):
                stop = min(stop, entry.num_tokens)
                assert np.array_equal(documents.token_range(entry, start, stop), ids[start:stop])


def test_many_shards_need_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("longspan.data_pipeline.storage.shards._MOST_OPEN_SHARDS", 2)
    corpus = pack(tmp_path / "corpus", shard_bytes=1)
    assert len(corpus.manifest.shards) == len(TEXTS)
    documents = DocumentReader(corpus.manifest)
    for _ in range(2):
        for entry in corpus.manifest.documents:
            assert documents.bytes(entry) == TEXTS[entry.id]
    targets = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert sum(target.startswith(str(corpus.folder)) for target in targets) == 2


def test_a_state_fits_only_the_same_plan_and_place(folder):
    reader = open_lanes(folder, 0, 2)
    state = json.loads(json.dumps(reader.state(17)))
    open_lanes(folder, 2, 4).check_state(state)  # of any rank
    assert len(state["lanes"]) == 4
    assert state["tokens_seen"] == dict(zip(reader.plan.sources, reader.plan.progress(17).tokens, strict=True))
    with pytest.raises(UsageError) as caught:
        open_lanes(
            folder, segment_tokens=64, boundary="pad", source_weights={"letters": 0.25, "poems": 0.75}
        ).check_state(state)
    message = str(caught.value)
    assert "segment_tokens: 32 saved, 64 now" in message
    assert "boundary: pack saved, pad now" in message
    assert "saved, {'letters': 1, 'poems': 3} now" in message
    assert "quantum" not in message


def test_a_damaged_state_is_refused(folder):
    reader = open_lanes(folder)
    state = reader.state(17)
    with pytest.raises(UsageError, match="data state version 9; this version reads 2"):
        reader.check_state({**state, "version": 9})
    with pytest.raises(DataError, match="does not match its digest"):
        reader.check_state({**state, "step": 18})


def test_lanes_that_stand_elsewhere_are_refused(folder, monkeypatch):
    reader = open_lanes(folder)
    state = reader.state(17)
    moved = copy.deepcopy(state["lanes"])
    moved[2]["offset"] += Q
    monkeypatch.setattr("longspan.data_pipeline.plan_state.lane_positions", lambda plan, step: moved)
    with pytest.raises(DataError, match=r"lane 2 at step 17: saved .*, the plan says "):
        reader.check_state(state)


def test_lanes_outside_the_plan_are_refused(folder):
    with pytest.raises(UsageError, match="lanes 2 to 5 are not within the plan's 4 lanes"):
        open_lanes(folder, 2, 5)


def test_the_vocabulary_round_trips():
    text = "Käse und ✓"
    ids = ByteVocabulary.encode(text.encode())
    assert (ids.dtype, ids[0], ids[-1]) == (np.uint16, BOS, EOS)
    assert ByteVocabulary.decode(ids) == text
    assert ByteVocabulary.decode([0x41, 0xFF, 0x42, PAD, 383]) == "A\ufffdB"
    assert len(ByteVocabulary().digest) == 64
