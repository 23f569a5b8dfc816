"""Full attention against a loop over tokens with complex rotary factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.full_attention import reference
from longspan.kernels.full_attention.api import full_attention

HEADS, WIDTH = 2, 6


def by_token(q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], valid: int, reset: Tensor) -> Tensor:
    """One row: token t reads its document's last C tokens; the angle depends on the distance only."""
    cached, half = cache[0].shape[0], WIDTH // 2
    keys, values = torch.cat([cache[0], k]), torch.cat([cache[1], v])
    document = torch.cat([torch.zeros(cached, dtype=torch.long), reset.long().cumsum(0)])
    frequency = 10000.0 ** (-torch.arange(half).double() / half)
    as_complex = lambda x: torch.complex(x[..., :half], x[..., half:])  # noqa: E731
    out = []
    for t in range(q.shape[0]):
        places = [
            s
            for s in range(cached - valid, cached + t + 1)
            if cached + t - s <= cached and document[s] == document[cached + t]
        ]
        turn = torch.stack([torch.polar(torch.ones(half).double(), frequency * (cached + t - s)) for s in places])
        dots = (as_complex(q[t])[None] * turn[:, None] * as_complex(keys[places]).conj()).real.sum(-1)
        p = torch.softmax(dots / WIDTH**0.5, 0)
        out.append((p[..., None] * values[places]).sum(0))
    return torch.stack(out)


def inputs(context: int, tokens: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, HEADS, WIDTH)] * 3 + [(2, context - 1, HEADS, WIDTH)] * 2
    return [torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("starts", [[], [0], [4, 9]], ids=str)
@pytest.mark.parametrize(("context", "tokens"), [(1, 5), (4, 13), (8, 3), (20, 13)])
def test_equals_a_loop_over_tokens(
    context: int, tokens: int, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "QUERY_CHUNK_TOKENS", 4)
    tensors = inputs(context, tokens)
    valid = torch.tensor([context - 1, (context - 1) // 2])
    reset = torch.zeros(2, tokens, dtype=torch.bool)
    for place in starts:
        if place < tokens:
            reset[1, place] = True
    out, keys, _, count = full_attention(*tensors, valid, reset=reset)
    q, k, v, ck, cv = tensors
    want = torch.stack([by_token(q[r], k[r], v[r], (ck[r], cv[r]), int(valid[r]), reset[r]) for r in range(2)])
    assert torch.allclose(out, want, atol=1e-12)
    last = max([place for place in starts if place < tokens], default=None)
    own = tokens - last if last is not None else tokens + int(valid[1])
    assert count.tolist() == [min(context - 1, tokens + context - 1), min(context - 1, own)]
    assert torch.equal(keys, torch.cat([ck, k], 1)[:, tokens:])
    grads = [torch.autograd.grad((y * y).sum(), tensors, allow_unused=True) for y in (out, want)]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_a_cache_of_other_rows_is_refused() -> None:
    q, k, v, ck, cv = inputs(4, 8)
    with pytest.raises(ShapeError, match=r"\[1, 3, 2, 6\]"):
        full_attention(q, k, v, ck[:1], cv[:1], torch.tensor([0]), reset=torch.zeros(2, 8, dtype=torch.bool))


NAMES = ("q", "k", "v", "cached_keys", "cached_values", "cached_tokens", "reset")


def refused(message: str, **wrong: Tensor) -> None:
    """Two rows of 8 tokens behind a cache of 3, of which `wrong` is something else."""
    right = [*(x.detach() for x in inputs(4, 8)), torch.tensor([3, 1]), torch.zeros(2, 8, dtype=torch.bool)]
    *tensors, reset = (dict(zip(NAMES, right, strict=True)) | wrong).values()
    with pytest.raises(ShapeError, match=message):
        full_attention(*tensors, reset=reset)


@pytest.mark.parametrize("name", NAMES[1:])
def test_nothing_is_broadcast_over_rows(name: str) -> None:
    right = dict(zip(NAMES, [*inputs(4, 8), torch.tensor([3, 1]), torch.zeros(2, 8, dtype=torch.bool)], strict=True))
    refused(rf"{name} is \[1.*expected \[2", **{name: right[name][:1].detach()})


def test_no_tokens_odd_heads_other_flags_and_other_devices_are_refused() -> None:
    refused("at least one token", **{name: torch.zeros(2, 0, HEADS, WIDTH) for name in "qkv"})
    refused("even width", q=torch.zeros(2, 8, HEADS, 5))
    refused(r"cached_keys is \[3\]", cached_keys=torch.zeros(3))
    refused("torch.int64: it must be bool", reset=torch.zeros(2, 8, dtype=torch.int64))
    refused("cpu, meta", cached_tokens=torch.tensor([3, 1], device="meta"))
