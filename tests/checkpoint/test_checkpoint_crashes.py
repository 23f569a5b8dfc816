"""A process that dies at any moment of a save leaves the old checkpoint or the new one, and nothing to mend."""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_states import KILLED, ToyTraining, assert_same_state, in_child, saved, tiny_state

from longspan.trainer.checkpoint import crash_points
from longspan.trainer.checkpoint.background import BackgroundSaver
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.snapshot import Snapshot
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import verify

OLD, NEW = 2, 3
CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")
BEFORE_PUBLICATION = crash_points.POINTS[: crash_points.POINTS.index("after-rename")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two old checkpoints; the next save keeps one and prunes the other."""
    folder = tmp_path / "checkpoints"
    saved(folder, OLD - 1, OLD)
    return folder


def save_new(root: Path) -> None:
    result = CheckpointStore(root, keep_last=2).save(tiny_state(NEW))
    assert result.ok, result.error


def save_new_in_background(root: Path) -> None:
    """The same save in a thread, while this one changes the weights and optimizer state in place."""
    store = CheckpointStore(root, keep_last=2)
    saver, training = BackgroundSaver(store.save, Snapshot(torch.device("cpu"))), ToyTraining(tiny_state(NEW))
    saver.begin(training.other_state(), training.sources)
    saver.settle()
    saved = None
    while saved is None:
        training.update()
        saved = saver.finished()
    assert saved.result.ok, saved.result.error


def assert_saved(state: RunState, step: int) -> None:
    """The state is that of a step, whichever of the two ways it was saved."""
    expected = tiny_state(step)
    assert_same_state(state, expected if "head.weight" in state.weights else ToyTraining(expected).whole_state())


def recover(root: Path) -> int:
    """Check all that a crash may not break, as the next life of the run does; returns the newest step."""
    store = CheckpointStore(root, keep_last=2)
    state, path = store.load_newest(0, 4)
    assert state.step in (OLD, NEW) and path == store.committed()[-1], "the newest published one verifies by itself"
    assert_saved(state, state.step)
    for folder in store.committed():
        verify(folder)
    assert not list(root.glob(".tmp-*")), "orphans are gone"
    assert store.save(tiny_state(NEW)).ok, "the next save of the same step succeeds"
    assert_saved(store.load_newest(0, 4)[0], NEW)
    names = sorted(os.listdir(root))
    assert names in (["step-00000002", "step-00000003"], ["step-00000001", "step-00000002", "step-00000003"]), names
    return state.step


@pytest.mark.parametrize("save", [save_new, save_new_in_background])
@pytest.mark.parametrize("point", crash_points.POINTS)
def test_crash_points(root: Path, monkeypatch: pytest.MonkeyPatch, point: str, save: Callable[[Path], None]) -> None:
    monkeypatch.setattr(crash_points, "_passes", crash_points.Counter())
    monkeypatch.setenv("LONGSPAN_CRASH", f"{point}@1")
    assert in_child(lambda: save(root)) == KILLED
    monkeypatch.delenv("LONGSPAN_CRASH")
    assert recover(root) == (OLD if point in BEFORE_PUBLICATION else NEW)


def test_crash_point_counts_its_passes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash_points, "_passes", crash_points.Counter())
    monkeypatch.setenv("LONGSPAN_CRASH", "before-rename@2")

    def save_twice() -> None:
        save_new(root)
        CheckpointStore(root, keep_last=2).save(tiny_state(NEW + 1))

    assert in_child(save_twice) == KILLED
    monkeypatch.delenv("LONGSPAN_CRASH")
    assert recover(root) == NEW


@pytest.mark.parametrize("save", [save_new, save_new_in_background])
def test_without_the_variable_nothing_happens(root: Path, save: Callable[[Path], None]) -> None:
    assert in_child(lambda: save(root)) == 0
    assert recover(root) == NEW


class CallCounter:
    """Stands before `os` calls; ends the process at call `die_at` (from 1), a write after half of its bytes."""

    def __init__(self, die_at: int | None) -> None:
        self.die_at = die_at
        self.count = 0

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.die_at:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os._exit(77)
            return real(*args, **kwargs)

        return call


def count_calls(root: Path) -> int:
    """File-system calls of one save, counted in a child that lives."""
    reader, writer = os.pipe()
    write_back = os.write

    def work() -> None:
        counter = CallCounter(None)
        counter.install()
        save_new(root)
        write_back(writer, str(counter.count).encode())

    assert in_child(work) == 0
    os.close(writer)
    with builtins.open(reader) as file:
        return int(file.read())


def lives(root: Path, copy: Path, total: int, save: Callable[[Path], None] = save_new) -> Iterator[tuple[int, int]]:
    """(call, newest step afterwards) for a save that dies at each of its calls."""
    for call in range(1, total + 1):
        shutil.copytree(root, copy)

        def work(call: int = call) -> None:
            CallCounter(call).install()
            save(copy)

        assert in_child(work) == 77, f"call {call} of {total} was never made"
        yield call, recover(copy)
        shutil.rmtree(copy)


def test_death_at_every_file_system_call(root: Path, tmp_path: Path) -> None:
    pristine = tmp_path / "pristine"
    shutil.copytree(root, pristine)
    total = count_calls(root)
    assert total > 60, "the shim sees the save's calls"
    steps = [step for _, step in lives(pristine, tmp_path / "copy", total)]
    assert steps == sorted(steps) and {OLD, NEW} == set(steps), "old until one call, new from there on"


@pytest.mark.long
def test_death_at_every_file_system_call_of_a_save_in_the_background(root: Path, tmp_path: Path) -> None:
    pristine = tmp_path / "pristine"
    shutil.copytree(root, pristine)
    steps = [step for _, step in lives(pristine, tmp_path / "copy", count_calls(root), save_new_in_background)]
    assert steps == sorted(steps) and {OLD, NEW} == set(steps), "old until one call, new from there on"
