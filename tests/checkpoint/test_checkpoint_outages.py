"""Places that go away and come back while a run saves to them: nothing committed is lost, nothing else is loaded."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from object_server import BUCKET, ObjectServer
from tiny_states import assert_same_state, tiny_state

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_training import read_log, tiny_config

from longspan.errors import EXIT_FAULT, CheckpointError, LongspanError, Stopped
from longspan.trainer.checkpoint.places import RemotePath, place_of
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import verify
from longspan.trainer.loop import Run, train

_numbers = itertools.count(1)
DOWN = "500"


@pytest.fixture
def root(server: ObjectServer) -> Iterator[RemotePath]:
    """An empty place in the store."""
    yield place_of(f"s3://{BUCKET}/outage{next(_numbers)}")  # type: ignore[misc]
    server.fault = lambda method, path: None
    server.faults.clear()


def store_of(root: RemotePath) -> CheckpointStore:
    """A store with a client of its own, as another process has it."""
    return CheckpointStore(RemotePath.of(str(root)), keep_last=2, warn=lambda message: None)


def steps(root: RemotePath) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in store_of(root).committed()]


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(root: RemotePath, server: ObjectServer) -> None:
    """It lists, but does not say what an object is: a save once took its committed checkpoints for left-overs."""
    assert store_of(root).save(tiny_state(1)).ok
    server.fault = lambda method, path: DOWN if method == "HEAD" else None
    assert not store_of(root).save(tiny_state(2)).ok
    with pytest.raises(CheckpointError, match="cannot be listed"):
        store_of(root).load_newest(0, 4)
    assert server.faults
    server.fault = lambda method, path: None
    assert_same_state(store_of(root).load_newest(0, 4)[0], tiny_state(1))  # type: ignore[index]


def test_what_cannot_be_read_is_neither_replaced_nor_passed_over(root: RemotePath, server: ObjectServer) -> None:
    for step in (1, 2):
        assert store_of(root).save(tiny_state(step)).ok
    server.fault = lambda method, path: DOWN if method == "GET" and "step-00000002/optimizer" in path else None
    with pytest.raises(CheckpointError, match=r"step-00000002 cannot be read.*no older one is taken. Try again"):
        store_of(root).load_newest(0, 4)
    result = store_of(root).save(tiny_state(2))
    assert server.faults and not result.ok and "unreadable" in str(result.error)
    server.fault = lambda method, path: None
    assert steps(root) == [1, 2]
    verify(root / "step-00000002")


def test_a_checkpoint_is_saved_although_the_old_ones_cannot_be_listed(root: RemotePath, server: ObjectServer) -> None:
    assert store_of(root).save(tiny_state(1)).ok
    committed = lambda: any("PUT" in text and "step-00000002/COMMITTED" in text for text in server.requests)  # noqa: E731
    server.requests.clear()
    server.fault = lambda method, path: DOWN if committed() and method == "GET" else None
    assert store_of(root).save(tiny_state(2)).ok and server.faults
    server.fault = lambda method, path: None
    assert steps(root) == [1, 2]


def planted(
    monkeypatch: pytest.MonkeyPatch, step: int, plant: Callable[[Run], None], name: str = "_one_step"
) -> list[int]:
    """`plant` happens when a run at `step` has done what a method of this name does; the steps at which it did."""
    original, happened = getattr(Run, name), list[int]()

    def one_step(self: Run) -> Any:
        result = original(self)
        if self.step == step:
            happened.append(step)
            plant(self)
        return result

    monkeypatch.setattr(Run, name, one_step)
    return happened


def options(root: Any) -> dict[str, Any]:
    return {
        "checkpoint__folder": str(root),
        "checkpoint__interval_steps": 2,
        "validation__interval_steps": 100,
        "validation__sample_tokens": 0,
        "training__steps": 8,
    }


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(run_dir, "step")}


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_config(shards, **options(folder / "kept")), folder / "run")
    return losses(folder / "run")


def fails(config: Any, run_dir: Path, code: int, match: str, **more: Any) -> None:
    with pytest.raises(LongspanError, match=match) as caught:
        train(config, run_dir, **more)
    assert caught.value.exit_code == code, caught.value


@pytest.mark.long
@pytest.mark.parametrize("signalled", [False, True])
def test_a_store_that_is_down_to_the_end_and_comes_back(
    root: RemotePath,
    server: ObjectServer,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[int, float],
    signalled: bool,
) -> None:
    """Training goes on without it; the end says what is the last good checkpoint, although nobody can list them."""

    def plant(run: Run) -> None:
        run._join_save()
        server.fault = lambda method, path: DOWN
        if signalled:
            os.kill(os.getpid(), signal.SIGTERM)

    happened, config = planted(monkeypatch, 3, plant), tiny_config(shards, **options(root))
    end = "stopped by SIGTERM, and step 4" if signalled else "its last step 8"
    fails(
        config, tmp_path / "run", EXIT_FAULT, rf"{end} could not be saved. The last good checkpoint is .*step-00000002"
    )
    assert happened and server.faults
    assert {record["step"] for record in read_log(tmp_path / "run", "checkpoint_failure")} == (
        {4} if signalled else {4, 6, 8}
    )
    monkeypatch.undo()
    server.fault = lambda method, path: None
    assert steps(root) == [2]
    summary = train(config, tmp_path / "run", resume=True)
    assert summary["steps"] == 8 and steps(root)[-1] == 8
    assert losses(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("what", ["removed", "removed at last", "a file"])
def test_a_folder_that_goes_away_while_the_run_trains(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    uninterrupted: dict[int, float],
    what: str,
) -> None:
    """Removed: made again, also for the last step's checkpoint. A file in its place: each save fails and is counted."""
    kept = tmp_path / "kept"

    def plant(run: Run) -> None:
        run._join_save()
        shutil.rmtree(kept)
        if what == "a file":
            kept.write_text("")

    name, step = ("_validate", 8) if what == "removed at last" else ("_one_step", 3)
    config, happened = tiny_config(shards, **options(kept)), planted(monkeypatch, step, plant, name)
    if what == "a file":
        fails(config, tmp_path / "run", EXIT_FAULT, "last step 8 could not be saved. No checkpoint has been saved")
        assert [r["step"] for r in read_log(tmp_path / "run", "checkpoint_failure")] == [4, 6, 8, 8]
        kept.unlink()
    else:
        summary = train(config, tmp_path / "run")
        assert summary["checkpoint_failures"] == 0 and Path(summary["checkpoint"]) == kept / "step-00000008"
        verify(kept / "step-00000008")
    assert happened and ("lost its owner record" in capsys.readouterr().err)
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True)["steps"] == 8
    assert losses(tmp_path / "run") == uninterrupted


def test_a_signal_during_a_save_that_fails(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[int, float]
) -> None:
    """The disk is full in the background; at the signal the step is saved anew, and the run goes on from it."""
    begin, signalled, full = Run._save, list[int](), list[int]()

    def save(self: Run) -> None:
        begin(self)
        if not signalled:
            signalled.append(self.step)
            os.kill(os.getpid(), signal.SIGTERM)

    real = CheckpointStore._write_payload

    def write_payload(self: CheckpointStore, *args: Any) -> Any:
        if not full:
            full.append(1)
            raise OSError(28, "No space left on device", str(self.root))
        return real(self, *args)

    monkeypatch.setattr(Run, "_save", save)
    monkeypatch.setattr(CheckpointStore, "_write_payload", write_payload)
    config = tiny_config(shards, **options(tmp_path / "kept"))
    with pytest.raises(Stopped, match="everything is saved"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    failure = read_log(tmp_path / "run", "checkpoint_failure")
    assert [record["step"] for record in failure] == [2] and "No space left" in failure[0]["error"]
    assert train(config, tmp_path / "run", resume=True)["steps"] == 8
    assert losses(tmp_path / "run") == uninterrupted


def test_memory_is_told_to_vanish(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(tiny_config(shards, **{**options("MEMORY://vanishing"), "training__steps": 2}), tmp_path / "run")
    assert summary["checkpoint"] == "memory:///vanishing/step-00000002"
    assert "vanish with the process" in capsys.readouterr().err
