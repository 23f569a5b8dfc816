"""Tile sizes of fused window attention, by number type and width of a head. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """How one pass is cut.

    Args:
        queries, keys: edges of a tile of scores; 32, 64 or 128. In `attend` keys divides queries, in `key_gradient`
            queries divides keys.
        warps, stages: of a program, and of its pipeline of loads.
        registers: at most so many for each thread, so that one more program fits on a multiprocessor; None: no limit.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        """How Triton compiles a kernel for this tile."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@dataclass(frozen=True)
class Tiles:
    """One tile for each pass: output, gradient of keys and values, gradient of queries.

    The `keys` of `query_gradient` is that of `key_gradient`, whose stored tiles it reads.
    """

    attend: Tile
    query_gradient: Tile
    key_gradient: Tile


# three programs of each of the first two share a multiprocessor, two of the third
_WIDE = Tiles(
    attend=Tile(64, 32, 4, 3, registers=168),
    query_gradient=Tile(64, 64, 4, 3, registers=168),
    key_gradient=Tile(64, 64, 4, 2),
)
_NARROW = Tiles(attend=Tile(64, 64, 4, 3), query_gradient=Tile(128, 64, 8, 3), key_gradient=Tile(64, 64, 4, 3))
_FP32 = Tiles(attend=Tile(64, 64, 4, 2), query_gradient=Tile(64, 64, 4, 1), key_gradient=Tile(64, 64, 4, 1))


def choose_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """The tiles for heads of `width` in `dtype`: those of bf16 heads of 64 and 128 are tuned for an H100."""
    if dtype == torch.float32:
        return _FP32
    return _WIDE if width > 64 else _NARROW
