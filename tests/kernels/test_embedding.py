"""The token embedding: its fused gradient, on a GPU or under the interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_memory, relative_error
from torch.nn import functional as F

from longspan.errors import ShapeError
from longspan.kernels.backend import forced
from longspan.kernels.embedding.api import embed

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [pytest.param(torch.float32), *([pytest.param(torch.bfloat16, marks=pytest.mark.gpu)] if CUDA else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rows", "width"), [((2, 37), 11, 24), ((1, 1), 5, 8), ((3, 40), 2, 300)])
def test_gradient_equals_fp64(shape: tuple[int, ...], rows: int, width: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(rows, shape, generator=g).to(DEVICE)
    weight = torch.randn(rows, width, generator=g).to(DEVICE, dtype).requires_grad_()
    gradient = torch.randn(*shape, width, generator=g).to(DEVICE, dtype)
    with forced("triton"), poisoned_memory():
        out = embed(tokens, weight)
        (ours,) = torch.autograd.grad(out, weight, gradient)
    wide = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(F.embedding(tokens, wide), wide, gradient.double())
    assert torch.equal(out, weight[tokens])
    assert relative_error(ours, want) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_has_most_tokens_is_shared_by_programs(dtype: torch.dtype) -> None:
    from longspan.kernels.embedding import triton as triton_form  # interpreted or not is fixed when it is imported

    assert triton_form.shares_of(32_768, 32_128) == 1  # as much memory as the gradient itself would be wasted
    assert triton_form.shares_of(131_072, 384) == 32
    assert triton_form.shares_of(260, 2) == 8
    g = torch.Generator().manual_seed(0)
    tokens = (torch.arange(260) % 20 == 7).long().to(DEVICE)  # 13 of them: fewer than two for each program
    weight = torch.randn(2, 24, generator=g).to(DEVICE, dtype).requires_grad_()
    gradient = torch.randn(260, 24, generator=g).to(DEVICE, dtype)
    with forced("triton"), poisoned_memory():
        (ours,) = torch.autograd.grad(embed(tokens, weight), weight, gradient)
        (again,) = torch.autograd.grad(embed(tokens, weight), weight, gradient)
    want = torch.stack([gradient[tokens == row].double().sum(0) for row in (0, 1)])
    assert relative_error(ours, want) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(ours, again)


def test_rows_without_a_token_get_zeros_and_strided_gradients_work() -> None:
    tokens = torch.tensor([[7, 7], [0, 7]], device=DEVICE)
    weight = torch.zeros(9, 4, device=DEVICE, requires_grad=True)
    gradient = torch.ones(4, 2, 2, device=DEVICE).permute(1, 2, 0)
    with forced("triton"):
        (ours,) = torch.autograd.grad(embed(tokens, weight), weight, gradient)
    assert ours[:, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 3, 0]


def test_without_gradient_and_in_fp64_it_is_the_plain_form() -> None:
    tokens = torch.tensor([1, 0, 1])
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(embed(tokens, weight), weight[tokens])
    assert torch.autograd.gradcheck(lambda w: embed(tokens, w), weight)


def test_other_types_are_refused() -> None:
    with pytest.raises(ShapeError, match="int32"):
        embed(torch.zeros(2, dtype=torch.int32), torch.zeros(3, 4))


@pytest.mark.parametrize("trained", [False, True])
def test_tokens_of_another_device_are_refused(trained: bool) -> None:
    with pytest.raises(ShapeError, match="cpu, meta"):
        embed(torch.zeros(2, dtype=torch.int64, device="meta"), torch.zeros(3, 4, requires_grad=trained))
