"""The state chain of a Block-Recurrent layer handed from rank to rank: the kernels, interpreted, against one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from longspan.kernels import backend
from longspan.kernels.block_recurrent import over_ranks
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.modeling.config import BlockRecurrentConfig, ModelConfig
from longspan.modeling.context_parallel import set_sequence_shard
from longspan.modeling.mixers.block_recurrent import BlockRecurrent

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU: test_context_parallel_gpu.py")
ROWS, BLOCKS, WINDOW, DIM = 2, 4, 16, 32
Result = dict[str, torch.Tensor]


def layer_results(shard: SequenceShard, **options: Any) -> Result:
    """Output and gradients of one layer over this rank's share."""
    torch.manual_seed(0)
    layer = BlockRecurrentConfig(gate="fixed", mode="skip", num_states=16)
    sizes = {"dim": DIM, "num_heads": 2, "head_dim": 16, "ffn_dim": 32, "window_tokens": WINDOW, "dropout": 0.0}
    mixer = BlockRecurrent(ModelConfig(vocab_size=32, layers=[layer], **sizes), layer, WINDOW)
    set_sequence_shard(torch.nn.ModuleList([mixer]), shard, **options)
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(ROWS, BLOCKS * WINDOW, DIM, generator=generator) for _ in range(2))
    blocks = BLOCKS // shard.size
    place = slice(shard.rank * blocks * WINDOW, (shard.rank + 1) * blocks * WINDOW)
    reset = torch.zeros(ROWS, BLOCKS, dtype=torch.bool)
    reset[0, 2] = reset[1, 1] = True
    x = x[:, place].clone().requires_grad_()
    y, state, _ = mixer(x, mixer.init_state(ROWS), reset=reset[:, blocks * shard.rank :][:, :blocks])
    (y * weights[:, place]).sum().backward()
    found = {"y": y.detach(), "dx": x.grad, "state": state["state"].detach()}
    return found | {f"d {name}": p.grad for name, p in mixer.named_parameters() if p.grad is not None}


def on_this_rank(rank: int, kind: str, slices: int) -> tuple[Result, int]:
    calls = 0
    side_by_side = over_ranks._side_by_side

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return side_by_side(*arguments)

    over_ranks._side_by_side = counted
    with backend.forced(kind):
        return layer_results(SequenceShard.of(dist.group.WORLD), state_slices=slices), calls


@pytest.mark.parametrize(("kind", "slices"), [("triton", 2), ("reference", 2)])
def test_two_ranks_are_one(kind: str, slices: int) -> None:
    with backend.forced("reference"):
        want = layer_results(ONE_RANK)
    (first, calls), (second, _) = on_ranks(on_this_rank, 2, kind, slices)
    assert calls == (kind == "triton")
    for name, tensor in want.items():
        if name in ("y", "dx"):
            got = torch.cat([first[name], second[name]], dim=1)
        else:
            got = second[name] if name == "state" else first[name] + second[name]
        assert (got - tensor).norm() <= 1e-4 * tensor.norm() + 1e-6, name
