"""Token losses: values, gradients, chunks, and that logits of a long input are never all in memory."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from longspan.errors import ShapeError
from longspan.kernels.cross_entropy.api import scaled_logits, token_nll
from longspan.kernels.cross_entropy.reference import chunked_nll

DIM, VOCAB = 8, 11


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, DIM, generator=g, dtype=torch.float64).requires_grad_()
    embedding = torch.randn(VOCAB, DIM, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, VOCAB, (tokens,), generator=g)
    labels[::5] = -100
    return hidden, embedding, labels


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_values_and_gradients(chunk_tokens: int) -> None:
    hidden, embedding, labels = inputs(23)
    weights = torch.linspace(0, 2, 23, dtype=torch.float64)
    nll = chunked_nll(hidden, embedding, labels, max_chunk_logits=chunk_tokens * VOCAB)
    logits = hidden @ embedding.T / DIM**0.5
    want = logits.exp().sum(-1).log() - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    want = torch.where(labels == -100, 0.0, want)
    assert torch.allclose(nll, want, atol=1e-12)
    assert (nll[labels == -100] == 0).all()
    grads = [torch.autograd.grad((y * weights).sum(), [hidden, embedding]) for y in (nll, want)]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_logits_of_a_long_input_are_not_kept_for_the_backward_pass() -> None:
    hidden, embedding, labels = inputs(64)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_nll(hidden, embedding, labels, max_chunk_logits=4 * VOCAB)
    assert 64 * VOCAB not in kept and 4 * VOCAB not in kept
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_nll(hidden, embedding, labels)
    assert 64 * VOCAB in kept


def test_losses_are_fp32_in_bf16_models() -> None:
    hidden, embedding, labels = inputs(6)
    nll = token_nll(hidden.bfloat16()[None], embedding.bfloat16(), labels[None])
    assert nll.dtype == torch.float32
    assert scaled_logits(hidden.bfloat16(), embedding.bfloat16()).dtype == torch.float32


def test_labels_of_another_shape_are_refused() -> None:
    hidden, embedding, labels = inputs(6)
    with pytest.raises(ShapeError, match=r"\[1, 5\]"):
        token_nll(hidden[None], embedding, labels[None, :5])
