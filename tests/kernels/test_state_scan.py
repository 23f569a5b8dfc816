"""The three-phase backward against autograd of the unrolled loop, and its Triton kernels under the interpreter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from poison import poisoned_memory
from scan_cases import VARIANTS, Case, Sizes, errors, everything, inputs_of, make_case
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels import backend
from longspan.kernels.block_recurrent import scan as scan_module
from longspan.kernels.block_recurrent.api import block_recurrent
from longspan.kernels.block_recurrent.packed import project_sum, project_twice

EXACT = 1e-11
TINY = Sizes(rows=3, tokens=27, window=8, states=6, dim=16, heads=2, width=4, ffn=12)
variants = pytest.mark.parametrize(("gate", "mode"), VARIANTS, ids=lambda value: value)
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is not on")
three_phase = partial(block_recurrent, form="three_phase")
two_phase = partial(block_recurrent, form="two_phase")


def triton_form(inputs):  # type: ignore[no-untyped-def]
    with backend.forced("triton"):
        return block_recurrent(inputs)


@pytest.fixture(params=[("all", 9), ("border", 9), ("border", 2)], ids=["all", "border", "border2"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the forward keeps, and how many blocks the backward computes at once."""
    keep, chunk = request.param
    monkeypatch.setattr(scan_module, "KEEP_LIMIT_BYTES", 1 << 40 if keep == "all" else -1)
    monkeypatch.setattr(scan_module, "CHUNK_VALUES", TINY.values(chunk))


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ((8, 8, 512, 512, 1024), 8),
        ((8, 64, 512, 512, 1024), 8),
        ((1, 2048, 512, 512, 1024), 64),
        ((100, 8, 512, 512, 1024), 1),
        ((32, 64, 256, 64, 384), 10),
        ((8, 9, 512, 512, 1024), 5),  # not eight and one
        ((8, 64, 16, 512, 1024), 8),  # the tokens count
    ],
)
def test_chunks_hold_as_many_numbers_whatever_the_sizes(sizes: tuple[int, ...], blocks: int) -> None:
    assert scan_module.chunk_blocks(*sizes) == blocks


@pytest.mark.parametrize("tokens", [1, 7, 8, 27, 40], ids=lambda tokens: f"T{tokens}")
@variants
def test_three_phase_is_autograd_in_fp64(gate: str, mode: str, tokens: int, memory: None) -> None:
    case = make_case(gate, mode, Sizes(**(vars(TINY) | {"tokens": tokens})))
    for last in (True, False):
        gaps = errors(everything(case, three_phase, last=last), everything(case, two_phase, last=last))
        assert max(gaps.values()) < EXACT, (last, gaps)


@pytest.mark.parametrize("mode", ["skip", "dual"])
def test_an_lstm_gate_that_writes_a_tanh(mode: str) -> None:
    case = make_case("lstm", mode, TINY, candidate="tanh")
    assert max(errors(everything(case, three_phase), everything(case, two_phase)).values()) < EXACT


def test_a_frozen_state() -> None:
    case = make_case("fixed", "skip", TINY, update="frozen")
    assert max(errors(everything(case, three_phase), everything(case, two_phase)).values()) < EXACT


def test_a_scale_of_zero() -> None:
    case = make_case("fixed", "skip", TINY)
    with torch.no_grad():
        case.mixer.recurrent.write.self_scale[1] = case.mixer.recurrent.write.token_scale[0] = 0.0
    assert max(errors(everything(case, three_phase), everything(case, two_phase)).values()) < EXACT


def test_split_segments_pass_gradients_through_state_and_cache() -> None:
    """Two halves with the state and the cache handed over are the whole, gradients included."""
    case = make_case("fixed", "skip", Sizes(**(vars(TINY) | {"tokens": 32})))
    leaves = {n: t.clone().requires_grad_() for n, t in case.tensors.items() if not n.startswith("d_")}
    whole = three_phase(inputs_of(case, **leaves))
    first = three_phase(
        inputs_of(
            case, **leaves | {n: leaves[n][:, :16] for n in ("qkv", "state_query")} | {"reset": case.reset[:, :2]}
        )
    )
    rest = {n: leaves[n][:, 16:] for n in ("qkv", "state_query")} | {"reset": case.reset[:, 2:]}
    handed = {"state": first.state, "cached_keys": first.keys, "cached_values": first.values}
    second = three_phase(inputs_of(case, **leaves | rest | handed))
    assert torch.allclose(torch.cat([first.read, second.read], dim=1), whole.read, atol=1e-12)
    sources = [*leaves.values(), *case.mixer.parameters()]
    both = torch.autograd.grad(
        [first.own, second.own, first.read, second.read, second.state],
        sources,
        [
            case.tensors["d_own"][:, :16],
            case.tensors["d_own"][:, 16:],
            case.tensors["d_read"][:, :16],
            case.tensors["d_read"][:, 16:],
            case.tensors["d_state"],
        ],
        allow_unused=True,
    )
    names = ("own", "read", "state")
    want = torch.autograd.grad(
        [getattr(whole, n) for n in names], sources, [case.tensors[f"d_{n}"] for n in names], allow_unused=True
    )
    for a, b in zip(both, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-11)


KERNEL_CASES = [
    ("fixed", "skip", Sizes(tokens=40)),
    ("lstm", "skip", Sizes(tokens=48, rows=1)),
    ("fixed", "skip", Sizes(tokens=9, states=24, dim=48)),
    ("lstm", "dual", Sizes(tokens=40)),
    ("fixed", "single", Sizes(tokens=32)),
]


def kernel_runs() -> Iterator[Any]:
    """Every case with the last state used and unused; interpreted, most are for the long suite."""
    for number, (gate, mode, sizes) in enumerate(KERNEL_CASES):
        for last in (True, False):
            often = number != 1 if last else number == 2
            name = f"{gate}-{mode}-{sizes.tokens}-state-{'used' if last else 'unused'}"
            yield pytest.param(gate, mode, sizes, last, marks=() if often else pytest.mark.long, id=name)


@interpreted
@pytest.mark.parametrize(("gate", "mode", "sizes", "last"), list(kernel_runs()))
def test_kernels_equal_autograd(gate: str, mode: str, sizes: Sizes, last: bool) -> None:
    case = make_case(gate, mode, sizes)
    gaps = errors(everything(case.to(torch.float32), triton_form, last=last), everything(case, two_phase, last=last))
    assert max(gaps.values()) < 5e-6, gaps


@interpreted
@pytest.mark.parametrize(
    ("copies", "tokens"), [(True, 64), pytest.param(False, 64, marks=pytest.mark.long), (True, 61)]
)
def test_tokens_read_through_the_copy_engine_or_pointers(
    copies: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy engine is asked for only where nothing is cut off: tiles divide window and states here."""
    from longspan.kernels.block_recurrent import triton_tokens

    asked = []
    monkeypatch.setattr(triton_tokens, "copies_tiles", lambda device: asked.append(device) or copies)
    case = make_case("fixed", "skip", Sizes(tokens=tokens, window=32))
    gaps = errors(everything(case.to(torch.float32), triton_form), everything(case, two_phase))
    assert max(gaps.values()) < 5e-6, gaps
    assert len(asked) == (2 if tokens == 64 else 0)


@interpreted
def test_tokens_read_states_that_the_copy_engine_cannot_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.kernels.block_recurrent import triton_tokens

    asked = []
    monkeypatch.setattr(triton_tokens, "copies_tiles", lambda device: asked.append(device) or True)
    queries, scale = torch.randn(1, 32, 1, 16), torch.ones(1)
    keys, values = torch.randn(2, 1, 2, 16, 1, 16)
    odd = [torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in (keys, values)]  # begin 4 bytes too late
    found = [triton_tokens.read_states(queries, scale, *states, 16) for states in ((keys, values), odd)]
    assert len(asked) == 1 and torch.allclose(*found, atol=1e-6)


@interpreted
@pytest.mark.parametrize("parts", [2, 8])
def test_sums_in_parts_of_rows_and_of_blocks(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows and one, three blocks each; or every row alone, two blocks and one."""
    monkeypatch.setattr("longspan.kernels.block_recurrent.triton_scan.SUM_PARTS", parts)
    case = make_case("fixed", "skip", Sizes(rows=3, tokens=40, states=16, dim=32, width=16))
    gaps = errors(everything(case.to(torch.float32), triton_form), everything(case, two_phase))
    assert max(gaps.values()) < 5e-6, gaps


@interpreted
@pytest.mark.parametrize("copies", [True, pytest.param(False, marks=pytest.mark.long)])
def test_reads_gradient_through_the_copy_engine_or_pointers(copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles of the product, which fit the case; the second chunk has a block that nobody writes."""
    from longspan.kernels.block_recurrent import triton_scan
    from longspan.kernels.block_recurrent.tiles import Tiles

    asked = []
    sizes = Sizes(tokens=40, states=32, dim=32, width=16)
    monkeypatch.setattr(scan_module, "CHUNK_VALUES", sizes.values(2))
    monkeypatch.setattr(triton_scan, "LARGE_ROWS", 1)
    monkeypatch.setattr(triton_scan, "PRODUCT_WIDE", Tiles(16, 32, 4, 2))
    monkeypatch.setattr(triton_scan, "PRODUCT_LARGE", Tiles(16, 32, 4, 2))
    monkeypatch.setattr(triton_scan, "copies_tiles", lambda device: asked.append(device) or copies)
    case = make_case("fixed", "skip", sizes)
    gaps = errors(everything(case.to(torch.float32), triton_form), everything(case, two_phase))
    assert max(gaps.values()) < 5e-6, gaps
    assert len(asked) == 1  # nothing is written in the other chunk


@interpreted
def test_kernels_in_chunks_from_the_border_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "KEEP_LIMIT_BYTES", -1)
    monkeypatch.setattr(scan_module, "CHUNK_VALUES", Sizes().values(2))
    case = make_case("fixed", "skip", Sizes(tokens=48))  # three blocks, all written: two at once, and one
    gaps = errors(everything(case.to(torch.float32), triton_form), everything(case, two_phase))
    assert max(gaps.values()) < 5e-6, gaps


@interpreted
def test_the_scan_alone_has_kernels() -> None:
    case = make_case("fixed", "skip", Sizes(tokens=40)).to(torch.float32)
    weights, results = list(case.mixer.recurrent.parameters()), []
    for fast in (True, False):
        inputs = inputs_of(case, state=case.tensors["state"].clone().requires_grad_())
        tokens = inputs.normalised()
        leaves = [inputs.state, tokens.keys.detach().requires_grad_(), tokens.values.detach().requires_grad_()]
        with poisoned_memory():
            states = scan_module.scan_states(*leaves, case.reset, inputs.path, case.window, fast=fast)
            outputs = (states.keys, states.values, states.last)
            given = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in outputs]
            kept = [x.clone() for x in given]
            results.append([*outputs, *torch.autograd.grad(outputs, [*leaves, *weights], given)])
        assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True)), "the gradient given in is the caller's"
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() < 1e-5 * plain.norm()


@interpreted
@pytest.mark.parametrize("keep", ["all", pytest.param("border", marks=pytest.mark.long)])
def test_kernels_write_all_they_return_and_take_a_slice_of_the_flags(
    keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "KEEP_LIMIT_BYTES", 1 << 40 if keep == "all" else -1)
    monkeypatch.setattr(scan_module, "CHUNK_VALUES", Sizes().values(2))
    case = make_case("fixed", "skip", Sizes(tokens=88 if keep == "border" else 40))
    wide = torch.ones(case.reset.shape[0], 2 * case.reset.shape[1], dtype=torch.bool)
    wide[:, 1::2] = case.reset
    case.reset = wide[:, 1::2]
    ours = case.to(torch.float32)
    ours.reset = wide[:, 1::2]
    assert not ours.reset.is_contiguous()
    with poisoned_memory():
        found = everything(ours, triton_form)
    gaps = errors(found, everything(case, two_phase))
    assert max(gaps.values()) < 5e-6, gaps


def test_joined_projections_are_plain_ones() -> None:
    x, first, second = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (6, 4), (5, 4)))
    one, two = project_twice(x, first, second)
    assert torch.allclose(one, x @ first.t()) and torch.allclose(two, x @ second.t())
    assert torch.autograd.gradcheck(project_twice, (x, first, second))
    own, read, weight = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 3, 4), (5, 8))
    )
    assert torch.allclose(project_sum(own, read, weight), torch.cat([own, read], dim=-1) @ weight.t())
    assert torch.autograd.gradcheck(project_sum, (own, read, weight))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "every second number": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "rows last": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


def laid_out(given: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same record with all its tensors, those of records in it too, in other places of memory."""
    if isinstance(given, Tensor):
        return change(given)
    if not is_dataclass(given):
        return given
    return replace(given, **{field.name: laid_out(getattr(given, field.name), change) for field in fields(given)})  # type: ignore[type-var]


@interpreted
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(
    ("gate", "sizes"),
    [
        ("fixed", Sizes(tokens=10, window=4, states=5, dim=16, heads=1, width=16)),  # the chain forward has no kernel
        pytest.param("fixed", Sizes(tokens=20, states=16), marks=pytest.mark.long),
        pytest.param("lstm", Sizes(tokens=20, states=16), marks=pytest.mark.long),
    ],
    ids=["small", "fixed", "lstm"],
)
def test_inputs_and_weights_need_not_be_contiguous(gate: str, sizes: Sizes, strides: str) -> None:
    case = make_case(gate, "skip", sizes).to(torch.float32)
    change = STRIDES[strides]
    relaid = laid_out(inputs_of(case), change)
    seen = [relaid.state, relaid.state_query, relaid.path.ids, relaid.path.key]
    assert not any(x.is_contiguous() for x in seen)
    want = everything(case, triton_form)
    found = everything(case, lambda inputs: triton_form(laid_out(inputs, change)))
    gaps = errors(found, {name: x.double() for name, x in want.items()})
    assert max(gaps.values()) < 1e-5, gaps


@interpreted
@pytest.mark.long
def test_kernels_in_fp16() -> None:
    """As near to fp64 as 16 bits let it be; gradients of scales nearly cancel."""
    case = make_case("fixed", "skip", Sizes(tokens=10, window=4, states=5, dim=16, heads=1, width=16))
    gaps = errors(everything(case.to(torch.float16), triton_form), everything(case, two_phase))
    assert max(gap for name, gap in gaps.items() if not name.endswith("scale")) < 5e-3, gaps
    assert max(gaps.values()) < 5e-2, gaps


@interpreted
def test_kernels_take_an_lstm_gate_that_writes_a_tanh() -> None:
    case = make_case("lstm", "skip", Sizes(tokens=32, rows=1), candidate="tanh")
    gaps = errors(everything(case.to(torch.float32), triton_form), everything(case, two_phase))
    assert max(gaps.values()) < 5e-6, gaps


def warned(*cases: Case) -> list[str]:
    """What the kernels say in two runs of each case, forward and back."""
    backend.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", RuntimeWarning)  # of the interpreter
        for case in (*cases, *cases):
            everything(case, triton_form)
    return [str(warning.message) for warning in found]


def test_types_and_heads_without_kernel_fall_back_with_one_warning() -> None:
    (said,) = warned(make_case("fixed", "skip", TINY))
    assert said.startswith("block_recurrent: torch.float64 has no kernel")
    (said,) = warned(make_case("lstm", "skip", TINY).to(torch.float32))
    assert said.startswith("block_recurrent: heads of width 4 have no kernel (16, 32, 64, 128 have).")


@interpreted
def test_a_chain_without_kernel_gives_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a segment in two chunks, whose chain runs again in the backward pass."""
    sizes = Sizes(rows=1, tokens=24, window=8, states=5, dim=16, heads=1, width=16, ffn=8)
    monkeypatch.setattr(scan_module, "KEEP_LIMIT_BYTES", -1)
    monkeypatch.setattr(scan_module, "CHUNK_VALUES", sizes.values(2))
    (said,) = warned(make_case("fixed", "skip", sizes).to(torch.float32))
    assert said.startswith("block_recurrent, chain of states: the kernels take heads 32, 64 or 128 wide, not 16.")
    assert "The plain PyTorch form runs instead" in said


@interpreted
def test_where_the_chain_has_a_kernel_or_by_its_mode_none_nothing_is_said() -> None:
    sizes = Sizes(rows=1, tokens=16, states=16, dim=64, heads=1, ffn=8)
    assert warned(*(make_case("fixed", mode, sizes).to(torch.float32) for mode in ("skip", "single"))) == []


def test_no_gradient_is_kept_without_grad_mode() -> None:
    case = make_case("fixed", "skip", TINY)
    with torch.no_grad():
        out = three_phase(inputs_of(case))
    assert not out.read.requires_grad and out.read.isfinite().all()


WRONG = {
    "state": (lambda t: t[:1], r"state is \[1, 6, 16\], expected \[3, 6, 16\] for 3 rows"),
    "reset": (lambda t: t[:, :3], r"reset is \[3, 3\], expected \[3, 4\]"),
    "cached_values": (lambda t: t[:, 1:], r"cached_values is \[3, 7, 2, 4\], expected \[3, 8, 2, 4\]"),
    "state_query": (lambda t: t[:, :5], r"state_query is \[3, 5, 2, 4\]"),
    "qkv": (lambda t: t[:, :0], r"qkv is \[3, 0, 3, 2, 4\], expected .* at least one row and one token"),
    "cached_keys": (lambda t: t[:, :0], r"cached_keys is \[3, 0, 2, 4\], expected .* a window of at least one"),
    "bias_table": (lambda t: t[:, 1:], r"bias_table is \[2, 31\], expected \[2, 32\]"),
    "state_scale": (lambda t: t[:1], r"state_scale is \[1\], expected \[2\] for 2 heads"),
    "scale": (lambda t: t.to("meta"), r"scale is on meta, qkv on cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    case = make_case("fixed", "skip", TINY)
    change, message = WRONG[name]
    inputs = inputs_of(case)
    with pytest.raises(ShapeError, match=message):
        block_recurrent(inputs_of(case, **{name: change(getattr(inputs, name))}))


def test_other_types_of_flags_and_unknown_forms_are_refused() -> None:
    case = make_case("fixed", "skip", TINY)
    with pytest.raises(ShapeError, match="must be bool"):
        block_recurrent(inputs_of(case, reset=case.reset.long()))
    with pytest.raises(ValueError, match="two_phase, sequential, three_phase"):
        block_recurrent(inputs_of(case), form="two_fase")


def test_under_autocast_the_plain_form_runs() -> None:
    backend.warn_once.cache_clear()
    case = make_case("fixed", "skip", Sizes(width=16, tokens=16)).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        found = everything(case, triton_form)
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_rows_of_zero_are_refused() -> None:
    case = make_case("fixed", "skip", TINY)
    none = {name: tensor[:0] for name, tensor in case.tensors.items() if not name.startswith("d_")}
    with pytest.raises(ShapeError, match="at least one row"):
        block_recurrent(inputs_of(case, **none, reset=case.reset[:0]))


@pytest.mark.parametrize("form", [two_phase, three_phase], ids=["two_phase", "three_phase"])
def test_a_nan_stays_in_its_row_and_goes_on(form) -> None:  # type: ignore[no-untyped-def]
    case = make_case("fixed", "skip", TINY)
    case.tensors["state"][1, 0, 0] = float("nan")
    out = form(inputs_of(case))
    assert out.read[1].isnan().any() and out.read[2].isfinite().all()
