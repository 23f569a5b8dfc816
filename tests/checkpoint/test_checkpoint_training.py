"""The trainer's own saves in the background: one at a time, logged with what they cost, joined before it ends."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_training import read_log, tiny_config

from longspan.trainer.checkpoint import free_space
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.store import CheckpointStore, SaveResult
from longspan.trainer.log import RunLog
from longspan.trainer.loop import train

SAVE_SECONDS = 0.3


def slow_saves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Saves take a while; of each its step, the saves under way with it, and whether the main thread did it."""
    seen: list[tuple[int, int, bool]] = []
    under_way: list[int] = []
    original = CheckpointStore.save

    def save(self: CheckpointStore, state: RunState) -> SaveResult:
        under_way.append(state.step)
        seen.append((state.step, len(under_way), threading.current_thread() is threading.main_thread()))
        time.sleep(SAVE_SECONDS)
        try:
            return original(self, state)
        finally:
            under_way.remove(state.step)

    monkeypatch.setattr(CheckpointStore, "save", save)
    return seen


def test_saves_follow_one_another_and_the_waits_are_counted(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = slow_saves(monkeypatch)
    summary = train(
        tiny_config(shards, training__steps=4, checkpoint__interval_steps=1, validation__sample_tokens=0), tmp_path
    )
    assert seen == [(step, 1, False) for step in range(1, 5)]
    records = read_log(tmp_path, "checkpoint")
    assert [record["step"] for record in records] == [1, 2, 3, 4], "the last one was joined"
    for record in records:
        assert 0 <= record["stall_seconds"] < record["seconds"] and record["seconds"] >= SAVE_SECONDS
    assert records[0]["waited_seconds"] < SAVE_SECONDS / 2 < max(record["waited_seconds"] for record in records)
    waited = sum(record["waited_seconds"] for record in records)
    assert summary["checkpoint_waits"] >= 1 and summary["checkpoint_waited_seconds"] == pytest.approx(waited)
    assert summary["checkpoint_stall_seconds"] == pytest.approx(sum(record["stall_seconds"] for record in records))
    assert Path(summary["checkpoint"]).name == "step-00000004"


def test_steps_go_on_while_a_save_does(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_saves(monkeypatch)
    train(tiny_config(shards, training__steps=30, checkpoint__interval_steps=29), tmp_path)
    steps = {record["step"]: record["time"] for record in read_log(tmp_path, "step")}
    first = read_log(tmp_path, "checkpoint")[0]
    assert first["step"] == 29 and steps[30] < first["time"], "step 30 came before the checkpoint of step 29"
    assert "checkpoint saved in" in capsys.readouterr().err


def test_an_error_that_is_not_the_disk_ends_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: CheckpointStore, state: RunState) -> SaveResult:
        raise RuntimeError("a bug in the thread that saves")

    monkeypatch.setattr(CheckpointStore, "save", save)
    with pytest.raises(RuntimeError, match="a bug in the thread that saves"):
        train(tiny_config(shards), tmp_path)
    assert read_log(tmp_path, "end")[0]["status"] == "FAILED"
    assert read_log(tmp_path, "step")[-1]["step"] <= 8, "it was seen before the next save had begun"


def test_a_run_that_fails_keeps_the_save_that_was_under_way(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longspan.trainer.engine import Engine

    slow_saves(monkeypatch)
    original = Engine.step
    calls: list[int] = []

    def step(self: Engine, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the step after the save")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(RuntimeError, match="the step after the save"):
        train(tiny_config(shards), tmp_path)
    assert [folder.name for folder in CheckpointStore(tmp_path / "checkpoints").committed()] == ["step-00000004"]
    assert [record["step"] for record in read_log(tmp_path, "checkpoint")] == [4]


def test_the_log_keeps_records_of_a_save_that_came_late(tmp_path: Path) -> None:
    log = RunLog(tmp_path, None)
    for kind, step in (("step", 4), ("step", 5), ("validation", 4), ("step", 6), ("checkpoint", 4), ("checkpoint", 6)):
        log.write(kind, step)
    log.close()
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "st')
    again = RunLog(tmp_path, 4)
    again.write("start", 4)
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("step", 4),
        ("validation", 4),
        ("checkpoint", 4),
        ("start", 4),
    ]
    assert again.validated == {4} and [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(("free", "warned"), [(10**12, False), (1000, True)])
def test_a_run_hears_that_its_disk_is_small(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    warned: bool,
) -> None:
    usage: Callable[[Any], Any] = lambda path: type("Usage", (), {"free": free})  # noqa: E731
    monkeypatch.setattr(free_space.shutil, "disk_usage", usage)
    config = tiny_config(shards, training__steps=5, validation__sample_tokens=0)
    if not warned:
        train(config, tmp_path)
        assert "bytes free" not in capsys.readouterr().err
        return
    with pytest.raises(Exception, match="last step 5 could not be saved"):
        train(config, tmp_path)
    message = capsys.readouterr().err
    assert "1,000 bytes free, but checkpoint.keep_last = 3 and the one being written take" in message
    assert [record["step"] for record in read_log(tmp_path, "checkpoint_failure")] == [4, 5, 5], (
        "the last is tried twice"
    )
    assert read_log(tmp_path, "step")[-1]["step"] == 5, "training went on"
