"""A training step whose sequence several ranks hold, against one rank that holds it alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.kernels.context_parallel.shard import ONE_RANK, SequenceShard
from longspan.modeling import state as states
from longspan.modeling.context_parallel import set_sequence_shard, shared_state
from longspan.modeling.model import LanguageModel, build_model
from longspan.modeling.parameters import num_parameters
from longspan.modeling.state import State
from longspan.trainer.bench.contender import Work
from longspan.trainer.bench.context_parallel.rank import Rank
from longspan.trainer.bench.context_parallel.settings import ContextParallelSettings
from longspan.trainer.bench.floors import Cost, step_costs
from longspan.trainer.bench.result import Ratio

CHECK_ROWS, CHECK_TOKENS = 2, 8192
# How far loss and gradients of all parameters may lie from one rank's, relative to these. In quickstart sizes on a CPU
# correct ones lie within 3e-5 and 9e-3 in bf16, 1e-7 and 2e-7 in fp32; a gradient that is not sent makes 4e-2 or more,
# wrong keys, values, states or document starts 2.7e-4 of the loss or more.
LIMITS = {"bf16": (2e-4, 2e-2), "fp32": (1e-4, 5e-3)}


@dataclass(frozen=True)
class Batch:
    """A rank's share of random rows.

    Attributes:
        inputs, labels: int64 [B, N / ranks]. reset: bool [B, blocks].
        tokens: B x N, of all ranks.
    """

    inputs: Tensor
    labels: Tensor
    reset: Tensor
    tokens: int


def run(settings: ContextParallelSettings, rank: Rank) -> None:
    """Check losses and gradients at a small length, then time one rank alone and all together."""
    torch.manual_seed(0)  # the same parameters on all ranks
    with rank.device:
        model = build_model(settings.model)
    model.set_activation_checkpointing("layer")
    model.to(rank.dtype).train()
    _check(model, settings, rank)
    rank.clear()
    alone = _work(model, settings, rank, ONE_RANK, 1)
    if not rank.is_first:
        alone = Work(lambda: None, alone.tokens, alone.costs, parameters=alone.parameters)
    rank.measure(_alone(settings), alone)
    del alone
    for slices in settings.state_slices:
        model.zero_grad(set_to_none=True)
        rank.clear()
        rank.measure(_together(settings, slices), _work(model, settings, rank, rank.shard, slices))


def ratios(settings: ContextParallelSettings, ms: dict[str, float]) -> list[Ratio]:
    """Speed of all ranks over that of one.

    Args:
        ms: of the cases that were measured.
    """
    alone = ms.get(_alone(settings))
    cases = {slices: _together(settings, slices) for slices in settings.state_slices}
    return [
        Ratio(f"step, {_slices(slices)}: tokens/s of {settings.nproc} ranks / of 1 rank", alone / ms[case])
        for slices, case in cases.items()
        if alone and case in ms
    ]


def _alone(settings: ContextParallelSettings) -> str:
    return f"step, {settings.rows} x {settings.segment_tokens}, 1 rank"


def _together(settings: ContextParallelSettings, slices: int) -> str:
    return f"step, {settings.rows} x {settings.segment_tokens}, {settings.nproc} ranks, {_slices(slices)}"


def _slices(slices: int) -> str:
    return f"{slices} slice{'' if slices == 1 else 's'}"


def _work(
    model: LanguageModel, settings: ContextParallelSettings, rank: Rank, shard: SequenceShard, slices: int
) -> Work:
    """Forward, backward, sum of the gradients over the ranks of `shard`, and the state for the next segment."""
    batch = _batch(model, settings.rows, settings.segment_tokens, shard, rank.device)
    set_sequence_shard(model, shard, state_slices=slices)
    carried = states.detach(model.init_state(settings.rows, rank.device))

    def step() -> None:
        nonlocal carried
        _, carried = _forward_backward(model, batch, carried, shard)

    whole = step_costs(settings.model, settings.rows, settings.segment_tokens, rank.dtype.itemsize)
    costs = [Cost(cost.flops / shard.size, cost.num_bytes / shard.size) for cost in whole]
    return Work(step, batch.tokens, costs, parameters=num_parameters(model))


def _batch(model: LanguageModel, rows: int, tokens: int, shard: SequenceShard, device: torch.device) -> Batch:
    """The share of `shard` of the same random tokens on all ranks; no document starts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (rows, tokens + 1), generator=generator)
    share = tokens // shard.size
    begin, end = shard.rank * share, (shard.rank + 1) * share
    return Batch(
        inputs=ids[:, begin:end].contiguous().to(device),
        labels=ids[:, begin + 1 : end + 1].contiguous().to(device),
        reset=torch.zeros(rows, share // model.quantum, dtype=torch.bool, device=device),
        tokens=rows * tokens,
    )


def _forward_backward(model: LanguageModel, batch: Batch, state: State, shard: SequenceShard) -> tuple[Tensor, State]:
    """The sum of this rank's losses, fp32 [], and the state after the sequence; the model has all ranks' gradients."""
    model.zero_grad(set_to_none=True)
    losses, state, aux = model(batch.inputs, state, reset=batch.reset, labels=batch.labels)
    total = losses.sum()
    ((total + sum(aux.values(), losses.new_zeros(()))) / batch.tokens).backward()
    if shard.size > 1:
        _sum_gradients(model, shard)
    return total.detach(), shared_state(state, shard)


def _flat_gradient(model: LanguageModel) -> Tensor:
    """All gradients one after another; zeros where a rank's share has none, since ranks must agree on the size."""
    gradients = (p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters())
    return torch.cat([gradient.flatten() for gradient in gradients])


def _sum_gradients(model: LanguageModel, shard: SequenceShard) -> None:
    flat = _flat_gradient(model)
    dist.all_reduce(flat, group=shard.group)
    parameters = list(model.parameters())
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def _check(model: LanguageModel, settings: ContextParallelSettings, rank: Rank) -> None:
    """Loss and gradients of all ranks together against those of one alone, a document starting inside."""
    quantum = model.quantum * settings.nproc
    wanted = min(CHECK_TOKENS, settings.segment_tokens)
    tokens = max(2, -(-wanted // quantum)) * quantum
    case = f"gradients of {CHECK_ROWS} x {tokens}, {settings.nproc} ranks against 1"
    rank.begin(case)

    def found(shard: SequenceShard) -> tuple[Tensor, Tensor]:
        batch = _batch(model, CHECK_ROWS, tokens, shard, rank.device)
        _start_document(batch, tokens // model.quantum // 2 + 1, shard)
        set_sequence_shard(model, shard, state_slices=max(settings.state_slices))
        state = states.detach(model.init_state(CHECK_ROWS, rank.device))
        loss, _ = _forward_backward(model, batch, state, shard)
        if shard.size > 1:
            dist.all_reduce(loss, group=shard.group)
        return loss, _flat_gradient(model)

    alone = found(ONE_RANK) if rank.is_first else None
    rank.show_life()
    rank.meet()  # compiling takes longer than a message should wait
    together = found(rank.shard)
    model.zero_grad(set_to_none=True)
    if alone is not None:
        loss_gap, gradient_gap = (_gap(a, b) for a, b in zip(together, alone, strict=True))
        note, passed = verdict(loss_gap, gradient_gap, settings.precision)
        rank.judge(case, note, passed=passed)


def _start_document(batch: Batch, block: int, shard: SequenceShard) -> None:
    """In the first row, at this block of the whole sequence."""
    blocks = batch.reset.shape[1]
    if block // blocks == shard.rank:
        batch.reset[0, block % blocks] = True


def _gap(x: Tensor, of: Tensor) -> float:
    """|x - of| / |of|."""
    return float((x.double() - of.double()).norm() / of.double().norm())


def verdict(loss_gap: float, gradient_gap: float, precision: str) -> tuple[str, bool]:
    """A sentence about relative differences from one rank, and whether they are small enough; NaN is not."""
    loss_limit, gradient_limit = LIMITS[precision]
    note = (
        f"relative differences: loss {loss_gap:.1e} (at most {loss_limit:.0e}), all gradients {gradient_gap:.1e} "
        f"(at most {gradient_limit:.0e})"
    )
    return note, loss_gap <= loss_limit and gradient_gap <= gradient_limit
