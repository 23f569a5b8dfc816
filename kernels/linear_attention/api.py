"""Public function of linear attention."""

from __future__ import annotations

from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.checks import check_devices, check_reset, check_shapes
from longspan.kernels.linear_attention.reference import chunked


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, normaliser: Tensor, *, reset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with the kernel phi(q) . phi(k), phi = elu + 1, over all earlier tokens and this one.

    y_t = phi(q_t) S_t / (phi(q_t) . z_t + 1e-6), S_t = S_{t-1} + phi(k_t)^T v_t, z_t = z_{t-1} + phi(k_t)
    (arXiv:2006.16236, section 3.3); S and z are zero before a document. Computed in fp32 or more.

    Args:
        q, k: [B, T, H, K]; any T > 0.
        v: [B, T, H, V].
        matrix: fp32 [B, H, K, V], S before the first token.
        normaliser: fp32 [B, H, K], z before the first token.
        reset: bool [B, T], a document starts with this token.

    Returns:
        y [B, T, H, V], fp32 or more; S and z after the last token.

    Raises:
        ShapeError: state, reset and tokens do not fit together, have no tokens, or are on different devices; reset is
            not bool.
    """
    for name, x in (("q", q), ("v", v)):
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ShapeError(
                f"{name} is {list(x.shape)}: it must be [B, T, H, width] with at least one token and one head. Skip "
                "the call where there are no tokens."
            )
    rows, tokens, heads, width = q.shape
    check_shapes(
        {
            "k": (k, q.shape),
            "v": (v, (rows, tokens, heads, v.shape[3])),
            "matrix": (matrix, (rows, heads, width, v.shape[3])),
            "normaliser": (normaliser, (rows, heads, width)),
            "reset": (reset, (rows, tokens)),
        }
    )
    check_reset(reset)
    check_devices("linear_attention", q, k, v, matrix, normaliser, reset)
    return chunked(q, k, v, matrix, normaliser, reset)
