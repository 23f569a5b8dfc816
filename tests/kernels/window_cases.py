"""Inputs of window attention for the tests of its fused form, and one run forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from longspan.kernels.backend import Backend, forced
from longspan.kernels.window_attention.api import window_attention
from longspan.kernels.window_attention.reference import l2_normalise

NAMES = ("out", "keys", "values", "d_qkv", "d_cached_keys", "d_cached_values", "d_scale", "d_table")


def _inside(x: Tensor, row: int, token: int, offset: int) -> Tensor:
    """x [B, T, H, D] with rows and tokens so far apart, its first number `offset` numbers into its storage."""
    room = x.new_zeros(offset + x.shape[0] * row)
    place = room.as_strided(x.shape, (row, token, x.shape[3], 1), offset)
    place.copy_(x)
    return place


# how a gradient [B, T, H, D] may lie in memory
ARRIVALS: dict[str, Callable[[Tensor], Tensor]] = {
    "beside a neighbour": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "at an odd address": lambda x: _inside(x, x[0].numel(), x[0, 0].numel(), 1),
    "odd steps": lambda x: _inside(x, x.shape[1] * (x[0, 0].numel() + 1), x[0, 0].numel() + 1, 0),
    "odd rows": lambda x: _inside(x, x[0].numel() + 8, x[0, 0].numel(), 0),
    "one row for all": lambda x: x[:1].expand_as(x),
    "one token for all": lambda x: x[:, :1].expand_as(x),
    "heads apart": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@dataclass(frozen=True)
class Case:
    """One shape; `where` places document starts: nowhere, first, blocks or anywhere."""

    window: int
    tokens: int
    width: int = 16
    heads: int = 2
    rows: int = 2
    where: str = "anywhere"
    rope: bool = False
    drop: bool = False
    scale: float = 1.0

    def __str__(self) -> str:
        options = [self.where] + [name for name in ("rope", "drop") if getattr(self, name)]
        return f"W{self.window}-T{self.tokens}-D{self.width}-x{self.scale:g}-" + "-".join(options)


def reset_of(case: Case, device: str = "cpu") -> Tensor:
    """bool [B, T]."""
    reset = torch.zeros(case.rows, case.tokens, dtype=torch.bool)
    if case.where == "first":
        reset[:, 0] = True
    if case.where == "blocks":
        reset[0, 0] = reset[-1, (case.tokens - 1) // case.window * case.window] = True
    if case.where == "anywhere":
        reset[0, case.tokens // 2] = True
        reset[-1, [0, case.tokens // 3, case.tokens - 1]] = True
    return reset.to(device)


def inputs_of(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Leaf tensors, what multiplies each output in the loss (w_*), and the dropout mask if any; in `dtype`."""
    g = torch.Generator(device).manual_seed(case.tokens)
    draw = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
    tokens = (case.rows, case.tokens, case.heads, case.width)
    cache = (case.rows, case.window, case.heads, case.width)
    tensors = {
        "qkv": draw(case.rows, case.tokens, 3, case.heads, case.width),
        "cached_keys": l2_normalise(draw(*cache)),
        "cached_values": draw(*cache),
        "scale": case.scale * draw(case.heads),
        "w_out": draw(*tokens),
        "w_keys": draw(*cache),
        "w_values": draw(*cache),
    }
    if not case.rope:
        tensors["table"] = draw(case.heads, 32)
    if case.drop:
        keep = torch.rand(case.heads, case.window, 2 * case.window, generator=g, device=device) > 0.1
        tensors["drop"] = keep / 0.9
    return {name: x.to(dtype) for name, x in tensors.items()}


def run(case: Case, tensors: dict[str, Tensor], form: Backend) -> dict[str, Tensor]:
    """Outputs and gradients of all leaves in one form of the kernel."""
    t = {name: x.detach() for name, x in tensors.items()}
    leaves = ["qkv", "cached_keys", "cached_values", "scale"] + ([] if case.rope else ["table"])
    for name in leaves:
        t[name].requires_grad_()
    with forced(form):
        outputs = window_attention(
            t["qkv"],
            t["cached_keys"],
            t["cached_values"],
            t.get("table"),
            t["scale"],
            reset=reset_of(case, str(t["qkv"].device)),
            reset_grid=case.window if case.where == "blocks" else 1,
            drop=t.get("drop"),
            positions="rope" if case.rope else "t5",
        )
        grads = torch.autograd.grad(outputs, [t[name] for name in leaves], [t["w_out"], t["w_keys"], t["w_values"]])
    return dict(zip(NAMES, [*outputs, *grads], strict=False))


def copy_engine(copies: bool) -> AbstractContextManager[object]:
    """Inside, the kernels read by the copy engine, or do without."""
    return mock.patch("longspan.kernels.window_attention.fused.copies_tiles", return_value=copies)


def run_once(case: Case, dtype: torch.dtype, copies: bool) -> None:
    """The Triton form of one case on the GPU, for what it compiles."""
    with copy_engine(copies):
        run(case, inputs_of(case, dtype, "cuda"), "triton")
    torch.cuda.synchronize()
