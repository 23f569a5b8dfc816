"""Launching one Triton kernel many times in a row, at a host cost of a few microseconds.

A launch through Triton looks at every argument again, to find the variant of the kernel that fits, and encodes every
tensor descriptor again. A loop whose launches differ in a few integers alone need not.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton


def blocks_of(size: int, block: int) -> int:
    """ceil(size / block). Triton's own function looks for values of kernels in its arguments, for some microseconds."""
    return -(-size // block)


@cache  # asked in every layer; the driver takes microseconds
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for the CPU, where programs are interpreted one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class RepeatedLaunch:
    """A kernel, its grid and its arguments; every call launches it with new values of a few integers.

    The first call goes through Triton, the others straight to the launcher that the first one found. That is safe
    because all other arguments are the same objects, and the integers that change are not specialised: the kernel
    names them in `do_not_specialize`. All calls must be made on the device and the stream of the first one. Where
    Triton's launcher is not of the known form, later calls go through its compiled kernel, which is slower and the
    same otherwise. Under the interpreter every call is an ordinary launch.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], changing: tuple[int, ...], **options: Any
    ) -> None:
        """Launches nothing yet.

        Args:
            kernel: what `triton.jit` gives.
            grid: one to three sizes.
            args: all arguments in order, constants too; tensors, descriptors, integers, tuples of integers.
            changing: places in `args` of the integers (32 bits) that each call gives.
            options: num_warps and the like.
        """
        free = getattr(kernel, "do_not_specialize", kernel.arg_names)  # the interpreter has no variants
        assert all(kernel.arg_names[place] in free for place in changing), "a change would need another variant"
        self.kernel, self.grid, self.args, self.changing, self.options = kernel, grid, list(args), changing, options
        self.handle: Any = None
        self.direct: tuple[Any, list[Any], list[int]] | None = None

    def __call__(self, *values: int) -> None:
        """Launch with these values of the changing integers."""
        if self.direct is not None:
            launch, args, places = self.direct
            for place, value in zip(places, values, strict=True):
                args[place] = value
            launch(*args)
            return
        for place, value in zip(self.changing, values, strict=True):
            self.args[place] = value
        if self.handle is not None:
            self.handle[(*self.grid, 1, 1)[:3]](*self.args)
            return
        self.handle = self.kernel[self.grid](*self.args, **self.options)
        if self.handle is not None:
            self.direct = _direct(self.handle, (*self.grid, 1, 1)[:3], self.args, self.changing)


def hooked() -> bool:
    """Whether somebody, a profiler say, wants to hear of launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@dataclass
class LauncherCall:
    """How a launch ends.

    Args:
        launch: the function in C that launches.
        noted: its arguments.
        forms: how each tensor descriptor lies in shared memory, as Triton found it, in order.
        encode: Triton's, of a descriptor and its form: [CUtensorMap, *shape, *strides].
    """

    launch: Any
    noted: list[Any]
    forms: list[Any]
    encode: Any


def launcher_call(handle: Any, grid: tuple[int, ...], args: Sequence[Any]) -> LauncherCall | None:
    """The call in C that ends a launch of this compiled kernel on the current stream; it is not made.

    It is observed: the Python layers above run once with a function in its place that notes its arguments.
    None if the layers do not look as expected, or do more than pass arguments on (scratch memory, hooks of a profiler).
    """
    try:
        layers = copy.copy(handle.run)
        if layers.global_scratch_size or layers.profile_scratch_size or hooked():
            return None
        call = LauncherCall(layers.launch, [], [], None)

        def note(*given: Any) -> None:
            call.noted.extend(given)

        if isinstance(layers.launch, types.FunctionType):  # makes descriptors, then calls what it holds as `launcher`
            outer = layers.launch
            cells = dict(zip(outer.__code__.co_freevars, outer.__closure__ or (), strict=True))
            call.launch = cells["launcher"].cell_contents
            call.forms = list(cells["tensordesc_meta"].cell_contents or ()) if "tensordesc_meta" in cells else []
            call.encode = outer.__globals__.get("make_tensordesc_arg")
            cells["launcher"] = types.CellType(note)
            layers.launch = types.FunctionType(
                outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, tuple(cells.values())
            )
        else:
            layers.launch = note
        if not isinstance(call.launch, types.BuiltinFunctionType):
            return None
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        layers(*grid, stream, handle.function, handle.packed_metadata, None, None, None, *args)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return call


def _direct(
    handle: Any, grid: tuple[int, ...], args: list[Any], changing: tuple[int, ...]
) -> tuple[Any, list[Any], list[int]] | None:
    """The function in C below a compiled kernel, the arguments that it gets, and where the changing integers stand.

    None where `launcher_call` finds none.
    """
    markers = [object() for _ in changing]
    for place, marker in zip(changing, markers, strict=True):
        args = [*args[:place], marker, *args[place + 1 :]]
    call = launcher_call(handle, grid, args)
    if call is None or any(all(x is not marker for x in call.noted) for marker in markers):
        return None
    places = [next(at for at, x in enumerate(call.noted) if x is marker) for marker in markers]
    # an address in place of a tensor spares the launcher a call of Python and one of the driver
    return call.launch, [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in call.noted], places
