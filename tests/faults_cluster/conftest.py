"""A tiny corpus and, for each number of ranks, the end state of a training that nothing disturbed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from launches import stop_all, train_undisturbed, write_recipe
from tiny_training import build_tiny_corpus


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def recipe(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", shards)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    stop_all()


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    @cache
    def train(ranks: int) -> dict[str, str]:
        return train_undisturbed(recipe, tmp_path_factory.mktemp("undisturbed") / "run", ranks)

    return train
