"""Ranks that hold one model together against one rank: losses, logits, states and every gradient in fp64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_context_parallel import documents
from torch import Tensor

from longspan.errors import UsageError
from longspan.kernels.context_parallel.messages import count_traffic
from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.kernels.tensor_parallel.shard import WHOLE, TensorShard
from longspan.modeling import tensor_parallel
from longspan.modeling.context_parallel import set_sequence_shard, shared_state
from longspan.modeling.state import State, leaves, pack
from longspan.modeling.tensor_parallel import own_state, partition_of, shard_model, whole_state

sys.path.insert(0, str(Path(__file__).parents[1] / "modeling"))
from tiny_models import MODELS, WINDOW, random_tokens, tiny_model

NEAR = 1e-10
ROWS = 3
SIZES = {"num_heads": 4, "head_dim": 4, "vocab_size": 20}
Result = dict[str, Tensor]


def groups(rank: int, tp: int, cp: int) -> tuple[TensorShard, SequenceShard]:
    """Ranks in the order of the mesh: tensor parallel first."""
    tp_groups = [dist.new_group(list(range(first, first + tp))) for first in range(0, tp * cp, tp)]
    cp_groups = [dist.new_group(list(range(first, tp * cp, tp))) for first in range(tp)]
    return TensorShard.of(tp_groups[rank // tp]), SequenceShard.of(cp_groups[rank % tp])


def whole(parameter: Tensor, tensor: Tensor, tensors: TensorShard) -> Tensor:
    partition = partition_of(parameter)
    return tensor if partition is None else partition.whole(tensor, tensors)


def run(
    name: str,
    tensors: TensorShard,
    sequence: SequenceShard,
    tokens: int,
    kind: str,
    checkpointing: str = "none",
    **changes: Any,
) -> Result:
    """Two steps of losses and gradients, logits, then decoding token by token; tensors with all heads and words."""
    model = tiny_model(name, **(SIZES | changes))
    model.set_activation_checkpointing(checkpointing)
    shard_model(model, tensors)
    set_sequence_shard(model, sequence)
    share = tokens // sequence.size
    place = slice(sequence.rank * share, (sequence.rank + 1) * share)
    blocks = slice(place.start // model.quantum, place.stop // model.quantum)
    specs = model.state_spec()
    state: State = model.init_state(ROWS)
    found: Result = {}
    for step in range(2):
        ids = random_tokens(ROWS, tokens, seed=step)[:, place]
        labels = ids.masked_fill(ids == 3, -100)
        reset = documents(model, tokens, kind if step == 0 else "none")[:, blocks]
        weights = torch.rand(ROWS, tokens, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        losses, new_state, aux = model(ids, state, reset=reset, labels=labels)
        ((losses * weights[:, place]).sum() + sum(aux.values())).backward()
        found[f"losses {step}"] = losses.detach()
        state = shared_state(new_state, sequence)
        found |= {f"state {step} {path}": t for path, t in pack(whole_state(state, specs, tensors)).items()}
    for path, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[f"gradient {path}"] = whole(parameter, gradient, tensors)
        found[f"weight {path}"] = whole(parameter, parameter.detach(), tensors)
    with torch.no_grad():
        model.eval()
        found["losses of logits"], _, _ = model(ids, state, reset=reset)
        set_sequence_shard(model, ONE_RANK)
        decode = model.decode_state(state)
        for index, token in enumerate(random_tokens(ROWS, WINDOW + 2, seed=9).unbind(1)):
            found[f"logits of step {index}"], decode = model.step_tokens(token, decode)
    return found


def on_this_rank(rank: int, name: str, tp: int, cp: int, tokens: int, kind: str, changes: dict[str, Any]) -> Result:
    return run(name, *groups(rank, tp, cp), tokens, kind, **changes)


def joined(parts: list[Result], tp: int) -> Result:
    """Losses of the sequence's shares side by side, their gradients summed; tensor-parallel ranks agree on all."""
    for rank, part in enumerate(parts):
        for name, tensor in part.items():
            assert torch.equal(tensor, parts[rank - rank % tp][name]), (rank, name)
    result: Result = {}
    for name in parts[0]:
        values = [part[name] for part in parts[::tp]]
        if name.startswith("losses"):
            result[name] = torch.cat(values, dim=1)
        elif name.startswith("gradient"):
            result[name] = torch.stack(values).sum(0)
        else:
            result[name] = values[-1]
    return result


def traffic(rank: int, name: str, tp: int) -> dict[str, int]:
    model = tiny_model(name, **SIZES)
    shard_model(model, TensorShard.of(dist.group.WORLD))
    ids = random_tokens(ROWS, TOKENS)
    reset = torch.zeros(ROWS, TOKENS // model.quantum, dtype=torch.bool)
    with count_traffic() as sent:
        losses, _, _ = model(ids, model.init_state(ROWS), reset=reset, labels=ids)
        losses.sum().backward()
    return dict(sent)


def largest_difference(name: str, tp: int, cp: int, tokens: int, kind: str, **changes: Any) -> float:
    want = run(name, WHOLE, ONE_RANK, tokens, kind, **changes)
    got = joined(on_ranks(on_this_rank, tp * cp, name, tp, cp, tokens, kind, changes), tp)
    assert want.keys() == got.keys()
    assert all(want[key].shape == got[key].shape for key in want)
    return max((got[key] - want[key]).abs().max().item() for key in want if want[key].numel())


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_are_one_rank(name: str) -> None:
    assert largest_difference(name, 2, 1, 4 * WINDOW, "inside") <= NEAR


@pytest.mark.parametrize("name", ["lstm_dual", "hybrid", "feedback", "memory_hybrid"])
def test_with_a_divided_sequence(name: str) -> None:
    """Two ranks for the layers times two for the sequence."""
    assert largest_difference(name, 2, 2, 4 * WINDOW, "inside") <= NEAR


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("feedback", {"dropout": 0.2}),
        ("lstm_dual", {"dropout": 0.2, "checkpointing": "mixer"}),
        ("hybrid", {"checkpointing": "layer"}),
    ],
    ids=["dropout", "dropout and mixers again", "layers again"],
)
def test_random_numbers_and_recomputation_are_those_of_one_rank(name: str, changes: dict[str, Any]) -> None:
    assert largest_difference(name, 2, 1, 4 * WINDOW, "inside", **changes) <= NEAR


TOKENS = 4 * WINDOW
VECTORS = ROWS * TOKENS * 16  # of tokens; elements
EDGES = 2 * 2 * 2 * VECTORS  # two layers: mixer and feed-forward network, sum in the forward and in the backward
HEAD = VECTORS + 3 * ROWS * TOKENS + VECTORS  # embedding; largest, sum, label of each token; gradient of the head
KEYS = 2 * ROWS * (WINDOW + TOKENS) * 4 * 4  # keys and values of all heads, with the cache
STATE_PATH = (
    3 * 16 * 2 + 16 + 4 * 16 * 16 + 2 * 4 + 32 * 16 + 16
)  # initial, ids; norm; projections; scales; output; gate


@pytest.mark.parametrize(
    ("name", "tp", "want"),
    [
        ("sliding_window", 2, {"tensor_sum": EDGES + HEAD}),
        ("sliding_window", 4, {"tensor_sum": EDGES + HEAD}),
        ("fixed_skip", 2, {"tensor_sum": EDGES + HEAD + STATE_PATH, "tensor_gather": 2 * KEYS // 2}),
        ("fixed_skip", 4, {"tensor_sum": EDGES + HEAD + STATE_PATH, "tensor_gather": 2 * 3 * KEYS // 4}),
    ],
)
def test_traffic_is_the_formula(name: str, tp: int, want: dict[str, int]) -> None:
    """Every rank sends what docs/tensor_parallel.md says."""
    for sent in on_ranks(traffic, tp, name, tp):
        assert sent == {operation: 8 * count for operation, count in want.items()}


def test_a_state_path_whose_gradients_are_not_summed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: each rank keeps its own part."""
    monkeypatch.setattr(tensor_parallel, "_sum_gradients", lambda module, shard: None)
    with pytest.raises(AssertionError):
        largest_difference("fixed_skip", 2, 1, 4 * WINDOW, "none")


def odd_ids(rank: int) -> tuple[Tensor, str]:
    """Losses of labels of which one is no word, and what is said of a token that is none."""
    model = tiny_model("sliding_window", **SIZES)
    shard_model(model, TensorShard.of(dist.group.WORLD))
    ids = torch.tensor([[1, 2, 3, 4]])
    reset = torch.zeros(1, 4, dtype=torch.bool)
    losses, _, _ = model(ids, model.init_state(1), reset=reset, labels=torch.tensor([[5, 20, -100, 6]]))
    with pytest.raises(IndexError) as refused:
        model.embedding(torch.tensor([20]))
    return losses.detach(), str(refused.value)


def test_ids_outside_of_the_vocabulary() -> None:
    for losses, message in on_ranks(odd_ids, 2):
        assert losses.isnan().tolist() == [[False, True, False, False]]
        assert losses[0, 2] == 0
        assert "out of range" in message


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"num_heads = 2, vocab_size = 17: must be multiples of the 4"):
        shard_model(tiny_model("sliding_window"), TensorShard(None, 0, 4))


def test_state_of_all_heads_comes_apart_as_it_was_put_together() -> None:
    model = tiny_model("hybrid", **SIZES)
    specs = model.state_spec()
    state = model.init_state(ROWS)
    for tensor in pack(state).values():
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    parts = [pack(own_state(state, specs, TensorShard(None, rank, 2))) for rank in range(2)]
    for path, spec in leaves(specs):
        axis = spec.head_axis
        got = parts[1][path] if axis is None else torch.cat([part[path] for part in parts], dim=axis)
        assert torch.equal(got, pack(state)[path]), path


@pytest.mark.long
@pytest.mark.parametrize("kind", ["none", "inside", "edges"])
@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_ranks_and_documents(name: str, tp: int, cp: int, kind: str) -> None:
    for blocks in (4, 12):
        assert largest_difference(name, tp, cp, blocks * WINDOW, kind) <= NEAR
