"""Time of messages between ranks: who shares a host with whom, and what crosses which link. Imports no torch.

Ranks are numbered tensor parallel first, then context parallel, then data parallel, and hosts take `gpus_per_host`
ranks each in that order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from longspan.trainer.plan.hardware import Link, LinkRates

GIGA = 1e9
PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other.

    Attributes:
        size: how many, R.
        stride: distance of neighbours in the numbering of all ranks.
        per_host: R's on one host; all of them where the group stays inside one.
        hosts: that the group lies on.
    """

    size: int
    stride: int
    per_host: int
    hosts: int

    @classmethod
    def of(cls, size: int, stride: int, gpus_per_host: int) -> Group:
        """The group of `size` ranks, `stride` apart, that begins with rank 0."""
        if (size - 1) * stride < gpus_per_host:
            return cls(size, stride, size, 1)
        per_host = max(1, gpus_per_host // stride)
        return cls(size, stride, per_host, -(-size // per_host))

    def crosses(self, rank: int) -> bool:
        """Whether the message from member `rank` to the next one leaves the host."""
        return rank // self.per_host != (rank + 1) // self.per_host


def neighbour_link(links: LinkRates, group: Group) -> Link:
    """The slowest link between neighbours of a group."""
    return links.nvlink if group.hosts == 1 else links.infiniband


def message_seconds(link: Link, num_bytes: float) -> float:
    """One message between two ranks, or one each way at once."""
    return link.latency_us * 1e-6 + num_bytes / (link.gigabytes_per_second * GIGA)


def hop_seconds(links: LinkRates, group: Group, num_bytes: float) -> float:
    """Sum over all hops from the first to the last member of a message each."""
    between = group.hosts - 1
    inside = group.size - 1 - between
    return inside * message_seconds(links.nvlink, num_bytes) + between * message_seconds(links.infiniband, num_bytes)


def wire_bytes(kind: Kind, num_bytes: float, size: int) -> float:
    """What one rank of a ring sends for a collective over a vector of `num_bytes`; a broadcast sends all of it."""
    if kind == "broadcast":
        return num_bytes if size > 1 else 0.0
    return PASSES[kind] * (size - 1) / size * num_bytes


def collective_seconds(links: LinkRates, group: Group, kind: Kind, num_bytes: float, calls: int = 1) -> float:
    """Time of `calls` collectives over `num_bytes` in all.

    The ranks of a host form as many rings as they are, each of which leaves the host through another adapter, so a
    host's members share the sum of their adapters, and of n ways out of a GPU n-1 are NVLink.
    """
    if group.size == 1:
        return 0.0
    rate = links.nvlink.gigabytes_per_second
    latency = math.ceil(math.log2(group.per_host)) * links.nvlink.collective_us
    if group.hosts > 1:
        adapters = group.per_host * links.infiniband.gigabytes_per_second
        rate = min(rate * group.per_host / (group.per_host - 1), adapters) if group.per_host > 1 else adapters
        latency += math.ceil(math.log2(group.hosts)) * links.infiniband.collective_us
    return calls * PASSES[kind] * latency * 1e-6 + wire_bytes(kind, num_bytes, group.size) / (rate * GIGA)
