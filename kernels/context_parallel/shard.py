"""Which part of every sequence a rank holds: contiguous shares of equal length, in order of rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class SequenceShard:
    """This rank's place among the ranks that hold one sequence together.

    Attributes:
        group: their process group; None: this rank holds whole sequences.
        rank: place in the group, from 0. size: ranks of the group.
    """

    group: Any = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: Any, device: torch.device | str = "cpu") -> SequenceShard:
        """The shard of this process in `group`; every rank of the group must call this.

        Args:
            group: process group, or None.
            device: where its messages lie.
        """
        if group is None or dist.get_world_size(group) == 1:
            return cls()
        # NCCL makes the group's communicator in its first collective; messages between two ranks cannot make it
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    @property
    def is_last(self) -> bool:
        """Whether the sequence ends here."""
        return self.rank == self.size - 1

    def has(self, hop: int) -> bool:
        """Whether there is a rank `hop` places to the right (left if negative)."""
        return 0 <= self.rank + hop < self.size

    def peer(self, hop: int) -> int:
        """Global number of the rank `hop` places to the right (left if negative)."""
        return int(dist.get_global_rank(self.group, self.rank + hop))


ONE_RANK = SequenceShard()
