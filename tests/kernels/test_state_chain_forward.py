"""The Triton forward of the state chain, under the interpreter, against the scan in plain PyTorch and fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.state_chain import Case, make_case, reference, relative

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs under the interpreter; the GPU has its own tests"
)

SHAPE = Case(rows=2, states=16, window=16, dim=64, heads=2, width=32, tokens=16 * 2 + 5)
LOADS = ["pointers", "descriptors"]


def tiles_of(loads: str):
    from longspan.kernels.block_recurrent.triton_forward import Tiles

    return Tiles((16, 64, 32, 1), (16, 16, 1), (16, 32, 128, 1), (4, 4, 4), tma=loads == "descriptors")


def run(case: Case, loads: str, **keywords) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(result, reference), by name."""
    from longspan.kernels.block_recurrent import triton_forward as chain

    path, state, keys, values, reset = make_case(case)
    wanted = reference(path, state, keys, values, reset, case.window)
    assert chain.unsupported(path, case.window) is None
    result = chain.chain_forward(
        chain.prepare(path), state, keys, values, reset, case.window, tiles=tiles_of(loads), **keywords
    )
    return vars(result), wanted


def check(result: dict[str, Tensor], wanted: dict[str, Tensor], names: str) -> None:
    for name in names.split():
        assert result[name].shape == wanted[name].shape, name
        assert relative(result[name], wanted[name]) < 1e-5, name


EVERYTHING = "entering proj inv read lse rstd final"


@pytest.mark.parametrize("gate", ["fixed", "lstm"])
@pytest.mark.parametrize("loads", LOADS)
def test_equals_the_scan_with_a_partial_last_block(loads: str, gate: str) -> None:
    check(*run(replace(SHAPE, gate=gate), loads), EVERYTHING)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 32},
        {"tokens": 7},
        {"tokens": 16},
        {"window": 32, "states": 48, "tokens": 40},
        {"states": 32, "tokens": 16, "heads": 1},
        {"dim": 128, "heads": 3, "tokens": 18},
        {"scale": 200.0},
        {"tanh": True},
    ],
    ids=str,
)
def test_shapes(loads: str, changes: dict[str, float]) -> None:
    case = replace(SHAPE, rows=1, **changes)
    names = EVERYTHING if case.tokens >= case.window else "entering proj inv rstd final"
    check(*run(case, loads), names)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize(("gate", "parts"), [("fixed", 4), ("lstm", 4)])
def test_wide_tiles_of_the_written_state(loads: str, gate: str, parts: int) -> None:
    """Those of the fixed gate are stored by halves; those of the LSTM gate are cut to 64 columns."""
    from longspan.kernels.block_recurrent import triton_forward as chain

    case = replace(SHAPE, dim=256, gate=gate)
    path, state, keys, values, reset = make_case(case)
    tiles = replace(tiles_of(loads), write=(16, 128, 128, 1))
    run = chain._Run(chain.prepare(path), state[:, None], keys, values, reset, case.window, 2, tiles, "all")
    assert run.parts == parts and run.halves == (2 if gate == "fixed" else 1)
    result = chain.chain_forward(chain.prepare(path), state, keys, values, reset, case.window, tiles=tiles)
    check(vars(result), reference(path, state, keys, values, reset, case.window), EVERYTHING)


@pytest.mark.parametrize("loads", LOADS)
def test_buffers_that_are_not_kept_change_nothing(loads: str) -> None:
    case = replace(SHAPE, rows=1, tokens=16 * 3 + 3)
    result, wanted = run(case, loads, keep="kv")
    wanted["proj"] = wanted["proj"][:, :, :, :2]
    check(result, wanted, "entering proj final")
    assert result["inv"] is result["read"] is result["lse"] is result["rstd"] is None
    result, wanted = run(case, loads, keep="states")
    check(result, wanted, "entering final")
    assert result["proj"] is None


@pytest.mark.parametrize("loads", LOADS)
def test_recomputes_a_slice_of_the_blocks(loads: str) -> None:
    from longspan.kernels.block_recurrent import triton_forward as chain

    path, state, keys, values, reset = make_case(replace(SHAPE, rows=1))
    weights, window = chain.prepare(path), SHAPE.window
    whole = vars(chain.chain_forward(weights, state, keys, values, reset, window, tiles=tiles_of(loads)))
    names = ("proj", "inv", "read", "lse", "rstd")
    for begin, end in ((0, 2), (1, 3)):
        rows = slice(begin * window, (end + 1) * window)
        part = vars(
            chain.recompute(
                weights, whole["entering"][:, begin:end], keys[:, rows], values[:, rows], reset[:, begin:end], window,
                tiles=tiles_of(loads),
            )
        )  # fmt: skip
        for name in names:
            if whole[name][:, begin:end].numel():
                assert relative(part[name], whole[name][:, begin:end]) < 1e-5, (name, begin)


def test_inputs_with_other_strides() -> None:
    from longspan.kernels.block_recurrent import triton_forward as chain

    path, state, keys, values, reset = make_case(SHAPE)
    weights, tiles = chain.prepare(path), tiles_of("pointers")
    wanted = chain.chain_forward(weights, state, keys, values, reset, SHAPE.window, tiles=tiles)
    packed = torch.stack([keys, values], dim=2)
    turned = state.transpose(1, 2).contiguous().transpose(1, 2)
    result = chain.chain_forward(
        weights, turned, packed[:, :, 0], packed[:, :, 1], reset.t().contiguous().t(), SHAPE.window, tiles=tiles
    )
    assert torch.equal(result.entering, wanted.entering)
    assert torch.equal(result.read, wanted.read)


@pytest.mark.parametrize(("rows", "tokens"), [(0, 32), (2, 0)])
def test_nothing_to_do(rows: int, tokens: int) -> None:
    from longspan.kernels.block_recurrent import triton_forward as chain

    path, state, keys, values, reset = make_case(replace(SHAPE, rows=2, tokens=32))
    blocks = tokens // SHAPE.window
    keys, values = keys[:rows, : SHAPE.window + tokens], values[:rows, : SHAPE.window + tokens]
    result = chain.chain_forward(chain.prepare(path), state[:rows], keys, values, reset[:rows, :blocks], SHAPE.window)
    assert result.entering.shape == (rows, blocks, SHAPE.states, SHAPE.dim)
    assert torch.equal(result.final, state[:rows])


@pytest.mark.parametrize("loads", LOADS)
def test_not_a_number_spreads_within_its_row_only(loads: str) -> None:
    from longspan.kernels.block_recurrent import triton_forward as chain

    path, state, keys, values, reset = make_case(replace(SHAPE, tokens=32))
    weights = chain.prepare(path)
    reset.zero_()
    clean = chain.chain_forward(weights, state, keys, values, reset, SHAPE.window, tiles=tiles_of(loads))
    state[0, 0, 0] = float("nan")
    spoiled = chain.chain_forward(weights, state, keys, values, reset, SHAPE.window, tiles=tiles_of(loads))
    assert spoiled.final[0].isnan().all()
    assert torch.equal(spoiled.final[1], clean.final[1])


def test_says_what_it_does_not_support() -> None:
    from longspan.kernels.block_recurrent import triton_forward as chain

    path, *_ = make_case(SHAPE)
    assert "window" in chain.unsupported(path, 17)
    assert "skip" in chain.unsupported(replace(path, write=None), 16)
    assert "float64" in chain.unsupported(replace(path, key=path.key.double()), 16)
    assert "heads" in chain.unsupported(replace(path, heads=4), 16)
