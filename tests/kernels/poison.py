"""New memory full of NaN, so that what a kernel forgets to write shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty, torch.empty_like and Tensor.new_empty give NaN inside the context."""

    def filling(function: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            return out.fill_(torch.nan) if out.dtype.is_floating_point else out

        return poisoned

    with (
        mock.patch.object(torch, "empty", filling(torch.empty)),
        mock.patch.object(torch, "empty_like", filling(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", filling(Tensor.new_empty)),
    ):
        yield


def relative_error(ours: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted, in fp64; NaN anywhere gives NaN."""
    want = want.detach().double()
    return ((ours.detach().double().to(want.device) - want).norm() / want.norm().clamp(min=1e-30)).item()
