"""Projections of a Block-Recurrent layer's tokens whose gradients need no pass of their own to be added up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from longspan.kernels.backend import autocasting


class _ProjectTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, first, second)
        return F.linear(x, first), F.linear(x, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfirst: Tensor, dsecond: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        dfirst, dsecond, flat = dfirst.flatten(0, -2), dsecond.flatten(0, -2), x.flatten(0, -2)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dfirst @ first).addmm_(dsecond, second).view(x.shape)
        return dx, dfirst.t() @ flat, dsecond.t() @ flat


def project_twice(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """x first^T and x second^T.

    Args:
        x: [..., D].
        first, second: [M, D], [N, D].

    Returns:
        [..., M], [..., N]; differentiable once.
    """
    if autocasting(x):  # it changes the types of the products below
        return F.linear(x, first), F.linear(x, second)
    return _ProjectTwice.apply(x, first, second)


class _ProjectSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, read: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(own, read, weight)
        half = own.shape[-1]
        y = own.flatten(0, -2) @ weight[:, :half].t()
        return y.addmm_(read.flatten(0, -2), weight[:, half:].t()).view(*own.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        own, read, weight = ctx.saved_tensors
        half, flat = own.shape[-1], dy.flatten(0, -2)
        down, dread = ((flat @ part).view(own.shape) for part in weight.split(half, dim=1))
        dweight = torch.empty_like(weight)
        for part, seen in zip(dweight.split(half, dim=1), (own, read), strict=True):
            torch.mm(flat.t(), seen.flatten(0, -2), out=part)
        return down, dread, dweight


def project_sum(own: Tensor, read: Tensor, weight: Tensor) -> Tensor:
    """The projection of two tensors side by side, without putting them side by side.

    Args:
        own, read: [..., M].
        weight: [D, 2*M].

    Returns:
        [..., D]; differentiable once.
    """
    if autocasting(own):
        return F.linear(torch.cat([own, read], dim=-1), weight)
    return _ProjectSum.apply(own, read, weight)
