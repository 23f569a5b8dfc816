"""Each metric reaches the store exactly once, whatever fails, and the trainer never waits for it."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from pathlib import Path

from fake_store import FakeStore, cut_log, write_steps

from longspan.trainer.config import RunConfig
from longspan.trainer.metric_sender import Sender, TrackingState, tracking_uri
from longspan.trainer.tracking import LOCK, Tracker, backfill, exclusive

QUICK = {"settle_seconds": 0.0, "poll_seconds": 0.01}


def tracker(run_dir: Path, config: RunConfig, store: FakeStore, warnings: list[str] | None = None) -> Tracker:
    started = Tracker(
        run_dir, config, make_store=store.open, warn=(warnings if warnings is not None else []).append, **QUICK
    )
    started.start()
    return started


def expected(first: int, last: int, time_of_first: float = 1000.0) -> list[tuple[int, float, int]]:
    return [(step, 1 / step, int((time_of_first + step) * 1000)) for step in range(first, last + 1)]


def test_a_run_is_sent_once_with_the_times_of_its_log(run_dir: Path, config: RunConfig, store: FakeStore) -> None:
    following = tracker(run_dir, config, store)
    write_steps(run_dir, 1, 700)  # 1400 points: more than one batch
    assert following.close()
    assert store.points("train/loss") == expected(1, 700)
    run = store.runs["run0"]
    assert run["sent"] == len(run["points"]) == 1400
    assert run["params"]["training.steps"] == "100" and run["params"]["model.layers.0.mixer"] == "sliding_window"
    assert run["status"] == "FINISHED"


def test_kinds_become_prefixes_and_what_is_no_finite_number_is_left_out(
    run_dir: Path, config: RunConfig, store: FakeStore
) -> None:
    lines = [
        {"kind": "step", "step": 1, "time": 5.0, "loss": float("nan"), "tokens": 32, "skipped": True},
        {"kind": "validation", "step": 1, "time": 6.0, "bits_per_byte": 2.5, "sample": "text"},
        {"kind": "checkpoint", "step": 1, "time": 7.0, "path": "p", "seconds": 0.5},
        {"no": "kind"},
    ]
    (run_dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "step", "st')
    assert tracker(run_dir, config, store).close()
    assert store.runs["run0"]["points"] == {
        ("train/tokens", 32.0, 5000, 1), ("train/skipped", 1.0, 5000, 1),
        ("validation/bits_per_byte", 2.5, 6000, 1), ("checkpoint/seconds", 0.5, 7000, 1),
    }  # fmt: skip


def test_killed_between_sending_and_remembering_nothing_is_doubled(
    run_dir: Path, config: RunConfig, store: FakeStore
) -> None:
    write_steps(run_dir, 1, 10)
    sender = Sender(run_dir, config, store.open)
    sender.send()
    before = (run_dir / "tracking.json").read_bytes()
    write_steps(run_dir, 11, 20)
    sender.send()
    (run_dir / "tracking.json").write_bytes(before)  # as if killed after the store had the points
    cut_log(run_dir, 5)  # and resumed from step 5: steps 6 to 20 are written again, at other times
    write_steps(run_dir, 6, 30, time=9000.0)
    assert tracker(run_dir, config, store).close()
    assert len(store.runs) == 1
    assert store.points("train/loss") == expected(1, 20) + expected(21, 30, 9000.0)


def test_killed_between_creating_the_run_and_remembering_it_there_is_one_run(
    run_dir: Path, config: RunConfig, store: FakeStore
) -> None:
    write_steps(run_dir, 1, 3)
    Sender(run_dir, config, store.open).send()
    state = TrackingState.model_validate_json((run_dir / "tracking.json").read_bytes())
    state.model_copy(update={"run_id": None, "offset": 0, "anchor": "", "highest": {}}).write(run_dir)
    assert tracker(run_dir, config, store).close()
    assert list(store.runs) == ["run0"] and store.points("train/loss") == expected(1, 3)


def test_a_log_cut_back_on_resume_gives_no_double_points(run_dir: Path, config: RunConfig, store: FakeStore) -> None:
    write_steps(run_dir, 1, 20)
    assert tracker(run_dir, config, store).close()
    cut_log(run_dir, 12)
    write_steps(run_dir, 13, 40, time=7777.0)
    assert tracker(run_dir, config, store).close()
    assert store.points("train/loss") == expected(1, 20) + expected(21, 40, 7777.0)


def test_store_down_at_start_is_back_filled_and_said_once(run_dir: Path, config: RunConfig, store: FakeStore) -> None:
    store.reachable = False
    warnings: list[str] = []
    following = tracker(run_dir, config, store, warnings)
    write_steps(run_dir, 1, 5)
    wait_until(lambda: store.calls >= 3)
    assert len(warnings) == 1 and "metrics stay in log.jsonl" in warnings[0]
    store.reachable = True
    write_steps(run_dir, 6, 9)
    assert following.close()
    assert store.points("train/loss") == expected(1, 9)
    assert len(warnings) == 2 and "answers again" in warnings[1]


def test_store_lost_mid_run_and_at_the_end_is_back_filled_by_the_next_process(
    run_dir: Path, config: RunConfig, store: FakeStore
) -> None:
    store.fail_after = 1
    write_steps(run_dir, 1, 900)
    assert not tracker(run_dir, config, store).close()
    assert 0 < len(store.points("train/loss")) < 900
    store.fail_after = None
    assert backfill(run_dir, store.open)
    assert store.points("train/loss") == expected(1, 900)
    assert store.runs["run0"]["sent"] == 1800
    calls = store.calls
    assert backfill(run_dir, store.open) and store.calls == calls  # nothing left: the store is not even opened


def test_back_fill_leaves_a_live_run_alone_and_says_how_the_run_ended(
    run_dir: Path, config: RunConfig, store: FakeStore
) -> None:
    write_steps(run_dir, 1, 3)
    with exclusive(run_dir / LOCK, 0.0):  # as the trainer's own thread holds it
        assert not backfill(run_dir, store.open)
    assert not store.runs
    assert backfill(run_dir, store.open) and store.runs["run0"]["status"] == "KILLED"
    write_steps(run_dir, 4, 100)
    assert backfill(run_dir, store.open) and store.runs["run0"]["status"] == "FINISHED"


def test_a_store_that_hangs_never_makes_anybody_wait(run_dir: Path, config: RunConfig, store: FakeStore) -> None:
    release, asked = threading.Event(), threading.Event()

    def hang() -> FakeStore:
        asked.set()
        release.wait(30)
        return store

    write_steps(run_dir, 1, 3)
    following = Tracker(run_dir, config, make_store=hang, warn=lambda _: None, **QUICK)
    following.start()
    assert asked.wait(10)
    started = time.monotonic()
    assert not following.close(timeout=0.2)
    assert time.monotonic() - started < 2
    release.set()


def test_a_deleted_database_is_filled_again_from_the_log(run_dir: Path, config: RunConfig, store: FakeStore) -> None:
    write_steps(run_dir, 1, 5)
    assert tracker(run_dir, config, store).close()
    store.runs.clear()
    write_steps(run_dir, 6, 8)
    assert tracker(run_dir, config, store).close()
    assert store.points("train/loss") == expected(1, 8)


def test_a_run_that_starts_anew_in_the_same_folder_is_another_run(
    run_dir: Path, config: RunConfig, store: FakeStore
) -> None:
    write_steps(run_dir, 1, 5)
    assert tracker(run_dir, config, store).close()
    (run_dir / "log.jsonl").unlink()
    write_steps(run_dir, 1, 3, time=9000.0)
    assert tracker(run_dir, config, store).close()
    assert store.points("train/loss") == expected(1, 5)
    assert {step for _, _, _, step in store.runs["run1"]["points"]} == {1, 2, 3}


def test_switched_off_nothing_is_sent(run_dir: Path, config: RunConfig, store: FakeStore) -> None:
    off = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})})
    write_steps(run_dir, 1, 3)
    assert tracker(run_dir, off, store).close()
    assert store.calls == 0 and not (run_dir / "tracking.json").exists()


def test_a_damaged_state_file_is_no_reason_to_stop(run_dir: Path, config: RunConfig, store: FakeStore) -> None:
    (run_dir / "tracking.json").write_text("{")
    write_steps(run_dir, 1, 3)
    assert tracker(run_dir, config, store).close()
    assert store.points("train/loss") == expected(1, 3)


def test_mlflow_itself_drops_points_that_are_sent_again(run_dir: Path, config: RunConfig) -> None:
    write_steps(run_dir, 1, 20)
    following = Tracker(run_dir, config, **QUICK)
    following.start()
    assert following.close(timeout=60)
    (run_dir / "tracking.json").write_text(
        TrackingState.model_validate_json((run_dir / "tracking.json").read_bytes())
        .model_copy(update={"offset": 0, "anchor": "", "highest": {}})
        .model_dump_json()
    )
    write_steps(run_dir, 21, 25)
    assert backfill(run_dir)
    database = run_dir.parent / "mlflow.db"
    assert tracking_uri(run_dir, config.tracking) == f"sqlite:///{database}"
    with sqlite3.connect(database) as rows:
        loss = rows.execute("select step, value, timestamp from metrics where key = 'train/loss' order by step")
        assert loss.fetchall() == expected(1, 25)
        assert rows.execute("select count(*) from runs").fetchone() == (1,)
        assert rows.execute("select artifact_uri from runs").fetchone()[0].startswith(run_dir.parent.as_uri())


def test_an_mlflow_server_that_is_not_there_costs_one_warning(run_dir: Path, config: RunConfig) -> None:
    nowhere = config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})
    warnings: list[str] = []
    write_steps(run_dir, 1, 3)
    following = Tracker(run_dir, config.model_copy(update={"tracking": nowhere}), warn=warnings.append, **QUICK)
    following.start()
    wait_until(lambda: warnings)
    assert not following.close(timeout=30)
    assert len(warnings) == 1 and "http://127.0.0.1:9" in warnings[0]


def wait_until(condition: object, seconds: float = 20.0) -> None:
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)
