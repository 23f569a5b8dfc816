"""Which part of every divided layer a rank holds: contiguous shares of equal size, in order of rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class TensorShard:
    """This rank's place among the ranks that hold one model together.

    Attributes:
        group: their process group; None: this rank holds whole layers.
        rank: place in the group, from 0. size: ranks of the group.
    """

    group: Any = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: Any) -> TensorShard:
        """The shard of this process in `group`, a process group or None."""
        if group is None or dist.get_world_size(group) == 1:
            return cls()
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def part(self, whole: int) -> slice:
        """This rank's share of `whole` heads, units or rows; `whole` is a multiple of `size`."""
        share = whole // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


WHOLE = TensorShard()
