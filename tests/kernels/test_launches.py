"""Launching a kernel many times: what reaches the launcher, seen with the layers above it replaced."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")


class Launcher:
    """As Triton's: scratch sizes, and a `launch` that makes one argument into several before it calls C."""

    def __init__(self, scratch: int = 0) -> None:
        self.global_scratch_size, self.profile_scratch_size = scratch, 0
        self.launch = wrap(max)

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
        self.launch(x, y, z, stream, function, "option", *args)


def wrap(launcher: Any) -> Any:
    """What Triton wraps around the function in C when a kernel has tensor descriptors."""

    def inner(*args: Any) -> Any:
        return launcher(*args[:10], *(part for x in args[10:] for part in (x if isinstance(x, list) else [x])))

    return inner


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 77)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))


def direct(launcher: Launcher, args: list[Any], changing: tuple[int, ...]) -> Any:
    from longspan.kernels.launches import _direct

    return _direct(SimpleNamespace(run=launcher, function=5, packed_metadata=(4,)), (3, 1, 1), args, changing)


def test_notes_what_reaches_the_launcher() -> None:
    tensor = torch.zeros(4)
    launch, args, places = direct(Launcher(), [["map", 7, 8], tensor, 0, (1, 2), 9], (2,))
    assert launch is max
    assert args[:11] == [3, 1, 1, 77, 5, "option", (4,), None, None, None, "map"]
    args[places[0]] = 6
    assert args[11:] == [7, 8, tensor.data_ptr(), 6, (1, 2), 9]


def test_leaves_alone_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    assert direct(Launcher(scratch=8), [0], (0,)) is None
    nested = Launcher()
    nested.launch = lambda *args: None
    assert direct(nested, [0], (0,)) is None
    assert direct(SimpleNamespace(), [0], (0,)) is None  # type: ignore[arg-type]
    profiler = SimpleNamespace(calls=[print])
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", profiler)
    assert direct(Launcher(), [0], (0,)) is None


def test_first_launch_then_handle_then_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.kernels import launches

    seen: list[Any] = []

    class Handle:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args: seen.append(("handle", grid, args))

    class Kernel:
        arg_names, do_not_specialize = ["x", "block"], ["block"]

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: [seen.append(("kernel", grid, args, options)), Handle()][1]

    monkeypatch.setattr(launches, "_direct", lambda *_: None)
    launch = launches.RepeatedLaunch(Kernel(), (2,), (10, 0), (1,), num_warps=4)
    launch(3)
    launch(4)
    launch.direct = (lambda *args: seen.append(("direct", args)), ["map", 10, 0], [2])
    launch(5)
    assert seen == [
        ("kernel", (2,), (10, 3), {"num_warps": 4}),
        ("handle", (2, 1, 1), (10, 4)),
        ("direct", ("map", 10, 5)),
    ]
    with pytest.raises(AssertionError, match="variant"):
        launches.RepeatedLaunch(Kernel(), (2,), (10, 0), (0,))
