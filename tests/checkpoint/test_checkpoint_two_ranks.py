"""Two ranks (gloo): disjoint shares, one outcome, no waiting for a rank that failed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_states import ToyTraining, assert_same_state, assert_same_tensors, tiny_state

from longspan.errors import CheckpointError, ClusterError
from longspan.trainer.checkpoint import files
from longspan.trainer.checkpoint.background import BackgroundSaver
from longspan.trainer.checkpoint.snapshot import Snapshot
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import verify

DEADLINE_SECONDS = 60.0


def run_two_ranks(tmp_path: Path, work: Callable[[int, Path], dict[str, Any]]) -> list[dict[str, Any]]:
    """What `work(rank, root)` returns on two ranks; the test fails if one hangs or ends with an error."""
    context = multiprocessing.get_context("fork")
    rendezvous = tmp_path / f"rendezvous-{time.monotonic_ns()}"
    processes = [context.Process(target=_rank, args=(rank, rendezvous, tmp_path, work)) for rank in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + DEADLINE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hung, f"ranks {hung} hang"
    assert [process.exitcode for process in processes] == [0, 0]
    return [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2)]


def _rank(rank: int, rendezvous: Path, tmp_path: Path, work: Callable[[int, Path], dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    result = work(rank, tmp_path / "checkpoints")
    (tmp_path / f"result-{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def state_of(rank: int, step: int) -> Any:
    """Each rank has all weights and two of the four lanes."""
    return tiny_state(step, 2 * rank, 2 * rank + 2)


def save(rank: int, root: Path, step: int = 5) -> dict[str, Any]:
    result = CheckpointStore(root, rank=rank, world_size=2).save(state_of(rank, step))
    return {"ok": result.ok, "path": str(result.path), "error": result.error}


def test_shares_are_disjoint_and_any_world_size_reads_them(tmp_path: Path) -> None:
    def work(rank: int, root: Path) -> dict[str, Any]:
        saved = save(rank, root)
        store = CheckpointStore(root, rank=rank, world_size=2)
        state, _ = store.load_newest(2 * rank, 2 * rank + 2)
        assert_same_state(state, state_of(rank, 5))
        return saved

    left, right = run_two_ranks(tmp_path, work)
    assert left == right and left["ok"]
    folder = Path(left["path"])
    manifest = verify(folder)
    assert manifest["world_size"] == 2 and manifest["lanes"] == [(0, 2), (2, 4)]
    assert sorted(path.name for path in (folder / "state").iterdir()) == [
        "lanes-00000-00001.safetensors",
        "lanes-00002-00003.safetensors",
    ]
    for kind in ("weights", "optimizer"):
        assert len(list((folder / kind).iterdir())) == 2
    alone, _ = CheckpointStore(folder.parent).load_newest(0, 4)
    assert_same_tensors(alone.weights, tiny_state(5).weights)
    assert_same_tensors(alone.lanes, tiny_state(5).lanes)
    assert alone.rng == state_of(0, 5).rng


def test_a_rank_that_the_checkpoint_does_not_know_has_no_random_state(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "checkpoints").save(tiny_state(5)).ok

    def work(rank: int, root: Path) -> dict[str, Any]:
        state, _ = CheckpointStore(root, rank=rank, world_size=2).load_newest(2 * rank, 2 * rank + 2)
        assert_same_tensors(state.lanes, {n: t[2 * rank : 2 * rank + 2] for n, t in tiny_state(5).lanes.items()})
        return state.rng

    assert run_two_ranks(tmp_path, work) == [tiny_state(5).rng, {}]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_error_on_one_rank_is_every_ranks_failure(tmp_path: Path, failing: int) -> None:
    def work(rank: int, root: Path) -> dict[str, Any]:
        first = save(rank, root, 4)
        real = os.write
        if rank == failing:
            files.os.write = _raise(OSError(errno.ENOSPC, "No space left on device"))
        second = save(rank, root, 5)
        files.os.write = real
        dist.barrier()  # rank 0 removes what is left while the others go on
        names = sorted(os.listdir(root))
        dist.barrier()
        return {"first": first, "second": second, "names": names, "third": save(rank, root, 5)}

    for result in run_two_ranks(tmp_path, work):
        assert result["first"]["ok"] and result["third"]["ok"]
        assert not result["second"]["ok"]
        assert f"rank {failing}: " in result["second"]["error"] and "No space left" in result["second"]["error"]
        assert result["names"] == ["step-00000004"]


def test_any_other_error_on_one_rank_ends_both(tmp_path: Path) -> None:
    def work(rank: int, root: Path) -> dict[str, Any]:
        state = state_of(rank, 5)
        if rank == 1:
            state.lane_stop += 1
        try:
            CheckpointStore(root, rank=rank, world_size=2).save(state)
        except (ValueError, ClusterError) as error:
            return {"kind": type(error).__name__, "text": str(error), "names": os.listdir(root)}
        return {}

    left, right = run_two_ranks(tmp_path, work)
    assert left["kind"] == "ClusterError" and "rank 1: ValueError" in left["text"]
    assert right["kind"] == "ValueError"
    assert left["names"] == []


def test_damage_that_one_rank_sees_makes_both_fall_back(tmp_path: Path) -> None:
    def work(rank: int, root: Path) -> dict[str, Any]:
        save(rank, root, 4)
        newer = Path(save(rank, root, 5)["path"])
        if rank == 0:
            path = newer / "state" / "lanes-00002-00003.safetensors"
            path.write_bytes(path.read_bytes()[:-1])
        dist.barrier()
        warnings: list[str] = []
        store = CheckpointStore(root, rank=rank, world_size=2, warn=warnings.append)
        state, _ = store.load_newest(2 * rank, 2 * rank + 2)
        assert_same_state(state, state_of(rank, 4))
        return {"step": state.step, "warnings": warnings}

    left, right = run_two_ranks(tmp_path, work)
    assert left["step"] == right["step"] == 4
    assert "rank 1: state/lanes-00002-00003.safetensors" in left["warnings"][0] and right["warnings"] == []


def test_none_left_is_every_ranks_error(tmp_path: Path) -> None:
    def work(rank: int, root: Path) -> dict[str, Any]:
        folder = Path(save(rank, root)["path"])
        if rank == 0:
            (folder / "data.json").write_bytes(b"")
        dist.barrier()
        store = CheckpointStore(root, rank=rank, world_size=2, warn=lambda message: None)
        try:
            store.load_newest(2 * rank, 2 * rank + 2)
        except CheckpointError as error:
            return {"text": str(error)}
        return {}

    for result in run_two_ranks(tmp_path, work):
        assert "no checkpoint left that verifies" in result["text"]


def background_saver(rank: int, root: Path) -> tuple[BackgroundSaver, ToyTraining]:
    """A saver whose thread has a process group of its own, and what it saves: each rank one of two parameters."""
    group = dist.new_group(backend="gloo")
    store = CheckpointStore(root, rank=rank, world_size=2, group=group)
    training = ToyTraining(state_of(rank, 5))
    for tensors in (training.weights, training.moments, training.steps):
        for name in list(tensors)[1 - rank :: 2]:
            del tensors[name]
    return BackgroundSaver(store.save, Snapshot(torch.device("cpu"))), training


def test_a_save_in_the_background_while_the_ranks_talk(tmp_path: Path) -> None:
    """Hundreds of collectives of the training beside those of the save, in an order that differs on the two ranks."""

    def work(rank: int, root: Path) -> dict[str, Any]:
        saver, training = background_saver(rank, root)
        generator, sums, done = random.Random(rank), [], []
        for step in range(1, 6):
            training.state.step = step
            saver.begin(training.other_state(), training.sources)
            for number in range(60):
                value = torch.full((1000,), float(step * number))
                dist.all_reduce(value)
                sums.append(bool((value == 2 * step * number).all()))
                time.sleep(generator.random() * 1e-3)
            saver.settle()
            training.update()
            done.append(saver.join())
        return {"sums": all(sums), "ok": [saved.result.ok for saved in done], "names": list(training.weights)}

    left, right = run_two_ranks(tmp_path, work)
    assert left["sums"] and right["sums"] and left["ok"] == right["ok"] == [True] * 5
    state, folder = CheckpointStore(tmp_path / "checkpoints").load_newest(0, 4)
    assert folder.name == "step-00000005" and sorted(state.weights) == sorted(left["names"] + right["names"])
    expected = ToyTraining(tiny_state(5))
    for _ in range(4):
        expected.update()
    assert_same_tensors(state.weights, expected.weights)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_error_in_the_background_of_one_rank_is_every_ranks_failure(tmp_path: Path, failing: int) -> None:
    def work(rank: int, root: Path) -> dict[str, Any]:
        saver, training = background_saver(rank, root)
        saver.begin(training.other_state(), training.sources)
        first, training.state.step = saver.join(), 6
        real = os.write
        if rank == failing:
            files.os.write = _raise(OSError(errno.ENOSPC, "No space left on device"))
        saver.begin(training.other_state(), training.sources)
        second = saver.join()
        files.os.write = real
        dist.barrier()
        return {"first": first.result.ok, "second": second.result.error, "names": sorted(os.listdir(root))}

    for result in run_two_ranks(tmp_path, work):
        assert result["first"] and f"rank {failing}: " in result["second"] and "No space left" in result["second"]
        assert result["names"] == ["step-00000005"]


def test_a_rank_that_dies_in_the_background_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """Rank 1 is killed with its share half written; rank 0 is told, and nothing is published."""
    context = multiprocessing.get_context("fork")
    root = tmp_path / "checkpoints"

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=rank, world_size=2)
        saver, training = background_saver(rank, root)
        saver.begin(training.other_state(), training.sources)
        assert saver.join().result.ok
        training.state.step = 6
        if rank == 1:
            os.environ["LONGSPAN_CRASH"] = "mid-payload@1"
        saver.begin(training.other_state(), training.sources)
        try:
            saver.join()
        except Exception as error:
            (tmp_path / "told").write_text(str(error))
        os._exit(0)  # the group cannot be left in order

    processes = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_SECONDS)
        process.kill()
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    assert (tmp_path / "told").read_text()
    state, folder = CheckpointStore(root).load_newest(0, 4)
    assert folder.name == "step-00000005" and state.step == 5 and os.listdir(root) == ["step-00000005"]


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail
