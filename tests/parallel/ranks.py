"""Functions on several gloo ranks in fresh processes of one host, with a deadline."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what is checkpointed loads it: here once, not in each of the ranks
import torch.distributed as dist
import torch.multiprocessing as mp

_DEADLINE = timedelta(seconds=60)


def on_ranks(worker: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """What `worker(rank, *args)` returns on each rank; a rank that hangs or fails fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        mp.start_processes(_enter, (worker, ranks, folder, args), nprocs=ranks, start_method="fork")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _enter(rank: int, worker: Callable[..., Any], ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    # process groups of earlier tests come along without their threads: to collect one would wait for these for ever
    gc.freeze()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=_DEADLINE)
    torch.save(worker(rank, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
