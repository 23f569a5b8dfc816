"""Fixtures of the trainer's tests: a mesh of one, a tiny corpus, and one launch of two ranks for all that need it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks as measurements
from tiny_training import build_tiny_corpus, tiny_config
from trainer_toy import free_port, run_ranks

from longspan.cluster.mesh import Mesh


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh.build(tiny_config(Path("none")).parallel)
    yield built
    built.close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`ranks`: what each rank measured; `runs`: folder of the run directories."""
    runs = tmp_path_factory.mktemp("two_ranks")
    ports = [free_port(), free_port()]
    return {"ranks": run_ranks(measurements.everything, 2, str(shards), str(runs), ports), "runs": runs}
