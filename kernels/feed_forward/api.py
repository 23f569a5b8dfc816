"""Public functions of the feed-forward network, and of products that are added to a residual in its own memory."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels import backend
from longspan.kernels.feed_forward import reference

__all__ = ["add_feed_forward_", "add_product_", "adds_in_place", "feed_forward"]


def feed_forward(x: Tensor, hidden_weight: Tensor, output_weight: Tensor, *, keep_hidden: bool = True) -> Tensor:
    """relu(x W1^T) W2^T with a backward pass that keeps no more than it needs.

    Args:
        x: [..., D].
        hidden_weight: W1 [F, D].
        output_weight: W2 [D', F].
        keep_hidden: keep relu(x W1^T) for the backward pass. Otherwise it is computed there again, a chunk of tokens
            at a time, for a sixth more arithmetic: for long inputs, whose hidden vectors do not fit into memory. The
            plain PyTorch form always keeps it.

    Returns:
        [..., D'], x's type.

    Raises:
        ShapeError: the widths differ.
    """
    _check_widths(x, hidden_weight, output_weight)
    unsupported = None
    if x.dtype == torch.float64:
        unsupported = "the kernel computes in fp32 and these tensors are fp64."
    elif backend.autocasting(x):
        unsupported = backend.NO_AUTOCAST
    elif not x.dtype == hidden_weight.dtype == output_weight.dtype:
        unsupported = f"x is {x.dtype}, the weights {hidden_weight.dtype} and {output_weight.dtype}."
    if backend.choose("feed_forward", x, hidden_weight, output_weight, unsupported=unsupported) == "triton":
        from longspan.kernels.feed_forward.autograd import lean_feed_forward

        return lean_feed_forward(x, hidden_weight, output_weight, keep_hidden)
    return reference.feed_forward(x, hidden_weight, output_weight)


def adds_in_place(residual: Tensor, *weights: Tensor) -> bool:
    """Whether products with these weights can be added to this residual in its own memory: where the kernels run, in
    bf16 or fp32, all of one type, without autocast.

    Args:
        residual: [..., D].
        weights: of the products.
    """
    dtype = residual.dtype
    if dtype not in (torch.bfloat16, torch.float32) or any(weight.dtype != dtype for weight in weights):
        return False
    if backend.autocasting(residual) or not residual.is_contiguous():
        return False
    return backend.choose("add_product", residual, *weights) == "triton"


def add_product_(residual: Tensor, weight: Tensor, *parts: Tensor) -> Tensor:
    """residual + x W^T written over the residual, x being the parts side by side: cuBLAS adds to what its output holds
    without a pass of its own.

    The residual must be the caller's to overwrite. If a backward pass needs its old value and has saved it before,
    autograd refuses that pass, since the result counts as a change of the residual. Nor may this run again in a
    backward pass (checkpointing).

    Args:
        residual: [..., D'], with `adds_in_place(residual, weight)`.
        weight: W [D', D].
        parts: each [..., D1], [..., D2], ..., with D1 + D2 + ... = D.

    Returns:
        [..., D'], in the residual's memory; differentiable once.

    Raises:
        ShapeError: the shapes do not fit together.
        ValueError: these tensors are not added in place, or the residual is a parameter or shares memory with a part.
    """
    width = sum(part.shape[-1] if part.dim() else 0 for part in parts)
    if weight.dim() != 2 or not parts or weight.shape[1] != width:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise ShapeError(
            f"the parts are {shapes}, W {list(weight.shape)}: expected [..., D1], [..., D2], [D', D1 + D2]."
        )
    for part in parts:
        _check_residual(residual, part, weight, weight)
    from longspan.kernels.feed_forward.in_place import add_product_ as add

    return add(residual, weight, *parts)


def add_feed_forward_(residual: Tensor, x: Tensor, hidden_weight: Tensor, output_weight: Tensor) -> Tensor:
    """residual + relu(x W1^T) W2^T written over the residual, as `add_product_` does; hidden vectors are kept.

    Args:
        residual: [..., D'], with `adds_in_place(residual, hidden_weight, output_weight)`.
        x, hidden_weight, output_weight: as in `feed_forward`.

    Returns:
        [..., D'], in the residual's memory; differentiable once.

    Raises:
        ShapeError: the shapes do not fit together.
        ValueError: these tensors are not added in place, or the residual is a parameter or shares memory with x.
    """
    _check_widths(x, hidden_weight, output_weight)
    _check_residual(residual, x, hidden_weight, output_weight)
    from longspan.kernels.feed_forward.in_place import add_feed_forward_ as add

    return add(residual, x, hidden_weight, output_weight)


def _check_widths(x: Tensor, hidden_weight: Tensor, output_weight: Tensor) -> None:
    flat = x.dim() == 0 or hidden_weight.dim() != 2 or output_weight.dim() != 2
    if flat or hidden_weight.shape[1] != x.shape[-1] or output_weight.shape[1] != hidden_weight.shape[0]:
        raise ShapeError(
            f"x is {list(x.shape)}, W1 {list(hidden_weight.shape)}, W2 {list(output_weight.shape)}: "
            "expected [..., D], [F, D], [D', F]."
        )


def _check_residual(residual: Tensor, x: Tensor, hidden_weight: Tensor, output_weight: Tensor) -> None:
    wanted = [*x.shape[:-1], output_weight.shape[0]]
    if list(residual.shape) != wanted:
        raise ShapeError(f"the residual is {list(residual.shape)}, the product {wanted}: they must have one shape.")
    weights = (hidden_weight, output_weight)
    if x.dtype != residual.dtype or not adds_in_place(residual, *weights):
        types = ", ".join(str(weight.dtype) for weight in weights)
        raise ValueError(
            f"the residual is {residual.dtype} on {residual.device}, x {x.dtype}, the weights {types}: these products "
            "are not added in place. Ask adds_in_place first, and add with +."
        )
    if residual.requires_grad and residual.is_leaf:
        raise ValueError("the residual is a leaf with a gradient: a parameter is not written over. Pass a sum of it.")
    if residual.numel() and residual.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        raise ValueError("the residual and x share memory: x would change while it is read. Pass a copy of either.")
