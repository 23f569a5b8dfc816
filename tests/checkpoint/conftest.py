"""What the tests of checkpoints share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from object_server import ObjectServer, object_server
from tiny_training import build_tiny_corpus


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    """A store that speaks S3 on loopback."""
    with object_server() as started:
        yield started


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_corpus(tmp_path_factory.mktemp("corpus"))
