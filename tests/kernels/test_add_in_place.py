"""Products added to a residual in its own memory (interpreted, fp32) against plain PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_memory, relative_error
from torch import Tensor
from torch.nn import functional as F

from longspan.errors import ShapeError
from longspan.kernels.backend import forced
from longspan.kernels.feed_forward.api import add_feed_forward_, add_product_, adds_in_place
from longspan.kernels.norm.api import residual_rms_norm

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
SHAPES = [((2, 5, 16), 24), ((131, 260), 12), ((2, 3, 5), 7), ((0, 4), 6)]


def draw(*sizes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(sizes[0]))
    return [torch.randn(size, generator=g, dtype=torch.float64) / max(1, size[-1]) ** 0.25 for size in sizes]


def check(tensors: list[Tensor], ours, plain) -> None:  # type: ignore[no-untyped-def]
    """Sums and gradients of all tensors but the last, the gradient of the sum; where the sum lies."""
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in tensors[:-1]]
        residual = leaves[0] * 1
        with forced("reference" if dtype == torch.float64 else "triton"), poisoned_memory():
            total = (plain if dtype == torch.float64 else ours)(residual, *leaves[1:])
            assert (total.data_ptr() == residual.data_ptr()) == (dtype == torch.float32 or total.numel() == 0)
            # the gradient comes non-contiguous
            incoming = tensors[-1].to(dtype).transpose(0, -2).contiguous().transpose(0, -2)
            found.append([total.detach().clone(), *torch.autograd.grad(total, leaves, incoming)])
    for number, (want, got) in enumerate(zip(*found, strict=True)):
        assert relative_error(got, want) < 1e-5, number


@needs_interpreter
@pytest.mark.parametrize(("shape", "depth"), SHAPES)
def test_a_product_is_added(shape: tuple[int, ...], depth: int) -> None:
    tensors = draw(shape, (shape[-1], depth), (*shape[:-1], depth), shape)
    check(tensors, add_product_, lambda residual, w, x: residual + F.linear(x, w))


@needs_interpreter
@pytest.mark.parametrize(("shape", "depth"), SHAPES)
def test_a_product_of_two_parts_is_added(shape: tuple[int, ...], depth: int) -> None:
    parts = (*shape[:-1], depth), (*shape[:-1], 3)
    tensors = draw(shape, (shape[-1], depth + 3), *parts, shape)
    check(tensors, add_product_, lambda residual, w, *x: residual + F.linear(torch.cat(x, -1), w))


@needs_interpreter
@pytest.mark.parametrize(("shape", "hidden"), SHAPES)
def test_a_feed_forward_network_is_added(shape: tuple[int, ...], hidden: int) -> None:
    tensors = draw(shape, (*shape[:-1], 8), (hidden, 8), (shape[-1], hidden), shape)
    check(tensors, add_feed_forward_, lambda r, x, w1, w2: r + F.linear(F.linear(x, w1).relu(), w2))


@needs_interpreter
def test_without_gradients_hidden_vectors_exist_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.kernels.feed_forward.autograd.MAX_CHUNK_HIDDEN", 6 * 24)
    residual, x, w1, w2 = draw((4, 5, 16), (4, 5, 8), (24, 8), (16, 24))
    want = residual + F.linear(F.linear(x, w1).relu(), w2)
    mine = residual.float()
    with forced("triton"), torch.no_grad():
        total = add_feed_forward_(mine, x.float(), w1.float(), w2.float())
    assert total.data_ptr() == mine.data_ptr() and relative_error(total, want) < 1e-5


@needs_interpreter
def test_who_still_needs_the_old_value_is_told() -> None:
    """Whatever saved the residual before, under this name or another, cannot go back with the sum instead."""
    leaf, w1, w2 = (tensor.float().requires_grad_() for tensor in draw((3, 8), (8, 8), (8, 8)))
    ways = [lambda r: add_product_(r, w1, leaf), lambda r: add_feed_forward_(r, leaf, w1, w2)]
    with forced("triton"):
        for add in ways:
            for use in (torch.square, lambda r: r.view(3, 8).square(), lambda r: residual_rms_norm(r, leaf[0])[1]):
                residual = leaf * 1
                before = use(residual)
                total = add(residual)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    (before.sum() + total.sum()).backward()
            # and the sum itself may be saved by two that do not change it
            total = add(leaf * 1)
            (total.square().sum() + total.exp().sum()).backward()


@needs_interpreter
def test_parameters_and_shared_memory_are_refused() -> None:
    weight, parts = torch.randn(8, 8), torch.randn(4, 2, 8)
    leaf = torch.randn(4, 8, requires_grad=True)
    for residual, part, why in (
        (leaf, parts[:, 0].contiguous(), "leaf with a gradient"),
        (leaf * 1, None, "share memory"),
        (parts.view(8, 8)[:4], parts[:, 0], "share memory"),
    ):
        part = residual if part is None else part
        before = residual.detach().clone()
        with forced("triton"), pytest.raises(ValueError, match=why):
            add_product_(residual, weight, part)
        with forced("triton"), pytest.raises(ValueError, match=why):
            add_feed_forward_(residual, part, weight, weight)
        assert torch.equal(residual, before)


@needs_interpreter
def test_what_is_not_added_in_place_is_refused() -> None:
    residual, w = torch.zeros(4, 8), torch.zeros(8, 6)
    assert not adds_in_place(residual, w)
    with pytest.raises(ValueError, match="not added in place"):
        add_product_(residual, w, torch.zeros(4, 6))
    with forced("triton"):
        assert adds_in_place(residual, w) and adds_in_place(residual.bfloat16(), w.bfloat16())
        for other in (torch.float16, torch.float64):
            assert not adds_in_place(residual.to(other), w.to(other)) and not adds_in_place(residual, w.to(other))
        assert not adds_in_place(residual.t(), w)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not adds_in_place(residual, w)
        with pytest.raises(ValueError, match=r"x torch.float64"):
            add_product_(residual, w, torch.zeros(4, 6, dtype=torch.float64))
        with pytest.raises(ShapeError, match=r"residual is \[4, 8\], the product \[5, 8\]"):
            add_product_(residual, w, torch.zeros(5, 6))
        with pytest.raises(ShapeError, match=r"the parts are \[4, 6\], \[4, 1\], W \[8, 6\]"):
            add_product_(residual, w, torch.zeros(4, 6), torch.zeros(4, 1))
        with pytest.raises(ShapeError, match=r"residual is \[4, 8\], the product \[3, 8\]"):
            add_feed_forward_(residual, torch.zeros(3, 5), torch.zeros(6, 5), w)
