"""Ranks that run the benchmark's own parts, counting or with a mistake; processes of their own import this."""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from longspan.kernels.context_parallel import halo, ring_blocks
from longspan.kernels.context_parallel.messages import count_traffic
from longspan.kernels.context_parallel.shard import SequenceShard
from longspan.modeling.context_parallel import set_sequence_shard
from longspan.modeling.model import LanguageModel
from longspan.trainer.bench.contender import Work
from longspan.trainer.bench.context_parallel import step, worker
from longspan.trainer.bench.context_parallel.rank import Rank
from longspan.trainer.bench.context_parallel.settings import ContextParallelSettings


def counting(number: int, parent: Connection, settings: ContextParallelSettings, folder: str) -> None:
    """Each case's call once: its verdict says the bytes that the rank sent, and the blocks of ring attention."""
    blocks: list[list[Any]] = []  # which function of `ring_blocks`, at which position, whether the rank's own

    def seen(name: str) -> Any:
        real = getattr(ring_blocks, name)

        def call(*arguments: Any, **options: Any) -> Any:
            blocks.append([name, arguments[-1], options["own"]])
            return real(*arguments, **options)

        return call

    def measure(self: Rank, case: str, work: Work) -> None:
        self.meet()
        blocks.clear()
        with count_traffic() as sent:
            work.call()
        self.judge(case, json.dumps({"bytes": sent, "blocks": blocks}), passed=True)

    spies = {name: seen(name) for name in ("attend", "gradients")}
    with mock.patch.object(Rank, "measure", measure), mock.patch.multiple(ring_blocks, **spies):
        worker.live(number, parent, settings, "cpu", folder)


def mistaken(number: int, parent: Connection, settings: ContextParallelSettings, folder: str) -> None:
    """The check of gradients as it is, and then with each mistake."""
    check = step._check

    def with_mistakes(*arguments: Any) -> None:
        check(*arguments)
        for where, name, wrong in MISTAKES:
            with mock.patch.object(where, name, wrong):
                check(*arguments)

    unmeasured = mock.patch.object(Rank, "measure", lambda self, case, work: None)
    with unmeasured, mock.patch.object(step, "_check", with_mistakes):
        worker.live(number, parent, settings, "cpu", folder)


_halo_backward = halo._Halo.backward
_sum_gradients = step._sum_gradients


def _lost(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _halo_backward(ctx, torch.zeros_like(grad))


def _truncated(model: LanguageModel, shard: SequenceShard, *, state_slices: int = 1) -> None:
    set_sequence_shard(model, shard, state_slices=state_slices, state_grad="truncate")


def _short(model: LanguageModel, shard: SequenceShard) -> None:
    for parameter in model.parameters():
        if shard.is_last and parameter.grad is not None:
            parameter.grad *= 0.9
    _sum_gradients(model, shard)


MISTAKES: tuple[tuple[Any, str, Any], ...] = (
    (halo._Halo, "backward", staticmethod(_lost)),
    (step, "set_sequence_shard", _truncated),
    (step, "_sum_gradients", _short),
)
