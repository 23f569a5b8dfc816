"""`ranks.on_ranks` itself: ranks are forks of the test's process, with all that earlier tests left in it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import ranks
import torch.distributed as dist

_HELD: list[Any] = []


def _drop_what_came_along(rank: int) -> int:
    _HELD.clear()
    gc.collect()
    return rank


def test_a_rank_does_not_wait_for_the_threads_of_an_inherited_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    circle: list[Any] = [dist.group.WORLD]
    circle.append(circle)
    _HELD.append(circle)
    dist.destroy_process_group()
    del circle
    try:
        assert ranks.on_ranks(_drop_what_came_along, 2) == [0, 1]
    finally:
        _HELD.clear()
