"""One fork-server, one corpus and one uninterrupted run for all fault tests of a session."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from life_server import LifeServer
from trainer_lives import Moment, Run, tiny_corpus, tiny_recipe

from longspan.errors import EXIT_REQUEUE

STEPS = 40


@pytest.fixture(scope="session")
def server() -> Iterator[LifeServer]:
    """Everything imported once."""
    started = LifeServer(Path(__file__).with_name("fork_server.py"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of short documents."""
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def recipe(shards: Path) -> dict[str, Any]:
    """Configuration of every run here; they differ only in what happens to them."""
    return tiny_recipe(shards, seed=1, steps=STEPS)


@pytest.fixture(scope="session")
def uninterrupted(server: LifeServer, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happens to."""
    run = Run(server, tmp_path_factory.mktemp("uninterrupted"), recipe)
    run.finish()
    assert sorted(run.losses()) == list(range(1, STEPS + 1)) and not run.resumes
    return run


@pytest.fixture(scope="session")
def stopped(server: LifeServer, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that SIGTERM stopped after seven steps or a little more; for copies to go on from."""
    run = Run(server, tmp_path_factory.mktemp("stopped"), recipe)
    assert run.live(Moment("step", count=7), signal.SIGTERM) == EXIT_REQUEUE, run.messages()
    assert len(run.store.committed()) == 2
    return run
