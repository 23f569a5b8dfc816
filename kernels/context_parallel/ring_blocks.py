"""One block of ring attention: partial result with its log-sum-exp, and its share of the gradients.

Blocks that every query sees in full run in torch's flash attention on CUDA; others, and everything on CPU, in chunks
of plain matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.kernels.context_parallel.sight import Sight

CHUNK_TOKENS = 512
_FLASH_TYPES = (torch.bfloat16, torch.float16)


class Part(NamedTuple):
    """Result of one block: `out` fp32 [B, T, H, Dh], `lse` fp32 [B, H, T], minus infinity where nothing is seen."""

    out: Tensor
    lse: Tensor


class Total:
    """The merged result of the blocks so far, fp32 or more."""

    out: Tensor
    lse: Tensor

    def __init__(self) -> None:
        self._empty = True

    def add(self, part: Part) -> None:
        """Merge a block: lse' = log(exp lse + exp lse_b), out' = weighted mean; exact for any order of size."""
        if self._empty:
            self.out, self.lse, self._empty = part.out, part.lse, False
            return
        lse = torch.logaddexp(self.lse, part.lse)
        old, new = (torch.exp(x - lse).transpose(1, 2).unsqueeze(-1) for x in (self.lse, part.lse))
        self.out = self.out * old + part.out * new
        self.lse = lse


class Known(NamedTuple):
    """What the backward has of the whole attention."""

    q: Tensor  # [B, T, H, Dh]
    out: Tensor  # [B, T, H, Dh], of all blocks
    lse: Tensor  # [B, H, T], of all blocks
    grad: Tensor  # [B, T, H, Dh], of out


def _flash(q: Tensor, seen: Sight, cut: bool) -> bool:
    return q.is_cuda and q.dtype in _FLASH_TYPES and seen.whole and not cut


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Sight, position: int, *, own: bool, cut: bool = False) -> Part:
    """Attention to one block of keys.

    Args:
        q: [B, T, H, Dh]. k, v: [B, K, H, Dh], whose first token is at `position` of the sequence.
        seen: what the queries may look at.
        own: the block is this rank's own: queries see it up to themselves.
        cut: some of the block may be out of sight even where `seen.whole` holds.
    """
    if _flash(q, seen, cut):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, own
        )
        return Part(out.transpose(1, 2).float(), lse)
    outs, lses = [], []
    for rows in _chunks(q.shape[1]):
        scores = _scores(q[:, rows], k, seen, rows, position)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1))
        outs.append((weights @ _wide(v).transpose(1, 2)).transpose(1, 2))
        lses.append(lse)
    return Part(torch.cat(outs, dim=1), torch.cat(lses, dim=2))


def gradients(
    known: Known, block: Tensor, seen: Sight, position: int, *, own: bool, cut: bool = False
) -> tuple[Tensor, Tensor]:
    """The block's part of dq [B, T, H, Dh], and dk, dv of its keys as [2, B, K, H, Dh].

    Args:
        known: of the whole attention. block: [2, B, K, H, Dh], keys and values.
        seen, position, own, cut: as `attend`.
    """
    if _flash(known.q, seen, cut):
        return _flash_gradients(known, block, own)
    k, v = _wide(block[0]).transpose(1, 2), _wide(block[1]).transpose(1, 2)
    scale = known.q.shape[-1] ** -0.5
    delta = (_wide(known.grad) * _wide(known.out)).sum(-1).transpose(1, 2)  # [B, H, T]
    dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for rows in _chunks(known.q.shape[1]):
        q, grad = _wide(known.q[:, rows]).transpose(1, 2), _wide(known.grad[:, rows]).transpose(1, 2)
        scores = _scores(known.q[:, rows], block[0], seen, rows, position)
        weights = torch.exp(scores - known.lse[:, :, rows].unsqueeze(-1))
        dscores = weights * (grad @ v.transpose(-1, -2) - delta[:, :, rows].unsqueeze(-1)) * scale
        dqs.append((dscores @ k).transpose(1, 2))
        dk += dscores.transpose(-1, -2) @ q
        dv += weights.transpose(-1, -2) @ grad
    return torch.cat(dqs, dim=1), torch.stack([dk, dv]).transpose(2, 3)


def _flash_gradients(known: Known, block: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Flash attention's backward with the result and log-sum-exp of all blocks gives this block's exact part."""
    tokens, keys = known.q.shape[1], block.shape[2]
    heads_first = [x.transpose(1, 2) for x in (known.grad, known.q, block[0], block[1], known.out)]
    state: Any = torch.zeros(2, dtype=torch.int64, device=known.q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *heads_first, known.lse, None, None, tokens, keys, 0.0, own, state, state
    )
    return dq.transpose(1, 2), torch.stack([dk.transpose(1, 2), dv.transpose(1, 2)])


def _scores(q: Tensor, k: Tensor, seen: Sight, rows: slice, position: int) -> Tensor:
    """Scaled logits [B, H, t, K] of queries `rows`, minus infinity where they may not look; fp32 or more."""
    scores = _wide(q).transpose(1, 2) @ _wide(k).permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    keys = torch.arange(position, position + k.shape[1], device=q.device)
    queries = torch.arange(seen.begin + rows.start, seen.begin + rows.stop, device=q.device)
    visible = (keys <= queries[:, None]) & (keys >= seen.low[:, rows, None])
    return scores.masked_fill(~visible[:, None], float("-inf"))


def _chunks(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, CHUNK_TOKENS):
        yield slice(start, min(start + CHUNK_TOKENS, tokens))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
