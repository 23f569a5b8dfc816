"""`longspan evals reconcile`: every committed checkpoint once, whoever calls it and however often."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from longspan.cluster.actor_pool import Shape, Source, Task
from longspan.errors import ClusterError, UsageError
from longspan.trainer import cli
from longspan.trainer.checkpoint.contents import RunState
from longspan.trainer.checkpoint.store import CheckpointStore
from longspan.trainer.checkpoint.verify import pinned
from longspan.trainer.commands import evals_reconcile
from longspan.trainer.evaluation import alert, queue, reconcile, status
from longspan.trainer.evaluation.folders import key_of, read_result, read_results
from longspan.trainer.evaluation.lease import Lease
from longspan.trainer.evaluation.run import evaluate
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.evaluation.worker import EvaluationWorker

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    return tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(corpus), steps=(1, 2))


class Jobs:
    """Runs the tasks in this process, in place of Ray; can end some of them in other ways."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.pins: list[list[str]] = []
        self.instead: Callable[[Task], dict[str, Any] | None] = lambda task: None
        self.worker = EvaluationWorker()

    def __call__(self, ray: Any, worker: type, shape: Shape, source: Source) -> None:
        while (task := source.next_task(None)) is not None:
            checkpoint = Path(task.request["checkpoint"])
            if task.method == "open":
                self.ran.append(checkpoint.name)
                self.pins.append(pinned(checkpoint))
            try:
                source.answered(task, self.instead(task) or self.worker.run(task.method, task.request))
            except Died:
                source.answered(task, None)


class Died(Exception):
    """The worker of this task is gone."""


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    fake = Jobs()
    monkeypatch.setattr(reconcile, "run_pool", fake)
    monkeypatch.setattr(reconcile, "ray_session", lambda *_: nullcontext())
    monkeypatch.setattr(queue, "BACKOFF_SECONDS", 0.0)
    return fake


def once(run: Path, spec: EvaluationSpec) -> reconcile.Report:
    return reconcile.reconcile([run], [spec], reconcile.Place(None, Shape(1)), note=lambda _: None)


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
    arguments = tiny_run.one_pass(run, tmp_path)
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


def test_a_worker_that_dies_is_replaced_and_finished_shards_stay(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    names_seen: list[str] = []

    def dies_twice(task: Task) -> None:
        names_seen.append(f"{task.method} {task.name[-2:]}")
        if names_seen in (["open a1"], ["open a1", "open a2", "score a2", "score a2"]):
            raise Died

    jobs.instead = dies_twice  # type: ignore[assignment]
    assert len(once(run, spec).evaluated) == 2
    first = [step for step in names_seen if step.endswith(("a2", "a3"))]
    assert first == ["open a2", *["score a2"] * 2, *["score a3"] * 3, "finish a3"]  # four shards, one of them twice


def test_workers_that_die_again_and_again_are_a_failure_but_not_for_ever(
    run: Path, spec: EvaluationSpec, jobs: Jobs
) -> None:
    def dies(task: Task) -> None:
        raise Died

    jobs.instead = dies  # type: ignore[assignment]
    for attempt in (1, 2, 3):
        report = once(run, spec)
        assert len(report.submitted) == 2 and [entry["attempts"] for entry in report.failed] == [attempt] * 2
        assert pinned(run / "checkpoints" / "step-00000001") == ([] if attempt == 3 else [reconcile.pin_owner(spec)])
    report = once(run, spec)
    assert report.submitted == [] and len(report.failed_before) == 2
    assert report.failed_before[0]["reason"] == "its workers died 5 times"
    jobs.instead = lambda task: None
    assert [entry["step"] for entry in status.retry(run, spec, step=2)] == [2]
    assert names(once(run, spec).evaluated) == ["step-00000002"]


def test_an_interrupted_evaluation_goes_on_with_its_shards(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    scored: list[int] = []

    def stops_after_two(task: Task) -> None:
        if task.method == "score":
            scored.append(task.request["shard"])
            if len(scored) == 3:
                raise KeyboardInterrupt

    jobs.instead = stops_after_two  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        once(run, spec)
    assert len(list((run / "evals" / "work").glob("*/shard-*"))) == 2
    assert len(once(run, spec).evaluated) == 2
    assert scored == [0, 1, 2, 2, 3, 0, 1, 2, 3]
    assert list((run / "evals" / "work").iterdir()) == []


def test_a_damaged_shard_is_scored_again(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    def damages(task: Task) -> None:
        if task.method == "finish" and len(jobs.ran) == 1 and not damaged:
            shard = sorted((run / "evals" / "work").glob("*/shard-*"))[1]
            shard.write_text(shard.read_text()[:-5])
            damaged.append(shard)

    damaged: list[Path] = []
    jobs.instead = damages  # type: ignore[assignment]
    assert len(once(run, spec).evaluated) == 2 and damaged


def test_sharded_values_are_those_of_one_process(run: Path, spec: EvaluationSpec, jobs: Jobs, tmp_path: Path) -> None:
    once(run, spec)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        alone = evaluate(checkpoint, spec, tmp_path / "alone")
        sharded = read_result(run / "evals" / alone["key"])
        assert sharded is not None and sharded["carried"] == pytest.approx(alone["carried"], rel=1e-6)
        for one, other in zip(alone["scores"], sharded["scores"], strict=True):
            assert other == {**one, "nats": pytest.approx(one["nats"], rel=1e-6)}


def test_a_full_disk_costs_no_attempt(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    full = {"reason": "No space left on device", "exit_code": 1, "transient": True}
    jobs.instead = lambda task: full if task.method == "score" else None
    for _ in range(4):
        report = once(run, spec)
        assert [entry["attempts"] for entry in report.failed] == [0, 0] and report.failed_before == []
    jobs.instead = lambda task: None
    assert len(once(run, spec).evaluated) == 2


def test_a_real_disk_error_is_told_apart(run: Path, spec: EvaluationSpec, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000001"
    request = {
        "key": key_of(checkpoint, spec), "checkpoint": str(checkpoint), "spec": spec.model_dump_json(),
        "out": "/dev/null/evals", "attempt": 1, "shard": 0,
    }  # fmt: skip
    worker = EvaluationWorker()
    assert worker.run("score", request)["transient"] is False  # no folder can be made there: not worth another try
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        answer = worker.run("score", {**request, "out": str(tmp_path / "evals")})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in answer["reason"] and answer["transient"]
    assert list((tmp_path / "evals" / "work").rglob("*.json")) == []


def test_pending_checkpoints_are_pinned_before_their_turn(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    other: list[list[str]] = []
    jobs.instead = lambda task: other.append(pinned(run / "checkpoints" / "step-00000001"))  # type: ignore[assignment]
    once(run, spec)
    assert other[0] == [reconcile.pin_owner(spec)] and pinned(run / "checkpoints" / "step-00000001") == []


def test_no_pruning_takes_a_checkpoint_between_two_passes(
    run: Path, spec: EvaluationSpec, jobs: Jobs, corpus: Path
) -> None:
    once(run, spec)
    folder = tiny_run.run_directory(run.parent / "more", tiny_run.config(corpus), steps=(3, 4, 5))
    (folder / "checkpoints" / "pins").mkdir()
    shutil.copytree(run / "checkpoints" / "pins" / "every", folder / "checkpoints" / "pins" / "every")
    save(folder, corpus, step=6, keep_last=1)  # would prune all three
    left = [path.name for path in sorted((folder / "checkpoints").glob("step-*"))]
    assert left == ["step-00000006"] and pinned(folder / "checkpoints" / left[0]) == [reconcile.pin_owner(spec)]
    save(folder, corpus, step=7, keep_last=1)
    assert (folder / "checkpoints" / "step-00000006").is_dir()  # pinned as it was published: its turn comes
    assert len(once(folder, spec).evaluated) == 2
    save(folder, corpus, step=8, keep_last=1)
    assert not (folder / "checkpoints" / "step-00000006").exists()
    old = time.time() - 8 * 86400
    for waiting in (folder / "checkpoints" / "pins" / "every").iterdir():
        os.utime(waiting, (old, old))
    save(folder, corpus, step=9, keep_last=1)
    assert pinned(folder / "checkpoints" / "step-00000009") == []  # nobody has looked for a week


def save(run: Path, corpus: Path, step: int, keep_last: int) -> None:
    """What a trainer does."""
    weights = {name: tensor.detach() for name, tensor in tiny_run.model(tiny_run.config(corpus)).named_parameters()}
    state = RunState(
        step=step, weights=weights, optimizer={}, lanes={}, lane_start=0, lane_stop=2,
        data={}, rng={}, counters={}, config_yaml=(run / "config.yaml").read_text(), tokenizer={},
    )  # fmt: skip
    assert CheckpointStore(run / "checkpoints", keep_last=keep_last).save(state).ok


def test_success_after_a_crash_clears_the_failure(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    jobs.instead = lambda task: {"shards": 0, "done": []} if task.method == "open" else {"ok": True}
    assert [entry["reason"] for entry in once(run, spec).failed] == ["ended without a result"] * 2
    jobs.instead = lambda task: None
    assert len(once(run, spec).evaluated) == 2
    assert list((run / "evals" / "failed").iterdir()) == []


def test_two_reconcilers_at_once_run_each_evaluation_once(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    assert _with_a_second_one(run, spec, jobs) == ["step-00000002", "step-00000001"]


def test_without_the_lease_they_would_run_twice(
    run: Path, spec: EvaluationSpec, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "take", classmethod(lambda cls, path: Lease(path, "me")))
    monkeypatch.setattr(Lease, "release", lambda self: None)
    assert len(_with_a_second_one(run, spec, jobs)) > 2


def _with_a_second_one(run: Path, spec: EvaluationSpec, jobs: Jobs) -> list[str]:
    """What ran, when a second pass begins and ends in the middle of the first."""
    inside = threading.Event()

    def meanwhile(task: Task) -> None:
        if not inside.is_set():
            inside.set()
            once(run, spec)

    jobs.instead = meanwhile  # type: ignore[assignment]
    once(run, spec)
    return jobs.ran if len(jobs.ran) > 2 else sorted(jobs.ran, reverse=True)


def test_an_interrupted_pass_gives_everything_back(run: Path, spec: EvaluationSpec, jobs: Jobs) -> None:
    def interrupted(task: Task) -> None:
        raise KeyboardInterrupt

    jobs.instead = interrupted  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        once(run, spec)
    assert list((run / "evals" / "leases").glob("[0-9a-f]*")) == []
    jobs.instead = lambda task: None
    assert len(once(run, spec).evaluated) == 2


def test_a_path_that_is_no_run_is_refused(tmp_path: Path, spec: EvaluationSpec) -> None:
    with pytest.raises(UsageError, match="no run directory"):
        once(tmp_path, spec)


def test_an_alert_is_raised_once_for_each_checkpoint_that_got_worse(
    run: Path, spec: EvaluationSpec, jobs: Jobs, tmp_path: Path
) -> None:
    once(run, spec)
    values = {entry["step"]: entry["bits_per_byte"] for entry in status.entries(run, spec)}
    worse = abs(values[2] - values[1])
    if values[2] < values[1]:  # weights are random: let the second checkpoint be the worse one
        swap_carried(run, spec)
    said = tmp_path / "said"
    script = tmp_path / "tell.sh"
    script.write_text(f"#!/bin/sh\ncat >> {said}\n")
    script.chmod(0o755)

    def alerts(worse_by: float, command: str) -> list[dict[str, Any]]:
        place, rule = reconcile.Place(None, Shape(1)), alert.Rule(worse_by, command)
        return reconcile.reconcile([run], [spec], place, rule=rule, note=lambda _: None).alerts

    assert alerts(worse * 1.01, str(script)) == [] and not said.exists()
    assert alerts(worse * 0.99, str(tmp_path / "nowhere")) == []  # the command fails: next pass again
    raised = alerts(worse * 0.99, str(script))
    assert [(entry["step"], entry["best_step"]) for entry in raised] == [(2, 1)]
    assert json.loads(said.read_text()) == raised[0]
    assert alerts(worse * 0.99, str(script)) == []


def swap_carried(run: Path, spec: EvaluationSpec) -> None:
    """Exchange what two results say about mode `carried`."""
    (one, first), (other, second) = read_results(run / "evals", spec)
    first["carried"], second["carried"] = second["carried"], first["carried"]
    for folder, result in ((one, first), (other, second)):
        (folder / "result.json").write_text(json.dumps(result))


def test_status_and_retry(
    run: Path, spec: EvaluationSpec, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_weights(run / "checkpoints" / "step-00000001")
    arguments = [str(run), "--spec", str(tiny_run.spec_file(tmp_path, **tiny_run.QUICK)), "--json"]

    def say(action: str, *more: str) -> dict[str, Any]:
        assert cli.main(["evals", action, *arguments, *more]) == 0
        answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return answer

    assert say("status")["counts"] == {"pending": 2}
    seen: list[dict[str, Any]] = []
    jobs.instead = lambda task: seen.append(say("status"))  # type: ignore[func-returns-value]
    once(run, spec)
    assert seen[0]["counts"] == {"pending": 1, "in progress": 1}
    after = say("status")
    assert [entry["state"] for entry in after["evaluations"]] == ["failed", "evaluated"]
    assert "does not verify" in after["evaluations"][0]["reason"] and after["evaluations"][1]["bits_per_byte"] > 0
    assert cli.main(["evals", "status", *arguments[:-1]]) == 0
    table = capsys.readouterr().out
    assert "failed" in table and "evaluated" in table and "does not verify" in table
    assert say("retry", "--step", "2")["retried"] == []
    assert [entry["step"] for entry in say("retry")["retried"]] == [1]
    assert say("status")["counts"] == {"pending": 1, "evaluated": 1}
    flip_weights(run / "checkpoints" / "step-00000001")  # mended
    jobs.instead = lambda task: None
    assert names(once(run, spec).evaluated) == ["step-00000001"]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--once", "--every", "10m"], "not allowed with"),
        ([], "is required"),
        (["--every", "10"], "--every 10: write a number and s, m or h"),
        (["--once", "--alert-command", "true"], "belong together"),
        (["--once", "--workers", "0"], "--workers 0"),
        (["--once", "--set", "batch_token=1"], "batch_token"),
    ],
)
def test_wrong_options_are_refused(
    run: Path, tmp_path: Path, more: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evals", "reconcile", str(run), "--spec", str(tiny_run.spec_file(tmp_path, **tiny_run.QUICK)), *more]
    try:
        code = cli.main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2 and problem in capsys.readouterr().err and not (run / "evals").exists()


def test_a_daemon_passes_again_and_again_until_a_signal_comes(
    run: Path, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[int] = []
    real = reconcile.reconcile

    def counted(*args: Any, **options: Any) -> reconcile.Report:
        passes.append(len(passes))
        if len(passes) == 1:
            raise ClusterError("no Ray today.")
        if len(passes) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(reconcile, "reconcile", counted)
    monkeypatch.setattr(evals_reconcile, "interval_seconds", lambda text: 0.01)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        spec = str(tiny_run.spec_file(tmp_path, **tiny_run.QUICK))
        assert cli.main(["evals", "reconcile", str(run), "--spec", spec, "--every", "10m"]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    said = capsys.readouterr()
    assert passes == [0, 1, 2] and "no Ray today. The next pass tries again." in said.err
    assert "evaluated 2" in said.out
