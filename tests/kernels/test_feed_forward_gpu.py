"""The feed-forward network on a GPU: every type against fp64, chunks, long inputs."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_memory, relative_error
from torch import Tensor
from torch.nn import functional as F

from longspan.kernels.feed_forward.api import feed_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=str)


def inputs(tokens: int, dim: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(tokens)
    sizes = [(tokens, dim), (hidden, dim), (dim, hidden), (tokens, dim)]
    scales = [1.0, dim**-0.5, hidden**-0.5, 1.0]
    return [
        (torch.randn(size, generator=g, device="cuda") * s).to(dtype) for size, s in zip(sizes, scales, strict=True)
    ]


def run(tensors: list[Tensor], dtype: torch.dtype, **options: bool) -> list[Tensor]:
    x, w1, w2, dy = (tensor.detach().to(dtype) for tensor in tensors)
    wanted = [tensor.requires_grad_() for tensor in (x, w1, w2)]
    y = feed_forward(x, w1, w2, **options)
    return [y, *torch.autograd.grad(y, wanted, dy)]


@dtypes
@pytest.mark.parametrize("keep_hidden", [True, False])
@pytest.mark.parametrize(
    ("tokens", "dim", "hidden"), [(1024, 1024, 4096), (517, 256, 1000), (1, 64, 256), (333, 40, 72), (65, 36, 30)]
)
@pytest.mark.filterwarnings("ignore:feed_forward")
def test_every_type_equals_fp64(tokens: int, dim: int, hidden: int, dtype: torch.dtype, keep_hidden: bool) -> None:
    tensors = inputs(tokens, dim, hidden, dtype)
    want = run(tensors, torch.float64)
    with poisoned_memory():
        ours = run(tensors, dtype, keep_hidden=keep_hidden)
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert relative_error(a, b) < LIMITS[dtype], number


@pytest.mark.filterwarnings("ignore:feed_forward")
def test_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    tensors = inputs(517, 1024, 4096, torch.float32)
    # the truth has the kernel's signs: next to zero TF32 decides them by its rounding, and the gradient jumps there
    x, w1, w2, dy = tensors
    active = (F.linear(x, w1) > 0).double()
    wanted = [tensor.double().requires_grad_() for tensor in (x, w1, w2)]
    y = F.linear(F.linear(wanted[0], wanted[1]) * active, wanted[2])
    want = [y, *torch.autograd.grad(y, wanted, dy.double())]
    for a, b in zip(run(tensors, torch.float32), want, strict=True):
        assert relative_error(a, b) < 1e-3


@pytest.mark.parametrize("tokens", [1000, 1024])
def test_chunks_add_up(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.kernels.feed_forward.autograd.MAX_CHUNK_HIDDEN", 256 * 4096)
    tensors = inputs(tokens, 1024, 4096, torch.bfloat16)
    want = run([tensor.double() for tensor in tensors], torch.float64)
    with poisoned_memory():
        ours = run(tensors, torch.bfloat16, keep_hidden=False)
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert relative_error(a, b) < 1e-2, number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "dim", "hidden"), [(4096, 1024, 4096), (1001, 1024, 4096), (300, 200, 600)])
def test_both_products(tokens: int, dim: int, hidden: int, dtype: torch.dtype) -> None:
    from longspan.kernels.feed_forward import triton as kernels

    x, w1, w2, dy = inputs(tokens, dim, hidden, dtype)
    assert kernels.supported(x, w1) and kernels.supported(dy, w2)
    with poisoned_memory():
        relu, bits = kernels.relu_product(x, w1)
        ours = kernels.masked_product(dy, w2, bits)
    assert relative_error(relu, F.relu(x.double() @ w1.double().t())) < LIMITS[dtype]
    assert relative_error(ours, (dy.double() @ w2.double()) * (relu > 0)) < LIMITS[dtype]
    assert not ours[relu <= 0].any()


def test_both_products_beyond_32_bits() -> None:
    from longspan.kernels.feed_forward.triton import masked_product, relu_product

    rows = 2**19 + 300  # 2.1e9 hidden values
    x = torch.randn(rows, 64, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(64, 4096, dtype=torch.bfloat16, device="cuda")
    last = slice(rows - 260, rows)
    relu, bits = relu_product(x, weight.t().contiguous())
    hidden = relu[last].clone()
    assert relative_error(hidden, F.relu(x[last].double() @ weight.double())) < 1e-2
    del relu
    ours = masked_product(x, weight, bits)
    assert relative_error(ours[last], (x[last].double() @ weight.double()) * (hidden > 0)) < 1e-2


def test_not_a_number_does_not_vanish_in_the_forward_pass() -> None:
    x, w1, w2, dy = inputs(130, 64, 128, torch.bfloat16)
    x[7] = torch.nan
    y = run([x, w1, w2, dy], torch.bfloat16)[0]
    assert y[7].isnan().all() and y[:7].isfinite().all()


def test_not_a_number_does_not_vanish_in_the_backward_pass() -> None:
    x, w1, w2, dy = inputs(130, 64, 128, torch.bfloat16)
    dy[7] = torch.nan
    (dx,) = run([x, w1, w2, dy], torch.bfloat16)[1:2]
    assert dx[7].isnan().all() and dx[:7].isfinite().all()
