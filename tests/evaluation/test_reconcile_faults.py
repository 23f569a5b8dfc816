"""`longspan evals reconcile` when runs are broken, results torn and disks full: the rest goes on, nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_pool
import pytest
import tiny_run

from longspan.cluster.actor_pool import Shape, Task
from longspan.errors import Stopped
from longspan.trainer import cli, recipes
from longspan.trainer.checkpoint.verify import pinned
from longspan.trainer.evaluation import alert, reconcile
from longspan.trainer.evaluation.best import follow
from longspan.trainer.evaluation.folders import key_of, read_result, read_results
from longspan.trainer.evaluation.run import evaluate
from longspan.trainer.evaluation.spec import EvaluationSpec

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    return tiny_run.run_directory(tmp_path / "runs" / "tiny", tiny_run.config(corpus), steps=(1,))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> fake_pool.Pool:
    return fake_pool.install(monkeypatch)


def once(*runs: Path, spec: EvaluationSpec, rule: alert.Rule | None = None) -> reconcile.Report:
    place = reconcile.Place(None, Shape(1))
    return reconcile.reconcile(runs, [spec], place, rule=rule, note=lambda _: None)


def command(capsys: pytest.CaptureFixture[str], *runs: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, the object of `--json`, and what was said besides."""
    spec = runs[0].parent / "spec.yaml"
    if not spec.exists():
        tiny_run.spec_file(spec.parent, **tiny_run.QUICK)
    arguments = ["evals", "reconcile", *map(str, runs), "--spec", str(spec), "--once", "--json", "--workers", "1"]
    code, said = cli.main(arguments), capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]), said.err


def test_a_run_that_is_broken_keeps_no_other_from_its_turn(
    run: Path, tmp_path: Path, pool: fake_pool.Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, gone = run.parent / "begun", run.parent / "gone"
    begun.mkdir()
    shutil.copy(run / "config.yaml", begun / "config.yaml")
    code, said, text = command(capsys, begun, run, gone)
    assert code == 2 and said["exit_code"] == 2
    assert said["evaluated"] == [str(run / "checkpoints" / "step-00000001")]
    assert [(entry["run"], entry["exit_code"]) for entry in said["refused"]] == [(str(begun), 2), (str(gone), 2)]
    assert "2 runs were left out" in text and str(begun) in text and str(gone) in text
    assert not (begun / "evals").exists() and not gone.exists()
    code, said, _ = command(capsys, run)
    assert code == 0 and len(said["already_evaluated"]) == 1 and said["refused"] == []
    spec = str(run.parent / "spec.yaml")
    assert cli.main(["evals", "status", str(gone), str(run), "--spec", spec, "--json"]) == 2
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["counts"] == {"evaluated": 1} and str(gone) in said["error"]


def test_signals_are_taken_for_the_pass_alone(
    run: Path, pool: fake_pool.Pool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, during = (signal.SIGTERM, signal.SIGINT), []
    before = [signal.getsignal(number) for number in numbers]

    def one_pass(*args: Any, stopped: Callable[[], bool], **options: Any) -> reconcile.Report:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        during.append(stopped())
        return reconcile.Report()

    monkeypatch.setattr(reconcile, "reconcile", one_pass)
    assert command(capsys, run)[0] == Stopped.exit_code and during == [True]
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_whose_files_cannot_be_written_is_a_fault(
    run: Path, pool: fake_pool.Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(run, run.parent / "broken"))
    (broken / "checkpoints" / "pins").write_text("a file where a folder belongs")
    code, said, text = command(capsys, broken, run)
    assert code == 70 and len(said["evaluated"]) == 1 and said["refused"][0]["run"] == str(broken)
    assert "pins" in said["refused"][0]["reason"] and str(broken) in text


def test_json_keeps_the_lists_when_evaluations_fail(
    run: Path, pool: fake_pool.Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(run, run.parent / "damaged"))
    weights = next((damaged / "checkpoints" / "step-00000001" / "weights").iterdir())
    weights.write_bytes(weights.read_bytes()[:-1])
    code, said, _ = command(capsys, damaged, run)
    assert code == said["exit_code"] == 70 and "1 evaluations failed" in said["error"]
    assert [Path(entry["checkpoint"]).parts[-3] for entry in said["failed"]] == ["damaged"]
    assert [Path(entry).parts[-3] for entry in said["evaluated"]] == ["tiny"]
    assert len(said["submitted"]) == 2


def test_a_run_that_is_named_twice_is_looked_through_once(
    run: Path, spec: EvaluationSpec, pool: fake_pool.Pool
) -> None:
    (run.parent / "link").symlink_to(run)
    report = once(run, run.parent / "." / "tiny", run.parent / "link", spec=spec)
    assert len(report.evaluated) == 1 and report.in_progress_elsewhere == report.already_evaluated == []


@pytest.mark.parametrize(
    "tear",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "{}",
        None,
    ],
    ids=["half", "nothing in it", "gone"],
)
def test_a_torn_result_is_no_result_and_the_next_pass_replaces_it(
    run: Path, spec: EvaluationSpec, pool: fake_pool.Pool, tmp_path: Path, tear: Any
) -> None:
    once(run, spec=spec)
    ((folder, whole),) = read_results(run / "evals", spec)
    (folder / "_LOGGED").touch()
    text = (folder / "result.json").read_text()
    if tear is None:
        (folder / "result.json").unlink()
    else:
        (folder / "result.json").write_text(tear(text))
    assert read_result(folder) is None and read_results(run / "evals", spec) == []
    follow(run / "evals", spec, lambda results, best: pytest.fail("a torn result is the best"))
    report = once(run, spec=spec, rule=alert.Rule(0.0, "false"))
    assert len(report.evaluated) == 1 and report.already_evaluated == report.failed == report.alerts == []
    again = read_result(folder)
    assert again is not None and again["carried"] == whole["carried"] and not (folder / "_LOGGED").exists()
    (aside,) = (run / "evals").glob(".torn-*")
    assert (aside / "_LOGGED").exists() and len(read_results(run / "evals", spec)) == 1
    assert len(once(run, spec=spec).already_evaluated) == 1


@pytest.mark.parametrize("content", ["", "\0" * 500, "[]", "null", '{"key": "another"}'])
def test_nothing_but_a_whole_result_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "result.json").write_text(content)
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text(json.dumps({"key": tmp_path.name}))
    assert read_result(tmp_path) is not None


def test_evaluate_replaces_a_torn_result_too(run: Path, spec: EvaluationSpec, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000001"
    first = evaluate(checkpoint, spec, tmp_path / "out")
    (tmp_path / "out" / first["key"] / "result.json").write_text("{")
    again = evaluate(checkpoint, spec, tmp_path / "out")
    assert not again["reused"] and read_result(tmp_path / "out" / first["key"]) is not None


def test_a_result_that_cannot_be_read_at_the_moment_is_not_replaced(
    run: Path, spec: EvaluationSpec, pool: fake_pool.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(run, spec=spec)
    real, refused = Path.read_text, []

    def stale(self: Path, *args: Any, **options: Any) -> str:
        if self.name == "result.json":
            refused.append(self)
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", stale)
    report = once(run, spec=spec)
    assert refused and "Stale file handle" in report.refused[0]["reason"] and report.submitted == []


def test_a_machine_without_room_for_ray_is_a_fault_with_everything_so_far(
    run: Path, pool: fake_pool.Pool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "ray-session")

    monkeypatch.setattr(reconcile, "ray_session", full)
    code, said, text = command(capsys, run, run.parent / "none")
    assert code == said["exit_code"] == 70 and "No space left on device" in said["error"]
    assert len(said["submitted"]) == len(said["refused"]) == 1 and "Traceback" not in text
    assert list((run / "evals" / "leases").glob("[0-9a-f]*")) == []


class Disk:
    """A small file system that can be filled to the last byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refused = 0

    def fill(self) -> None:
        """Until the kernel says that there is no space."""
        for size in (1 << 16, 1):
            try:
                with (self.folder / "filler").open("ab", buffering=0) as file:
                    while True:
                        file.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                self.refused += 1

    def free(self) -> None:
        (self.folder / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if not done or done.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("moment", ["before", pytest.param("open", marks=pytest.mark.long), "score", "finish"])
def test_a_full_disk_loses_nothing_and_the_next_pass_goes_on(
    disk: Disk, corpus: Path, pool: fake_pool.Pool, capsys: pytest.CaptureFixture[str], tmp_path: Path, moment: str
) -> None:
    run = tiny_run.run_directory(disk.folder / "tiny", tiny_run.config(corpus), steps=(1, 2))
    tiny_run.spec_file(disk.folder, **tiny_run.QUICK)

    def fills(task: Task) -> None:
        if task.method == moment and not disk.refused:
            disk.fill()

    pool.before = fills
    if moment == "before":
        disk.fill()
    code, said, text = command(capsys, run)
    assert disk.refused == 2 and code == 70 and "No space left on device" in said["error"] + text
    assert list((run / "evals").glob("*/_SUCCESS")) == [] and said["evaluated"] == []
    assert list((run / "evals").glob(".tmp-*")) == []
    assert all(entry["attempts"] == 0 and "No space left" in entry["reason"] for entry in said["failed"])
    assert len(said["failed"]) == (0 if said["refused"] else 2)
    disk.free()
    shards = len(list((run / "evals" / "work").glob("*/shard-*")))
    assert shards == {"before": 0, "open": 0, "score": 0, "finish": 4}[moment]
    pool.done.clear()
    code, said, _ = command(capsys, run)
    assert code == 0 and len(said["evaluated"]) == 2
    assert sum(task.method == "score" for task in pool.done) == 8 - shards  # what was scored stays scored
    spec = recipes.load(EvaluationSpec, disk.folder / "spec.yaml")
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        alone = evaluate(checkpoint, spec, tmp_path / "alone")
        mended = read_result(run / "evals" / key_of(checkpoint, spec))
        assert mended is not None and mended["carried"] == pytest.approx(alone["carried"], rel=1e-6)
        assert pinned(checkpoint) == []


@pytest.mark.parametrize("moment", ["score", "finish"])
def test_a_run_that_is_deleted_in_the_middle_stays_deleted_and_the_others_go_on(
    run: Path, spec: EvaluationSpec, pool: fake_pool.Pool, moment: str
) -> None:
    doomed = Path(shutil.copytree(run, run.parent / "doomed"))

    def deletes(task: Task) -> None:
        if task.method == moment and "doomed" in task.name:
            shutil.rmtree(doomed)

    pool.before = deletes
    report = once(doomed, run, spec=spec)
    assert not doomed.exists()
    assert [Path(path).parts[-3] for path in report.evaluated] == ["tiny"]
    assert [Path(entry["checkpoint"]).parts[-3] for entry in report.failed] == ["doomed"]
