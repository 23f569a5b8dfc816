"""A block recurrence whose tokens' heads are divided, each part over the whole state path: together it is the layer."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from poison import poisoned_memory
from scan_cases import VARIANTS, Case, Sizes, errors, everything, make_case

from longspan.kernels import backend
from longspan.kernels.block_recurrent.api import block_recurrent
from longspan.kernels.block_recurrent.inputs import BlockRecurrentInputs, BlockRecurrentOutputs

TINY = Sizes(rows=3, tokens=27, window=8, states=6, dim=16, heads=4, width=4, ffn=12)


def in_halves(inputs: BlockRecurrentInputs) -> BlockRecurrentOutputs:
    """What two ranks compute, side by side; the state of the first of them."""
    tokens, heads = inputs.normalised(), inputs.path.heads
    both = torch.stack([tokens.keys, tokens.values])
    parts = []
    for own in (slice(0, heads // 2), slice(heads // 2, heads)):
        divided = {name: getattr(inputs, name)[:, :, own] for name in ("state_query", "cached_keys", "cached_values")}
        divided |= {name: getattr(inputs, name)[own] for name in ("bias_table", "scale", "state_scale")}
        divided |= {"qkv": inputs.qkv[:, :, :, own], "own_heads": own, "all_tokens": both}
        parts.append(block_recurrent(replace(inputs, **divided)))
    side_by_side = {name: torch.cat([getattr(p, name) for p in parts], 2) for name in ("own", "read", "keys", "values")}
    assert torch.equal(parts[0].state, parts[1].state)
    return BlockRecurrentOutputs(**side_by_side, state=parts[0].state)


def in_halves_by_kernels(inputs: BlockRecurrentInputs) -> BlockRecurrentOutputs:
    with backend.forced("triton"):
        return in_halves(inputs)


def by_default(case: Case) -> dict[str, torch.Tensor]:
    return everything(case, lambda inputs: block_recurrent(inputs, form="two_phase"))


@pytest.mark.parametrize("tokens", [27, 32])
@pytest.mark.parametrize(("gate", "mode"), VARIANTS, ids=lambda value: value)
def test_two_halves_are_the_layer_in_fp64(gate: str, mode: str, tokens: int) -> None:
    case = make_case(gate, mode, replace(TINY, tokens=tokens))
    assert max(errors(everything(case, in_halves), by_default(case)).values()) < 1e-11


def test_a_frozen_state() -> None:
    case = make_case("fixed", "skip", TINY, update="frozen")
    assert max(errors(everything(case, in_halves), by_default(case)).values()) < 1e-11


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is not on")
@pytest.mark.parametrize(("gate", "mode"), [("lstm", "dual")])
def test_kernels_with_fewer_heads_of_tokens(gate: str, mode: str) -> None:
    case = make_case(gate, mode, Sizes())
    with poisoned_memory():
        ours = everything(case.to(torch.float32), in_halves_by_kernels)
    gaps = errors(ours, by_default(case))
    assert max(gaps.values()) < 5e-6, gaps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_a_gpu() -> None:
    sizes = Sizes(rows=2, tokens=1124, window=512, states=512, dim=1024, heads=8, width=128, ffn=1024)
    case = make_case("fixed", "skip", sizes)
    with poisoned_memory():
        ours = everything(case.to(torch.bfloat16, "cuda"), in_halves)
    gaps = errors(ours, by_default(case.to(torch.float64, "cuda")))
    assert max(gaps.values()) < 1e-2, gaps
