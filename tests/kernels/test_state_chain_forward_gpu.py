"""The Triton forward of the state chain on a GPU: every tile size that can be picked, against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.kernels.state_chain import Case, make_case, reference, relative

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16 = Case(
    rows=1, states=512, window=512, dim=1024, heads=8, width=128, tokens=512 * 3 + 100,
    scale=1.0, dtype=torch.bfloat16, device="cuda",
)  # fmt: skip
TF32 = replace(BF16, dtype=torch.float32)
FIELDS = ("entering", "proj", "inv", "read", "lse", "rstd", "final")
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-3}
CASES = {
    "b1": BF16,
    "b3": replace(BF16, rows=3, tokens=1024),
    "b8": replace(BF16, rows=8, tokens=1024),
    "b8 not a multiple of 256 wide": replace(BF16, rows=8, dim=1152, tokens=600),
    "b1 lstm": replace(BF16, gate="lstm"),
    "b8 lstm": replace(BF16, gate="lstm", rows=8, tokens=600),
    "b1 heads of 64": replace(BF16, heads=16, width=64),
    "b8 heads of 64": replace(BF16, heads=16, width=64, rows=8, tokens=600),
    "few states": replace(BF16, states=128, rows=2),
    "many states": replace(BF16, states=2048, tokens=600),
    "odd window": replace(BF16, window=48, states=80, dim=192, heads=3, width=64, tokens=200),
    "tf32 b1": replace(TF32, tokens=600),
    "tf32 b8": replace(TF32, rows=8, tokens=600),
    "tf32 b1 lstm": replace(TF32, gate="lstm", tokens=600, tanh=True),
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_equals_fp64(name: str) -> None:
    from longspan.kernels.block_recurrent import triton_forward as chain

    case = CASES[name]
    path, state, keys, values, reset = make_case(case)
    assert chain.unsupported(path, case.window) is None
    weights = chain.prepare(path)
    wanted = reference(path, state, keys, values, reset, case.window)
    result = chain.chain_forward(weights, state, keys, values, reset, case.window)
    again = chain.recompute(weights, result.entering, keys, values, reset, case.window)
    errors = {key: relative(getattr(result, key), value) for key, value in wanted.items()}
    for key in ("proj", "inv", "read", "lse", "rstd"):
        errors[f"recomputed {key}"] = relative(getattr(again, key), wanted[key])
    assert {key: error for key, error in errors.items() if not error < LIMITS[case.dtype]} == {}


@pytest.mark.parametrize("size", ["SMALL", "BIG"])
def test_every_way_to_run_gives_the_same(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches past Triton, through its compiled kernel, in a graph: equal bits. Copy engine or plain loads: nearly."""
    from longspan.kernels import launches
    from longspan.kernels.block_recurrent import triton_forward as chain

    path, state, keys, values, reset = make_case(BF16)
    weights, chosen = chain.prepare(path), getattr(chain, size)

    def run(tiles: chain.Tiles) -> chain.ChainResult:
        return chain.chain_forward(weights, state, keys, values, reset, BF16.window, tiles=tiles)

    first = run(chosen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(chosen)
    graph.replay()
    loaded = run(replace(chosen, tma=False))
    monkeypatch.setattr(launches, "_direct", lambda *_: None)
    for name in FIELDS:
        assert torch.equal(getattr(captured, name), getattr(first, name)), name
        assert torch.equal(getattr(run(chosen), name), getattr(first, name)), name
        # the compiler may contract a product and a sum in one of them only
        assert relative(getattr(loaded, name), getattr(first, name)) < 3e-3, name


def test_launches_go_past_triton() -> None:
    """Of three launches that differ in an integer the first alone looks at all arguments."""
    import triton

    from longspan.kernels.block_recurrent import triton_forward as chain

    if not triton.__version__.startswith("3.6."):
        pytest.skip("the launcher of another Triton")
    path, state, keys, values, reset = make_case(BF16)
    weights = chain.prepare(path)
    entering = state.new_empty(1, 4, *state.shape[1:])
    run = chain._Run(weights, entering, keys, values, reset, 512, 3, chain.SMALL, "all")
    run.begin(state, first=True)
    for launch in (run.project(1), run.attend(1), run.write()):
        launch(0)
        assert launch.direct is not None
        launch(1)
    torch.cuda.synchronize()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_repetitions_are_bit_equal(rows: int) -> None:
    from longspan.kernels.block_recurrent import triton_forward as chain

    case = replace(BF16, rows=rows, tokens=512 * 8)
    path, state, keys, values, reset = make_case(case)
    weights = chain.prepare(path)
    for tiles in (chain.SMALL, chain.BIG):
        first = chain.chain_forward(weights, state, keys, values, reset, case.window, tiles=tiles)
        for keep in ("all", "kv", "states", "all") * 10:
            result = chain.chain_forward(weights, state, keys, values, reset, case.window, tiles=tiles, keep=keep)
            assert torch.equal(result.entering, first.entering)
            assert torch.equal(result.final, first.final)


def test_three_hundred_blocks() -> None:
    from longspan.kernels.block_recurrent import triton_forward as chain

    case = replace(BF16, tokens=512 * 300)
    path, state, keys, values, reset = make_case(case)
    weights = chain.prepare(path)
    result = chain.chain_forward(weights, state, keys, values, reset, case.window)
    again = chain.chain_forward(weights, state, keys, values, reset, case.window, keep="kv")
    assert torch.equal(result.entering, again.entering)
    assert torch.equal(result.proj[:, :, :, :2], again.proj)
    assert torch.equal(result.final, again.final)
    assert result.final.isfinite().all()


def test_not_a_number_ends() -> None:
    from longspan.kernels.block_recurrent import triton_forward as chain

    path, state, keys, values, reset = make_case(replace(BF16, rows=2))
    weights = chain.prepare(path)
    reset.zero_()
    state[0] = float("nan")
    for tiles in (chain.SMALL, chain.BIG):
        result = chain.chain_forward(weights, state, keys, values, reset, 512, tiles=tiles)
        assert result.final[0].isnan().all()
        assert result.final[1].isfinite().all()


def test_a_new_length_compiles_nothing() -> None:
    from longspan.kernels.block_recurrent import triton_forward as chain
    from longspan.kernels.block_recurrent.triton_forward_tiles import attend_kernel, project_kernel, write_kernel

    path, state, keys, values, reset = make_case(replace(BF16, tokens=512 * 20))
    weights = chain.prepare(path)
    counts = []
    for blocks in (20, 1, 2, 3, 16, 17):
        for tiles in (chain.SMALL, chain.BIG):
            end = (blocks + 1) * 512
            chain.chain_forward(weights, state, keys[:, :end], values[:, :end], reset[:, :blocks], 512, tiles=tiles)
        counts.append([len(k.device_caches[0][0]) for k in (attend_kernel, project_kernel, write_kernel)])
    assert counts[0] == counts[-1]
