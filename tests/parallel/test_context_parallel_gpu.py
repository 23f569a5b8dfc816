"""Two GPUs that hold one sequence together against one of them: losses and every gradient, by the kernels over NCCL."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longspan.kernels import backend
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.modeling.config import ModelConfig
from longspan.modeling.context_parallel import set_sequence_shard, shared_state
from longspan.modeling.model import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
ROWS, TOKENS, WINDOW, VOCAB = 2, 8192, 512, 4096
WINDOWS = {"mixer": "sliding_window", "repeat": 2}
RECURRENT = {"mixer": "block_recurrent", "gate": "fixed", "mode": "skip", "num_states": 512}
LAYERS = {
    "window": [WINDOWS],
    "recurrent": [WINDOWS, RECURRENT, WINDOWS],
    "full attention": [{"mixer": "full_attention"}, WINDOWS],
    "linear": [{"mixer": "linear_attention"}, WINDOWS],
}
# (backend, dtype): how far the gradient of any parameter may lie from that of one GPU, relative to its norm
LIMITS = {("triton", torch.bfloat16): 5e-2, ("triton", torch.float32): 5e-3, ("reference", torch.bfloat16): 8e-2}
Gradients = dict[str, torch.Tensor]


def gradients(model: Any, shard: SequenceShard, device: torch.device) -> Gradients:
    """Of the mean loss; summed over the ranks of `shard`."""
    share = TOKENS // shard.size
    ids = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    ids = ids[:, shard.rank * share : (shard.rank + 1) * share].contiguous()
    reset = torch.zeros(ROWS, TOKENS // model.quantum, dtype=torch.bool, device=device)
    reset[0, reset.shape[1] // 2 + 1] = True
    blocks = share // model.quantum
    reset = reset[:, shard.rank * blocks : (shard.rank + 1) * blocks].contiguous()
    set_sequence_shard(model, shard, state_slices=ROWS)
    for parameter in model.parameters():
        parameter.grad = None
    losses, state, aux = model(ids, model.init_state(ROWS), reset=reset, labels=ids)
    ((losses.sum() + sum(aux.values())) / (ROWS * TOKENS)).backward()
    shared_state(state, shard)
    found = {"loss": losses.detach().double().sum()}
    found |= {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    if shard.size > 1:
        for tensor in found.values():
            dist.all_reduce(tensor)
    return found


def _enter(rank: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=2, device_id=device)
    shard = SequenceShard.of(dist.group.WORLD, device)
    gaps: dict[str, dict[str, float]] = {}
    for name, layers in LAYERS.items():
        sizes = {"dim": 512, "num_heads": 4, "head_dim": 128, "ffn_dim": 1024, "window_tokens": WINDOW, "dropout": 0.0}
        config = ModelConfig(vocab_size=VOCAB, layers=layers, **sizes)
        for kind, dtype in LIMITS:
            torch.manual_seed(0)
            model = build_model(config).to(device, dtype)
            with backend.forced(kind):
                want = gradients(model, ONE_RANK, device)
                for repeat in range(3):  # memory is given out again
                    found = gradients(model, shard, device)
                    gap = {key: float((found[key] - want[key]).norm() / want[key].norm()) for key in want}
                    gaps[f"{name}, {kind}, {dtype}, {repeat}"] = gap
    torch.save(gaps, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_gradients_of_two_gpus_are_those_of_one() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (folder,), nprocs=2, start_method="spawn")
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    assert len(ranks[0]) == len(LAYERS) * len(LIMITS) * 3
    limits = {str(key): limit for key, limit in LIMITS.items()}
    bad = []
    for gaps in ranks:
        for run, gap in gaps.items():
            _, kind, dtype, _ = run.split(", ")
            limit = next(value for key, value in limits.items() if kind in key and dtype in key)
            bad += [(run, name, value) for name, value in gap.items() if not value < limit]
    assert not bad, sorted(bad, key=lambda found: -found[2])[:12]
