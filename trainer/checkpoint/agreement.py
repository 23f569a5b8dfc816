"""Ranks agree on success before anything is published, so that no rank goes on alone and none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from longspan.errors import CheckpointError, ClusterError, UsageError
from longspan.trainer.checkpoint.files import describe_disk_error

_KINDS = (OSError, CheckpointError, UsageError)


class RankDiskError(Exception):
    """The disk of one rank or more failed; every rank raises it, with all their messages."""


@dataclass(frozen=True)
class _Outcome:
    """What one rank reports to the others."""

    value: Any
    error: str | None
    kind: type[Exception] | None  # one of _KINDS, or Exception for the rest


class Ranks:
    """The ranks that save and load together.

    Args:
        rank, world_size: this process among them.
        group: their process group, None for the default one; not used when world_size is 1.
    """

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group = group

    def agree(self, work: Callable[[], Any]) -> list[Any]:
        """Do `work` here while the other ranks do theirs, and wait until all are through.

        Args:
            work: returns something small; may raise.

        Returns:
            What `work` returned on rank 0, 1, ...; only if it succeeded on all of them.

        Raises:
            RankDiskError: on all ranks, if some had disk errors and nothing worse.
            CheckpointError: on all ranks, if some found damage and nothing worse.
            UsageError: on all ranks, if some met one and nothing worse.
            Exception: any other error where it happened, and a ClusterError on the other ranks.
        """
        value, error = None, None
        try:
            value = work()
        except Exception as caught:
            error = caught
        outcomes = self._gather(_Outcome(value, _describe(error), _kind(error)))
        failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome.kind is not None}
        if not failed:
            return [outcome.value for outcome in outcomes]
        text = "; ".join(
            f"{outcome.error}" if self.world_size == 1 else f"rank {rank}: {outcome.error}"
            for rank, outcome in failed.items()
        )
        kinds = {outcome.kind for outcome in failed.values()}
        if kinds == {OSError}:
            raise RankDiskError(text) from error
        for kind in (CheckpointError, UsageError):
            if kinds == {kind}:
                raise kind(text) from error
        if error is not None:
            raise error
        raise ClusterError(f"saving or loading a checkpoint failed on another rank: {text}")

    def _gather(self, mine: _Outcome) -> list[_Outcome]:
        if self.world_size == 1:
            return [mine]
        outcomes: list[Any] = [None] * self.world_size
        dist.all_gather_object(outcomes, mine, group=self._group)
        return outcomes


def _describe(error: Exception | None) -> str | None:
    if error is None:
        return None
    if isinstance(error, OSError):
        return describe_disk_error(error)
    return str(error) if isinstance(error, CheckpointError | UsageError) else f"{type(error).__name__}: {error}"


def _kind(error: Exception | None) -> type[Exception] | None:
    if error is None:
        return None
    return next((kind for kind in _KINDS if isinstance(error, kind)), Exception)
