"""Tracking stores that a team uses: PostgreSQL, and an MLflow server before it, both on loopback."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_store import write_steps
from servers import listens_on, mlflow_server, postgres, why_no_postgres
from test_evaluations import evaluation, scored_evaluation

from longspan.trainer import recipes
from longspan.trainer.config import RunConfig
from longspan.trainer.evaluation_tracking import evaluation_columns, evaluation_points, log_evaluation, move_best
from longspan.trainer.tracking import backfill

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(why_no_postgres()), reason=why_no_postgres())]

LOG = """
import json, sys
from pathlib import Path
from longspan.trainer.evaluation_tracking import send_evaluation
run, folder = Path(sys.argv[1]), Path(sys.argv[2])
print(send_evaluation(run, json.loads((folder / "result.json").read_text()), folder / "curve.png"))
"""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    # its server runs as another user, from whom every pytest that starts closes the folders of all others
    with tempfile.TemporaryDirectory(prefix="longspan-postgres-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with postgres(folder / "server") as uri:
            yield uri


def track_at(run_dir: Path, config: RunConfig, uri: str) -> None:
    """Configure the run for a store."""
    changed = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    (run_dir / "config.yaml").write_text(recipes.dump(changed))


def stored(database: str, key: str) -> tuple[Counter[Any], Counter[Any], int]:
    """Points of the evaluations with a key, points of all training runs but those of their own log, number of runs."""
    import psycopg

    with psycopg.connect(database) as connection, connection.cursor() as rows:
        evaluated = (
            "select r.run_uuid from tags t join runs r on r.run_uuid = t.run_uuid "
            "where t.key = 'eval.key' and r.lifecycle_stage = 'active'"
        )
        rows.execute(
            "select m.key, m.value, timestamp, step from metrics m join tags t on t.run_uuid = m.run_uuid "
            f"where t.key = 'eval.key' and t.value = %s and m.run_uuid in ({evaluated})",
            (key,),
        )
        points = Counter(rows.fetchall())
        rows.execute(
            "select key, value, timestamp, step from metrics "
            f"where key like 'quick/%%' and run_uuid not in ({evaluated})"
        )
        columns = Counter(rows.fetchall())
        rows.execute(
            f"select count(*) from ({evaluated}) as found join tags t using (run_uuid) where t.value = %s", (key,)
        )
        return points, columns, rows.fetchone()[0]


def check(database: str, result: dict[str, Any]) -> None:
    """The database has exactly this evaluation's points, once."""
    time_ms = int(result["checkpoint"]["committed"] * 1000)
    points, columns, runs = stored(database, result["key"])
    assert runs == 1 and points == Counter(evaluation_points(result, time_ms))
    assert not Counter(evaluation_columns(result, time_ms)) - columns


def test_postgres(run_dir: Path, config: RunConfig, database: str) -> None:
    track_at(run_dir, config, database)
    write_steps(run_dir, 1, 30)
    assert backfill(run_dir)
    result, picture = evaluation(run_dir, "p" * 32)
    for _ in range(2):
        assert log_evaluation(run_dir, result, picture)
        (picture.parent / "_LOGGED").unlink()
    check(database, result)
    assert list((run_dir.parent / "mlflow-artifacts").rglob("curve.png"))  # a database keeps no files


def test_four_processes_at_once_log_an_evaluation_once(run_dir: Path, config: RunConfig, database: str) -> None:
    import json

    track_at(run_dir, config, database)
    write_steps(run_dir, 1, 3)
    result, picture = evaluation(run_dir, "q" * 32)
    (picture.parent / "result.json").write_text(json.dumps(result))
    processes = [
        subprocess.Popen([sys.executable, "-c", LOG, run_dir, picture.parent], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=200)[0].strip() for process in processes]
    assert "logged" in said and set(said) <= {"logged", "elsewhere"}, said
    check(database, result)


def test_a_server_before_postgres(run_dir: Path, config: RunConfig, database: str, tmp_path: Path) -> None:
    with mlflow_server(tmp_path, database) as uri:
        assert listens_on(int(uri.rpartition(":")[2])) == {"0100007F"}  # 127.0.0.1 alone
        track_at(run_dir, config, uri)
        write_steps(run_dir, 1, 30)
        best = scored_evaluation(run_dir, "b", 2.0)
        picture = run_dir / "evals" / best["key"] / "curve.png"
        for _ in range(2):
            assert log_evaluation(run_dir, best, picture)
            (picture.parent / "_LOGGED").unlink()
        assert move_best(run_dir, [best], best)
    check(database, best)
    assert not log_evaluation(run_dir, best, picture)  # the server is down
    with mlflow_server(tmp_path, database) as uri:
        track_at(run_dir, config, uri)
        assert log_evaluation(run_dir, best, picture)
    check(database, best)
