"""Law 8: n ranks that hold one sequence together against one rank; outputs, states and every gradient in fp64."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from longspan.kernels.context_parallel import halo as halo_module
from longspan.kernels.context_parallel.messages import count_traffic
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.modeling.context_parallel import set_sequence_shard, shared_state
from longspan.modeling.state import State, pack

sys.path.insert(0, str(Path(__file__).parents[1] / "modeling"))
from tiny_models import MODELS, WINDOW, no_reset, random_tokens, tiny_model

NEAR = 1e-10
ROWS = 3
Result = dict[str, Tensor]


def documents(model: Any, tokens: int, kind: str) -> Tensor:
    """Document starts on the quantum grid: nowhere; inside shares; at the edges of shares of a quarter."""
    reset = no_reset(model, ROWS, tokens)
    count = reset.shape[1]
    if kind == "inside":
        reset[0, 0] = reset[1, count // 4 - 1] = reset[1, count - 1] = reset[2, min(1, count - 1)] = True
    if kind == "edges":
        reset[0, count // 4] = reset[1, count // 2] = reset[2, count // 2] = reset[2, 3 * count // 4] = True
    return reset


def two_steps(
    name: str, shard: SequenceShard, tokens: int, kind: str, *, checkpointing: Any = "none", **options: Any
) -> Result:
    """Two training steps' worth of losses and gradients: the second begins with the state that the first left."""
    model = tiny_model(name)
    model.set_activation_checkpointing(checkpointing)
    set_sequence_shard(model, shard, **options)
    share = tokens // shard.size
    place = slice(shard.rank * share, (shard.rank + 1) * share)
    state: State = model.init_state(ROWS)
    found: Result = {}
    for step in range(2):
        ids = random_tokens(ROWS, tokens, seed=step)[:, place]
        reset = documents(model, tokens, kind if step == 0 else "none")
        reset = reset[:, place.start // model.quantum : place.stop // model.quantum]
        weights = torch.rand(ROWS, tokens, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        losses, new_state, aux = model(ids, state, reset=reset, labels=ids)
        ((losses * weights[:, place]).sum() + sum(aux.values())).backward()
        found[f"losses {step}"] = losses.detach()
        state = shared_state(new_state, shard)
        found |= {f"state {step} {path}": tensor for path, tensor in pack(state).items()}
    for path, parameter in model.named_parameters():
        found[f"gradient {path}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def on_this_rank(rank: int, name: str, tokens: int, kind: str, options: dict[str, Any]) -> Result:
    return two_steps(name, SequenceShard.of(dist.group.WORLD), tokens, kind, **options)


def joined(parts: list[Result]) -> Result:
    """Losses side by side, gradients summed, states of the last rank after checking that all have the same."""
    whole: Result = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name.startswith("losses"):
            whole[name] = torch.cat(values, dim=1)
        elif name.startswith("gradient"):
            whole[name] = torch.stack(values).sum(0)
        else:
            assert all(torch.equal(value, values[0]) for value in values), name
            whole[name] = values[-1]
    return whole


def largest_difference(name: str, ranks: int, tokens: int, kind: str, **options: Any) -> float:
    want = two_steps(name, ONE_RANK, tokens, kind)
    got = joined(on_ranks(on_this_rank, ranks, name, tokens, kind, options))
    assert want.keys() == got.keys()
    return max((got[key] - want[key]).abs().max().item() for key in want if want[key].numel())


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_are_one_rank(name: str) -> None:
    """A share is two windows; documents start inside shares, in the first and in the last block."""
    assert largest_difference(name, 2, 4 * WINDOW, "inside") <= NEAR


@pytest.mark.parametrize("name", ["fixed_skip", "hybrid", "two_recurrent", "feedback", "memory_hybrid"])
def test_four_ranks_with_documents_that_start_at_their_edges(name: str) -> None:
    assert largest_difference(name, 4, 4 * WINDOW, "edges") <= NEAR


@pytest.mark.long
@pytest.mark.parametrize("kind", ["none", "inside", "edges"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_ranks_and_documents(name: str, ranks: int, kind: str) -> None:
    for blocks in (4, 12):
        assert largest_difference(name, ranks, blocks * WINDOW, kind) <= NEAR


@pytest.mark.parametrize(("ranks", "tokens"), [(4, 8), (4, 4), (2, 6)], ids=["two hops", "four hops", "odd share"])
@pytest.mark.parametrize("name", ["sliding_window", "full_attention", "linear_attention"])
def test_shares_shorter_than_the_window(name: str, ranks: int, tokens: int) -> None:
    for kind in ("none", "inside", "edges"):
        assert largest_difference(name, ranks, tokens, kind) <= NEAR


def test_state_in_slices_of_the_batch() -> None:
    assert largest_difference("fixed_skip", 2, 4 * WINDOW, "inside", state_slices=2) <= NEAR


@pytest.mark.parametrize("policy", ["mixer", "layer"])
@pytest.mark.parametrize("name", ["fixed_skip", "hybrid", "full_attention"])
def test_what_is_computed_again_is_the_same(name: str, policy: str) -> None:
    assert largest_difference(name, 2, 4 * WINDOW, "inside", checkpointing=policy, state_slices=2) <= NEAR


def test_truncated_gradient_is_another_and_reaches_every_parameter() -> None:
    want = two_steps("fixed_skip", ONE_RANK, 8 * WINDOW, "none")
    got = joined(on_ranks(on_this_rank, 2, "fixed_skip", 8 * WINDOW, "none", {"state_grad": "truncate"}))
    for name, tensor in got.items():
        if name.startswith("gradient"):
            assert tensor.abs().max() > 0, name
        else:
            assert (tensor - want[name]).abs().max() <= NEAR, name
    name = "gradient backbone.layers.1.mixer.recurrent.write.query.weight"
    assert (got[name] - want[name]).abs().max() > 1e-6


def traffic(rank: int, name: str, tokens: int, checkpointing: str) -> dict[str, int]:
    with count_traffic() as sent:
        two_steps(name, SequenceShard.of(dist.group.WORLD), tokens, "none", checkpointing=checkpointing)
    return dict(sent)


RANKS = 4
HALO_ROW = 2 * 2 * 8 + 1  # keys and values of two heads of eight, and the flag of a document start
STATE = 3 * 16  # vectors of a width
PASSES = 2 * 2  # forward and backward of two steps
FP64 = 8


def halo_rows(share: int) -> int:
    """Rows that all ranks together send to the right: to each rank that lies `hop` to the right of another."""
    rows = [min(share, max(0, WINDOW - (hop - 1) * share)) for hop in range(1, RANKS)]
    return sum((RANKS - hop) * count for hop, count in enumerate(rows, 1))


@pytest.mark.parametrize(
    ("name", "share", "want"),
    [
        ("sliding_window", WINDOW, {"halo": PASSES * 2 * ROWS * (RANKS - 1) * WINDOW * HALO_ROW}),
        ("sliding_window", 2, {"halo": PASSES * 2 * ROWS * halo_rows(2) * HALO_ROW}),
        (
            "fixed_skip",
            WINDOW,
            {
                "halo": PASSES * 2 * ROWS * (RANKS - 1) * WINDOW * HALO_ROW,
                "carry": PASSES * ROWS * (RANKS - 1) * STATE,
            },
        ),
        # factor and state to all others in the forward, the state's gradient in the backward
        ("linear_attention", WINDOW, {"scan": 2 * 2 * ROWS * RANKS * (RANKS - 1) * (2 * 2 * 8 * 9 + 1)}),
    ],
    ids=["one hop", "two hops", "recurrent", "linear"],
)
def test_traffic_is_the_formula(name: str, share: int, want: dict[str, int]) -> None:
    """All ranks together send what docs/context_parallel.md says, also where layers are computed twice."""
    for checkpointing in ("none", "layer"):
        total: Counter[str] = Counter()
        for sent in on_ranks(traffic, RANKS, name, RANKS * share, checkpointing):
            total.update(sent)
        del total["share_last"]
        assert total == {operation: FP64 * count for operation, count in want.items()}, checkpointing


def test_a_halo_from_the_wrong_side_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the halo's gradient is dropped."""
    backward = halo_module._Halo.backward

    def deaf(ctx: Any, grad: Tensor) -> Any:
        return backward(ctx, torch.zeros_like(grad))

    monkeypatch.setattr(halo_module._Halo, "backward", staticmethod(deaf))
    assert largest_difference("sliding_window", 2, 4 * WINDOW, "none") > 1e-6
