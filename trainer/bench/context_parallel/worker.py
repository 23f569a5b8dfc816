"""A rank's process: joins the others and runs the parts of the benchmark."""

from __future__ import annotations

import os
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from longspan.kernels.context_parallel.shard import SequenceShard
from longspan.trainer.bench.contender import DTYPES
from longspan.trainer.bench.context_parallel import linear, ring, step
from longspan.trainer.bench.context_parallel.processes import SILENT_SECONDS
from longspan.trainer.bench.context_parallel.rank import Rank
from longspan.trainer.bench.context_parallel.settings import ContextParallelSettings
from longspan.trainer.device import set_threads

PARTS = {"step": step, "ring": ring, "linear": linear}


def live(number: int, parent: Connection, settings: ContextParallelSettings, kind: str, folder: str) -> None:
    """One rank from start to end.

    Args:
        number: of this rank. parent: where it tells what it finds.
        settings: the same on all ranks.
        kind: "cuda": each rank has the GPU of its number; "cpu".
        folder: empty, where the ranks meet.
    """
    # NVLink's multicast is the host's, which others may share; its user says so by setting the variable
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    set_threads(None, settings.nproc)
    device = torch.device(kind, number) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/meet",
        rank=number,
        world_size=settings.nproc,
        timeout=timedelta(seconds=2 * SILENT_SECONDS),  # the parent gives up first, and says so
        device_id=device if kind == "cuda" else None,
    )
    shard = SequenceShard.of(dist.group.WORLD, device)
    rank = Rank(shard, device, DTYPES[settings.precision], settings.repeat, parent)
    for part in settings.parts:
        PARTS[part].run(settings, rank)
        rank.clear()
    dist.barrier()
    dist.destroy_process_group()
