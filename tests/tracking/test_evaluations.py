"""Evaluations in MLflow: a run per key under its training run, step = context length; again changes nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from fake_store import FakeStore, write_steps

from longspan.trainer.tracking import log_evaluation

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
        "data": {"digest": "d" * 64},
        "curve": [
            {"mode": "truncated", "context_tokens": length, **entry(3 - length / 4096, length + 8)}
            for length in (64, 1024)
        ],
        "carried": entry(2.5, 12000),
        "swapped": None,
        "memory_gain": {"context_tokens": 64, **entry(0.2, 0)},
    }
    return result, folder / "curve.png"


def test_a_curve_is_a_run_of_its_own_and_a_column_of_the_training_run(run_dir: Path, store: FakeStore) -> None:
    write_steps(run_dir, 1, 100)
    result, picture = evaluation(run_dir)
    assert log_evaluation(run_dir, result, picture, store.open)
    assert (picture.parent / "_LOGGED").exists()
    training, curve = store.runs["run0"], store.runs["run1"]
    assert curve["tags"] == {
        "ckpt.step": "300", "ckpt.fingerprint": "f" * 64, "eval.spec": "quick", "dataset.digest": "d" * 32,
        "mlflow.parentRunId": "run0", "eval.key": "k" * 32,
    }  # fmt: skip
    time_ms = int(TIME * 1000)
    assert ("ppl_vs_len/truncated/bits_per_byte", 2.75, time_ms, 1024) in curve["points"]
    assert ("ppl_vs_len/truncated/ci_low", 3 - 64 / 4096 - 0.1, time_ms, 64) in curve["points"]
    assert ("ppl_vs_len/carried/bits_per_byte", 2.5, time_ms, 12000) in curve["points"]
    assert ("bits_per_byte_carried/ctx_00012000", 2.5, time_ms, 300) in training["points"]
    assert ("bits_per_byte_truncated/ctx_00001024", 2.75, time_ms, 300) in training["points"]
    assert ("memory_gain/bits_per_byte", 0.2, time_ms, 300) in training["points"]
    assert curve["artifacts"] == {"result.json": result, "curve.png": b"picture"}
    assert curve["status"] == "FINISHED"


def test_logging_again_changes_nothing(run_dir: Path, store: FakeStore) -> None:
    write_steps(run_dir, 1, 100)
    result, picture = evaluation(run_dir)
    assert log_evaluation(run_dir, result, picture, store.open)
    calls, points = store.calls, [set(run["points"]) for run in store.runs.values()]
    assert log_evaluation(run_dir, result, picture, store.open) and store.calls == calls
    (picture.parent / "_LOGGED").unlink()  # as if killed just before it was written
    assert log_evaluation(run_dir, result, picture, store.open)
    assert [set(run["points"]) for run in store.runs.values()] == points


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
