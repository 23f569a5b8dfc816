"""One pass over runs with stores of their own: a dead or refusing one holds up nothing but its own results."""

from __future__ import annotations

import socket
import sqlite3
from pathlib import Path
from typing import Any

import fake_pool
import pytest
import tiny_run

from longspan.cluster.actor_pool import Shape
from longspan.trainer import evaluation_tracking, recipes
from longspan.trainer.config import RunConfig
from longspan.trainer.evaluation import reconcile
from longspan.trainer.evaluation.spec import EvaluationSpec

pytestmark = pytest.mark.usefixtures("no_pictures")


def run_with(folder: Path, corpus: Path, uri: str, steps: tuple[int, ...]) -> Path:
    raw = tiny_run.config(corpus).model_dump(mode="json")
    raw["tracking"] = {"enabled": True, "uri": uri}
    return tiny_run.run_directory(folder, recipes.validate(RunConfig, raw, "tiny"), steps=steps)


def once(runs: list[Path], spec: EvaluationSpec) -> reconcile.Report:
    return reconcile.reconcile(runs, [spec], reconcile.Place(None, Shape(1)), note=lambda _: None)


def logged(run: Path) -> int:
    return len(list((run / "evals").glob("*/_LOGGED")))


def rows(database: Path, query: str) -> list[Any]:
    with sqlite3.connect(database) as tables:
        return tables.execute(query).fetchall()


@pytest.mark.long
def test_a_dead_store_holds_up_no_run_of_another(
    tmp_path: Path, corpus: Path, spec: EvaluationSpec, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    fake_pool.install(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead_uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
    database = tmp_path / "live.db"
    dead = run_with(tmp_path / "runs" / "dead", corpus, dead_uri, (1, 2))
    live = run_with(tmp_path / "runs" / "live", corpus, f"sqlite:///{database}", (3, 4))
    also_dead = run_with(tmp_path / "runs" / "also-dead", corpus, dead_uri, (5,))
    report = once([dead, live, also_dead], spec)
    assert len(report.evaluated) == 5 and report.failed == []
    assert capfd.readouterr().err.count("is not in the tracking store yet") >= 2  # it was asked, and did not answer
    assert (logged(dead), logged(live), logged(also_dead)) == (0, 2, 0)
    assert sorted(Path(place).parts[-3] for place in report.not_logged) == ["also-dead", "dead", "dead"]
    assert len(rows(database, "select distinct run_uuid from tags where key = 'eval.key'")) == 2
    assert len(rows(database, "select * from registered_model_aliases where alias = 'best-bpb'")) == 1
    for run in (dead, also_dead):  # it is back, under another address
        config = run / "config.yaml"
        config.write_text(config.read_text().replace(dead_uri, f"sqlite:///{database}"))
    report = once([dead, live, also_dead], spec)
    assert report.not_logged == [] and (logged(dead), logged(live), logged(also_dead)) == (2, 2, 1)
    assert len(rows(database, "select * from registered_model_aliases where alias = 'best-bpb'")) == 3


def test_a_result_that_the_store_refuses_is_skipped_and_said(
    tmp_path: Path, corpus: Path, spec: EvaluationSpec, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    fake_pool.install(monkeypatch)
    run = run_with(tmp_path / "runs" / "tiny", corpus, f"sqlite:///{tmp_path / 'store.db'}", (1, 2, 3))
    real = evaluation_tracking.evaluation_points

    def with_a_bad_name(result: dict[str, Any], time_ms: int) -> Any:
        points = real(result, time_ms)
        return [("bpb@1024", 1.0, time_ms, 1), *points] if result["checkpoint"]["step"] == 3 else points

    monkeypatch.setattr(evaluation_tracking, "evaluation_points", with_a_bad_name)
    report = once([run], spec)  # newest first, so the refused one comes first
    said = capfd.readouterr().err
    assert "is refused by the tracking store" in said and "bpb@1024" in said  # MLflow's own words
    assert len(report.not_logged) == 1 and logged(run) == 2
    aliases = rows(tmp_path / "store.db", "select * from registered_model_aliases where alias = 'best-bpb'")
    assert len(aliases) == 1
    monkeypatch.setattr(evaluation_tracking, "evaluation_points", real)
    assert once([run], spec).not_logged == [] and logged(run) == 3


def test_a_best_checkpoint_that_cannot_be_told_stops_no_other_run(
    tmp_path: Path, corpus: Path, spec: EvaluationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pool.install(monkeypatch)
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    one, other = (run_with(tmp_path / "runs" / name, corpus, uri, (1,)) for name in ("one", "other"))
    real, asked = reconcile.follow, []

    def fails_for_one(evals: Path, *args: Any) -> None:
        asked.append(evals.parent.name)
        if evals.parent == one:
            raise KeyError("spec")  # a result of another version
        real(evals, *args)

    monkeypatch.setattr(reconcile, "follow", fails_for_one)
    report = once([one, other], spec)
    assert asked == ["one", "other"] and len(report.evaluated) == 2 and report.not_logged == []
    assert [name for (name,) in rows(tmp_path / "store.db", "select name from registered_model_aliases")] == [
        "other.tiny"
    ]
