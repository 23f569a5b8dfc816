"""Public function of linear attention."""

from __future__ import annotations

from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.linear_attention.reference import chunked


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, normaliser: Tensor, *, reset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with the kernel phi(q) . phi(k), phi = elu + 1, over all earlier tokens and this one.

    y_t = phi(q_t) S_t / (phi(q_t) . z_t + 1e-6), S_t = S_{t-1} + phi(k_t)^T v_t, z_t = z_{t-1} + phi(k_t)
    (arXiv:2006.16236, section 3.3); S and z are zero before a document. Computed in fp32 or more.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        matrix: fp32 [B, H, K, V], S before the first token.
        normaliser: fp32 [B, H, K], z before the first token.
        reset: bool [B, T], a document starts with this token.

    Returns:
        y [B, T, H, V], fp32 or more; S and z after the last token.

    Raises:
        ShapeError: state, reset and tokens do not fit together.
    """
    wanted = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if matrix.shape != wanted or reset.shape != q.shape[:2]:
        raise ShapeError(
            f"queries {list(q.shape)} need a matrix state {list(wanted)} and reset {list(q.shape[:2])}; "
            f"got {list(matrix.shape)} and {list(reset.shape)}. Pass the state of the same rows."
        )
    return chunked(q, k, v, matrix, normaliser, reset)
