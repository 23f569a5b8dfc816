"""One fork-server for all exports that are killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from life_server import LifeServer


@pytest.fixture(scope="session")
def export_server() -> Iterator[LifeServer]:
    """Everything imported once; see `export_server.py`."""
    started = LifeServer(Path(__file__).with_name("export_server.py"))
    yield started
    started.close()
