"""Results go to MLflow when it is there, in order, however long it was away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longspan.trainer.evaluation import sink
from longspan.trainer.evaluation.sink import Sink


class Server:
    """Stands for `send_evaluation`."""

    def __init__(self) -> None:
        self.answers: Callable[[str], str] = lambda key: "logged"
        self.asked: list[str] = []

    def __call__(self, run: Path, result: dict[str, Any], picture: Path) -> str:
        self.asked.append(result["key"])
        return self.answers(result["key"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    fake = Server()
    monkeypatch.setattr(sink, "send_evaluation", fake)
    monkeypatch.setattr(sink, "read_result", lambda folder: {"key": folder.name})
    return fake


def test_all_are_sent_once(server: Server, tmp_path: Path) -> None:
    sending = Sink()
    for key in "abc":
        sending.add(tmp_path, key)
    assert sending.close() == [] and server.asked == ["a", "b", "c"]


def test_what_was_refused_is_sent_after_a_pause(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = lambda key: "later" if len(server.asked) == 1 else "logged"
    sending = Sink()
    for key in "ab":  # within the pause: nothing more is asked
        sending.add(tmp_path, key)
    assert sending.close() == [] and server.asked == ["a", "a", "b"]
    monkeypatch.setattr(sink, "PAUSE_SECONDS", 0.0)
    server.asked = []
    sending = Sink()
    sending.add(tmp_path, "c")
    sending.add(tmp_path, "d")
    assert sending.close() == [] and server.asked == ["c", "c", "d"]


def test_a_server_that_stays_away_is_told_about_and_not_asked_for_ever(server: Server, tmp_path: Path) -> None:
    server.answers = lambda key: "later"
    sending = Sink()
    for key in "abc":
        sending.add(tmp_path, key)
    assert [key for _, key in sending.close()] == ["a", "b", "c"] and len(server.asked) == 2


def test_what_others_log_and_what_is_not_tracked_is_no_failure(server: Server, tmp_path: Path) -> None:
    server.answers = {"a": "elsewhere", "b": "off", "c": "logged"}.__getitem__
    sending = Sink()
    for key in "abc":
        sending.add(tmp_path, key)
    assert sending.close() == [] and server.asked == ["a", "b", "c"]


def test_a_store_that_is_down_holds_up_no_other(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "store_name", lambda run: run.name)
    server.answers = lambda key: "later" if key.startswith("dead") else "logged"
    sending = Sink()
    for run, key in (("dead", "dead1"), ("live", "a"), ("dead", "dead2"), ("live", "b")):
        sending.add(tmp_path / run / "evals", key)
    assert [key for _, key in sending.close()] == ["dead1", "dead2"]
    assert server.asked == ["dead1", "a", "b", "dead1"]  # the dead one once, and once at the end
    assert sending.is_down(tmp_path / "dead" / "evals") and not sending.is_down(tmp_path / "live" / "evals")


def test_what_a_store_refuses_holds_up_nothing_behind_it(server: Server, tmp_path: Path) -> None:
    server.answers = lambda key: "refused" if key in "ab" else "logged"
    sending = Sink()
    for key in "abc":
        sending.add(tmp_path, key)
    assert [key for _, key in sending.close()] == ["a", "b"] and server.asked == ["a", "b", "c"]
    assert not sending.is_down(tmp_path)


def test_a_result_that_cannot_be_read_is_left_for_the_next_pass(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(folder: Path) -> dict[str, str]:
        if folder.name == "a":
            raise OSError(116, "Stale file handle")
        return {"key": folder.name}

    monkeypatch.setattr(sink, "read_result", stale)
    sending = Sink()
    for key in "ab":
        sending.add(tmp_path, key)
    assert [key for _, key in sending.close()] == ["a"] and server.asked == ["b"]
