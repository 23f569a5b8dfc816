"""An open shard, read at offsets by any number of threads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from longspan.data_pipeline.regular_files import open_descriptor


class ShardFile:
    """A file that stays open while somebody refers to it.

    Reads go through `pread` and not through a memory map: a shard that shrinks under a map kills the process.
    """

    def __init__(self, path: Path) -> None:
        """Args: path: of the shard.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self.descriptor = open_descriptor(path)

    def read_into(self, offset: int, out: memoryview | bytearray | np.ndarray) -> int:
        """Fill `out` (contiguous) with bytes from `offset` on; returns how many came before the end of the file.

        Raises:
            OSError: of the disk.
        """
        return os.preadv(self.descriptor, [out], offset)  # type: ignore[list-item]

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on.

        Raises:
            OSError: of the disk.
        """
        return os.pread(self.descriptor, size, offset)

    def close(self) -> None:
        """Close it now; further reads fail."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            os.close(self.descriptor)
