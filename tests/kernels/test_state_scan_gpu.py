"""The Block-Recurrent layer's kernels on a GPU: every output and gradient against fp64, with every tile."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from poison import poisoned_memory
from scan_cases import Case, Sizes, errors, everything, make_case

from longspan.kernels.block_recurrent import scan as scan_module
from longspan.kernels.block_recurrent.api import block_recurrent
from longspan.kernels.launches import RepeatedLaunch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BASE = {"window": 512, "states": 512, "dim": 1024, "heads": 8, "width": 128, "ffn": 1024}
SHORT = {"window": 256, "states": 256, "dim": 512, "heads": 4, "width": 128, "ffn": 512}
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-3}
two_phase = partial(block_recurrent, form="two_phase")
# Sizes that differ cost a compilation each: most cases share theirs. Rows choose between tiles.
CASES = {
    "one row": ("fixed", "skip", Sizes(rows=1, tokens=3 * 512 + 100, **BASE)),
    "one row, whole blocks": ("fixed", "skip", Sizes(rows=1, tokens=3 * 512, **BASE)),
    "five rows": ("fixed", "skip", Sizes(rows=5, tokens=1024, **BASE)),
    "eight rows": ("fixed", "skip", Sizes(rows=8, tokens=3 * 512, **BASE)),
    "eight rows, ragged": ("fixed", "skip", Sizes(rows=8, tokens=2 * 512 + 77, **BASE)),
    "lstm": ("lstm", "skip", Sizes(rows=2, tokens=1024, **BASE)),
    "dual": ("fixed", "dual", Sizes(rows=2, tokens=1124, **BASE)),
    "lstm single": ("lstm", "single", Sizes(rows=2, tokens=1024, **BASE)),
    "heads of 64": ("fixed", "skip", Sizes(rows=3, tokens=700, **(SHORT | {"heads": 8, "width": 64}))),
    "odd": ("lstm", "skip", Sizes(rows=3, tokens=211, window=48, states=80, dim=192, heads=3, width=64, ffn=64)),
}


def check(case: Case, dtype: torch.dtype, **changes: bool) -> None:
    """Every result lies within the limit of fp64, or as near as plain PyTorch in the same type, and half more.

    The gradients of the state's queries and scales nearly cancel in modes dual and single: there bf16 leaves errors of
    up to 4 % to any order of computation.
    """
    with poisoned_memory():
        ours = everything(case.to(dtype, "cuda"), block_recurrent, **changes)
    exact = everything(case.to(torch.float64, "cuda"), two_phase, **changes)
    bad = {name: gap for name, gap in errors(ours, exact).items() if not gap < LIMITS[dtype]}
    if bad and dtype == torch.bfloat16:
        plain = errors(everything(case.to(dtype, "cuda"), two_phase, **changes), exact)
        bad = {name: (gap, plain[name]) for name, gap in bad.items() if not gap <= 1.5 * plain[name]}
    assert not bad, bad


@pytest.mark.parametrize("name", CASES)
def test_bf16(name: str) -> None:
    check(make_case(*CASES[name]), torch.bfloat16)


@pytest.mark.parametrize("tokens", [600, 512])
def test_fp32(tokens: int) -> None:
    check(make_case("fixed", "skip", Sizes(rows=2, tokens=tokens, **SHORT)), torch.float32)


def test_tokens_read_whole_blocks_without_the_copy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.kernels.block_recurrent.triton_tokens.copies_tiles", lambda device: False)
    check(make_case(*CASES["one row, whole blocks"]), torch.bfloat16)


def test_without_a_gradient_of_the_state() -> None:
    check(make_case(*CASES["one row"]), torch.bfloat16, last=False)


def test_from_border_states_as_with_everything_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(*CASES["five rows"]).to(torch.bfloat16, "cuda")
    kept = everything(case, block_recurrent)
    monkeypatch.setattr(scan_module, "KEEP_LIMIT_BYTES", -1)
    monkeypatch.setattr(scan_module, "CHUNK_VALUES", 1)  # one block
    gaps = errors(everything(case, block_recurrent), {name: x.double() for name, x in kept.items()})
    assert max(gaps.values()) < 1e-2, gaps


def test_many_short_blocks_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second block of a chunk on, launches go straight to the driver; rows that large tiles and copies fit."""
    sizes = Sizes(rows=8, tokens=39 * 64 + 20, window=64, states=256, dim=384, heads=6, width=64)
    case, noted = make_case("fixed", "skip", sizes), []

    class Noted(RepeatedLaunch):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            noted.append(self)

    monkeypatch.setattr("longspan.kernels.block_recurrent.triton_scan.RepeatedLaunch", Noted)
    assert scan_module.chunk_blocks(8, 40, 256, 64, 384) == 40
    check(case, torch.bfloat16)
    ours = case.to(torch.bfloat16, "cuda")
    whole = {name: x.double() for name, x in everything(ours, block_recurrent).items()}
    monkeypatch.setattr(scan_module, "CHUNK_VALUES", sizes.values(11))
    assert scan_module.chunk_blocks(8, 40, 256, 64, 384) == 10
    for limit in (1 << 40, -1):
        monkeypatch.setattr(scan_module, "KEEP_LIMIT_BYTES", limit)
        noted.clear()
        with poisoned_memory():
            found = everything(ours, block_recurrent)
        gaps = errors(found, whole)
        assert max(gaps.values()) < 1e-2, (limit, gaps)
        # of the read, of the attention, of the norm with and without a gate behind it, in each of four chunks
        assert len(noted) >= 4 * 4 and all(each.direct is not None for each in noted)


@pytest.mark.parametrize("name", ["one row", "five rows"])
def test_window_attention_beside_the_chain_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs follow one another without a pause, so that memory is given out again as soon as it may be."""
    case = make_case(*CASES[name]).to(torch.bfloat16, "cuda")
    beside = [everything(case, block_recurrent) for _ in range(6)]
    monkeypatch.setattr("longspan.kernels.block_recurrent.scan_layer.BESIDE", False)
    alone = everything(case, block_recurrent)
    different = {key for found in beside for key in alone if not torch.equal(found[key], alone[key])}
    # the cache's gradient is added up in another order
    assert all("cached" in key for key in different), different


def test_the_chain_takes_no_memory_that_the_main_stream_still_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Window attention whose last kernel, slow, fills a buffer of the gradients' size that is free already."""
    from longspan.kernels.block_recurrent import triton_layer

    case = make_case(*CASES["five rows"]).to(torch.bfloat16, "cuda")
    quiet = everything(case, block_recurrent)
    window_backward, sizes = triton_layer.window_backward, []

    def slow(*arguments: Any) -> Any:
        result = window_backward(*arguments)
        junk = [torch.empty_like(result[0][:, :, 0]) for _ in range(4)]
        torch.cuda._sleep(100_000_000)
        for tensor in junk:
            sizes.append(tensor.fill_(float("nan")).numel())
        return result

    monkeypatch.setattr(triton_layer, "window_backward", slow)
    found = [everything(case, block_recurrent) for _ in range(3)]
    assert len(sizes) == 12
    for each in found:
        assert all(x.isfinite().all() and torch.allclose(x, quiet[name], rtol=1e-2) for name, x in each.items())


def test_repeats_bit_by_bit() -> None:
    case = make_case(*CASES["five rows"]).to(torch.bfloat16, "cuda")
    first, again = everything(case, block_recurrent), everything(case, block_recurrent)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_new_length_compiles_nothing() -> None:
    import triton

    def run(tokens: int) -> None:
        everything(
            make_case("fixed", "skip", Sizes(rows=1, tokens=tokens, **BASE)).to(torch.bfloat16, "cuda"),
            block_recurrent,
        )

    for tokens in (512 * 3, 512 * 3 + 40):
        run(tokens)
    compiled: list[object] = []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **found: compiled.append(found.get("repr"))
    try:
        for tokens in (512 * 8, 512 * 5 + 7, 512 * 9):
            run(tokens)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert not compiled


def test_a_nan_ends_and_stays_in_its_row() -> None:
    case = make_case(*CASES["five rows"]).to(torch.bfloat16, "cuda")
    case.tensors["state"][1, 0, 0] = float("nan")
    found = everything(case, block_recurrent)
    assert found["read"][1].isnan().any() and found["read"][2].isfinite().all()


def test_no_synchronisation() -> None:
    case = make_case(*CASES["five rows"]).to(torch.bfloat16, "cuda")
    everything(case, block_recurrent)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(case, block_recurrent)
    finally:
        torch.cuda.set_sync_debug_mode("default")
