"""Sizes of the tiles of the Block-Recurrent layer's kernels: a few fixed choices, each of them tested."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel's tiles, and its warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


# With heads of 128 TOKENS spills a few registers, READ_KEYS two, outside its loop, and WIDE more: four bytes a value,
# three products for one.
ATTENTION = Tiles(64, 32, 4, 3)  # queries (or keys) of a program, keys (or queries) of its loop
ATTENTION_WIDE = Tiles(32, 32, 4, 2)
TOKENS = Tiles(32, 64, 4, 3)  # states (queries), tokens (keys)
PRODUCT = Tiles(64, 64, 4, 4)  # rows, summed dimension
PRODUCT_LARGE = Tiles(128, 64, 8, 3)
PRODUCT_WIDE = Tiles(64, 32, 8, 3)
READ = Tiles(64, 32, 4, 3)  # tokens (queries), states (keys)
READ_QUERIES = Tiles(64, 32, 4, 3)
READ_KEYS = Tiles(64, 64, 4, 2)
READ_KEYS_POINTERS = Tiles(32, 64, 4, 3)  # addresses take registers, and the larger tile would spill
TOKEN_WIDE = Tiles(32, 32, 4, 2)
LARGE_ROWS = 2048  # rows times state vectors from which a large tile still fills the device


def fitting(tiles: Tiles, rows: int, columns: int) -> Tiles:
    """`tiles`, no larger than what there is; 16 is the least that a matrix product takes."""
    return Tiles(min(tiles.rows, _tile(rows)), min(tiles.columns, _tile(columns)), tiles.warps, tiles.stages)


def _tile(length: int) -> int:
    return max(16, 1 << (length - 1).bit_length())


def divide(tiles: Tiles, *lengths: int) -> bool:
    """Whether no tile is cut off at the end of any length."""
    return all(length % side == 0 for length in lengths for side in (tiles.rows, tiles.columns))
