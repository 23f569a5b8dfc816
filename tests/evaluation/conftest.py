"""What the tests of whole evaluations share."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run

from longspan.trainer import recipes
from longspan.trainer.evaluation import run as evaluation_run
from longspan.trainer.evaluation.spec import EvaluationSpec


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else in a tiny evaluation."""
    monkeypatch.setattr(evaluation_run, "curve_png", lambda result, path: path.write_bytes(b"picture"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def spec(tmp_path: Path) -> EvaluationSpec:
    return recipes.load(EvaluationSpec, tiny_run.spec_file(tmp_path, **tiny_run.QUICK))
