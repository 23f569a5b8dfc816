"""A rank that dies or hangs ends all ranks within the limit, and each of them names it and says where it was."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from two_trainers import FAULT_STEP, End, run_two, write_recipe

from longspan.cluster import heartbeat, watchdog
from longspan.cluster.watchdog import Watchdog
from longspan.errors import EXIT_FAULT, EXIT_HANG, EXIT_OK

LIMIT = 4.0
SLACK = 10.0  # a machine that others use too


@pytest.fixture(scope="module")
def recipe(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", shards, LIMIT)


def names_rank_one(end: End, *words: str) -> bool:
    return end.exit_code == EXIT_HANG and all(word in end.text for word in ("rank 1 (process", *words))


def test_a_hung_rank_is_named_by_both(recipe: Path, tmp_path: Path) -> None:
    ends = run_two(recipe, tmp_path, "hang")
    assert (tmp_path / "fired").exists(), ends
    for end in ends:
        assert names_rank_one(end, "hangs in phase 'step' at step 3", "The other ranks wait in all_reduce"), end
        assert re.search(
            r"Rank 1 has not entered call \d+ of all ranks .ranks 0, 1., all_reduce of 8 bytes, in", end.text
        )
        assert LIMIT - 1 < end.seconds_after_fault < LIMIT + SLACK
    assert "two_trainers.py" in ends[1].text, "the hung rank prints its stack"
    assert any((tmp_path / "run/checkpoints").glob("step-*")) is (FAULT_STEP > 4)


def test_without_the_watchdog_nobody_names_it(recipe: Path, tmp_path: Path) -> None:
    """The planted mistake that the test above must notice."""
    ends = run_two(recipe, tmp_path, "hang", watchdog=False, deadline_seconds=LIMIT + SLACK)
    assert (tmp_path / "fired").exists(), ends
    assert not any(names_rank_one(end, "hangs") for end in ends)


def test_a_killed_rank_is_named_at_once(recipe: Path, tmp_path: Path) -> None:
    survivor, killed = run_two(recipe, tmp_path, "kill")
    assert killed.exit_code == -9
    assert names_rank_one(survivor, "died, last seen in phase"), survivor
    assert survivor.seconds_after_fault < LIMIT, "sooner than a hang: its connection has ended"


def test_a_rank_that_leaves_a_collective_out_is_named_with_it(recipe: Path, tmp_path: Path) -> None:
    """Rank 1 goes on to the save, so that the two call different things; neither is outside of a collective."""
    ends = run_two(recipe, tmp_path, "skip")
    assert (tmp_path / "fired").exists(), ends
    for rank, end in enumerate(ends):
        assert names_rank_one(end, "rank 0 (process", "of all ranks (ranks 0, 1)"), end
        found = re.search(r"The ranks disagree about call (\d+) of all ranks .ranks 0, 1.: (.*?)\. All", end.text)
        assert found is not None, end
        assert found[2] == "rank 0 called all_reduce of 56 bytes; rank 1 called all_gather_object"
        dump = (tmp_path / f"run/hang/rank-{rank:05d}.txt").read_text()
        assert f"#{found[1]:<6} {('all_reduce of 56 bytes', 'all_gather_object')[rank]}, all ranks" in dump
        assert "Threads:" in dump and "trainer/loop.py" in dump


@pytest.mark.long
def test_without_the_watchdog_a_death_has_no_name(recipe: Path, tmp_path: Path) -> None:
    survivor, killed = run_two(recipe, tmp_path, "kill", watchdog=False)
    assert killed.exit_code == -9
    assert not names_rank_one(survivor)


@pytest.mark.long
@pytest.mark.parametrize("where", ["data", "step"])
@pytest.mark.parametrize("fault", ["hang", "kill", "stop"])
def test_every_fault_everywhere(recipe: Path, tmp_path: Path, fault: str, where: str) -> None:
    ends = run_two(recipe, tmp_path, fault, where=where)
    assert (tmp_path / "fired").exists(), ends
    for end in ends if fault == "hang" else ends[:1]:
        assert names_rank_one(end), end
        assert end.seconds_after_fault < LIMIT + SLACK


@pytest.mark.long
def test_an_error_of_one_rank_ends_the_other_with_its_words(recipe: Path, tmp_path: Path) -> None:
    survivor, raised = run_two(recipe, tmp_path, "raise", where="step")
    assert raised.exit_code == 1 and "planted" in raised.text
    assert survivor.exit_code == EXIT_FAULT
    assert "rank 1 on host" in survivor.text and "ended with exit code 1: ValueError: planted" in survivor.text


@pytest.mark.long
def test_no_false_alarm(recipe: Path, tmp_path: Path) -> None:
    ends = run_two(recipe, tmp_path, "none")
    assert [end.exit_code for end in ends] == [EXIT_OK, EXIT_OK], ends


def gathering(ranks: int) -> list[Callable[[Any], list[Any]]]:
    """What `Mesh.gather` does, between threads."""
    values, barrier = [None] * ranks, threading.Barrier(ranks)

    def gather(rank: int, value: Any) -> list[Any]:
        values[rank] = value
        barrier.wait(timeout=20)
        return list(values)

    return [lambda value, rank=rank: gather(rank, value) for rank in range(ranks)]


def test_ranks_that_come_and_go_at_different_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks, in threads; each leaves when it is done, and none is missed by the others."""
    ended: list[Any] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def live(rank: int, gather: Callable[[Any], list[Any]]) -> None:
        with Watchdog(rank, 4, 5.0, gather) as watchdog:
            for step in range(3):
                watchdog.phase("step", step)
                time.sleep(0.1)
            time.sleep(0.4 * rank)

    in_threads(live, 4)
    assert not ended


def in_threads(live: Callable[[int, Callable[[Any], list[Any]]], None], count: int) -> None:
    """Run `live(rank, gather)` of every rank in a thread of its own, to its end."""
    ranks = [threading.Thread(target=live, args=(rank, gather)) for rank, gather in enumerate(gathering(count))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=20)
    assert not any(rank.is_alive() for rank in ranks)


def two_watched(
    monkeypatch: pytest.MonkeyPatch, limit_seconds: float, begin: Callable[[int, Watchdog], None]
) -> list[int]:
    """Exit codes of two ranks, in threads, that do nothing after `begin` until the watchdog ends both."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(watchdog, "_LINGER_SECONDS", 0.5)  # their connections do not end with them
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    deadline = time.monotonic() + 15

    def live(rank: int, gather: Callable[[Any], list[Any]]) -> None:
        with Watchdog(rank, 2, limit_seconds, gather) as watched:
            begin(rank, watched)
            while len(ended) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)

    in_threads(live, 2)
    return ended


def planted(*arguments: Any) -> Any:
    raise TypeError("planted")


@pytest.mark.parametrize("part", ["current_place", "recorder"])
def test_a_beat_is_sent_without_what_cannot_be_found_out(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Rank 1 stands still; that no place or call can be told of it must not save it."""
    monkeypatch.setattr(watchdog, part, planted)

    def begin(rank: int, watched: Watchdog) -> None:
        for step in range(2 - rank):
            watched.phase("step", step)

    assert two_watched(monkeypatch, 1.0, begin) == [EXIT_HANG, EXIT_HANG]


@pytest.mark.parametrize(("failing", "owner", "name"), [(0, watchdog, "judge"), (1, Watchdog, "_over_rank_zero")])
def test_a_watchdog_that_fails_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], failing: int, owner: object, name: str
) -> None:
    monkeypatch.setattr(owner, name, planted)
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.2)

    assert two_watched(monkeypatch, 20.0, lambda rank, watched: None) == [EXIT_FAULT, EXIT_FAULT]
    said = capfd.readouterr().err
    message = rf"the watchdog of rank {failing} on host \S+ failed: TypeError: planted\. All ranks end"
    assert len(re.findall(message, said)) == 2, said
    assert "Traceback" in said and "in planted" in said
