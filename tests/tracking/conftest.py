"""A run directory that a trainer would have begun, and a store for its metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_store import FakeStore

from longspan.trainer import recipes
from longspan.trainer.config import RunConfig


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 100 steps that has just begun."""
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    raw = {
        "name": "tiny",
        "model": {"layers": [{"mixer": "sliding_window"}], "window_tokens": 8},
        "data": {"shards": "corpora/tiny", "segment_tokens": 16, "lanes": 2},
        "training": {"steps": 100},
    }
    config = recipes.validate(RunConfig, raw, "tiny")
    (folder / "config.yaml").write_text(recipes.dump(config), encoding="utf-8")
    return folder


@pytest.fixture
def config(run_dir: Path) -> RunConfig:
    return recipes.load(RunConfig, run_dir / "config.yaml")
