"""Carried state as a nested dictionary of tensors, batch dimension first, and everything done to it as tree maps.

No function here changes a tensor in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from longspan.errors import ShapeError, UsageError

# leaves are tensors [B, ...]; a recursive type would need a cast at every use
State: TypeAlias = dict[str, Any]
Kind = Literal["recurrent", "cache"]
SEPARATOR = "."


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a state.

    Attributes:
        shape: without the batch dimension.
        dtype: as stored between steps.
        init: "zeros", or the name of the learned initial value among the module's parameters.
        kind: "recurrent" (states, matrix states, memories) or "cache" (keys and values of a window).
        head_axis: axis of the heads, batch included, which tensor-parallel ranks divide; None: whole on every rank.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    init: str = "zeros"
    head_axis: int | None = None


SpecTree: TypeAlias = dict[str, Any]  # leaves are StateSpec


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function` of each leaf and the leaves at the same place of `others`; a tree of the results."""
    if not isinstance(tree, dict):
        return function(tree, *others)
    return {name: tree_map(function, child, *(other[name] for other in others)) for name, child in tree.items()}


def leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, leaf) of each leaf, in order."""
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    start = f"{prefix}{SEPARATOR}" if prefix else ""
    return [found for name, child in tree.items() for found in leaves(child, f"{start}{name}")]


def detach(state: State) -> State:
    """The same values without gradient."""
    return tree_map(lambda s: s.detach(), state)


def index_select(state: State, rows: Tensor) -> State:
    """The given rows, int64 [B'], in that order."""
    return tree_map(lambda s: s.index_select(0, rows.to(s.device)), state)


def to(state: State, device: torch.device | str) -> State:
    """The same state on another device."""
    return tree_map(lambda s: s.to(device), state)


def where(rows: Tensor, chosen: State, otherwise: State) -> State:
    """`chosen` in the rows where bool [B] is true, `otherwise` in the others."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows.to(a.device).view(-1, *[1] * (a.dim() - 1)), a, b)

    return tree_map(pick, chosen, otherwise)


def pack(state: State) -> dict[str, Tensor]:
    """A flat dictionary, dotted name -> tensor; the tensors themselves, not copies."""
    return dict(leaves(state))


def unpack(flat: dict[str, Tensor]) -> State:
    """The nested state of a flat dictionary made by `pack`."""
    state: State = {}
    for name, tensor in flat.items():
        *path, last = name.split(SEPARATOR)
        place: Any = state
        for part in path:
            place = place.setdefault(part, {})
        place[last] = tensor
    return state


def of_kinds(specs: SpecTree, kinds: Collection[str], changed: State, unchanged: State) -> State:
    """Leaves of the given kinds from `changed`, the others from `unchanged`.

    Raises:
        UsageError: there is no such kind of state.
    """
    if unknown := set(kinds) - set(get_args(Kind)):
        raise UsageError(f"no kind of state is called {', '.join(sorted(unknown))}. Use {', '.join(get_args(Kind))}.")
    return tree_map(lambda spec, a, b: a if spec.kind in kinds else b, specs, changed, unchanged)


def check(state: State, specs: SpecTree, batch: int, device: torch.device) -> None:
    """Compare a state with what the module expects.

    Args:
        state: the state. specs: of the module. batch: rows of the tokens. device: of the tokens.

    Raises:
        ShapeError: a tensor is missing, extra, has another shape or is on another device; names it and both.
    """
    wanted = {name: (batch, *spec.shape) for name, spec in leaves(specs)}
    given = pack(state)
    if wanted.keys() != given.keys():
        names = sorted(wanted.keys() ^ given.keys())
        raise ShapeError(
            f"the state's tensors differ from the model's at {', '.join(names)}. "
            "Use the state of this model: init_state, or what its forward returned."
        )
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ShapeError(
                f"state tensor {name} is {list(given[name].shape)}, expected {list(shape)} for {batch} rows. "
                "Select the rows with index_select, or start them with init_state."
            )
        if given[name].device != device:
            raise ShapeError(
                f"state tensor {name} is on {given[name].device}, the tokens on {device}. "
                "Move the state with longspan.modeling.state.to, or the tokens, to the device of the model."
            )
