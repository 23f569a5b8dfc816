"""Window attention on a GPU: all tiles that can be picked against fp64, repeated bits, long segments, launches.

Picked are those of fp32, of 16-bit heads up to 64 and of wider ones: `CASES` has all three.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent import futures

import pytest
import torch
from poison import poisoned_memory, relative_error
from window_cases import ARRIVALS, Case, copy_engine, inputs_of, reset_of, run, run_once

from longspan.kernels.window_attention.api import window_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
CASES = {  # what takes longest to compile first
    torch.float32: [
        Case(512, 1024, width=128, where="blocks"),
        Case(512, 700, width=128, drop=True),
        Case(200, 777, width=128, rows=3),
        Case(512, 700, width=64, rope=True),
        Case(128, 333, width=64),
        Case(40, 77, width=32),
        Case(64, 130, width=16, where="first"),
    ],
    torch.bfloat16: [
        Case(512, 1024, width=128, where="blocks"),
        Case(512, 1100, width=128, heads=3),
        Case(512, 1408, width=128, drop=True),
        Case(512, 700, width=128, drop=True),
        Case(512, 700, width=128, rope=True),
        Case(64, 1, width=128, where="nowhere"),
        Case(512, 300, width=64),
        Case(128, 256, width=64, drop=True, where="blocks"),
        Case(64, 130, width=64, where="first"),
        Case(200, 777, width=32),
        Case(128, 384, width=32),
        Case(200, 333, width=16, rows=3),
    ],
}
# the last one: as on GPUs without a copy engine
EACH = [(dtype, case, True) for dtype, cases in CASES.items() for case in cases]
EACH.append((torch.bfloat16, Case(512, 1100, width=128, heads=3), False))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Compile the variants of all cases at once, each in a process of its own, into Triton's cache on disk."""
    spawn = multiprocessing.get_context("spawn")
    workers = max(1, min(len(EACH), len(os.sched_getaffinity(0))))
    with futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        runs = [pool.submit(run_once, case, dtype, copies) for dtype, case, copies in EACH]
        futures.wait(runs)  # what fails will fail again below


@pytest.mark.parametrize(("dtype", "case", "copies"), EACH, ids=str)
def test_equals_fp64_with_all_gradients(dtype: torch.dtype, case: Case, copies: bool) -> None:
    tensors = inputs_of(case, dtype, "cuda")
    for name in ("scale", "table"):
        if name in tensors:
            tensors[name] = tensors[name].float()
    with poisoned_memory(), copy_engine(copies):
        ours = run(case, tensors, "triton")
    want = run(case, {name: x.double() for name, x in tensors.items()}, "reference")
    errors = {name: relative_error(ours[name], x) for name, x in want.items() if x.norm() > 0}
    print(case, dtype, " ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert all(error < LIMITS[dtype] for error in errors.values()), errors


def test_a_sharp_softmax_works() -> None:
    """The logits' own rounding is `scale` times as large: only that it works matters here."""
    case = Case(512, 1024, width=128, where="blocks", scale=30.0)
    tensors = inputs_of(case, torch.bfloat16, "cuda")
    ours = run(case, tensors, "triton")
    want = run(case, {name: x.double() for name, x in tensors.items()}, "reference")
    assert all(relative_error(ours[name], want[name]) < 0.1 for name in ("out", "d_qkv", "d_table"))


def test_gradients_of_bias_and_scale_may_be_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(512, 1024, width=128, where="blocks")
    tensors = inputs_of(case, torch.bfloat16, "cuda")
    whole = run(case, tensors, "triton")
    monkeypatch.setattr("longspan.kernels.window_attention.fused.PIECE_TOKENS", 192)
    pieces = run(case, tensors, "triton")
    assert all(relative_error(pieces[name], x) < 1e-4 for name, x in whole.items())


@pytest.mark.parametrize("arrival", ARRIVALS)
def test_the_gradient_may_lie_anywhere(arrival: str) -> None:
    case = Case(512, 1100, width=128, heads=3)
    tensors = inputs_of(case, torch.bfloat16, "cuda")
    go = ARRIVALS[arrival](tensors["w_out"])
    want = run(case, tensors | {"w_out": go.contiguous().clone()}, "triton")
    got = run(case, tensors | {"w_out": go}, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_rows_of_an_odd_length_do_not_touch() -> None:
    case = Case(512, 1100, width=128, heads=3, rows=3, where="nowhere")
    tensors = inputs_of(case, torch.bfloat16, "cuda")
    clean = run(case, tensors, "triton")
    for name in ("qkv", "cached_keys", "cached_values", "w_out", "w_keys", "w_values"):
        tensors[name][1] = torch.nan
    spoilt = run(case, tensors, "triton")
    for name in ("out", "keys", "values", "d_qkv", "d_cached_keys", "d_cached_values"):
        assert torch.equal(spoilt[name][::2], clean[name][::2]), name


def long_inputs(rows: int, tokens: int) -> tuple[Case, dict[str, torch.Tensor]]:
    case = Case(512, tokens, width=128, heads=8, rows=rows, where="nowhere")
    return case, inputs_of(case, torch.bfloat16, "cuda")


def test_repeated_runs_give_the_same_bits() -> None:
    case, tensors = long_inputs(4, 4096)
    first, second = (run(case, tensors, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_token_does_not_see_itself() -> None:
    case, tensors = long_inputs(1, 2048)
    before = run(case, tensors, "triton")["out"]
    tensors["qkv"][:, 700, 1:] = 100.0
    changed = (run(case, tensors, "triton")["out"] != before).flatten(2).any(2).any(0).nonzero().flatten()
    assert changed.min() == 701 and changed.max() == 700 + 512


def test_nan_stays_where_it_can_be_seen() -> None:
    case, tensors = long_inputs(1, 2048)
    tensors["qkv"][0, 1000, 0, 3, 5] = torch.nan
    out = run(case, tensors, "triton")["out"].isnan().any(-1)[0]
    assert out.nonzero().tolist() == [[1000, 3]]


def test_a_million_tokens_end_as_their_last_window_says() -> None:
    """Offsets pass 2^31; the last tokens see the cache that a segment of their own would get."""
    tokens, tail, heads, width, window = 1 << 20, 1024, 8, 128, 512
    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    qkv = draw(1, tokens, 3, heads, width).requires_grad_()
    table, scale = torch.randn(heads, 32, device="cuda"), torch.ones(heads, device="cuda")
    cache = torch.zeros(1, window, heads, width, device="cuda", dtype=torch.bfloat16)
    reset = torch.zeros(1, tokens, dtype=torch.bool, device="cuda")
    out, keys, values = window_attention(qkv, cache, cache, table, scale, reset=reset)
    go = draw(1, tail, heads, width)
    (whole,) = torch.autograd.grad((out[:, -tail:] * go).sum(), qkv)
    whole, out = whole[:, -tail:].clone(), out[:, -tail:].clone()
    with torch.no_grad():
        before = window_attention(qkv[:, : tokens - tail], cache, cache, table, scale, reset=reset[:, tail:])
        assert torch.equal(values[:, -8:], qkv[:, -8:, 2])
    last = qkv.detach()[:, -tail:].requires_grad_()
    short, short_keys, _ = window_attention(last, before[1], before[2], table, scale, reset=reset[:, -tail:])
    (part,) = torch.autograd.grad((short * go).sum(), last)
    assert relative_error(short, out) < 1e-2 and relative_error(part, whole) < 1e-2
    assert torch.equal(short_keys, keys)


def test_another_length_compiles_nothing_and_nothing_waits_for_the_device() -> None:
    from longspan.kernels.window_attention import triton_backward, triton_forward

    kernels = (
        triton_forward.attend_kernel,
        triton_backward.delta_kernel,
        triton_backward.key_gradient_kernel,
        triton_backward.query_gradient_kernel,
        triton_backward.finish_kernel,
    )

    def once(tokens: int, mode: str) -> None:
        case = Case(512, tokens, width=128, heads=8, rows=1, where="nowhere")
        t = inputs_of(case, torch.bfloat16, "cuda")
        reset = reset_of(case, "cuda")
        qkv = t["qkv"].requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out, _, _ = window_attention(qkv, t["cached_keys"], t["cached_values"], t["table"], t["scale"], reset=reset)
            out.backward(t["w_out"])
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    once(1024, "default")
    count = compiled()
    for tokens in (2048, 1152, 3712):
        once(tokens, "error")
    assert compiled() == count
