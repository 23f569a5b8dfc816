"""`longspan evals reconcile`: every committed checkpoint once, whoever calls it and however often."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from longspan.cluster import ray_local
from longspan.cluster.evaljobs import Command, Outcome
from longspan.errors import UsageError
from longspan.trainer import cli, recipes
from longspan.trainer.checkpoint.verify import pinned
from longspan.trainer.evaluation import job, reconcile
from longspan.trainer.evaluation.lease import Lease
from longspan.trainer.evaluation.spec import EvaluationSpec


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    return tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(corpus), steps=(1, 2))


@pytest.fixture
def spec(tmp_path: Path) -> EvaluationSpec:
    return recipes.load(EvaluationSpec, tiny_run.spec_file(tmp_path))


class Jobs:
    """Runs evaluation jobs in this process; can end some of them in other ways."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.pins: list[list[str]] = []
        self.instead: Callable[[Command], Outcome | None] = lambda command: None

    def __call__(
        self,
        commands: Sequence[Command],
        *,
        slots: int,
        gpus: int,
        on_done: Callable[[Outcome], None],
        on_tick: Callable[[], None],
    ) -> None:
        for command in commands:
            arguments = command.argv[command.argv.index("longspan.trainer.evaluation.job") + 1 :]
            self.ran.append(Path(arguments[0]).name)
            self.pins.append(pinned(Path(arguments[0])))
            on_tick()
            outcome = self.instead(command)
            on_done(outcome or Outcome(command.name, job.main(list(arguments)), "", 0.0))


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    fake = Jobs()
    monkeypatch.setattr(reconcile, "run_commands", fake)
    return fake


def once(run: Path, spec: EvaluationSpec) -> reconcile.Report:
    return reconcile.reconcile([run], spec, slots=1, note=lambda _: None)


def names(entries: Sequence[Any]) -> list[str]:
    return [Path(entry["checkpoint"] if isinstance(entry, dict) else entry).name for entry in entries]


def flip_weights(checkpoint: Path) -> None:
    weights = next((checkpoint / "weights").iterdir())
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)


def test_newest_first_pinned_meanwhile_and_never_twice(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    report = once(run, spec)
    assert jobs.ran == names(report.submitted) == names(report.evaluated) == ["step-00000002", "step-00000001"]
    assert all(len(owners) == 1 and owners[0].startswith("eval-") for owners in jobs.pins)
    assert pinned(run / "checkpoints" / "step-00000001") == []
    assert len(list((run / "evals").glob("*/_SUCCESS"))) == 2
    again = once(run, spec)
    assert again.submitted == [] and names(again.already_evaluated) == ["step-00000002", "step-00000001"]
    other = once(run, spec.model_copy(update={"seed": 9}))
    assert len(other.evaluated) == 2 and len(jobs.ran) == 4


def test_a_damaged_checkpoint_is_failed_with_the_reason_and_not_evaluated(
    run: Path, spec: EvaluationSpec, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_weights(run / "checkpoints" / "step-00000001")
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    arguments = ["evals", "reconcile", str(run), "--spec", str(tiny_run.spec_file(tmp_path)), "--once"]
    assert cli.main(arguments) == 70
    assert "2 evaluations failed" in capsys.readouterr().err
    assert jobs.ran == ["step-00000001"] and not list((run / "evals").glob("*/_SUCCESS"))
    notes = [json.loads(path.read_text()) for path in (run / "evals" / "failed").iterdir()]
    assert sorted(names(notes)) == ["step-00000001", "step-00000002"]
    assert all(note["exit_code"] == 70 and note["attempts"] == 1 for note in notes)
    assert any("manifest.json" in note["reason"] for note in notes)
    again = once(run, spec)
    assert again.submitted == again.failed == [] and len(again.failed_before) == 2
    assert cli.main(arguments) == 0 and "Nothing to submit" in capsys.readouterr().out


def test_a_crash_is_tried_again_but_not_for_ever(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    jobs.instead = lambda command: Outcome(command.name, -9, "killed", 1.0)
    for attempt in (1, 2, 3):
        report = once(run, spec)
        assert len(report.submitted) == 2 and [entry["attempts"] for entry in report.failed] == [attempt] * 2
    report = once(run, spec)
    assert report.submitted == [] and len(report.failed_before) == 2
    assert report.failed_before[0]["reason"] == "killed"


def test_success_after_a_crash_clears_the_failure(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    jobs.instead = lambda command: Outcome(command.name, 0, "", 1.0)  # says it is done, but there is no result
    assert len(once(run, spec).failed) == 2
    jobs.instead = lambda command: None
    assert len(once(run, spec).evaluated) == 2
    assert list((run / "evals" / "failed").iterdir()) == []


def test_two_reconcilers_at_once_run_each_evaluation_once(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    inside = threading.Event()
    second: list[reconcile.Report] = []

    def meanwhile(command: Command) -> None:
        if not inside.is_set():
            inside.set()
            second.append(once(run, spec))

    jobs.instead = meanwhile  # type: ignore[assignment]
    first = once(run, spec)
    assert len(first.evaluated) == 2 and len(jobs.ran) == 2
    assert second[0].submitted == [] and len(second[0].in_progress_elsewhere) == 2


def test_without_the_lease_they_would_run_twice(
    run: Path, spec: EvaluationSpec, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "take", classmethod(lambda cls, path: None if path is None else Lease(path, "me")))
    monkeypatch.setattr(Lease, "renew", lambda self: None)
    monkeypatch.setattr(Lease, "release", lambda self: None)
    inside = threading.Event()

    def meanwhile(command: Command) -> None:
        if not inside.is_set():
            inside.set()
            once(run, spec)

    jobs.instead = meanwhile  # type: ignore[assignment]
    once(run, spec)
    assert len(jobs.ran) == 4


def test_a_lease_belongs_to_one_until_its_owner_is_silent_for_long(tmp_path: Path) -> None:
    path = tmp_path / "leases" / "key"
    held = Lease.take(path)
    assert held is not None and Lease.take(path) is None
    old = time.time() - 1000
    os.utime(path, (old, old))
    held.renew()
    assert Lease.take(path) is None
    os.utime(path, (old, old))
    taken = Lease.take(path)
    assert taken is not None
    held.renew()
    held.release()  # no longer its own: changes nothing
    assert path.exists()
    taken.release()
    assert not path.exists()


def test_an_interrupted_pass_gives_everything_back(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    def interrupted(command: Command) -> None:
        raise KeyboardInterrupt

    jobs.instead = interrupted  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        once(run, spec)
    assert pinned(run / "checkpoints" / "step-00000002") == []
    jobs.instead = lambda command: None
    assert len(once(run, spec).evaluated) == 2


def test_a_path_that_is_no_run_is_refused(tmp_path: Path, spec: EvaluationSpec) -> None:
    with pytest.raises(UsageError, match="no run directory"):
        once(tmp_path, spec)


def test_the_token_is_for_this_user_alone(tmp_path: Path) -> None:
    ray_local.write_token(tmp_path / "token")
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert len((tmp_path / "token").read_text()) == 64
    with pytest.raises(FileExistsError):
        ray_local.write_token(tmp_path / "token")


def test_real_ray_jobs_and_mlflow(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(corpus, tracked=True), steps=(1, 2, 3))
    (run / "log.jsonl").write_text('{"kind": "step", "step": 1, "time": 1.0, "loss": 2.0}\n')
    flip_weights(run / "checkpoints" / "step-00000002")
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
    arguments = ["evals", "reconcile", str(run), "--spec", str(tiny_run.spec_file(tmp_path)), "--once", "--json"]
    assert cli.main(arguments) == 70  # one of three is damaged
    assert "step-00000002 does not verify" in capsys.readouterr().err
    assert {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")} == before
    done = list((run / "evals").glob("*/_SUCCESS"))
    assert len(done) == 2 and all((path.parent / "_LOGGED").exists() for path in done)
    assert len(list((run / "evals" / "failed").iterdir())) == 1
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["submitted"] == [] and len(report["already_evaluated"]) == 2 and len(report["failed_before"]) == 1
    assert (tmp_path / "runs" / "mlflow.db").is_file()
