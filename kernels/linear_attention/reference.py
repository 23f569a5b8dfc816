"""Linear attention in chunks: inside a chunk a masked product, between chunks an affine scan.

Letters: B rows, T tokens, H heads, K width of keys, V width of values, n chunks, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kernels.window_attention.reference import at_least_fp32

CHUNK_TOKENS = 64
EPSILON = 1e-6


def feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1, positive; fp32 or more."""
    return F.elu(at_least_fp32(x)) + 1


def chunked(
    q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, normaliser: Tensor, reset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result: `api.linear_attention`."""
    tokens, chunk = q.shape[1], min(CHUNK_TOKENS, q.shape[1])
    q, k, v = feature_map(q), feature_map(k), at_least_fp32(v)
    v = F.pad(v, (0, 1), value=1.0)  # the sums of a column of ones are the normaliser
    state = torch.cat([matrix, normaliser.unsqueeze(-1)], dim=-1)
    q, k, v = (_cut(x, chunk) for x in (q, k, v))  # [B, n, H, C, ...], zeros behind the last token
    # documents counted inside each chunk; 0 continues what came before the chunk
    document = F.pad(reset.long(), (0, -tokens % chunk)).unflatten(1, (-1, chunk)).cumsum(-1)
    sums, before = _scan(k, v, document, state)
    same = document[..., :, None] == document[..., None, :]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    inside = (q @ k.transpose(-1, -2)).masked_fill(~(same & causal).unsqueeze(2), 0.0) @ v
    carried = (q @ before).masked_fill((document != 0)[:, :, None, :, None], 0.0)
    total = inside + carried
    y = total[..., :-1] / (total[..., -1:] + EPSILON)
    y = y.transpose(2, 3).flatten(1, 2)[:, :tokens]
    return y, sums[..., :-1].contiguous(), sums[..., -1].contiguous()


def summary(k: Tensor, v: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
    """What a run of tokens does to the state: state after = factor * state before + added.

    Args:
        k: [B, T, H, K]. v: [B, T, H, V]. reset: bool [B, T], a document starts with this token.

    Returns:
        factor [B, 1, 1, 1], 0 where a document starts in the run, else 1; added [B, H, K, V+1], the matrix and, as its
        last column, the normaliser; fp32 or more.
    """
    k, v = feature_map(k), F.pad(at_least_fp32(v), (0, 1), value=1.0)
    document = reset.long().cumsum(1)
    k = k.masked_fill((document != document[:, -1:])[..., None, None], 0.0)
    factor = (document[:, -1] == 0).to(k.dtype)[:, None, None, None]
    return factor, torch.einsum("bthk,bthv->bhkv", k, v)


def _cut(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] -> [B, n, H, C, D], zeros behind the last token."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk)).unflatten(1, (-1, chunk)).transpose(2, 3)


def _scan(k: Tensor, v: Tensor, document: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """State after the last chunk [B, H, K, V+1], and before each chunk [B, n, H, K, V+1]."""
    last = (document == document[..., -1:])[:, :, None, :, None]  # tokens of the document that goes on
    added = k.masked_fill(~last, 0.0).transpose(-1, -2) @ v
    continues = document[..., -1] == 0
    before = []
    # unbound at once: the gradient of each chunk taken by its number would be a tensor of all chunks
    for goes_on, sums in zip(continues[..., None, None, None].unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = torch.where(goes_on, state, 0.0) + sums
    return state, torch.stack(before, dim=1)
