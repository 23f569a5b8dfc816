"""Whose result a node gives."""

from __future__ import annotations

from longspan.cluster.exit_records import ExitRecord
from longspan.cluster.launcher import NodeResult


def test_the_first_rank_speaks_for_its_node_whoever_ends_first() -> None:
    ends = [
        ExitRecord(rank=1, exit_code=0, pid=2, result={"checkpoint": None}, time=1.0),
        ExitRecord(rank=0, exit_code=0, pid=1, result={"checkpoint": "step-00000004"}, time=2.0),
    ]
    assert NodeResult(exit_code=0, ends=ends, restarts=0).result() == {"checkpoint": "step-00000004"}
    assert NodeResult(exit_code=70, ends=[ExitRecord(rank=0, exit_code=70, pid=1)], restarts=0).result() == {}
