"""Which form of an operation runs: the Triton kernel or the plain PyTorch reference."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from longspan.errors import UsageError
from longspan.kernels.checks import check_devices

Backend = Literal["triton", "reference"]
VARIABLE = "LONGSPAN_KERNELS"
_CHOICES = ("auto", "triton", "reference")
NO_AUTOCAST = "it does not take part in torch.autocast; convert the model to bf16 instead."
_log = logging.getLogger("longspan.kernels")
_forced: ContextVar[Backend | None] = ContextVar("longspan_kernels", default=None)


@contextlib.contextmanager
def forced(backend: Backend) -> Iterator[None]:
    """Run every operation in this form inside the context, whatever device and environment say.

    Args:
        backend: "triton" needs CUDA tensors, or TRITON_INTERPRET=1 set before the kernels are first used.
    """
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, statement by statement."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def autocasting(x: Tensor) -> bool:
    """Whether torch.autocast is on for x's device: products then change types that a backward pass counts on."""
    return torch.is_autocast_enabled(x.device.type)


def choose(operation: str, *tensors: Tensor, unsupported: str | None = None) -> Backend:
    """The form in which an operation runs on these tensors.

    Triton on CUDA devices of compute capability 8.0 and higher, the reference elsewhere; `forced` and the
    environment variable LONGSPAN_KERNELS (auto, triton, reference) override it. The choice is logged once.

    Args:
        operation: name, for the log.
        tensors: all on one device.
        unsupported: why the kernel cannot take these shapes or types; it then falls back with one warning.

    Raises:
        ShapeError: the tensors are on different devices.
        UsageError: LONGSPAN_KERNELS has no such value, or asks for Triton where it cannot run.
    """
    check_devices(operation, *tensors)
    wanted = _wanted(tensors[0].device)
    if wanted == "triton" and unsupported is not None:
        warn_once(operation, unsupported)
        wanted = "reference"
    _log_once(operation, wanted)
    return wanted


def _wanted(device: torch.device) -> Backend:
    forced_backend = _forced.get()
    if forced_backend is not None:
        return forced_backend
    value = os.environ.get(VARIABLE, "auto")
    if value not in _CHOICES:
        raise UsageError(f"{VARIABLE} = {value!r}: use one of {', '.join(_CHOICES)}.")
    if value == "triton" and device.type != "cuda" and not interpreting():
        raise UsageError(
            f"{VARIABLE} = triton, but tensors are on {device}: Triton needs a CUDA device, or TRITON_INTERPRET=1 for "
            f"its interpreter. Set {VARIABLE}=auto."
        )
    if value != "auto":
        return "triton" if value == "triton" else "reference"
    return "triton" if device.type == "cuda" and _capable(device.index or 0) else "reference"


@cache
def _capable(index: int) -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.get_device_capability(index) >= (8, 0)


@cache
def warn_once(operation: str, reason: str) -> None:
    """Warn that an operation, or a part of it, runs in its plain PyTorch form; each reason once in a process.

    Args:
        operation: name.
        reason: a sentence, why there is no kernel.
    """
    warnings.warn(f"{operation}: {reason} The plain PyTorch form runs instead, slower.", stacklevel=4)


@cache
def _log_once(operation: str, backend: Backend) -> None:
    _log.debug("%s runs in its %s form", operation, backend)
