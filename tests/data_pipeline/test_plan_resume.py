"""Resume at every step with any number of ranks, and slices over context parallelism, through the reader."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from packed_corpora import pack

from longspan.data_pipeline.documents import DocumentReader
from longspan.data_pipeline.fork import continue_plan
from longspan.data_pipeline.plan import LanePlan
from longspan.data_pipeline.reader import LaneReader
from longspan.errors import UsageError

STEPS, LANES = 200, 4
TENSORS = ("tokens", "labels", "reset", "doc_ids", "target_bytes", "lane_ids")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About a hundred documents of two sources, of many lengths."""
    texts = {
        f"{source}/{number}.txt": hashlib.shake_256(f"{source}{number}".encode())
        .hexdigest(number * 7 % 190 + 1)
        .encode()
        for source in ("books", "code")
        for number in range(1, 50)
    }
    return pack(tmp_path_factory.mktemp("resume") / "corpus", texts, held_out=(), shard_bytes=4000)


@pytest.fixture(scope="module")
def documents(corpus):
    """One reader of documents for all: what differs between ranks is the lanes."""
    return DocumentReader(corpus.manifest)


def make_plan(corpus):
    return LanePlan(
        corpus.manifest,
        seed=7,
        lanes=LANES,
        segment_tokens=64,
        quantum=16,
        boundary="pack",
        source_weights={"books": 0.6, "code": 0.4},
    )


def ranks(corpus, documents, number, prefetch_steps=0):
    """Each rank with a plan of its own, as in processes of their own."""
    rows = LANES // number
    return [
        LaneReader(make_plan(corpus), documents, rank * rows, (rank + 1) * rows, prefetch_steps=prefetch_steps)
        for rank in range(number)
    ]


def rows_of(batch):
    """All that a batch holds, as bytes of each of its lanes."""
    tensors = [getattr(batch, name).numpy() for name in TENSORS]
    return [b"".join(tensor[row].tobytes() for tensor in tensors) for row in range(len(batch.lane_ids))]


@pytest.mark.parametrize("numbers", [1, pytest.param(3, marks=pytest.mark.long)], ids=["in turn", "all"])
def test_resume_at_every_step_with_another_number_of_ranks(corpus, documents, numbers):
    """Fresh readers on 1, 2 or 4 ranks go on from the state of every step, and give all of the rest of the run.

    Runs on 1, 2 and 4 ranks have the same batches and the same states, so that each number of ranks is followed by
    each. Batches are compared lane by lane, with the whole of what the straight run gave. The long test resumes every
    state on all three numbers of ranks, the other on one of them in turn.
    """
    (straight,) = ranks(corpus, documents, 1)
    expected, states = [], []
    for step in range(STEPS):
        states.append(json.dumps(straight.state(step)))
        expected.append(rows_of(straight.batch(step)))
    assert len({b"".join(rows) for rows in expected}) == STEPS
    for number in (2, 4):
        running = ranks(corpus, documents, number)
        for step in range(STEPS):
            assert all(json.dumps(reader.state(step)) == states[step] for reader in running)
            assert [row for reader in running for row in rows_of(reader.batch(step))] == expected[step]
    compared = 0
    for step, state in enumerate(states):
        for number in [(1, 2, 4)[(step + turn) % 3] for turn in range(numbers)]:
            resumed = ranks(corpus, documents, number, prefetch_steps=16)
            for reader in resumed:
                reader.check_state(json.loads(state))
            for later in range(step, STEPS):
                found = [row for reader in resumed for row in rows_of(reader.batch(later))]
                assert found == expected[later], f"step {later} after a resume at step {step} on {number} ranks"
                compared += 1
    assert compared == numbers * STEPS * (STEPS + 1) // 2


def test_a_state_resumes_as_the_plan_of_the_configuration(corpus):
    plan = make_plan(corpus)
    state = LaneReader(plan, DocumentReader(corpus.manifest), 0, LANES).state(5)
    assert continue_plan(plan, state, allow_fork=False) is plan


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_parallel_slices_concatenate_back(corpus, documents, size):
    (reader,) = ranks(corpus, documents, 1)
    for step in range(10):
        batch = reader.batch(step)
        slices = [batch.share(rank, size) for rank in range(size)]
        for name in TENSORS[:-1]:
            assert torch.equal(torch.cat([getattr(part, name) for part in slices], dim=1), getattr(batch, name))
        assert all(torch.equal(part.lane_ids, batch.lane_ids) for part in slices)
        assert sum(part.num_valid for part in slices) == batch.num_valid
        assert sum(part.num_bytes for part in slices) == batch.num_bytes


def test_labels_look_into_the_next_slice(corpus, documents):
    (reader,) = ranks(corpus, documents, 1)
    crossing = 0
    for step in range(20):
        batch = reader.batch(step)
        first, second = batch.share(0, 2), batch.share(1, 2)
        goes_on = (first.labels[:, -1] >= 0) & ~second.reset[:, 0]
        assert torch.equal(first.labels[goes_on, -1], second.tokens[goes_on, 0])
        crossing += int(goes_on.sum())
    assert crossing > 20


def test_slices_that_are_no_whole_blocks_are_refused(corpus, documents):
    batch = ranks(corpus, documents, 1)[0].batch(0)
    with pytest.raises(UsageError, match=r"64 is 4 blocks of 16 tokens, which 3 .* make it a multiple of 48"):
        batch.share(0, 3)
    with pytest.raises(UsageError, match="context-parallel rank 2 of 2: ranks count from 0 to 1"):
        batch.share(2, 2)
