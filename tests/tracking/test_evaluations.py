"""Evaluations in MLflow: a run per key under its training run, step = context length; again changes nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from fake_store import FakeStore, write_steps

from longspan.trainer.config import TrackingConfig
from longspan.trainer.evaluation.best import best_of
from longspan.trainer.evaluation_tracking import log_evaluation, move_best, send_evaluation
from longspan.trainer.metric_sender import exclusive
from longspan.trainer.tracking import LOCK, MlflowStore, open_store

TIME = 1_700_000_000.25


def evaluation(run_dir: Path, key: str = "k" * 32) -> tuple[dict[str, Any], Path]:
    """A result and its picture, as `evaluate` leaves them."""

    def entry(value: float, most: int) -> dict[str, Any]:
        return {"bits_per_byte": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "context_max": most}

    folder = run_dir / "evals" / key
    folder.mkdir(parents=True)
    (folder / "curve.png").write_bytes(b"picture")
    result = {
        "key": key,
        "spec": {"name": "quick"},
        "checkpoint": {"run": "tiny", "step": 300, "fingerprint": "f" * 64, "committed": TIME},
        "data": {"digest": "d" * 64, "shards": "/corpora/books"},
        "curve": [
            {"mode": "truncated", "context_tokens": length, **entry(3 - length / 4096, length + 8)}
            for length in (64, 1024)
        ],
        "carried": entry(2.5, 12000),
        "swapped": None,
        "local": entry(2.75, 12000),
        "memory_gain": {"context_tokens": 64, **entry(0.2, 0)},
        "position_effect": [{"context_tokens": 1024, **entry(0.03, 0)}],
        "content_gain": None,
        "local_gain": {"bits_per_byte": 0.25, "ci_low": None, "ci_high": None},
    }
    return result, folder / "curve.png"


def test_a_curve_is_a_run_of_its_own_and_a_column_of_the_training_run(run_dir: Path, store: FakeStore) -> None:
    write_steps(run_dir, 1, 100)
    result, picture = evaluation(run_dir)
    assert log_evaluation(run_dir, result, picture, store.open)
    assert (picture.parent / "_LOGGED").exists()
    training, curve = store.runs["run0"], store.runs["run1"]
    assert curve["tags"] == {
        "ckpt.step": "300", "ckpt.fingerprint": "f" * 64, "eval.spec": "quick", "dataset.digest": "d" * 36,
        "mlflow.parentRunId": "run0", "eval.key": "k" * 32,
    }  # fmt: skip
    time_ms = int(TIME * 1000)
    assert ("ppl_vs_len/truncated/bits_per_byte", 2.75, time_ms, 1024) in curve["points"]
    assert ("ppl_vs_len/truncated/ci_low", 3 - 64 / 4096 - 0.1, time_ms, 64) in curve["points"]
    assert ("ppl_vs_len/carried/bits_per_byte", 2.5, time_ms, 12000) in curve["points"]
    assert ("ppl_vs_len/local/bits_per_byte", 2.75, time_ms, 12000) in curve["points"]
    assert {point for point in curve["points"] if not point[0].startswith("ppl") and "ci_" not in point[0]} == {
        ("memory_gain/bits_per_byte", 0.2, time_ms, 64),
        ("position_effect/bits_per_byte", 0.03, time_ms, 1024),
        ("local_gain/bits_per_byte", 0.25, time_ms, 12000),
    }
    assert ("quick/bits_per_byte_carried/ctx_00012000", 2.5, time_ms, 300) in training["points"]
    assert ("quick/bits_per_byte_truncated/ctx_00001024", 2.75, time_ms, 300) in training["points"]
    assert ("quick/memory_gain/bits_per_byte", 0.2, time_ms, 300) in training["points"]
    assert curve["artifacts"] == {"result.json": result, "curve.png": b"picture"}
    assert curve["status"] == "FINISHED" and curve["params"]["step"] == "300"
    assert curve["datasets"] == {("books", "d" * 36, "/corpora/books")}


def test_logging_again_changes_nothing(run_dir: Path, store: FakeStore) -> None:
    write_steps(run_dir, 1, 100)
    result, picture = evaluation(run_dir)
    assert log_evaluation(run_dir, result, picture, store.open)
    calls, points = store.calls, [set(run["points"]) for run in store.runs.values()]
    assert log_evaluation(run_dir, result, picture, store.open) and store.calls == calls
    (picture.parent / "_LOGGED").unlink()  # as if killed just before it was written
    assert log_evaluation(run_dir, result, picture, store.open)
    assert [set(run["points"]) for run in store.runs.values()] == points


def test_a_copy_of_a_run_logs_the_same_points_though_its_files_are_younger(run_dir: Path) -> None:
    result, picture = evaluation(run_dir)
    database = run_dir.parent / "mlflow.db"

    def rows() -> list[tuple[str, float, int, int]]:
        with sqlite3.connect(database) as connection:
            return connection.execute("select key, value, timestamp, step from metrics order by 1, 4").fetchall()

    assert log_evaluation(run_dir, result, picture)
    before = rows()
    assert len(before) == 19 and {row[2] for row in before} == {int(TIME * 1000)}
    (picture.parent / "_LOGGED").unlink()
    result["checkpoint"]["committed"] = TIME + 3600.5  # `cp -r`, or a backup that was put back
    assert log_evaluation(run_dir, result, picture) and rows() == before


def test_a_store_that_is_down_leaves_the_result_for_later(
    run_dir: Path, store: FakeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    write_steps(run_dir, 1, 100)
    result, picture = evaluation(run_dir)
    store.reachable = False
    assert not log_evaluation(run_dir, result, picture, store.open)
    assert not (picture.parent / "_LOGGED").exists() and "is not in the tracking store yet" in capsys.readouterr().err
    store.reachable = True
    assert log_evaluation(run_dir, result, picture, store.open)
    assert len(store.runs) == 2 and len(store.runs["run0"]["points"]) == 200 + 4


def test_the_training_run_comes_first(run_dir: Path, store: FakeStore) -> None:
    write_steps(run_dir, 1, 2)
    result, picture = evaluation(run_dir)
    with exclusive(run_dir / LOCK, 0.0):  # its tracker is at work, but has not reached the store yet
        assert send_evaluation(run_dir, result, picture, store.open) == "refused"  # the store is there
        assert store.runs == {} and not (picture.parent / "_LOGGED").exists()
    assert send_evaluation(run_dir, result, picture, store.open) == "logged"
    assert store.runs["run1"]["tags"]["mlflow.parentRunId"] == "run0"


def test_who_finds_another_at_it_leaves_it_alone(run_dir: Path, store: FakeStore) -> None:
    result, picture = evaluation(run_dir)
    with exclusive(picture.parent / LOCK, 0.0):
        assert send_evaluation(run_dir, result, picture, store.open) == "elsewhere"
    assert store.calls == 0


def test_runs_that_a_dying_server_made_twice_become_one(run_dir: Path) -> None:
    result, picture = evaluation(run_dir)
    store = open_store(run_dir, TrackingConfig())
    assert isinstance(store, MlflowStore)
    for name in ("one", "two"):
        store._client.create_run(store._experiment, tags={"eval.key": result["key"]}, run_name=name)
    assert log_evaluation(run_dir, result, picture)
    with sqlite3.connect(run_dir.parent / "mlflow.db") as rows:
        left = rows.execute("select run_uuid from runs where lifecycle_stage = 'active'").fetchall()
        assert len(left) == 1
        tags = dict(rows.execute("select key, value from tags where run_uuid = ?", left[0]).fetchall())
        assert tags["ckpt.step"] == "300"


def test_the_alias_follows_the_best_checkpoint_and_ignores_noise(run_dir: Path, store: FakeStore) -> None:
    first, clear, noise = (
        scored_evaluation(run_dir, key, nats) for key, nats in (("a", 10.0), ("b", 9.0), ("c", 8.99))
    )
    noise["scores"][0]["nats"] += 3.0  # better on the whole, but not on every document
    noise["scores"][1]["nats"] -= 6.0
    noise["carried"]["bits_per_byte"] -= 1.0
    assert best_of([noise, clear, first]) is clear
    assert best_of([first]) is first and best_of([]) is None
    assert move_best(run_dir, [first, clear], clear, store.open)
    run_id, tags = store.aliases["tiny.quick", "best-bpb"]
    assert store.runs[run_id]["tags"]["eval.key"] == clear["key"] and tags["ckpt.step"] == "2"
    store.reachable = False
    assert not move_best(run_dir, [first, clear], first, store.open)


def scored_evaluation(run_dir: Path, key: str, nats: float) -> dict[str, Any]:
    """A result with sums of four documents."""
    result, _ = evaluation(run_dir, key * 32)
    result["checkpoint"] |= {"step": "abc".index(key) + 1, "path": "p"}
    result["spec"] |= {"bootstrap_samples": 500, "seed": 0, "confidence": 0.95}
    result["carried"]["bits_per_byte"] = nats
    result["scores"] = [{"mode": "carried", "document": f"d{i}", "nats": nats, "bytes": 10} for i in range(4)]
    return result


def test_mlflow_moves_the_alias(run_dir: Path) -> None:
    first, second = (scored_evaluation(run_dir, key, 9.0) for key in "ab")
    for best in (first, second, first):
        assert move_best(run_dir, [first, second], best)
        with sqlite3.connect(run_dir.parent / "mlflow.db") as rows:
            aliased = rows.execute(
                "select v.run_id from registered_model_aliases a join model_versions v on v.name = a.name and "
                "v.version = a.version where a.alias = 'best-bpb'"
            ).fetchall()
            keys = rows.execute("select run_uuid from tags where key = 'eval.key' and value = ?", (best["key"],))
            assert aliased == keys.fetchall()
    with sqlite3.connect(run_dir.parent / "mlflow.db") as rows:
        assert rows.execute("select count(*) from model_versions").fetchone() == (2,)


def test_mlflow_keeps_the_context_length_as_step(run_dir: Path) -> None:
    write_steps(run_dir, 1, 2)
    result, picture = evaluation(run_dir)
    for _ in range(2):
        assert log_evaluation(run_dir, result, picture)
        (picture.parent / "_LOGGED").unlink()
    with sqlite3.connect(run_dir.parent / "mlflow.db") as rows:
        key = "ppl_vs_len/truncated/bits_per_byte"
        curve = rows.execute("select step, value, timestamp from metrics where key = ? order by step", (key,))
        assert curve.fetchall() == [(64, 3 - 64 / 4096, int(TIME * 1000)), (1024, 2.75, int(TIME * 1000))]
        assert rows.execute("select count(*) from runs").fetchone() == (2,)
        assert rows.execute("select status from runs order by start_time").fetchall() == [("FINISHED",), ("KILLED",)]
    assert sorted(path.name for path in (run_dir.parent / "mlflow-artifacts").rglob("*.*")) == [
        "curve.png",
        "result.json",
    ]
