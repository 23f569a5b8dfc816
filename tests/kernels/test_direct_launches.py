"""Launches past Triton's Python: what reaches the launcher must be what an ordinary launch gives it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from longspan.kernels import launches  # noqa: E402
from longspan.kernels.direct_launches import DirectKernel, launched_directly  # noqa: E402


def body(x, y, tile, number, size, free, HEADS: tl.constexpr, EXTRA: tl.constexpr = 7):  # type: ignore[no-untyped-def]
    """Never compiled."""


@dataclass
class PyCUtensorMap:
    """What Triton's function in C would have encoded."""

    given: tuple[Any, ...]


class Recorder:
    """In place of the function in C."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)


def make_tensordesc_arg(arg: Any, metadata: Any) -> list[Any]:
    return [PyCUtensorMap((arg.base.data_ptr(), metadata, arg.padding)), *arg.shape, *arg.strides]


class Launcher:
    """In the form of Triton 3.6."""

    def __init__(self, launcher: Recorder, signature: list[Any], scratch: int) -> None:
        self.global_scratch_size, self.profile_scratch_size = scratch, 0
        places = [i for i, x in enumerate(signature) if str(x).startswith("tensordesc")]
        tensordesc_meta = [{"form": signature[i]} for i in places]

        def inner(*args: Any) -> Any:
            final = list(args[:13])
            for i, arg in enumerate(args[13:]):
                meta = tensordesc_meta[places.index(i)] if i in places else None
                final.extend([arg] if meta is None else make_tensordesc_arg(arg, meta))
            return launcher(*final)

        self.launch = inner if places else launcher

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *args: Any) -> None:
        self.launch(x, y, z, stream, function, False, False, None, None, *args)


class Stage:
    """A kernel on a GPU that is not there: everything of Triton but its compiler and what lies below the launcher."""

    def __init__(self) -> None:
        self.stream, self.scratch, self.recorder = 77, 0, Recorder()
        self.jit = JITFunction(body, do_not_specialize=["free"])
        self.jit.create_binder = self.create_binder  # type: ignore[method-assign]
        self.jit.device_caches.default_factory = self.create_binder
        self.fast = DirectKernel(self.jit)

    def create_binder(self) -> tuple[Any, ...]:
        made = JITFunction.create_binder(self.jit)
        self.jit.compile = self.compile  # type: ignore[method-assign]
        return made

    def compile(self, source: Any, **options: Any) -> Any:
        """A handle whose `function` says all that tells variants apart."""
        function = repr((source.signature, source.attrs, source.constants, sorted(options["options"].items())))
        launcher = Launcher(self.recorder, list(source.signature.values()), self.scratch)
        return SimpleNamespace(
            run=launcher, function=function, packed_metadata=(4, 1, 0), launch_metadata=lambda *args: None
        )

    def launch(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], grid: Any = (5, 2)) -> list[Any]:
        """What the launcher got, tensors by their addresses, hooks None."""
        self.recorder.calls.clear()
        kernel[grid](*args, **constants)
        (call,) = self.recorder.calls
        flat = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in call]
        flat[11:13] = [None, None]
        return [(type(x), x) for x in flat]


@pytest.fixture
def make_stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Stage]:
    stages: list[Stage] = []
    active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: stages[-1].stream,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.jit, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    seen = SimpleNamespace(FunctionType=FunctionType, CellType=launches.types.CellType, BuiltinFunctionType=Recorder)
    monkeypatch.setattr(launches, "types", seen)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 0 if x.device.type == "cpu" else -1)

    def make() -> Stage:
        stages.append(Stage())
        return stages[-1]

    return make


MEMORY = torch.zeros(4096, dtype=torch.int8)
TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.bool, torch.int64)


@functools.cache
def tensor(dtype: torch.dtype, offset: int) -> torch.Tensor:
    start = -MEMORY.data_ptr() % 64 + offset * 8
    return MEMORY[start : start + 1024].view(dtype)


def described(dtype: torch.dtype, rows: int, block: tuple[int, ...], padding: str = "zero") -> TensorDescriptor:
    base = tensor(dtype, 0)
    return TensorDescriptor(base, [rows, 16], [16, 1], list(block), padding)


TENSORS = st.builds(tensor, st.sampled_from(TYPES), st.sampled_from([0, 1, 2, 3]))
INTEGERS = st.sampled_from(
    [0, 1, 2, 15, 16, 17, -1, -16, 4096, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**33 + 1, 2**63]
)
NUMBERS = st.one_of(INTEGERS, st.sampled_from([True, False, None, 0.0, 1.0, 0.5]))
DESCRIBED = st.builds(
    described,
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([1, 2, 16]),
    st.sampled_from([(1, 16), (2, 16), (16, 8)]),
    st.sampled_from(["zero", "nan"]),
)
ARGS = st.tuples(TENSORS, st.one_of(TENSORS, st.none()), st.one_of(DESCRIBED, TENSORS), NUMBERS, INTEGERS, INTEGERS)
CONSTANTS = st.fixed_dictionaries(
    {"HEADS": st.sampled_from([1, True, 8, None, "half", 1.5])},
    optional={"EXTRA": st.sampled_from([7, 8]), "num_warps": st.sampled_from([4, 8]), "num_stages": st.just(2)},
)
DEFAULT = (tensor(torch.bfloat16, 0), None, tensor(torch.int32, 0), 3, 16, 5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(ARGS, CONSTANTS), min_size=1, max_size=12))
def test_the_launcher_gets_the_same(
    make_stage: Callable[[], Stage], pairs: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    """All launches, twice over on one kernel, against ordinary ones."""
    stage, ordinary = make_stage(), make_stage()
    for args, constants in pairs * 2:
        assert stage.launch(stage.fast, args, constants) == ordinary.launch(ordinary.jit, args, constants)


@pytest.mark.parametrize(
    ("place", "values"),
    [
        (0, [tensor(dtype, offset) for dtype in TYPES for offset in (0, 1, 2)]),
        (1, [None, tensor(torch.int64, 0)]),
        (2, [described(torch.bfloat16, 16, x) for x in ((1, 16), (2, 16), (2, 8))] + [tensor(torch.bfloat16, 0)]),
        (2, [described(torch.float32, 16, (1, 16)), described(torch.int32, 16, (1, 16), "zero")]),
        (3, [0, 1, 2, 16, -16, -1, True, False, None, 0.0, 1.0]),
        (5, [0, 1, 2, 2**31, 2**63, -(2**31) - 1]),
    ],
)
def test_each_of_a_kind_after_each_other(make_stage: Callable[[], Stage], place: int, values: list[Any]) -> None:
    stage, ordinary = make_stage(), make_stage()
    for value in [*values, *reversed(values)]:
        args = (*DEFAULT[:place], value, *DEFAULT[place + 1 :])
        assert stage.launch(stage.fast, args, {"HEADS": 8}) == ordinary.launch(ordinary.jit, args, {"HEADS": 8})


@pytest.mark.parametrize("change", range(8))
def test_a_second_launch_goes_past_triton(make_stage: Callable[[], Stage], change: int) -> None:
    stage = make_stage()
    stage.launch(stage.fast, DEFAULT, {"HEADS": 8})
    other: list[Any] = [tensor(torch.bfloat16, 2), None, tensor(torch.int32, 4), 5, 32, 7]
    ordinary = [stage.launch(stage.jit, tuple(args), {"HEADS": 8}, grid) for args, grid in ((other, (9,)),)]
    stage.jit.run = None  # type: ignore[assignment,method-assign]
    assert [stage.launch(stage.fast, tuple(other), {"HEADS": 8}, (9,))] == ordinary
    different: Any = [tensor(torch.bfloat16, 1), DEFAULT[0], tensor(torch.int64, 0), 1, 17, 1, 9, "grid"][change]
    args, constants = [*other], {"HEADS": 8}
    if change == 7:  # another stream and grid need no other variant
        stage.stream = 78
        assert stage.launch(stage.fast, DEFAULT, constants, (1, 2, 3))[:4] == [(int, x) for x in (1, 2, 3, 78)]
        return
    if change == 6:
        constants = {"HEADS": different}
    else:
        args[change] = different
    with pytest.raises(TypeError):  # to Triton, which is gone
        stage.fast[(9,)](*args, **constants)


def test_leaves_to_triton_what_it_does_not_know(
    make_stage: Callable[[], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage()
    seen: list[Any] = []
    run = stage.jit.run

    def noting(*args: Any, **constants: Any) -> Any:
        seen.append(args)
        return run(*args, **constants)

    stage.jit.run = noting  # type: ignore[method-assign]

    def ordinary(args: tuple[Any, ...] = DEFAULT, **constants: Any) -> bool:
        seen.clear()
        stage.fast[(1,)](*args, **{"HEADS": 8, **constants})
        return bool(seen)

    assert ordinary() and not ordinary()
    assert ordinary((*DEFAULT[:4], 2**31, 5)) and ordinary((*DEFAULT[:4], 2**31, 5))
    assert ordinary(((DEFAULT[0], 4), *DEFAULT[1:])) and ordinary(((DEFAULT[0], 4), *DEFAULT[1:]))
    assert ordinary(DEFAULT[:5], free=5) and ordinary(DEFAULT[:5], free=5)
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", SimpleNamespace(calls=[print]))
    assert ordinary() and ordinary()


def test_scratch_memory_and_other_launchers_stay_with_triton(
    make_stage: Callable[[], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    for scratch, change in ((8, None), (0, lambda *args: None)):
        stage = make_stage()
        stage.scratch = scratch
        if change is not None:
            monkeypatch.setattr(launches, "launcher_call", change)
            monkeypatch.setattr("longspan.kernels.direct_launches.launcher_call", change)
        stage.launch(stage.fast, DEFAULT, {"HEADS": 8})
        assert list(stage.fast.variants.values()) == [None]
        stage.launch(stage.fast, DEFAULT, {"HEADS": 8})


def test_interpreted_kernels_are_left_as_they_are() -> None:
    assert launched_directly(body) is body
    kernel = launched_directly(JITFunction(body))
    assert kernel.arg_names[0] == "x"
