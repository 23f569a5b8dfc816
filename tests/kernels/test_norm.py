"""RMS normalisation: the Triton form (interpreted, fp32) against plain PyTorch in fp64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_memory, relative_error
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.backend import Backend, forced
from longspan.kernels.norm import reference
from longspan.kernels.norm.api import add_rms_norm, goes_back_from_output, multiply_tiled, residual_rms_norm, rms_norm

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs run one after another: four of two warps."""
    monkeypatch.setattr("longspan.kernels.norm.triton.BACKWARD_WARPS", 8)


def inputs(shape: tuple[int, ...], tile: int | None) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "x": draw(*shape),
        "delta": draw(*shape),
        "weight": 1 + 0.3 * draw(shape[-1]),
        "mask": None if tile is None else (draw(tile, shape[-1]) > -1).double() * 1.25,
        "d_total": draw(*shape),
        "d_h": draw(*shape),
    }


def run(kind: str, tensors: dict[str, Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients of everything that has one."""
    t = {name: None if x is None else x.to(dtype).clone() for name, x in tensors.items()}
    x, delta, weight = (t[name].requires_grad_() for name in ("x", "delta", "weight"))
    # the inputs are inner nodes of the graph, as in a model, and non-contiguous
    inner = [y.transpose(0, -1).contiguous().transpose(0, -1) * 1 for y in (x, delta)]
    if kind == "norm":
        outputs: tuple[Tensor, ...] = (rms_norm(inner[0], weight, t["mask"]),)
    elif kind == "residual":
        outputs = residual_rms_norm(inner[0], weight, t["mask"])
    else:
        outputs = add_rms_norm(*inner, weight, t["mask"])
    incoming = [t["d_total"], t["d_h"]][-len(outputs) :]
    wanted = [x, weight] if kind != "add" else [x, delta, weight]
    return [*outputs, *torch.autograd.grad(outputs, wanted, incoming)]


@needs_interpreter
@pytest.mark.parametrize("kind", ["norm", "residual", "add"])
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((2, 5, 16), None),
        ((3, 11, 24), 4),
        ((1, 1, 3), 1),
        ((2, 9, 33), 9),
        ((7, 130), None),
        ((2, 3, 1500), 2),
        ((3, 3, 1024), 2),
        ((1, 2048), None),
    ],
)
@pytest.mark.parametrize("ahead", [True, False], ids=["as in 16 bits", "as in fp32"])
def test_triton_equals_fp64(
    ahead: bool, kind: str, shape: tuple[int, ...], tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longspan.kernels.norm.triton import _AHEAD_WIDTH

    monkeypatch.setitem(_AHEAD_WIDTH, 4, _AHEAD_WIDTH[2] if ahead else 0)
    tensors = inputs(shape, tile)
    want = run(kind, tensors, torch.float64)
    with forced("triton"), poisoned_memory():
        ours = run(kind, tensors, torch.float32)
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert relative_error(a, b) < 1e-5, number


def run_from_output(tensors: dict[str, Tensor | None], dtype: torch.dtype, delta: bool) -> list[Tensor]:
    """Outputs, then gradients of x, delta and weight; in fp32 the sum is overwritten before the backward pass."""
    x, d, weight = (tensors[name].to(dtype).clone().requires_grad_() for name in ("x", "delta", "weight"))
    given, options = (x * 1, d * 1) if delta else (x * 1,), {"from_output": dtype != torch.float64}
    total, h = (add_rms_norm if delta else residual_rms_norm)(*given, weight, **options)
    found = [total.detach().clone(), h]
    if dtype != torch.float64:
        total.data.fill_(torch.nan)
    wanted = [x, d, weight] if delta else [x, weight]
    return [*found, *torch.autograd.grad([total, h], wanted, [tensors[n].to(dtype) for n in ("d_total", "d_h")])]


@needs_interpreter
@pytest.mark.parametrize("delta", [True, False], ids=["add", "residual"])
@pytest.mark.parametrize("shape", [(2, 5, 16), (1, 1, 5), (7, 130), (9, 33), (3, 3, 1024), (2, 3, 1500)])
@pytest.mark.parametrize("ahead", [True, False], ids=["as in 16 bits", "as in fp32"])
def test_going_back_from_the_output_equals_fp64(
    ahead: bool, shape: tuple[int, ...], delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum is NaN by then. Weights of 0 and close to it have gradients of their own."""
    from longspan.kernels.norm.triton import _AHEAD_WIDTH

    monkeypatch.setitem(_AHEAD_WIDTH, 4, _AHEAD_WIDTH[2] if ahead else 0)
    tensors = inputs(shape, None)
    tensors["weight"][:3] = torch.tensor([0.0, -0.0, -1e-33])
    want = run_from_output(tensors, torch.float64, delta)
    with forced("triton"), poisoned_memory():
        ours = run_from_output(tensors, torch.float32, delta)
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert relative_error(a, b) < 1e-5, number
    small = ours[-1][:3].double(), want[-1][:3]  # of the weights at 0, which the norm of all would hide
    assert relative_error(*small) < 1e-5 and small[1].abs().min() > 0
    assert ours[1][..., :3].abs().max() < 1e-29


@needs_interpreter
def test_going_back_from_the_output_keeps_not_a_number() -> None:
    x, weight = torch.randn(5, 8), torch.ones(8)
    x[1, 2] = torch.nan
    x.requires_grad_()
    with forced("triton"):
        _, h = residual_rms_norm(x * 1, weight, from_output=True)
        (dx,) = torch.autograd.grad(h, x, torch.ones_like(h))
        assert h[1].isnan().all() and dx[1].isnan().all()
        assert h[[0, 2, 3, 4]].isfinite().all() and dx[[0, 2, 3, 4]].isfinite().all()
        weight[3] = torch.nan
        _, h = residual_rms_norm(x * 1, weight, from_output=True)
    assert h[:, 3].isnan().all() and h[0, :3].isfinite().all()


@needs_interpreter
def test_the_sum_alone_has_a_gradient_without_the_norm() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with forced("triton"):
        total, _ = residual_rms_norm(x * 1, weight, from_output=True)
        dx, dweight = torch.autograd.grad(total.square().sum(), [x, weight], materialize_grads=True)
    assert torch.equal(dx, 2 * x) and not dweight.any()


@needs_interpreter
def test_what_cannot_go_back_from_the_output_is_refused() -> None:
    x, weight, mask = torch.randn(2, 3, 8), torch.ones(8), torch.ones(3, 8)
    assert not goes_back_from_output(x, weight)
    with pytest.raises(ValueError, match=r"fp32 and without a mask"):
        residual_rms_norm(x, weight, from_output=True)
    with forced("triton"):
        assert goes_back_from_output(x, weight) and goes_back_from_output(x.bfloat16(), weight)
        assert not goes_back_from_output(x.half(), weight) and not goes_back_from_output(x, weight.half())
        with pytest.raises(ValueError, match=r"and a mask"):
            add_rms_norm(x, x, weight, mask, from_output=True)
        with pytest.raises(ValueError, match=r"x torch.float16"):
            add_rms_norm(x.half(), x.half(), weight.half(), from_output=True)


@needs_interpreter
def test_one_used_output_is_enough() -> None:
    """The sum without the norm, and the norm without the sum."""
    tensors = inputs((2, 5, 16), 4)
    for used in (0, 1):
        found = []
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
            x, delta, weight = (tensors[n].to(dtype).requires_grad_() for n in ("x", "delta", "weight"))
            with forced(backend):
                out = add_rms_norm(x * 1, delta * 1, weight, tensors["mask"].to(dtype))[used]
            found.append(torch.autograd.grad(out.square().sum(), [x, delta, weight], materialize_grads=True))
        for want, ours in zip(*found, strict=True):
            assert torch.allclose(ours.double(), want, atol=1e-4)


@needs_interpreter
@pytest.mark.parametrize("make", [lambda w: w[::2], lambda w: w[:1].expand(8)], ids=["strided", "expanded"])
def test_a_weight_need_not_be_contiguous(make) -> None:  # type: ignore[no-untyped-def]
    x, whole = torch.randn(3, 8), torch.randn(16)
    found = []
    for form, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        w = whole.to(dtype).requires_grad_()
        with forced(form):
            h = rms_norm(x.to(dtype), make(w))
        found.append([h, torch.autograd.grad(h.square().sum(), w)[0]])
    for ours, want in zip(*found, strict=True):
        assert relative_error(ours, want) < 1e-6


@needs_interpreter
def test_no_rows() -> None:
    with forced("triton"):
        weight = torch.ones(8, requires_grad=True)
        for from_output in (False, True):
            total, h = add_rms_norm(*torch.zeros(2, 2, 0, 8), weight, from_output=from_output)
            h.sum().backward()
            assert total.shape == h.shape == (2, 0, 8)
            assert torch.equal(weight.grad, torch.zeros(8))


@needs_interpreter
def test_not_a_number_stays_in_its_row() -> None:
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    with forced("triton"):
        h = rms_norm(x, torch.ones(8))
    assert h[1].isnan().all() and h[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tokens", [4, 8, 10, 3])
def test_multiply_tiled_is_dropout_of_a_repeated_mask(tokens: int) -> None:
    mask = torch.rand(min(4, tokens), 6)
    x = torch.rand(2, tokens, 6)
    want = torch.stack([x[:, t] * mask[t % mask.shape[0]] for t in range(tokens)], dim=1)
    assert torch.equal(multiply_tiled(x, mask), want)


def test_fp64_and_cpu_run_the_reference() -> None:
    x, weight = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert torch.equal(rms_norm(x, weight), reference.rms_norm(x, weight))
    with forced("triton"), pytest.warns(UserWarning, match="fp64"):
        assert torch.equal(rms_norm(x, weight), reference.rms_norm(x, weight))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"weight \[7\]"):
        rms_norm(torch.zeros(2, 8), torch.ones(7))
    with pytest.raises(ShapeError, match=r"mask \[4, 7\]"):
        residual_rms_norm(torch.zeros(2, 8), torch.ones(8), torch.ones(4, 7))
    with pytest.raises(ShapeError, match=r"with a mask x is"):
        rms_norm(torch.zeros(8), torch.ones(8), torch.ones(1, 8))
    with pytest.raises(ShapeError, match=r"x is \[\]"):
        rms_norm(torch.tensor(1.0), torch.ones(1))
    with pytest.raises(ShapeError, match=r"delta \[2, 4\]"):
        add_rms_norm(torch.zeros(2, 8), torch.zeros(2, 4), torch.ones(8))


@pytest.mark.parametrize("form", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_masks_without_rows_or_longer_than_the_text_and_no_width_are_refused(form: Backend) -> None:
    x, weight = torch.ones(2, 3, 8), torch.ones(8)
    with forced(form):
        for rows in (0, 4):
            with pytest.raises(ShapeError, match=f"mask has {rows} rows, x 3 tokens"):
                rms_norm(x, weight, torch.ones(rows, 8))
            with pytest.raises(ShapeError, match=f"mask has {rows} rows, x 3 tokens"):
                multiply_tiled(x, torch.ones(rows, 8))
        with pytest.raises(ShapeError, match=r"x is \[2, 3, 0\].*at least 1"):
            rms_norm(x[..., :0], weight[:0])


def test_a_tiled_mask_of_another_width_or_device_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"x is \[2, 3, 8\], mask \[3, 7\]"):
        multiply_tiled(torch.ones(2, 3, 8), torch.ones(3, 7))
    with pytest.raises(ShapeError, match="multiply_tiled got tensors on cpu, meta"):
        multiply_tiled(torch.ones(2, 3, 8), torch.ones(3, 8, device="meta"))
