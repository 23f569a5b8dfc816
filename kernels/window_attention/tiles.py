"""Tile sizes of fused window attention, by number type and width of a head. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """How one pass is cut.

    Args:
        queries, keys: edges of a tile of scores; 64 or 128. In `attend` keys divides queries, in `key_gradient`
            queries divides keys.
        warps, stages: of a program, and of its pipeline of loads.
    """

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """One tile for each pass: output, gradient of keys and values, gradient of queries.

    The `queries` of `key_gradient` divides that of `attend`, whose sums it reads; the `keys` of `query_gradient` is
    that of `key_gradient`, whose stored tiles it reads.
    """

    attend: Tile
    query_gradient: Tile
    key_gradient: Tile


_WIDE = Tiles(attend=Tile(64, 64, 4, 2), query_gradient=Tile(128, 64, 8, 3), key_gradient=Tile(64, 64, 4, 2))
_NARROW = Tiles(attend=Tile(64, 64, 4, 3), query_gradient=Tile(128, 64, 8, 3), key_gradient=Tile(64, 64, 4, 3))
_FP32 = Tiles(attend=Tile(64, 64, 4, 2), query_gradient=Tile(64, 64, 4, 1), key_gradient=Tile(64, 64, 4, 1))


def choose_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """The tiles for heads of `width` in `dtype`: those of bf16 heads of 64 and 128 are tuned for an H100."""
    if dtype == torch.float32:
        return _FP32
    return _WIDE if width > 64 else _NARROW
