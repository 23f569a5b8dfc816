"""Ranks that a bare torchrun starts again meet each other, not what an earlier attempt left in the agent's store."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from worlds import in_world

from longspan.cluster import network
from longspan.cluster.config import ParallelConfig
from longspan.cluster.mesh import Mesh

ATTEMPTS = 2


def attempt(rank: int, agent_port: int) -> list[Any]:
    """One attempt's mesh; left as a process that dies leaves it, without a word to the agent's store."""
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT=str(agent_port))
    mesh = Mesh.build(ParallelConfig(timeout_seconds=30), "cpu", {"seed": 0})
    met = mesh.gather((rank, os.getpid()))
    mesh.close()
    return met


@pytest.mark.long
def test_every_attempt_has_a_store_of_its_own(tmp_path: Path) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=30), False)  # as the agent of torchrun
    agent.set("longspan-meeting-port", str(network.free_port()))  # of an attempt whose rank 0 died before all came
    seen = []
    for number in range(ATTEMPTS):
        [met] = in_world(2, tmp_path / str(number), [(attempt, (agent.port,))])
        assert met[0] == met[1] and [rank for rank, _ in met[0]] == [0, 1]
        seen += [pid for _, pid in met[0]]
    assert len(set(seen)) == 2 * ATTEMPTS, "processes of their own"
    assert not agent.check(["longspan-meeting-port"]), "nobody finds the store of an attempt that has begun"
