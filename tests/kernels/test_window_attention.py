"""Window attention against a loop over tokens that follows the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.window_attention.api import window_attention
from longspan.kernels.window_attention.reference import attend, l2_normalise, scaled_bias

HEADS, WIDTH = 2, 4


def bucket(distance: int) -> int:
    if distance < 16:
        return distance
    return min(31, 16 + math.floor(math.log(distance / 16) / math.log(128 / 16) * 16))


def by_token(q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], table: Tensor, a: Tensor, reset: Tensor):
    """One row: each token reads exactly W earlier positions; those of another document are null keys."""
    window, tokens = cache[0].shape[0], q.shape[0]
    norm = lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    keys, values, q = torch.cat([cache[0], norm(k)]), torch.cat([cache[1], v]), norm(q)
    document = torch.cat([torch.zeros(window, dtype=torch.long), reset.long().cumsum(0)])
    out = []
    for t in range(tokens):
        logits, read = [], []
        for n in range(1, window + 1):
            place = window + t - n
            known = (document[place] == document[window + t]).to(q.dtype)
            dot = (q[t] * keys[place]).sum(-1) * known
            logits.append((dot + table[:, bucket(n)]) * a.abs())
            read.append(values[place] * known)
        p = torch.softmax(torch.stack(logits), 0)
        out.append((p[:, :, None] * torch.stack(read)).sum(0))
    last = (document[-window:] == document[-1]).to(q.dtype)[:, None, None]
    return torch.stack(out), keys[-window:] * last, values[-window:] * last


def turned(x: Tensor, position: int) -> Tensor:
    """[..., Dh] rotated by complex multiplication."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("where", ["nowhere", "blocks", "anywhere"])
@pytest.mark.parametrize(("window", "tokens"), [(4, 1), (4, 11), (5, 20)])
def test_rotary_positions_equal_a_loop_over_tokens(window: int, tokens: int, where: str) -> None:
    """Positions are relative: here they count from the token that attends."""
    qkv, ck, cv, _, a = inputs(window, tokens)
    reset = torch.zeros(2, tokens, dtype=torch.bool)
    if where != "nowhere":
        reset[1, tokens // window * window // 2 if where == "anywhere" else 0] = True
    grid = 1 if where == "anywhere" else window
    out, keys, _ = window_attention(qkv, ck, cv, None, a, reset=reset, reset_grid=grid, positions="rope")
    for row in range(2):
        q, k, v = (x[row] for x in qkv.unbind(2))
        k_all, v_all = torch.cat([ck[row], l2_normalise(k)]), torch.cat([cv[row], v])
        document = torch.cat([torch.zeros(window, dtype=torch.long), reset[row].long().cumsum(0)])
        last = document[-window:] == document[-1]
        assert torch.allclose(keys[row], k_all[-window:] * last[:, None, None], atol=1e-12)
        for t in range(tokens):
            seen = torch.arange(t, t + window)
            known = (document[seen] == document[window + t]).double()[:, None]
            rotated = torch.stack([turned(k_all[n], int(n) - window - t) for n in seen])
            logits = (l2_normalise(q[t]) * rotated).sum(-1) * known * a.abs()
            p = torch.softmax(logits, 0) * known
            assert torch.allclose(out[row, t], (p[:, :, None] * v_all[seen]).sum(0), atol=1e-12)


def test_rotary_positions_and_a_table_exclude_each_other() -> None:
    qkv, ck, cv, table, scale = inputs(4, 8)
    reset = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(ShapeError, match="None with 'rope'"):
        window_attention(qkv, ck, cv, table, scale, reset=reset, positions="rope")
    with pytest.raises(ShapeError, match="a bias table with 't5'"):
        window_attention(qkv, ck, cv, None, scale, reset=reset)


def inputs(window: int, tokens: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, 3, HEADS, WIDTH)] + [(2, window, HEADS, WIDTH)] * 2 + [(HEADS, 32), (HEADS,)]
    tensors = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
    tensors[1] = l2_normalise(tensors[1])
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("where", ["nowhere", "blocks", "anywhere"])
@pytest.mark.parametrize(("window", "tokens"), [(4, 1), (4, 3), (4, 4), (4, 11), (5, 20), (1, 6), (24, 48)])
def test_equals_a_loop_over_tokens_with_gradients(window: int, tokens: int, where: str) -> None:
    tensors = inputs(window, tokens)
    reset = torch.zeros(2, tokens, dtype=torch.bool)
    if where == "blocks":
        reset[0, 0] = reset[1, (tokens - 1) // window * window] = True
    if where == "anywhere":
        reset[0, tokens // 2] = reset[1, [0, tokens // 3, tokens - 1]] = True
    grid = window if where == "blocks" else 1
    got = window_attention(*tensors, reset=reset, reset_grid=grid)
    qkv, ck, cv, table, scale = tensors
    q, k, v = qkv.unbind(2)
    rows = [by_token(q[r], k[r], v[r], (ck[r], cv[r]), table, scale, reset[r]) for r in range(2)]
    want = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    for ours, theirs in zip(got, want, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    sums = [sum((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum() for y in outputs) for outputs in (got, want)]
    ours, theirs = (torch.autograd.grad(s, tensors) for s in sums)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_bias_gradient_by_finite_differences() -> None:
    tensors = inputs(3, 7)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[1, 4] = True
    assert torch.autograd.gradcheck(lambda *x: window_attention(*x, reset=reset)[0], tensors)


def test_softmax_is_the_safe_softmax_of_the_paper() -> None:
    """Each query sees W keys, null ones included, so the floor's term vanishes; the masked never count."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, HEADS, rows, WIDTH, generator=g) for rows in (8, 16, 16))
    bias = scaled_bias(torch.randn(HEADS, 32, generator=g), torch.full((HEADS,), 20.0), 8, 8)
    logits = q @ k.transpose(-1, -2) + bias
    top = logits.amax(-1, keepdim=True).clamp(min=-1000)
    weights = (logits - top).exp()
    safe = weights / (weights.sum(-1, keepdim=True) + (-1000 - top).exp())
    assert torch.allclose(attend(q, k, v, bias, None, None), safe @ v, atol=1e-6)


def test_dropped_weights_do_not_count() -> None:
    tensors = inputs(4, 8)
    reset = torch.zeros(2, 8, dtype=torch.bool)
    none = window_attention(*tensors, reset=reset, drop=torch.zeros(HEADS, 4, 8, dtype=torch.float64))[0]
    assert none.abs().max() == 0
    half = window_attention(*tensors, reset=reset, drop=torch.full((HEADS, 4, 8), 0.5, dtype=torch.float64))[0]
    assert torch.allclose(half, 0.5 * window_attention(*tensors, reset=reset)[0])


def test_geometry_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        window_attention(*(x.detach() for x in inputs(7, 14)), reset=torch.zeros(2, 14, dtype=torch.bool))
    tensors = inputs(7, 14)
    window_attention(*tensors, reset=torch.zeros(2, 14, dtype=torch.bool))[0].sum().backward()
    assert tensors[3].grad is not None


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_flags_that_are_not_bool_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ShapeError, match="must be bool"):
        window_attention(*inputs(4, 8), reset=torch.zeros(2, 8, dtype=dtype))


def test_a_cache_of_other_rows_is_refused() -> None:
    tensors = inputs(4, 8)
    tensors[1] = tensors[1][:1]
    with pytest.raises(ShapeError, match=r"\[1, 4, 2, 4\]"):
        window_attention(*tensors, reset=torch.zeros(2, 8, dtype=torch.bool))


def test_unknown_positions_and_rotary_heads_of_odd_width_are_refused() -> None:
    qkv, ck, cv, table, scale = inputs(4, 8)
    reset = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(ShapeError, match="'alibi': use one of t5, rope"):
        window_attention(qkv, ck, cv, table, scale, reset=reset, positions="alibi")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"3 wide.*must be even"):
        window_attention(qkv[..., :3], ck[..., :3], cv[..., :3], None, scale, reset=reset, positions="rope")
