"""Public functions of the norms around a residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels import backend
from longspan.kernels.checks import check_devices
from longspan.kernels.norm import reference

__all__ = ["add_rms_norm", "goes_back_from_output", "multiply_tiled", "residual_rms_norm", "rms_norm"]

MAX_DIM = 16384  # one row stays in the registers of one program


def rms_norm(x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """RMS(x) * weight (arXiv:1910.07467), times a dropout mask that is shared by all rows.

    Statistics are computed in fp32 (fp64 for fp64 input); the gradient of `weight` is deterministic.

    Args:
        x: [..., D]; with a mask [..., T, D].
        weight: [D].
        mask: [M, D] multipliers, 1 <= M <= T, token t takes row t mod M; None = no dropout. Gets no gradient.

    Returns:
        Like x.

    Raises:
        ShapeError: the widths differ or are 0, the mask has no rows or more than T, or devices differ.
    """
    if _choose(x, None, weight, mask) == "triton":
        from longspan.kernels.norm.triton import residual_norm

        return residual_norm(x, None, weight, mask)[1]
    return reference.rms_norm(x, weight, mask)


def goes_back_from_output(x: Tensor, weight: Tensor) -> bool:
    """Whether the norms of a residual stream may be made with `from_output`: by the kernel, in types whose exponents
    reach to the least weight that it divides by.

    Args:
        x, weight: as in `rms_norm`.
    """
    wide = all(tensor.dtype in (torch.bfloat16, torch.float32) for tensor in (x, weight))
    return wide and x.shape[-1] <= MAX_DIM and _choose(x, None, weight, None) == "triton"


def residual_rms_norm(
    x: Tensor, weight: Tensor, mask: Tensor | None = None, *, from_output: bool = False
) -> tuple[Tensor, Tensor]:
    """x itself and its norm, so that both gradients of x meet in one kernel.

    Args:
        x, weight, mask: as in `rms_norm`.
        from_output: as in `add_rms_norm`.

    Returns:
        x; RMS(x) * weight * mask.

    Raises:
        ShapeError: as in `rms_norm`.
        ValueError: as in `add_rms_norm`.
    """
    _check_from_output(from_output, x, weight, mask)
    if _choose(x, None, weight, mask) == "triton":
        from longspan.kernels.norm.triton import residual_norm

        return residual_norm(x, None, weight, mask, from_output)
    return x, reference.rms_norm(x, weight, mask)


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, mask: Tensor | None = None, *, from_output: bool = False
) -> tuple[Tensor, Tensor]:
    """The residual sum and its norm in one pass; the gradients of x and delta are one tensor.

    Args:
        x: [..., D]; with a mask [..., T, D].
        delta: like x.
        weight, mask: as in `rms_norm`.
        from_output: the backward pass reads the norm instead of s, so that s may be overwritten after this and costs no
            memory. The normalised row is then norm / weight: a weight of an absolute value below 2^-100, 0 too, counts
            as 2^-100 with its sign, in both passes. Only where `goes_back_from_output`, and without a mask.

    Returns:
        s = x + delta; RMS(s) * weight * mask.

    Raises:
        ShapeError: x and delta differ in shape; else as in `rms_norm`.
        ValueError: from_output, and there is a mask or these tensors do not go back from the output.
    """
    _check_from_output(from_output, x, weight, mask)
    if x.shape != delta.shape:
        raise ShapeError(f"x is {list(x.shape)}, delta {list(delta.shape)}: add_rms_norm needs equal shapes.")
    if _choose(x, delta, weight, mask) == "triton":
        from longspan.kernels.norm.triton import residual_norm

        return residual_norm(x, delta, weight, mask, from_output)
    total = x + delta
    return total, reference.rms_norm(total, weight, mask)


def multiply_tiled(x: Tensor, mask: Tensor) -> Tensor:
    """Token t of every row times row t mod M of the mask.

    Args:
        x: [..., T, D].
        mask: [M, D], 1 <= M <= T.

    Returns:
        Like x.

    Raises:
        ShapeError: the widths differ, the mask has no rows or more than T, or devices differ.
    """
    if x.dim() < 2 or mask.dim() != 2 or mask.shape[1] != x.shape[-1]:
        raise ShapeError(f"x is {list(x.shape)}, mask {list(mask.shape)}: expected [..., T, D] and [M, D].")
    _check_rows(x, mask)
    check_devices("multiply_tiled", x, mask)
    return reference.multiply_tiled(x, mask)


def _check_from_output(from_output: bool, x: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    if from_output and (mask is not None or not goes_back_from_output(x, weight)):
        raise ValueError(
            f"from_output with x {x.dtype} on {x.device} and {'no' if mask is None else 'a'} mask: only the kernel "
            "goes back from its output, in bf16 and fp32 and without a mask. Ask goes_back_from_output first."
        )


def _check_rows(x: Tensor, mask: Tensor) -> None:
    if not 1 <= mask.shape[0] <= x.shape[-2]:
        raise ShapeError(
            f"the mask has {mask.shape[0]} rows, x {x.shape[-2]} tokens: a mask has 1 to T rows. Cut it to the tokens, "
            "or pass None for no dropout."
        )


def _choose(x: Tensor, delta: Tensor | None, weight: Tensor, mask: Tensor | None) -> backend.Backend:
    dim = x.shape[-1] if x.dim() > 0 else 0
    if weight.shape != (dim,) or (mask is not None and (x.dim() < 2 or mask.dim() != 2 or mask.shape[1] != dim)):
        mask_shape = None if mask is None else list(mask.shape)
        raise ShapeError(
            f"x is {list(x.shape)}, weight {list(weight.shape)}, mask {mask_shape}: expected [..., D], [D], [M, D]; "
            "with a mask x is [..., T, D]."
        )
    if dim == 0:
        raise ShapeError(f"x is {list(x.shape)}: the norm of no numbers is not defined. D must be at least 1.")
    if mask is not None:
        _check_rows(x, mask)
    unsupported = None
    if dim > MAX_DIM:
        unsupported = f"the kernel takes widths up to {MAX_DIM}, this is {dim}."
    elif torch.float64 in (x.dtype, weight.dtype):
        unsupported = "the kernel computes in fp32 and these tensors are fp64."
    elif delta is not None and delta.dtype != x.dtype:
        unsupported = f"x is {x.dtype}, delta {delta.dtype}."
    tensors = [tensor for tensor in (x, delta, weight, mask) if tensor is not None]
    return backend.choose("rms_norm", *tensors, unsupported=unsupported)
