"""Several runs in one pass that hold the same checkpoint: each gets a result of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import fake_pool
import pytest
import tiny_run

from longspan.cluster.actor_pool import Shape
from longspan.trainer.evaluation import reconcile
from longspan.trainer.evaluation.folders import key_of, read_results
from longspan.trainer.evaluation.spec import EvaluationSpec

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def copies(tmp_path: Path) -> list[Path]:
    """Two run directories with equal checkpoints."""
    corpus = tiny_run.corpus(tmp_path / "corpus")
    one = tiny_run.run_directory(tmp_path / "runs" / "one", tiny_run.config(corpus), steps=(1, 2))
    return [one, Path(shutil.copytree(one, tmp_path / "runs" / "other"))]


def once(runs: list[Path], spec: EvaluationSpec) -> reconcile.Report:
    return reconcile.reconcile(runs, [spec], reconcile.Place(None, Shape(2)), note=lambda _: None)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("workers", "steps"), [(1, (1,)), (2, (1, 2))])
def test_copies_of_a_checkpoint_are_evaluated_side_by_side(
    copies: list[Path], spec: EvaluationSpec, monkeypatch: pytest.MonkeyPatch, workers: int, steps: tuple[int, ...]
) -> None:
    for run in copies:
        for unwanted in {1, 2} - set(steps):
            shutil.rmtree(run / "checkpoints" / f"step-0000000{unwanted}")
    keys = [[key_of(run / "checkpoints" / f"step-0000000{step}", spec) for step in steps] for run in copies]
    assert keys[0] == keys[1]  # the same content, so nothing but the folder tells them apart
    pool = fake_pool.install(monkeypatch, workers)
    report = once(copies, spec)
    assert report.failed == [] and len(report.evaluated) == 2 * len(steps)
    for run, name in zip(copies, ("one", "other"), strict=True):
        results = [result for _, result in read_results(run / "evals", spec)]
        assert sorted(result["key"] for result in results) == sorted(keys[0])
        assert {result["checkpoint"]["run"] for result in results} == {name}  # not what a worker had in memory
        assert list((run / "evals" / "leases").glob("[0-9a-f]*")) == []
    assert sum(task.method == "finish" for task in pool.done) == 2 * len(steps)
