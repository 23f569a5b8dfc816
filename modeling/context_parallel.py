"""A model over a sequence that several ranks hold: each computes its contiguous share with the same parameters."""

from __future__ import annotations

from torch import Tensor, nn

from longspan.kernels.context_parallel.carry import StateGrad, share_last
from longspan.kernels.context_parallel.shard import SequenceShard
from longspan.modeling.state import State, pack, unpack


def set_sequence_shard(
    model: nn.Module, shard: SequenceShard, *, state_slices: int = 1, state_grad: StateGrad = "full"
) -> None:
    """Tell every layer which share of the sequence it gets; from then on all ranks must call the model together.

    The state that a call takes is the one before the whole sequence, the same on all ranks; `shared_state` makes
    the one for the next call. A sum over ranks of each parameter's gradient is the gradient.

    Args:
        model: any. shard: of this rank.
        state_slices: parts of the batch in which block-recurrent layers hand their state on.
        state_grad: "full" or "truncate", whether a recurrent state's gradient crosses from rank to rank.
    """
    for module in model.children():
        settings = {"shard": shard, "state_slices": state_slices, "state_grad": state_grad}
        for name, value in settings.items():
            if hasattr(module, name):
                setattr(module, name, value)
        # what goes through its layers block by block hands on the whole state, and its layers see no ranks
        if getattr(module, "dependency", None) != "stack_scan":
            set_sequence_shard(module, shard, state_slices=state_slices, state_grad=state_grad)


def shared_state(state: State, shard: SequenceShard) -> State:
    """The state after the whole sequence on all ranks, detached.

    Args:
        state: what the model returned on this rank. shard: of this rank.
    """
    flat: dict[str, Tensor] = pack(state)
    return unpack(dict(zip(flat, share_last(list(flat.values()), shard), strict=True)))
