"""Launching one Triton kernel with other tensors and sizes each time, at a host cost of some microseconds.

Triton looks at every argument of every launch again, in many small steps, to find the variant of the kernel that fits;
its launcher then asks the driver about every tensor. Here a launch is told apart by one key, at least as fine as
Triton's own, and what the launcher got for a key is kept. `launches.RepeatedLaunch` is for loops over the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from longspan.kernels.launches import hooked, launcher_call

_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})  # not their other subclasses, which may be no memory at all
_AS_THEY_ARE = frozenset({type(None), bool, float})  # Triton tells these apart by type alone
_INT32 = range(-(2**31), 2**31)


def launched_directly(kernel: Any) -> Any:
    """Decorator over `triton.jit`: the kernel as a `DirectKernel`, or itself where kernels are interpreted."""
    return DirectKernel(kernel) if isinstance(kernel, JITFunction) else kernel


class DirectKernel:
    """A kernel that is launched as ever, `kernel[grid](*tensors_and_sizes, **constants)`, and mostly faster.

    The first launch of a variant goes through Triton, the later ones straight to the function in C below it, with the
    addresses of the tensors. Ordinary launches remain: those with hooks, of a profiler say; kernels that need scratch
    memory; tensors elsewhere than on the current GPU, other objects than tensors, descriptors and plain numbers,
    integers of more than 32 bits; and all where Triton's launcher is not of the known form.

    Constants are hashable and named, all others stand in order. As to the rest it is the kernel that it holds. Global
    values that a kernel reads must not change after its first launch: only Triton would notice and raise.
    """

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self.plain = len(kernel.params) - len(kernel.constexprs)
        assert all(place >= self.plain for place in kernel.constexprs), "constants stand last"
        self.variants: dict[tuple[Any, ...], _Variant | None] = {}  # None: launched ordinarily, always

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """What launches on this grid, one to three sizes."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
        driver, knobs = triton.runtime.driver.active, triton.knobs
        device = driver.get_current_device()
        ordinary = len(args) != self.plain or self.kernel.pre_run_hooks or hooked()
        read = None if ordinary else _read(args, device)
        if read is None:
            return self.kernel[grid](*args, **constants)
        kinds, values, described = read
        given = tuple(constants.values())
        key = (
            device, knobs.runtime.debug, knobs.compilation.instrumentation_mode,
            tuple(kinds), tuple(constants), given, tuple(map(type, given)),  # True is 1 in a key
        )  # fmt: skip
        variant = self.variants.get(key)
        if variant is not None:
            for (place, descriptor), form in zip(described, variant.forms, strict=True):
                values[place] = variant.encode(descriptor, form)[0]
            stream = driver.get_current_stream(device)
            variant.launch(*(*grid, 1, 1)[:3], stream, *variant.head, *values, *variant.tail)
            return variant.handle
        handle = self.kernel[grid](*args, **constants)
        if key not in self.variants:
            self.variants[key] = self._variant(handle, args, constants, values, described)
        return handle

    def _variant(
        self, handle: Any, args: tuple[Any, ...], constants: dict[str, Any], values: list[Any], described: list[Any]
    ) -> _Variant | None:
        """What later launches like this one need; None if the launcher would not get from them what Triton gives it."""
        tail = [constants.get(p.name, p.default) for p in self.kernel.params[self.plain :]]
        call = launcher_call(handle, (1, 1, 1), [*args, *tail])
        if call is None or len(call.forms) != len(described) or None in call.forms:
            return None
        for (place, descriptor), form in zip(described, call.forms, strict=True):
            values[place] = call.encode(descriptor, form)[0]
        begin = len(call.noted) - len(values) - len(tail)
        if begin < 5 or not all(map(_alike, [*values, *tail], call.noted[begin:])):
            return None
        return _Variant(handle, call.launch, call.noted[4:begin], tail, call.forms, call.encode)


@dataclass
class _Variant:
    """A compiled kernel and what its launcher gets behind the grid (3) and the stream.

    No tensor among it: it stays for good.

    Args:
        handle: the compiled kernel; launch: the function in C.
        head: the compiled function and options of the launch; tail: constants.
        forms, encode: of `LauncherCall`.
    """

    handle: Any
    launch: Any
    head: list[Any]
    tail: list[Any]
    forms: list[Any]
    encode: Any


def _read(args: tuple[Any, ...], device: int) -> tuple[list[Any], list[Any], list[tuple[int, TensorDescriptor]]] | None:
    """One look at the arguments in front of the constants.

    An integer is told apart by more than Triton does where it is not specialised: such a kernel has a few keys more,
    and Triton gives them the same variant.

    Args:
        device: index of the current GPU.

    Returns:
        What tells each argument apart; what the launcher gets, places of CUtensorMaps still None; those places and the
        descriptors. Or None where an argument is none that is known here.
    """
    kinds: list[Any] = []
    values: list[Any] = []
    described = []
    for arg in args:
        kind = type(arg)
        if kind in _TENSORS:
            if arg.get_device() != device:
                return None
            address = arg.data_ptr()
            kinds.append((arg.dtype,) if address % 16 else arg.dtype)
            values.append(address)
        elif kind is int:
            if arg not in _INT32:
                return None
            kinds.append("1" if arg == 1 else "" if arg % 16 else "16")
            values.append(arg)
        elif kind in _AS_THEY_ARE:
            kinds.append(kind)
            values.append(arg)
        elif kind is TensorDescriptor and type(arg.base) in _TENSORS and arg.base.get_device() == device:
            kinds.append((arg.base.dtype, *arg.block_shape))
            described.append((len(values), arg))
            values += (None, *arg.shape, *arg.strides)
        else:
            return None
    return kinds, values, described


def _alike(mine: Any, theirs: Any) -> bool:
    """Whether the launcher takes both for the same; CUtensorMaps cannot be looked into."""
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.data_ptr()
    return type(mine) is type(theirs) and (mine is theirs or mine == theirs or type(mine).__name__ == "PyCUtensorMap")
