"""Random inputs of the state chain and its values in fp64, for the tests of the chain's kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.kernels.block_recurrent.state_path import Gate, StatePath, StateWrite
from longspan.kernels.window_attention.reference import l2_normalise


@dataclass(frozen=True)
class Case:
    """A shape; `scale` multiplies the learned scales of the logits."""

    rows: int
    states: int
    window: int
    dim: int
    heads: int
    width: int
    tokens: int
    gate: str = "fixed"
    tanh: bool = False
    scale: float = 2.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def make_case(case: Case, seed: int = 0) -> tuple[StatePath, Tensor, Tensor, Tensor, Tensor]:
    """(weights, state, keys, values, reset); some documents start in blocks 0, 2 and the last."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(case.device, case.dtype)

    full, dim = case.heads * case.width, case.dim
    matrix = lambda out, inner: draw(out, inner, std=inner**-0.5)  # noqa: E731
    if case.gate == "fixed":
        gate = Gate(bias=draw(dim), tanh=case.tanh)
    else:
        gate = Gate(None, matrix(dim, 2 * full), draw(dim), matrix(dim, 2 * full), draw(dim), tanh=case.tanh)
    write = StateWrite(
        query=matrix(full, dim),
        token_query=matrix(full, dim),
        self_scale=draw(case.heads, std=case.scale),
        token_scale=draw(case.heads, std=case.scale),
        output=matrix(dim, 2 * full) * 4,
        gate=gate,
    )
    path = StatePath(
        heads=case.heads,
        initial=draw(case.states, dim),
        norm=1 + draw(dim, std=0.3),
        ids=draw(case.states, dim),
        key=matrix(full, dim),
        value=matrix(full, dim),
        write=write,
    )
    length = case.window + case.tokens
    state = draw(case.rows, case.states, dim, std=2.0).float()
    keys = l2_normalise(draw(case.rows, length, case.heads, case.width))
    values = draw(case.rows, length, case.heads, case.width)
    reset = torch.zeros(case.rows, -(-case.tokens // case.window), dtype=torch.bool, device=case.device)
    reset[0, 0] = reset[-1, -1] = True
    reset[-1, 2:3] = True
    return path, state, keys, values, reset


def reference(
    path: StatePath, state: Tensor, keys: Tensor, values: Tensor, reset: Tensor, window: int
) -> dict[str, Tensor]:
    """Every field of the chain's result in fp64, by name: block by block, from the paper's equations."""
    write, heads = path.write, path.heads
    assert write is not None and write.gate is not None and write.output is not None
    initial, norm, ids, output = (x.double() for x in (path.initial, path.norm, path.ids, write.output))
    weights = [x.double() for x in (path.key, path.value, write.query, write.token_query)]
    scales = [write.self_scale.double().abs()[:, None], write.token_scale.double().abs()[:, None]]
    state, keys, values = state.double(), keys.double(), values.double()
    kept: dict[str, list[Tensor]] = {name: [] for name in ("entering", "rstd", "inv", "proj", "read", "lse")}
    for block in range(reset.shape[1]):
        fresh = reset[:, block, None, None]
        state = torch.where(fresh, initial, state)
        rstd = (state.square().mean(-1) + 1e-6).rsqrt()
        u = state * rstd[..., None] * norm + ids
        k, v, q, token_q = ((u @ w.t()).unflatten(-1, (heads, -1)) for w in weights)  # [B, S, H, Dh]
        inv = [(x.square().sum(-1) + 1e-6).rsqrt() for x in (k, q, token_q)]
        k, q, token_q = (
            k * inv[0][..., None],
            q * inv[1][..., None] * scales[0],
            token_q * inv[2][..., None] * scales[1],
        )
        kept["entering"].append(state)
        kept["rstd"].append(rstd)
        kept["inv"].append(torch.stack(inv, dim=2))
        kept["proj"].append(torch.stack([k, v, q, token_q], dim=2))
        begin, end = block * window, (block + 2) * window
        if end > keys.shape[1]:
            continue  # a partial block
        null = torch.zeros_like(reset[:, :1]).expand(-1, 2 * window).clone()
        null[:, :window] = fresh[:, 0]
        seen = [x[:, begin:end].masked_fill(null[..., None, None], 0.0) for x in (keys, values)]
        logits = [torch.einsum("bshd,bkhd->bhsk", *x) for x in ((q, k), (token_q, seen[0]))]
        reads = [
            torch.einsum("bhsk,bkhd->bshd", torch.softmax(x, -1), y) for x, y in zip(logits, (v, seen[1]), strict=True)
        ]
        kept["read"].append(torch.stack(reads, dim=2))
        kept["lse"].append(torch.stack([x.logsumexp(-1) for x in logits], dim=1) / math.log(2.0))
        read = torch.cat(reads, dim=2).flatten(2)
        state = _gated(write.gate, state, read @ output.t(), read)
    result = {name: torch.stack(parts, dim=1) for name, parts in kept.items() if parts}
    return result | {"final": state}


def _gated(gate: Gate, state: Tensor, out: Tensor, read: Tensor) -> Tensor:
    weights = {name: value.double() for name, value in vars(gate).items() if isinstance(value, Tensor)}
    if gate.tanh:
        out = torch.tanh(out)
    if gate.bias is not None:
        keep = torch.sigmoid(weights["bias"])
        return state * keep + out * (1 - keep)
    forget = read @ weights["forget_weight"].t() + weights["forget_bias"]
    admit = read @ weights["input_weight"].t() + weights["input_bias"]
    return state * torch.sigmoid(forget + 1) + out * torch.sigmoid(admit - 1)


def relative(result: Tensor, wanted: Tensor) -> float:
    """|result - wanted| / |wanted| in fp64."""
    return float((result.double() - wanted.double()).norm() / wanted.double().norm())
