"""Chunked linear attention against the recurrence, one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.linear_attention import reference
from longspan.kernels.linear_attention.api import linear_attention


def by_token(q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, reset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    out = []
    for t in range(q.shape[1]):
        keep = (~reset[:, t]).to(q.dtype)
        s = s * keep[:, None, None, None] + phi(k[:, t])[..., :, None] * v[:, t][..., None, :]
        z = z * keep[:, None, None] + phi(k[:, t])
        q_t = phi(q[:, t])
        out.append((q_t[..., None, :] @ s).squeeze(-2) / ((q_t * z).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(out, 1), s, z


def inputs(tokens: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, 3, 4), (2, tokens, 3, 4), (2, tokens, 3, 5), (2, 3, 4, 5), (2, 3, 4)]
    return [torch.randn(*shape, generator=g, dtype=torch.float64).abs().requires_grad_() for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 7, 16, 37])
@pytest.mark.parametrize("starts", [[], [0], [5], [15, 16, 30]], ids=str)
def test_equals_the_recurrence_with_gradients(tokens: int, starts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_TOKENS", 16)
    tensors = inputs(tokens)
    reset = torch.zeros(2, tokens, dtype=torch.bool)
    for place in starts:
        if place < tokens:
            reset[1, place] = True
    got, want = linear_attention(*tensors, reset=reset), by_token(*tensors, reset)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    grads = [torch.autograd.grad(sum((y * y).sum() for y in outputs), tensors) for outputs in (got, want)]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_bf16_input_is_summed_in_fp32() -> None:
    q, k, v, s, z = (x.detach().float() for x in inputs(40))
    y, matrix, normaliser = linear_attention(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), s, z, reset=torch.zeros(2, 40, dtype=torch.bool)
    )
    assert y.dtype == matrix.dtype == normaliser.dtype == torch.float32


def test_a_state_of_other_rows_is_refused() -> None:
    q, k, v, s, z = inputs(4)
    with pytest.raises(ShapeError, match=r"matrix is \[1, 3, 4, 5\]"):
        linear_attention(q, k, v, s[:1], z[:1], reset=torch.zeros(2, 4, dtype=torch.bool))


NAMES = ("q", "k", "v", "matrix", "normaliser", "reset")


def refused(message: str, **wrong: Tensor) -> None:
    """Two rows of 4 tokens, of which `wrong` is something else."""
    right = [*(x.detach() for x in inputs(4)), torch.zeros(2, 4, dtype=torch.bool)]
    *tensors, reset = (dict(zip(NAMES, right, strict=True)) | wrong).values()
    with pytest.raises(ShapeError, match=message):
        linear_attention(*tensors, reset=reset)


@pytest.mark.parametrize("name", NAMES[1:])
def test_nothing_is_broadcast_over_rows(name: str) -> None:
    right = dict(zip(NAMES, [*inputs(4), torch.zeros(2, 4, dtype=torch.bool)], strict=True))
    refused(rf"{name} is \[1.*expected \[2", **{name: right[name][:1].detach()})


def test_no_tokens_other_flags_and_other_devices_are_refused() -> None:
    refused(r"q is \[2, 0, 3, 4\].*at least one token", q=torch.zeros(2, 0, 3, 4))
    refused(r"v is \[2, 4, 3\]", v=torch.zeros(2, 4, 3))
    refused("torch.int64: it must be bool", reset=torch.zeros(2, 4, dtype=torch.int64))
    refused("cpu, meta", normaliser=torch.zeros(2, 3, 4, device="meta"))
