"""RMS normalisation on a GPU: every type and configuration against fp64, long inputs, repeated runs."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_memory, relative_error
from torch import Tensor

from longspan.kernels.norm import reference
from longspan.kernels.norm.api import add_rms_norm, residual_rms_norm, rms_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=str)


def inputs(shape: tuple[int, ...], tile: int | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
    g = torch.Generator("cuda").manual_seed(sum(shape))
    draw = lambda *size: torch.randn(*size, generator=g, device="cuda").to(dtype)  # noqa: E731
    return {
        "x": draw(*shape),
        "delta": draw(*shape),
        "weight": 1 + 0.3 * draw(shape[-1]),
        "mask": None if tile is None else ((draw(tile, shape[-1]) > -1) * 1.25).to(dtype),
        "d_total": draw(*shape),
        "d_h": draw(*shape),
    }


def run(kind: str, tensors: dict[str, Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    t = {name: None if x is None else x.to(dtype) for name, x in tensors.items()}
    x, delta, weight = (t[name].detach().requires_grad_() for name in ("x", "delta", "weight"))
    if kind == "norm":
        outputs: tuple[Tensor, ...] = (rms_norm(x * 1, weight, t["mask"]),)
    elif kind == "residual":
        outputs = residual_rms_norm(x * 1, weight, t["mask"])
    else:
        outputs = add_rms_norm(x * 1, delta * 1, weight, t["mask"])
    incoming = [t["d_total"], t["d_h"]][-len(outputs) :]
    return [*outputs, *torch.autograd.grad(outputs, [x, weight], incoming)]


@dtypes
@pytest.mark.parametrize("kind", ["norm", "residual", "add"])
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((2, 515, 1024), None),
        ((3, 700, 1024), 128),
        ((1, 77, 1000), 77),
        ((5, 2048), None),
        ((2, 500, 4096), 2),
        ((300, 8192), None),
        ((1, 9, 16384), None),
        ((2, 150, 16384), 5),
        ((2, 130, 24), 128),
    ],
)
@pytest.mark.filterwarnings("ignore:rms_norm")
def test_every_type_equals_fp64(kind: str, shape: tuple[int, ...], tile: int | None, dtype: torch.dtype) -> None:
    tensors = inputs(shape, tile, dtype)
    want = run(kind, tensors, torch.float64)
    with poisoned_memory():
        ours = run(kind, tensors, dtype)
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert a.dtype == dtype
        assert relative_error(a, b) < LIMITS[dtype], number


@pytest.mark.parametrize("dim", [64, 1024, 1000, 2560])
def test_both_passes_by_themselves(dim: int) -> None:
    from longspan.kernels.norm import triton as kernels

    t = inputs((2, 999, dim), 128, torch.bfloat16)
    total = t["x"].double() + t["delta"].double()
    h = reference.rms_norm(total, t["weight"].double(), t["mask"].double())
    with poisoned_memory():
        ours = kernels.norm_forward(t["x"], t["delta"], t["weight"], t["mask"])
    assert relative_error(ours[0], total) < 1e-2
    assert relative_error(ours[1], h) < 1e-2
    x, weight = t["x"].double().requires_grad_(), t["weight"].double().requires_grad_()
    y = reference.rms_norm(x, weight, t["mask"].double())
    dx, dweight = torch.autograd.grad(y, [x, weight], t["d_h"].double())
    with poisoned_memory():
        got = kernels.norm_backward(t["x"], t["weight"], t["mask"], t["d_total"], t["d_h"])
    assert relative_error(got[0], dx + t["d_total"].double()) < 1e-2
    assert relative_error(got[1], dweight) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("delta", [True, False], ids=["add", "residual"])
@pytest.mark.parametrize(
    "shape", [(8, 4096, 1024), (2, 515, 1024), (77, 1000), (5, 2048), (500, 4096), (300, 8192), (9, 16384), (130, 24)]
)
def test_going_back_from_the_output_equals_fp64(shape: tuple[int, ...], delta: bool, dtype: torch.dtype) -> None:
    """At 8 x 4096 the paper's width. Weights of 0, -0 and close to it; the sum is NaN before the backward pass."""
    t = inputs(shape, None, dtype)
    t["weight"][:3] = torch.tensor([0.0, -0.0, 1e-33])
    x, d, weight = (t[name].detach().requires_grad_() for name in ("x", "delta", "weight"))
    with poisoned_memory():
        given = (x * 1, d * 1) if delta else (x * 1,)
        total, h = (add_rms_norm if delta else residual_rms_norm)(*given, weight, from_output=True)
        seen = total.detach().double()
        total.data.fill_(torch.nan)
        dx, dweight = torch.autograd.grad([total, h], [x, weight], [t["d_total"], t["d_h"]])
    exact = (seen.requires_grad_(), weight.detach().double().requires_grad_())
    want = reference.rms_norm(*exact)
    want_dx, want_dweight = torch.autograd.grad(want, exact, t["d_h"].double())
    assert relative_error(h, want) < LIMITS[dtype]
    assert relative_error(dx, want_dx + t["d_total"].double()) < LIMITS[dtype]
    assert relative_error(dweight, want_dweight) < LIMITS[dtype]
    assert relative_error(dweight[:3], want_dweight[:3]) < LIMITS[dtype]


def test_the_gradient_of_the_weight_is_the_same_every_time() -> None:
    tensors = inputs((4, 4099, 1024), None, torch.bfloat16)
    first = run("add", tensors, torch.bfloat16)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run("add", tensors, torch.bfloat16), first, strict=True))


def test_offsets_beyond_32_bits() -> None:
    rows = 2**21 + 5
    x = torch.empty(rows, 1024, dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.full((1024,), 1.5, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    leaf = x.requires_grad_()
    h = rms_norm(leaf, weight)
    last = slice(rows - 7, rows)
    want = reference.rms_norm(x.detach()[last].double(), weight.detach().double())
    assert relative_error(h[last], want) < 1e-2
    (dx,) = torch.autograd.grad(h, leaf, h.detach())
    tail = x.detach()[last].double().requires_grad_()
    (want_dx,) = torch.autograd.grad(
        reference.rms_norm(tail, weight.detach().double()), tail, h.detach()[last].double()
    )
    # parallel to x the gradient cancels but for the roundings of h
    assert (dx[last].double() - want_dx).abs().max() < 0.05


def test_a_new_length_compiles_nothing() -> None:
    from longspan.kernels.norm.triton import norm_fwd_kernel

    weight = torch.ones(1024, dtype=torch.bfloat16, device="cuda")
    counts = []
    for tokens in (512, 513, 1024, 7):
        rms_norm(torch.randn(1, tokens, 1024, dtype=torch.bfloat16, device="cuda"), weight)
        counts.append(sum(len(entry[0]) for entry in norm_fwd_kernel.device_caches.values()))
    assert len(set(counts)) == 1
