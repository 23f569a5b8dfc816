"""Ranks that differ are told so before they form groups: which of them, in what, all with the same message."""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from longspan.cluster import preflight
from longspan.errors import ClusterError, LongspanError, UsageError


def rank(**changes: Any) -> dict[str, Any]:
    settings = {"seed": 0, "data": {"lanes": 4, "sources": [1, 2]}}
    about = {"host": "one", "kind": "cpu", "problem": None, "settings": settings, "versions": {"torch": "2.13.0"}}
    return {**about, **changes}


def check(*ranks: dict[str, Any] | None, timeout_seconds: float = 10.0) -> list[Exception | None]:
    """The error of each rank, each in a thread; None among `ranks` is one that does not come."""
    store, errors = dist.HashStore(), [None] * len(ranks)

    def live(number: int, mine: dict[str, Any]) -> None:
        try:
            preflight.check_ranks(store, number, len(ranks), mine, timeout_seconds)
        except LongspanError as error:
            errors[number] = error

    threads = [threading.Thread(target=live, args=(n, mine)) for n, mine in enumerate(ranks) if mine is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def test_equal_ranks_pass() -> None:
    assert check(rank(), rank(host="two"), rank()) == [None, None, None]


def test_rank_zero_stays_until_all_have_read_that_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves the store, and may end right after: processes that agree need not factor."""
    store, read, left = dist.HashStore(), preflight._read, []

    def late(store: dist.Store, key: str, timeout_seconds: float) -> bytes:
        if key == "verdict" and threading.current_thread().name == "1":
            time.sleep(1)
        return read(store, key, timeout_seconds)

    def live(number: int) -> None:
        preflight.check_ranks(store, number, 2, rank(), 10.0)
        left.append(number)

    monkeypatch.setattr(preflight, "_read", late)
    threads = [threading.Thread(target=live, args=(number,), name=str(number)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert left == [1, 0]


def test_other_settings_are_named_with_rank_host_and_field_on_all_ranks() -> None:
    other = rank(host="two", settings={"seed": 1, "data": {"lanes": 4, "sources": [1, 3], "extra": True}})
    errors = check(rank(), rank(), other)
    assert len({str(error) for error in errors}) == 1 and all(isinstance(error, UsageError) for error in errors)
    text = str(errors[0])
    assert "rank 2 on host two differs in seed: 1 there, 0 on rank 0" in text
    assert "data.sources.1: 3 there, 2 on rank 0" in text
    assert "data.extra: True there, None on rank 0" in text
    assert "rank 1" not in text


def test_kinds_of_device_must_agree() -> None:
    errors = check(rank(kind="cuda"), rank(host="two"))
    assert "rank 1 on host two differs in device: cpu there, cuda on rank 0" in str(errors[0])


def test_a_host_with_fewer_gpus_than_processes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    lacking = preflight.describe_rank(rank()["settings"], "cuda")
    assert lacking["problem"].startswith("has 2 GPUs, but process 3 on it needs one of its own")
    errors = check(rank(kind="cuda"), rank(kind="cuda", problem=lacking["problem"]))
    assert all(isinstance(error, UsageError) and "rank 1 on host one has 2 GPUs" in str(error) for error in errors)


def test_other_versions_are_a_warning_that_names_rank_and_package(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert check(rank(), rank(versions={"torch": "2.12.0"})) == [None, None]
    assert "rank 1 on host one runs other versions: torch 2.12.0 there, 2.13.0 on rank 0" in caplog.text


def test_a_rank_that_does_not_come_is_named_in_time() -> None:
    errors = check(rank(), rank(), None, timeout_seconds=1.0)
    assert all(isinstance(error, UsageError) for error in errors[:2])
    assert "rank 2 of 3 did not come within 1 s" in str(errors[0]) == str(errors[1])


@pytest.mark.parametrize(("restarts_before", "kind"), [("0", ClusterError), ("3", UsageError)])
def test_ranks_that_do_not_come_are_a_fault_while_the_launcher_starts_them_again(
    monkeypatch: pytest.MonkeyPatch, restarts_before: str, kind: type[LongspanError]
) -> None:
    monkeypatch.setenv("LONGSPAN_EXIT_RECORDS", "folder")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts_before)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert isinstance(check(rank(), None, timeout_seconds=0.2)[0], kind)


def test_many_that_do_not_come_are_cut_short() -> None:
    assert "19, 20, and 10 more of 31 did not come" in str(check(rank(), *[None] * 30, timeout_seconds=0.2)[0])


def test_a_signal_gets_through_while_ranks_wait() -> None:
    class Stop(Exception):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        started = time.monotonic()
        with pytest.raises(Stop):
            preflight.check_ranks(store, 0, 2, rank(), 20.0)
        assert time.monotonic() - started < 5
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_rank_zero_that_does_not_come_is_named_in_time() -> None:
    errors = check(None, rank(), timeout_seconds=0.5)
    assert isinstance(errors[1], UsageError) and "rank 0 said nothing within 0 s" in str(errors[1])


def meet(*places: tuple[int, int], timeout_seconds: float = 10.0) -> tuple[list[Exception | None], list[float]]:
    """The error of each process of (rank, WORLD_SIZE), started in order, and its seconds; as processes of their own."""
    store, errors, seconds = dist.HashStore(), [None] * len(places), [0.0] * len(places)

    def live(index: int, number: int, world_size: int) -> None:
        started = time.monotonic()
        try:
            preflight.check_ranks(store, number, world_size, rank(host=f"host{index}"), timeout_seconds)
        except LongspanError as error:
            errors[index] = error
        seconds[index] = time.monotonic() - started

    threads = [threading.Thread(target=live, args=(index, *place), daemon=True) for index, place in enumerate(places)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    return errors, seconds


def test_another_world_size_is_named_on_all_ranks_and_nobody_waits_for_the_rest() -> None:
    """Groups of other sizes would wait for ranks that never come."""
    errors, seconds = meet((0, 2), (1, 3))
    assert all(isinstance(error, UsageError) for error in errors) and max(seconds) < 5
    assert "rank 1 on host host1 differs in WORLD_SIZE: 3 there, 2 on rank 0" in str(errors[0]) == str(errors[1])


def test_a_world_size_that_differs_is_said_rather_than_who_did_not_come() -> None:
    errors, _ = meet((0, 3), (1, 2), timeout_seconds=1.0)
    assert "rank 1 on host host1 differs in WORLD_SIZE: 2 there, 3 on rank 0" in str(errors[0]) == str(errors[1])


def test_a_rank_that_rank_zero_does_not_count_says_so_and_leaves_the_others_alone() -> None:
    errors, seconds = meet((0, 1), (2, 3))
    assert errors[0] is None and isinstance(errors[1], UsageError) and max(seconds) < 5
    assert "WORLD_SIZE = 3 for rank 2 on host host1, but 1 for rank 0" in str(errors[1])


def test_of_two_processes_of_one_rank_the_second_ends_and_names_both() -> None:
    """It would wait for ever in groups that are complete without it."""
    errors, seconds = meet((1, 2), (1, 2), (0, 2))
    assert errors[0] is None and errors[2] is None and isinstance(errors[1], UsageError) and seconds[1] < 5
    text = str(errors[1])
    assert "two processes have RANK = 1 of 2" in text and "on host host0" in text and "on host host1" in text


def test_many_differences_are_cut_short() -> None:
    ranks = [rank(settings={"seed": number}) for number in range(30)]
    text = str(check(*ranks)[7])
    assert text.count("differs in") == 20 and "more" in text


def test_the_source_is_part_of_the_versions() -> None:
    found = preflight.versions()
    assert found["torch"] != "not installed" and len(found["longspan's source"]) == 12
