"""The feed-forward network: the lean form (interpreted, fp32) against plain PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_memory, relative_error
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from longspan.errors import ShapeError
from longspan.kernels import backend
from longspan.kernels.backend import forced
from longspan.kernels.feed_forward import reference
from longspan.kernels.feed_forward.api import feed_forward

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


def inputs(shape: tuple[int, ...], hidden: int) -> list[Tensor]:
    """x, W1, W2 and the gradient of the output, fp64."""
    g = torch.Generator().manual_seed(hidden)
    dim = shape[-1]
    sizes = [shape, (hidden, dim), (dim, hidden), shape]
    return [torch.randn(size, generator=g, dtype=torch.float64) / size[-1] ** 0.25 for size in sizes]


def run(tensors: list[Tensor], dtype: torch.dtype, **options: bool) -> list[Tensor]:
    """Output and gradients of x, W1, W2."""
    x, w1, w2, dy = (tensor.to(dtype) for tensor in tensors)
    wanted = [tensor.requires_grad_() for tensor in (x, w1, w2)]
    # x and dy come non-contiguous
    y = feed_forward(x.flip(0).flip(0).transpose(0, -2).contiguous().transpose(0, -2), w1, w2, **options)
    return [y, *torch.autograd.grad(y, wanted, dy.transpose(0, -2).contiguous().transpose(0, -2))]


@needs_interpreter
@pytest.mark.parametrize("keep_hidden", [True, False])
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [((2, 5, 16), 24), ((1, 1, 4), 4), ((3, 47, 8), 300), ((2, 3, 5), 7)],  # the last one is not aligned
)
def test_lean_form_equals_fp64(shape: tuple[int, ...], hidden: int, keep_hidden: bool) -> None:
    tensors = inputs(shape, hidden)
    want = run(tensors, torch.float64)
    with forced("triton"), poisoned_memory():
        ours = run(tensors, torch.float32, keep_hidden=keep_hidden)
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-5, number


@needs_interpreter
@pytest.mark.parametrize(("tokens", "dim", "hidden"), [(3, 8, 520), (130, 12, 300)])
def test_the_relu_leaves_the_bits_that_the_masked_product_applies(tokens: int, dim: int, hidden: int) -> None:
    from longspan.kernels.feed_forward import triton as kernels

    x, w1, w2, dy = (tensor.float() for tensor in inputs((tokens, dim), hidden))
    x[1] = 0  # the ReLU of exactly 0 has no gradient
    with poisoned_memory():
        relu, bits = kernels.relu_product(x, w1)
        ours = kernels.masked_product(dy, w2, bits)
    assert relative_error(relu, (x.double() @ w1.double().t()).relu()) < 1e-5
    assert relative_error(ours, (dy.double() @ w2.double()) * (relu > 0)) < 1e-5
    assert torch.equal(ours != 0, relu > 0) and not relu[1].any()


@needs_interpreter
@pytest.mark.parametrize("tokens", [6, 7, 20])
def test_chunks_add_up(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.kernels.feed_forward.autograd.MAX_CHUNK_HIDDEN", 6 * 24)
    tensors = inputs((tokens, 16), 24)
    want = run(tensors, torch.float64)
    with forced("triton"), poisoned_memory():
        ours = run(tensors, torch.float32, keep_hidden=False)
        with torch.no_grad():
            alone = feed_forward(*(tensor.float() for tensor in tensors[:3]))
    for number, (a, b) in enumerate(zip([*ours, alone], [*want, want[0]], strict=True)):
        assert relative_error(a, b) < 1e-5, number


@needs_interpreter
def test_without_the_hidden_vectors_only_the_inputs_are_kept() -> None:
    tensors = [tensor.float() for tensor in inputs((10, 16), 24)]
    for tensor in tensors[:3]:
        tensor.requires_grad_()
    for keep_hidden in (True, False):
        kept: list[tuple[int, ...]] = []

        def pack(tensor: Tensor, kept: list[tuple[int, ...]] = kept) -> Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

        with forced("triton"), saved_tensors_hooks(pack, lambda tensor: tensor):
            feed_forward(*tensors[:3], keep_hidden=keep_hidden)
        assert ((10, 24) in kept) == keep_hidden
        assert kept.count((10, 16)) == 1


@needs_interpreter
def test_no_tokens() -> None:
    x = torch.zeros(0, 8, requires_grad=True)
    w1, w2 = torch.randn(12, 8, requires_grad=True), torch.randn(8, 12, requires_grad=True)
    for keep_hidden in (True, False):
        with forced("triton"):
            y = feed_forward(x, w1, w2, keep_hidden=keep_hidden)
            gradients = torch.autograd.grad(y.sum(), [x, w1, w2])
        assert y.shape == (0, 8)
        assert all(not gradient.any() for gradient in gradients)


def test_fp64_runs_the_reference() -> None:
    x, w1, w2, _ = inputs((4, 8), 12)
    assert torch.equal(feed_forward(x, w1, w2), reference.feed_forward(x, w1, w2))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"W2 \[8, 11\]"):
        feed_forward(torch.zeros(3, 8), torch.zeros(12, 8), torch.zeros(8, 11))
    with pytest.raises(ShapeError, match=r"W1 \[8\]"):
        feed_forward(torch.zeros(3, 8), torch.zeros(8), torch.zeros(8, 12))


@needs_interpreter
@pytest.mark.parametrize("keep_hidden", [True, False])
def test_one_vector(keep_hidden: bool) -> None:
    x, w1, w2, _ = (t.float() for t in inputs((8,), 12))
    with forced("triton"):
        y = feed_forward(x, w1, w2, keep_hidden=keep_hidden)
    assert torch.allclose(y, reference.feed_forward(x, w1, w2), atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize("keep_hidden", [True, False])
def test_under_autocast_the_reference_runs(keep_hidden: bool) -> None:
    backend.warn_once.cache_clear()
    tensors = [t.float().detach().requires_grad_() for t in inputs((4, 8), 12)[:3]]
    with forced("triton"), torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        y = feed_forward(*tensors, keep_hidden=keep_hidden)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(t.grad is not None for t in tensors)


@needs_interpreter
def test_under_checkpointing_the_recomputation_makes_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden vectors are made once forward and once in the backward pass proper."""
    from longspan.kernels.feed_forward import autograd

    made: list[int] = []
    right = autograd.relu_product
    monkeypatch.setattr(autograd, "relu_product", lambda *args: made.append(1) or right(*args))
    tensors = inputs((10, 16), 24)
    x, w1, w2, dy = (tensor.float().requires_grad_() for tensor in tensors)

    def layer(x: Tensor) -> Tensor:
        return x + feed_forward(2 * x, w1, w2, keep_hidden=False)

    want = torch.autograd.grad(layer(x), [x, w1, w2], dy.detach())
    with forced("triton"), poisoned_memory():
        y = checkpoint(layer, x, use_reentrant=False)
        assert len(made) == 1
        ours = torch.autograd.grad(y, [x, w1, w2], dy.detach())
        assert len(made) == 2
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, want, strict=True))
