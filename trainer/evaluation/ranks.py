"""One evaluation on several ranks: documents are divided, and what comes together are sums and counts, never means."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch

from longspan.errors import ClusterError, DataError, LongspanError

if TYPE_CHECKING:
    from longspan.cluster.mesh import Mesh

T = TypeVar("T")


class Summed(Protocol):
    """Sums and counts over the targets of one key."""

    NUMBERS: ClassVar[tuple[str, ...]]
    tokens: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What they are sums over."""


S = TypeVar("S", bound=Summed)


def sum_over_ranks(scores: Sequence[S], zeros: Sequence[S], mesh: Mesh) -> list[S]:
    """The scores of all ranks, in the order of `zeros`; every rank must call this.

    Each score was made by one rank and is zero on the others, so the sum over ranks is exact.

    Args:
        scores: of this rank's documents. zeros: every score of the evaluation before anything is added to it.

    Raises:
        DataError: a key has no score on any rank.
    """
    names = zeros[0].NUMBERS
    place = {zero.key: index for index, zero in enumerate(zeros)}
    table = torch.zeros(len(zeros), len(names), dtype=torch.float64)
    for score in scores:
        table[place[score.key]] = torch.tensor([float(getattr(score, name)) for name in names], dtype=torch.float64)
    rows = mesh.sum_over_data(table.to(mesh.device)).tolist()
    found = []
    for zero, row in zip(zeros, rows, strict=True):
        score = copy.copy(zero)
        for name, value in zip(names, row, strict=True):
            setattr(score, name, type(getattr(zero, name))(value))
        if not score.tokens:
            raise DataError(f"no rank scored {score.key} of this evaluation. Evaluate again.")
        found.append(score)
    return found


def together(mesh: Mesh, work: Callable[[], T]) -> T:
    """Do `work` on every rank; if it fails on one, all end, and all say why.

    Raises:
        LongspanError: what `work` raised here; on other ranks one with the same exit code and message.
    """
    error: Exception | None = None
    try:
        value = work()
    except Exception as caught:
        error = caught
    told = None if error is None else (getattr(error, "exit_code", LongspanError.exit_code), f"{error}")
    answers = mesh.gather(told)
    if error is not None:
        raise error
    for rank, answer in enumerate(answers):
        if answer is not None:
            ended = ClusterError(f"rank {rank}: {answer[1]}")
            ended.exit_code = answer[0]
            raise ended
    return value
