"""Checks of what a caller passes, shared by the public functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longspan.errors import ShapeError


def check_devices(operation: str, *tensors: Tensor) -> None:
    """Raises ShapeError unless all tensors are on one device; `operation` is for the message."""
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ShapeError(f"{operation} got tensors on {names}. Move all of them to one device.")


def check_shapes(wanted: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Raises ShapeError unless every tensor has its shape.

    Nothing is broadcast: a row that is one for all would be wrong without a word.

    Args:
        wanted: name -> (the tensor, the shape that it must have).
    """
    wrong = [
        f"{name} is {list(given.shape)}, expected {list(shape)}"
        for name, (given, shape) in wanted.items()
        if given.shape != shape
    ]
    if wrong:
        raise ShapeError(f"{'; '.join(wrong)}. Pass tokens, state and reset flags of the same rows and heads.")


def check_reset(reset: Tensor) -> None:
    """Raises ShapeError unless the flags are bool."""
    if reset.dtype != torch.bool:
        raise ShapeError(f"reset is {reset.dtype}: it must be bool. Use reset.bool().")
