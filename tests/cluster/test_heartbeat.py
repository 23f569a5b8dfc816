"""The verdict over what all ranks tell: who is dead, silent or hung, and who only waits."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longspan.cluster import heartbeat
from longspan.cluster.heartbeat import SILENCE_SECONDS, Beat, Seen, current_place, judge


def beat(count: int = 5, age: float = 1.0, **fields: object) -> Beat:
    return Beat("host", 100 + count, count, "step", count, age, limit_seconds=10.0, **fields)  # type: ignore[arg-type]


def test_ranks_that_make_progress_go_on() -> None:
    assert judge({0: Seen(beat()), 1: Seen(beat(age=9.9)), 2: Seen(beat(4))}) is None


def test_the_rank_that_is_behind_hangs_and_those_that_wait_do_not() -> None:
    waiting = Seen(beat(6, 11.0, waiting="all_reduce"))
    verdict = judge({0: waiting, 1: Seen(beat(5, 12.0, place="reader.py:3 batch")), 2: waiting})
    assert verdict is not None and verdict.culprits == (1,) and verdict.exit_code == 71
    assert "hangs in phase 'step' at step 5 for 12 s (limit 10 s), at reader.py:3 batch" in verdict.message
    assert verdict.message.endswith("The other ranks wait in all_reduce.")


def test_a_rank_that_is_behind_may_use_its_own_limit() -> None:
    saving = Beat("host", 1, 5, "save", 5, 30.0, limit_seconds=40.0)
    assert judge({0: Seen(beat(6, 25.0, waiting="all_gather")), 1: Seen(saving)}) is None


def test_in_one_phase_the_rank_outside_of_the_collective_hangs() -> None:
    verdict = judge({0: Seen(beat(age=11.0, waiting="all_reduce")), 1: Seen(beat(age=11.0))})
    assert verdict is not None and verdict.culprits == (1,)


def test_when_all_wait_all_are_named_with_their_collectives() -> None:
    ranks = {0: Seen(beat(age=11.0, waiting="all_reduce")), 1: Seen(beat(age=11.0, waiting="all_gather"))}
    verdict = judge(ranks)
    assert verdict is not None and verdict.culprits == (0, 1)
    assert "waiting in all_reduce" in verdict.message and "waiting in all_gather" in verdict.message


def test_an_ended_connection_is_a_death_unless_the_rank_said_farewell() -> None:
    dead = judge({0: Seen(beat()), 1: Seen(beat(), gone=True)})
    assert dead is not None and dead.culprits == (1,) and "died" in dead.message
    assert judge({0: Seen(beat()), 1: Seen(beat(left=0), gone=True)}) is None


def test_silence_has_a_limit_of_its_own() -> None:
    slow = Beat("host", 1, 5, "save", 5, 0.0, limit_seconds=2400.0)
    assert judge({0: Seen(beat()), 1: Seen(slow, silent_seconds=SILENCE_SECONDS - 1)}) is None
    verdict = judge({0: Seen(beat()), 1: Seen(slow, silent_seconds=SILENCE_SECONDS + 1)})
    assert verdict is not None and "rank 1 (process 1 on host host) does not answer" in verdict.message
    assert judge({0: Seen(beat()), 1: Seen(beat(), silent_seconds=11)}) is not None, "the phase's limit is less"


def test_an_error_ends_the_others_after_a_grace_or_when_a_collective_failed() -> None:
    left = beat(left=2, message="data.lanes = 3")
    assert judge({0: Seen(beat()), 1: Seen(left, left_seconds=1.0)}) is None
    verdict = judge({0: Seen(beat()), 1: Seen(left, left_seconds=11.0)})
    assert verdict is not None and verdict.exit_code == 2 and verdict.message.endswith("data.lanes = 3")
    unexpected = judge({0: Seen(beat(lost_contact=True)), 1: Seen(beat(left=1, message="boom"))})
    assert unexpected is not None and unexpected.exit_code == 70
    assert judge({1: Seen(left, left_seconds=11.0)}) is None, "nobody is left behind"


def test_ends_that_are_no_errors_end_nobody() -> None:
    for code in (0, 75):
        assert judge({0: Seen(beat(lost_contact=True)), 1: Seen(beat(left=code), left_seconds=11.0)}) is None


def test_the_place_of_a_thread_that_waits_in_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    real, release = dist.distributed_c10d._object_to_tensor, threading.Event()

    def blocked(*arguments: Any) -> Any:
        release.wait(timeout=10)
        return real(*arguments)

    monkeypatch.setattr(dist.distributed_c10d, "_object_to_tensor", blocked)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert current_place(threading.get_ident())[0] == ""
        thread = threading.Thread(target=dist.all_gather_object, args=([None], "x"))
        thread.start()
        deadline = time.monotonic() + 5
        while not current_place(threading.get_ident())[0] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert current_place(threading.get_ident())[0] == "all_gather_object"
        release.set()
        thread.join(timeout=5)
    finally:
        dist.destroy_process_group()


def test_a_frame_at_an_instruction_without_a_line_has_a_place() -> None:
    """Compilers leave lines out: `f_lineno` is None there."""
    started, stop = threading.Event(), threading.Event()

    def spin() -> None:
        started.set()
        while not stop.is_set():
            pass

    code, no_line = spin.__code__, 15  # of the kinds of entries in CPython's location table, each of 8 code units here
    table = bytes([0x80 | no_line << 3 | 7] * (len(code.co_code) // 16 + 1))
    source = str(Path(heartbeat.__file__).resolve().parent.parent / "trainer" / "loop.py")
    spin.__code__ = code.replace(co_linetable=table, co_filename=source)
    thread = threading.Thread(target=spin)
    thread.start()
    try:
        assert started.wait(timeout=10)
        deadline = time.monotonic() + 10
        frame = sys._current_frames()[thread.ident or 0]
        while frame.f_code is not spin.__code__ and time.monotonic() < deadline:
            frame = sys._current_frames()[thread.ident or 0]
        assert frame.f_lineno is None
        assert current_place(threading.get_ident()) == ("", "trainer/loop.py:0 spin")
    finally:
        stop.set()
        thread.join(timeout=5)
