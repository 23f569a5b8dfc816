"""Saves that go on while training does: what they hold, what they cost, and what becomes of their errors."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_states import ToyTraining, assert_same_state, tiny_state

from longspan.trainer.checkpoint import files, snapshot
from longspan.trainer.checkpoint.background import BackgroundSaver, Saved, SaveStalls
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.snapshot import Arena, Snapshot, Source
from longspan.trainer.checkpoint.store import CheckpointStore, SaveResult

CPU = torch.device("cpu")
STALL_SHARE = 0.05
STEP_TOKENS = 256


class Gate:
    """`CheckpointStore.save` that waits until it is let through."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self.entered, self.open = threading.Event(), threading.Event()

    def save(self, state: RunState) -> SaveResult:
        self.entered.set()
        assert self.open.wait(30)
        return self.store.save(state)


def slow_copies(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """Every copy of the saving thread takes so long; the moments at which they ended."""
    ends: list[float] = []
    copy = snapshot.np.copyto

    def copyto(target: Any, source: Any) -> None:
        time.sleep(seconds)
        copy(target, source)
        ends.append(time.monotonic())

    monkeypatch.setattr(snapshot.np, "copyto", copyto)
    return ends


def test_a_save_holds_the_step_at_which_it_began(tmp_path: Path) -> None:
    gate = Gate(CheckpointStore(tmp_path))
    saver, training = BackgroundSaver(gate.save, Snapshot(CPU)), ToyTraining(tiny_state(5))
    expected = training.whole_state()
    saver.begin(training.other_state(), training.sources)
    for _ in range(3):
        saver.settle()
        training.update()
    assert gate.entered.wait(30) and saver.finished() is None, "training went on before anything was written"
    gate.open.set()
    saved = saver.join()
    assert saved is not None and saved.result.ok and saved.step == 5
    assert_same_state(gate.store.load_newest(0, 4)[0], expected)
    assert saver.join() is None and saver.finished() is None, "an outcome is told once"


@pytest.mark.parametrize("waits", [True, False])
def test_an_update_waits_for_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """Without the wait the save is of no step at all, which this test would see."""
    ends = slow_copies(monkeypatch, 0.05)
    saver, training = BackgroundSaver(CheckpointStore(tmp_path).save, Snapshot(CPU)), ToyTraining(tiny_state(5))
    expected = training.whole_state()
    saver.begin(training.other_state(), training.sources)
    assert len(ends) < 2, "the copies are made while the caller goes on"
    if waits:
        saver.settle()
    training.update()
    updated = time.monotonic()
    saved = saver.join()
    assert saved is not None and saved.result.ok
    assert (ends[-1] < updated) == waits
    assert (saved.stall_seconds > 0.1) == waits, "six copies of 0.05 s"
    state, _ = CheckpointStore(tmp_path).load_newest(0, 4)
    assert torch.equal(state.weights["layer.0.gate"], expected.weights["layer.0.gate"]) == waits


def test_the_memory_of_the_copies_is_used_again(tmp_path: Path) -> None:
    place = Snapshot(CPU)
    saver, training = BackgroundSaver(CheckpointStore(tmp_path).save, place), ToyTraining(tiny_state(1))
    pointers = []
    for step in range(1, 4):
        training.state.step = step
        saver.begin(training.other_state(), training.sources)
        saver.settle()
        pointers.append([tensor.data_ptr() for tensor in place.weights.values()])
        training.update()
        assert saver.join().result.ok  # type: ignore[union-attr]
    assert pointers[0] == pointers[1] == pointers[2]
    assert place._arena.num_bytes == snapshot.BLOCK_BYTES


def test_an_arena_hands_out_disjoint_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "BLOCK_BYTES", 1024)
    arena = Arena(pinned=False)
    arena.reserve(1500)
    assert arena.num_bytes == 2048
    shapes = [(5,), (200,), (3, 7), (1000,), (), (250,)]
    pieces = [arena.like(torch.empty(shape)).fill_(number) for number, shape in enumerate(shapes)]
    for number, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
        assert piece.shape == shape and piece.dtype == torch.float32 and bool((piece == number).all())
    held = arena.num_bytes
    arena.rewind()
    assert [arena.like(torch.empty(shape)).data_ptr() for shape in shapes] == [piece.data_ptr() for piece in pieces]
    assert arena.num_bytes == held


def test_what_is_no_live_float32_memory_is_taken_at_once() -> None:
    place = Snapshot(CPU)
    fresh, scalar = torch.ones(3), torch.tensor(2.0)
    half, strided = torch.ones(4).bfloat16(), torch.arange(6.0).view(2, 3).t()
    place.take(
        [
            Source("fresh", None, fresh, False),
            Source("half", None, half, True),
            Source("strided", None, strided, True),
            Source("fresh", "step", scalar, True),
        ]
    )
    assert not place.must_settle
    assert place.weights["fresh"].data_ptr() == fresh.data_ptr(), "nobody else has it: no copy"
    expected = strided.clone()
    for tensor in (half, strided, scalar):
        tensor.zero_()
    assert place.weights["half"].tolist() == [1.0] * 4 and place.weights["half"].dtype == torch.float32
    assert torch.equal(place.weights["strided"], expected)
    assert place.optimizer["fresh"]["step"].item() == 2.0


def test_two_saves_at_once_are_refused(tmp_path: Path) -> None:
    gate = Gate(CheckpointStore(tmp_path))
    saver, training = BackgroundSaver(gate.save, Snapshot(CPU)), ToyTraining(tiny_state(5))
    saver.begin(training.other_state(), training.sources)
    with pytest.raises(AssertionError, match="two saves at once"):
        saver.begin(training.other_state(), training.sources)
    assert saver.join(timeout_seconds=0.01) is None, "it goes on"
    gate.open.set()
    assert saver.join() is not None


def test_a_disk_error_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    saver, training = BackgroundSaver(store.save, Snapshot(CPU)), ToyTraining(tiny_state(1))
    saver.begin(training.other_state(), training.sources)
    assert saver.join().result.ok  # type: ignore[union-attr]
    expected, training.state.step = training.whole_state(), 2
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", _raise(OSError(28, os.strerror(28))))
        saver.begin(training.other_state(), training.sources)
        saved = saver.join()
    assert saved is not None and not saved.result.ok and "No space left" in str(saved.result.error)
    assert_same_state(store.load_newest(0, 4)[0], expected)
    saver.begin(training.other_state(), training.sources)
    assert saver.join().result.ok, "the next save tries again"  # type: ignore[union-attr]


def test_another_error_reaches_the_thread_that_trains(tmp_path: Path) -> None:
    saver, training = BackgroundSaver(CheckpointStore(tmp_path).save, Snapshot(CPU)), ToyTraining(tiny_state(1))
    training.state.counters["tokens"] = float("nan")
    saver.begin(training.other_state(), training.sources)
    with pytest.raises(ValueError, match="JSON"):
        saver.join()
    assert saver.finished() is None and os.listdir(tmp_path) == []


def test_an_error_while_copying_lets_the_update_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot.np, "copyto", _raise(MemoryError("no room")))
    saver, training = BackgroundSaver(CheckpointStore(tmp_path).save, Snapshot(CPU)), ToyTraining(tiny_state(1))
    saver.begin(training.other_state(), training.sources)
    saver.settle()
    with pytest.raises(MemoryError, match="no room"):
        saver.join()


def test_no_room_is_seen_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    monkeypatch.setattr(
        "longspan.trainer.checkpoint.free_space.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})
    )
    result = store.save(tiny_state(3))
    assert not result.ok and "No space left for a checkpoint of 2,020 bytes" in str(result.error), result.error
    assert "100 bytes free there" in str(result.error) and os.listdir(tmp_path) == []
    monkeypatch.undo()
    assert store.save(tiny_state(3)).ok


def test_stalls_are_summed_up() -> None:
    stalls = SaveStalls()
    for waited in (0.0, 2.0):
        stalls.add(Saved(1, SaveResult(True, None, 10.0, None), 0.25, waited, []))
    assert stalls.summary() == {
        "checkpoint_seconds": 20.0,
        "checkpoint_stall_seconds": 0.5,
        "checkpoint_waited_seconds": 2.0,
        "checkpoint_waits": 1,
    }


def stall_of_saves(root: Path, num_bytes: int, saves: int) -> list[tuple[float, float]]:
    """(stall, save) seconds of saves of a state of this size, between steps whose forward pass takes a while."""
    size = num_bytes // 12 // 1000
    names = [f"layer.{number}" for number in range(10)]
    weights, first, second = ({name: torch.ones(100, size) for name in names} for _ in range(3))
    other = tiny_state(1)
    store = CheckpointStore(root, keep_last=1)
    saver = BackgroundSaver(store.save, Snapshot(CPU))
    matrix = torch.ones(600, 600)
    # forward and backward pass of a model of so many parameters over 256 tokens, which is few
    products = 6 * (num_bytes // 12) * STEP_TOKENS // (2 * 600**3)

    def sources() -> Any:
        for name in names:
            yield Source(name, None, weights[name], True)
            yield Source(name, "exp_avg", first[name], True)
            yield Source(name, "exp_avg_sq", second[name], True)

    times = []
    for step in range(1, saves + 1):
        state = RunState(step, {}, {}, other.lanes, 0, 4, other.data, other.rng, other.counters, other.config_yaml)
        saver.begin(state, sources)
        saved = None
        while saved is None:
            for _ in range(products):
                torch.mm(matrix, matrix)
            saver.settle()
            for tensors in (weights, first, second):
                for tensor in tensors.values():
                    tensor += 1
            saved = saver.finished()
        assert saved.result.ok, saved.result.error
        loaded, _ = store.load_newest(0, 4)
        values = {tensor.view(-1)[place].item() for tensor in loaded.weights.values() for place in (0, -1)}
        assert len(values) == 1, "all of one step"
        times.append((saved.stall_seconds, saved.result.seconds))
    return times


@pytest.mark.long
def test_training_stalls_for_less_than_a_twentieth_of_a_save_of_one_gibibyte(tmp_path: Path) -> None:
    times = stall_of_saves(tmp_path, 2**30, 3)
    for stall, seconds in times:
        print(f"1 GiB: stall {stall:.4f} s of {seconds:.2f} s, {stall / seconds:.2%}")
    stalls, saves = map(sum, zip(*times, strict=True))
    assert stalls < STALL_SHARE * saves, times


@pytest.mark.gpu
def test_a_save_from_a_gpu_holds_its_step_without_a_wait(tmp_path: Path) -> None:
    device = torch.device("cuda")
    place = Snapshot(device)
    saver, training = BackgroundSaver(CheckpointStore(tmp_path).save, place), ToyTraining(tiny_state(5), "cuda")
    expected = training.whole_state()
    saver.begin(training.other_state(), training.sources)
    assert not place.must_settle
    for _ in range(3):
        saver.settle()
        training.update()
    assert saver.join().result.ok  # type: ignore[union-attr]
    assert all(tensor.is_pinned() for tensor in place.weights.values())
    assert_same_state(CheckpointStore(tmp_path).load_newest(0, 4)[0], expected)


@pytest.mark.gpu
def test_a_gpu_stalls_for_less_than_a_twentieth_of_a_save_of_one_gibibyte(tmp_path: Path) -> None:
    device = torch.device("cuda")
    tensors = {f"layer.{number}": torch.ones(2**23, device=device) for number in range(32)}
    place = Snapshot(device)
    place.reserve(2**30)
    saver, other = BackgroundSaver(CheckpointStore(tmp_path, keep_last=1).save, place), tiny_state(1)
    for step in (1, 2, 3):
        state = RunState(step, {}, {}, other.lanes, 0, 4, other.data, other.rng, other.counters, other.config_yaml)
        if place._reserving is not None:
            place._reserving.join()  # in a run, the first steps take longer than that
        saver.begin(state, lambda: (Source(name, None, tensor, True) for name, tensor in tensors.items()))
        saved = saver.join()
        assert saved is not None and saved.result.ok
        print(f"1 GiB: stall {saved.stall_seconds:.4f} s of {saved.result.seconds:.2f} s")
        assert saved.stall_seconds < STALL_SHARE * saved.result.seconds


def _raise(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail
