"""The Triton kernels of window attention under the interpreter, against the plain form in fp64."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from poison import poisoned_memory, relative_error
from window_cases import ARRIVALS, Case, copy_engine, inputs_of, reset_of, run

from longspan.errors import ShapeError
from longspan.kernels.backend import forced, warn_once
from longspan.kernels.window_attention.api import window_attention
from longspan.kernels.window_attention.fused import WindowCall, _described, _finish, fused_window_attention
from longspan.kernels.window_attention.reference import t5_buckets
from longspan.kernels.window_attention.support import unsupported
from longspan.kernels.window_attention.tiles import choose_tiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see test_window_attention_gpu.py")
CASES = [
    Case(8, 5),
    Case(1, 1, where="nowhere"),
    Case(24, 100, where="nowhere"),
    Case(40, 77, drop=True),
    Case(128, 256, where="blocks", width=32),
    Case(128, 128, where="nowhere", rows=1),
    Case(200, 333),
    Case(300, 64, where="first"),
    Case(150, 190, rope=True),
    Case(40, 17, rope=True, drop=True),
    Case(150, 190, scale=100.0),
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # log2(0), exp2 of what is not used


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_plain_form_in_fp64_with_all_gradients(case: Case) -> None:
    tensors = inputs_of(case, torch.float32)
    with poisoned_memory():
        ours = run(case, tensors, "triton")
    want = run(case, {name: x.double() for name, x in tensors.items()}, "reference")
    limit = 1e-5 if case.scale == 1 else 1e-3  # a sharp softmax
    for name, x in want.items():
        if x.norm() > 1e-12:
            assert relative_error(ours[name], x) < (10 * limit if name == "d_scale" else limit), name
        else:  # a single key: its probability is 1 whatever its logit
            assert ours[name].abs().max() < 1e-6, name


def test_the_cache_may_need_no_gradient_and_the_new_one_may_be_unused() -> None:
    case = Case(24, 100)
    tensors = inputs_of(case, torch.float32)
    want = run(case, {**tensors, "w_keys": 0 * tensors["w_keys"], "w_values": 0 * tensors["w_values"]}, "reference")
    qkv = tensors["qkv"].requires_grad_()
    with forced("triton"):
        out, keys, _ = window_attention(
            qkv,
            tensors["cached_keys"],
            tensors["cached_values"],
            tensors["table"],
            tensors["scale"],
            reset=reset_of(case),
        )
    (got,) = torch.autograd.grad((out * tensors["w_out"]).sum(), qkv)
    assert keys.requires_grad
    assert relative_error(got, want["d_qkv"]) < 1e-5


def test_strided_inputs_give_the_same_bits() -> None:
    case = Case(24, 100)
    tensors = inputs_of(case, torch.float32)
    wide = torch.zeros(2, 100, 4, 2, 16)
    wide[:, :, :3] = tensors["qkv"]
    late = torch.zeros(2, 48, 2, 16)
    late[:, 24:] = tensors["cached_keys"]
    want = run(case, tensors, "triton")
    strided = tensors | {
        "qkv": wide[:, :, :3],
        "cached_keys": late[:, 24:],
        "cached_values": tensors["cached_values"].transpose(1, 2).contiguous().transpose(1, 2),
        "table": tensors["table"].t().contiguous().t(),
        "w_out": tensors["w_out"].transpose(2, 3).contiguous().transpose(2, 3),
    }
    got = run(case, strided, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_gradients_of_bias_and_scale_may_be_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(100, 333, heads=1)
    tensors = inputs_of(case, torch.float32)
    whole = run(case, tensors, "triton")
    monkeypatch.setattr("longspan.kernels.window_attention.fused.PIECE_TOKENS", 192)
    pieces = run(case, tensors, "triton")
    assert all(relative_error(pieces[name], x) < 1e-5 for name, x in whole.items())


@pytest.mark.parametrize("window", [5, 90, 300])
@pytest.mark.parametrize(("parts", "tiles"), [(1, 1), (64, 1024), (150, 2100)])
def test_gradients_of_bias_and_scale_from_sums_of_any_number_of_tiles(parts: int, tiles: int, window: int) -> None:
    g = torch.Generator().manual_seed(parts)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    table, scale = draw(2, 32), torch.tensor([-1.5, 0.7])
    sums, for_scale = draw(parts, 2, 128), draw(tiles, 2)
    call = cast(WindowCall, SimpleNamespace(table=table, scale=scale, window=window))
    with poisoned_memory():
        dtable, dscale = _finish(call, for_scale, sums)
        none, alone = _finish(
            cast(WindowCall, SimpleNamespace(table=None, scale=scale, window=window)), for_scale, None
        )
    d = torch.arange(128)
    bucket = t5_buckets(d)
    by_distance = sums.double().sum(0) * ((d >= 1) & (d <= window))
    bias = table.double().requires_grad_()
    near = bias[:, bucket] - bias[:, bucket[min(window, 127)], None]
    (want,) = torch.autograd.grad((near * by_distance * scale.abs()[:, None]).sum(), bias)
    assert dtable is not None and relative_error(dtable, want) < 1e-5
    own = for_scale.double().sum(0)
    assert relative_error(dscale, (own + (near * by_distance).sum(1)) * scale.sign()) < 1e-5
    assert none is None and relative_error(alone, own * scale.sign()) < 1e-5


def test_without_a_copy_engine_it_is_the_same() -> None:
    case = Case(70, 140, heads=1, rows=1, drop=True)
    tensors = inputs_of(case, torch.float32)
    copied = run(case, tensors, "triton")
    with poisoned_memory(), copy_engine(False):
        loaded = run(case, tensors, "triton")
    assert all(relative_error(loaded[name], x) < 1e-6 for name, x in copied.items())


def test_a_gradient_beside_another_gives_the_same_bits() -> None:
    case = Case(24, 37)
    tensors = inputs_of(case, torch.float32)
    want = run(case, tensors, "triton")
    got = run(case, tensors | {"w_out": ARRIVALS["beside a neighbour"](tensors["w_out"])}, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_what_the_copy_engine_can_read_is_not_copied() -> None:
    for name, arrive in ARRIVALS.items():
        x = arrive(torch.randn(2, 5, 2, 16))
        y = _described(x)
        assert (y is x) == (name == "beside a neighbour"), name
        assert torch.equal(x, y) and y.data_ptr() % 16 == 0 and y.stride()[1:] in ((32, 16, 1), (64, 16, 1)), name


def test_rows_of_an_odd_length_do_not_touch() -> None:
    case = Case(24, 37, heads=1, where="nowhere")
    tensors = inputs_of(case, torch.float32)
    clean = run(case, tensors, "triton")
    for name in ("qkv", "cached_keys", "cached_values", "w_out", "w_keys", "w_values"):
        tensors[name][1] = torch.nan
    spoilt = run(case, tensors, "triton")
    for name in ("out", "keys", "values", "d_qkv", "d_cached_keys", "d_cached_values"):
        assert torch.equal(spoilt[name][0], clean[name][0]), name


@pytest.mark.parametrize("tokens", [333, 256])
@pytest.mark.parametrize("width", [pytest.param(64, marks=pytest.mark.long), 128])
def test_the_tiles_of_16_bit_numbers_give_the_same(tokens: int, width: int) -> None:
    case = Case(128 if tokens == 256 else 200, tokens, heads=1)
    t = inputs_of(case, torch.float32)
    leaves = [t[name].requires_grad_() for name in ("qkv", "cached_keys", "cached_values", "table", "scale")]
    with poisoned_memory():
        out, _, _ = fused_window_attention(*leaves, reset_of(case), None, choose_tiles(torch.bfloat16, width))
        got = torch.autograd.grad(out, leaves, t["w_out"])
    unused = {name: 0 * t[name].detach() for name in ("w_keys", "w_values")}
    want = run(case, t | unused, "triton")
    for name, x in zip(("d_qkv", "d_cached_keys", "d_cached_values", "d_table", "d_scale"), got, strict=True):
        assert relative_error(x, want[name]) < 1e-4, name


def test_a_token_does_not_see_itself() -> None:
    case = Case(24, 70, where="nowhere")
    tensors = inputs_of(case, torch.float32)
    before = run(case, tensors, "triton")["out"]
    token = 40
    tensors["qkv"][:, token, 1:] = 100 * torch.randn(2, 2, 2, 16)
    changed = (run(case, tensors, "triton")["out"] != before).flatten(2).any(2).any(0)
    assert changed.nonzero().flatten().tolist() == list(range(token + 1, token + 25))


def test_nan_stays_where_it_can_be_seen() -> None:
    case = Case(8, 200, where="nowhere", rows=1)
    tensors = inputs_of(case, torch.float32)
    tensors["qkv"][0, 70, 0, 1, 3] = torch.nan
    out = run(case, tensors, "triton")["out"]
    assert out[0, 70, 1].isnan().all()
    assert not out[0, :70].isnan().any() and not out[0, 71:].isnan().any() and not out[0, 70, 0].isnan().any()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qkv", (2, 0, 3, 2, 16)),
        ("qkv", (0, 100, 3, 2, 16)),
        ("qkv", (2, 100, 2, 2, 16)),
        ("cached_values", (2, 24, 3, 16)),
        ("table", (2, 31)),
        ("scale", (3,)),
        ("drop", (2, 24, 24)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...]) -> None:
    case = Case(24, 100)
    t = inputs_of(case, torch.float32) | {name: torch.zeros(shape)}
    with pytest.raises(ShapeError, match=str(list(shape)).replace("[", r"\[").replace("]", r"\]")):
        window_attention(
            t["qkv"],
            t["cached_keys"],
            t["cached_values"],
            t["table"],
            t["scale"],
            reset=reset_of(case),
            drop=t.get("drop"),
        )


def test_what_the_kernel_cannot_take_runs_in_the_plain_form_with_one_warning() -> None:
    warn_once.cache_clear()
    cases = [Case(8, 5, width=12), Case(8, 20, width=12, where="blocks")]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for case in cases:
            tensors = inputs_of(case, torch.float32)
            ours, want = run(case, tensors, "triton"), run(case, tensors, "reference")
            assert all(torch.equal(ours[name], x) for name, x in want.items())
    (said,) = (str(warning.message) for warning in found)
    assert said.startswith("window_attention: the fused kernel takes heads of width 16, 32, 64, 128, not 12.")


def test_what_the_kernel_cannot_take_is_said() -> None:
    assert unsupported(torch.zeros(1, 1, 3, 1, 64, dtype=torch.bfloat16)) is None
    assert "width 16, 32, 64, 128, not 48" in (unsupported(torch.zeros(1, 1, 3, 1, 48)) or "")
    assert "not float64" in (unsupported(torch.zeros(1, 1, 3, 1, 64, dtype=torch.float64)) or "")
