"""Public function of window attention."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.backend import choose
from longspan.kernels.checks import check_reset
from longspan.kernels.window_attention.reference import NUM_BUCKETS, Positions, attend_segment
from longspan.kernels.window_attention.support import unsupported


def window_attention(
    qkv: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    bias_table: Tensor | None,
    scale: Tensor,
    *,
    reset: Tensor,
    reset_grid: int = 1,
    drop: Tensor | None = None,
    positions: Positions = "t5",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to exactly the W earlier tokens of each token, itself not included (arXiv:2203.07852).

    Queries and keys are l2-normalised per head; logit = (q . k + T5 bias of the distance) * |scale|. Positions
    before a document's start are null keys: zero key and value, not masked, so their logit is the bias alone.
    With positions "rope" queries and keys are rotated by their place (arXiv:2104.09864) instead of the bias, and
    the logit of a null key is 0.

    The Triton kernels take bf16 and fp32 and heads of 16, 32, 64 or 128, with any W and T; other types and widths run
    in the plain form, with one warning. Gradients are the same in every run, bit by bit. The gradient of qkv is one
    packed tensor.

    Args:
        qkv: [B, T, 3, H, Dh], queries, keys and values as projected; any T > 0.
        cached_keys, cached_values: [B, W, H, Dh] of the W tokens before, keys normalised and not rotated; zero
            before a document.
        bias_table: [H, 32] with positions "t5", None with "rope".
        scale: [H].
        reset: bool [B, T], a document starts with this token.
        reset_grid: resets fall on multiples of this many tokens only; the plain form is fastest if W divides it.
        drop: [H, W, 2W] multiplier of the probabilities, shared by rows and blocks; None: no dropout.
        positions: "t5" or "rope", which needs an even Dh.

    Returns:
        out [B, T, H, Dh]; keys, values [B, W, H, Dh]: the cache for the next call.

    Raises:
        ShapeError: the tensors do not fit together, have no rows or tokens, or are on different devices; reset is not
            bool; there are no such positions, or rotary ones of an odd Dh.
    """
    _check(qkv, cached_keys, cached_values, bias_table, scale, reset, drop, positions)
    given = [x for x in (bias_table, drop) if x is not None]
    form = choose(
        "window_attention", qkv, cached_keys, cached_values, scale, reset, *given, unsupported=unsupported(qkv)
    )
    if form == "triton":
        from longspan.kernels.window_attention.fused import fused_window_attention

        return fused_window_attention(qkv, cached_keys, cached_values, bias_table, scale, reset, drop)
    return attend_segment(qkv, cached_keys, cached_values, bias_table, scale, reset, reset_grid, drop)


def _check(
    qkv: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    bias_table: Tensor | None,
    scale: Tensor,
    reset: Tensor,
    drop: Tensor | None,
    positions: Positions,
) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 0 in qkv.shape:
        raise ShapeError(f"qkv is {list(qkv.shape)}: it must be [B, T, 3, H, Dh] with at least one row and one token.")
    rows, tokens, _, heads, width = qkv.shape
    window = cached_keys.shape[1] if cached_keys.ndim == 4 else 0
    cache = (rows, window, heads, width)
    if window == 0 or reset.shape != (rows, tokens) or cached_keys.shape != cache or cached_values.shape != cache:
        raise ShapeError(
            f"qkv is {list(qkv.shape)}, the cache {list(cached_keys.shape)} and {list(cached_values.shape)}, reset "
            f"{list(reset.shape)}: they must be [B, T, 3, H, Dh], twice [B, W, H, Dh], and [B, T]. Pass the state of "
            "the same rows."
        )
    check_reset(reset)
    if positions not in get_args(Positions):
        raise ShapeError(f"positions = {positions!r}: use one of {', '.join(get_args(Positions))}.")
    if positions == "rope" and width % 2:
        raise ShapeError(
            f"the heads of qkv {list(qkv.shape)} are {width} wide, and positions = 'rope' turn pairs: Dh must be "
            "even. Use an even Dh or positions = 't5'."
        )
    if (bias_table is None) != (positions == "rope"):
        raise ShapeError(f"positions = {positions!r}: give a bias table with 't5', None with 'rope'.")
    if bias_table is not None and bias_table.shape != (heads, NUM_BUCKETS):
        raise ShapeError(f"the bias table is {list(bias_table.shape)}: it must be [H, 32] = {[heads, NUM_BUCKETS]}.")
    if scale.shape != (heads,):
        raise ShapeError(f"scale is {list(scale.shape)}: it must be [H] = [{heads}].")
    if drop is not None and drop.shape != (heads, window, 2 * window):
        raise ShapeError(f"drop is {list(drop.shape)}: it must be [H, W, 2W] = {[heads, window, 2 * window]}.")
