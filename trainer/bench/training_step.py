"""`longspan bench step`: forward and backward of whole models, beside plain PyTorch and the public package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longspan.modeling import state as states
from longspan.modeling.config import ModelConfig
from longspan.modeling.model import build_model
from longspan.modeling.parameters import num_parameters
from longspan.trainer.bench.contender import Contender, Session, Unavailable, Work
from longspan.trainer.bench.floors import Cost, step_costs
from longspan.trainer.bench.measured import Measured, by_key
from longspan.trainer.bench.peers import lucidrains
from longspan.trainer.bench.result import OURS, Ratio
from longspan.trainer.bench.settings import StepSettings

LEARNING_RATE = 1e-4


def measure(settings: StepSettings, session: Session) -> Measured:
    """Our models first, since the first of them tells how long a cold start takes; then the peers."""
    contenders = []
    for config in settings.models:
        prepare = partial(_ours, config, settings, session)
        contenders.append(Contender(OURS, config.name, prepare))
    if "plain" in settings.peers:
        contenders += [
            Contender("plain", config.name, partial(_plain, config, settings, session)) for config in settings.models
        ]
    if "lucidrains" in settings.peers:
        contenders += [
            Contender("lucidrains", config.name, partial(_lucidrains, config, settings, session))
            for config in settings.models
            if lucidrains.recurrent_layers(config) and not config.feedback
        ]
    rows = session.race(contenders, in_turns=settings.in_turns)
    notes = ["Peers do less: plain has no position bias, learned scales, cache or dropout; see its source."]
    if settings.optimizer == "adamw":
        notes.append("With torch's fused AdamW on weights of the chosen precision; training keeps fp32 weights too.")
    return Measured(rows, _ratios(settings, by_key(rows)), notes if settings.peers else notes[1:])


def _ratios(settings: StepSettings, ms: dict[tuple[str, str], float]) -> list[Ratio]:
    """Speed of ours over each peer's, and the step time of each model over the last one's."""
    ratios = []
    for config in settings.models:
        ours = ms.get((OURS, config.name))
        for peer in settings.peers:
            theirs = ms.get((peer, config.name))
            if ours and theirs:
                ratios.append(Ratio(f"{config.name}: tokens/s of longspan / of {peer}", theirs / ours))
    last = settings.models[-1].name
    for name in (OURS, *settings.peers):
        for config in settings.models[:-1]:
            if (name, config.name) in ms and (name, last) in ms:
                ratios.append(
                    Ratio(f"{name}: step time of {config.name} / of {last}", ms[name, config.name] / ms[name, last])
                )
    return ratios


def _ours(config: ModelConfig, settings: StepSettings, session: Session) -> Work:
    torch.manual_seed(0)
    with session.device:
        model = build_model(config)
    model.set_activation_checkpointing(settings.activation_checkpointing)
    model.to(session.dtype).train()
    tokens = _tokens(config, settings, session, extra=1)
    reset = torch.zeros(
        settings.rows, -(-settings.segment_tokens // model.quantum), dtype=torch.bool, device=session.device
    )
    carried: Any = states.detach(model.init_state(settings.rows, session.device))
    labels, inputs = tokens[:, 1:].contiguous(), tokens[:, :-1].contiguous()

    def forward() -> Tensor:
        nonlocal carried
        nll, new_state, aux = model(inputs, carried, reset=reset, labels=labels)
        carried = states.detach(new_state)
        return (nll.sum() + sum(aux.values(), nll.new_zeros(()))) / labels.numel()

    return _work(forward, model, config, settings, session)


def _plain(config: ModelConfig, settings: StepSettings, session: Session) -> Work:
    if session.device.type != "cuda":
        raise Unavailable("not supported", "flex_attention has no backward pass on a CPU")
    from longspan.trainer.bench.peers import plain  # torch's flex_attention takes seconds to load

    torch.manual_seed(0)
    with session.device:
        model = plain.PlainModel(config)
    model.to(session.dtype).train()
    run, note = plain.compiled(model, settings.segment_tokens)
    mask = plain.window_mask(settings.segment_tokens, config.window_tokens, session.device)
    tokens = _tokens(config, settings, session, extra=1)
    labels, inputs = tokens[:, 1:].contiguous(), tokens[:, :-1].contiguous()
    return _work(lambda: run(inputs, labels, mask), model, config, settings, session, note)


def _lucidrains(config: ModelConfig, settings: StepSettings, session: Session) -> Work:
    torch.manual_seed(0)
    model = lucidrains.build(config, settings.segment_tokens, session.device).train()
    tokens = _tokens(config, settings, session, extra=1)
    precision = settings.precision
    note = f"fp32 weights{', bf16 autocast' if precision == 'bf16' else ''}; one key head, rotary, GEGLU"
    return _work(lambda: lucidrains.loss(model, tokens, precision), model, config, settings, session, note)


def _tokens(config: ModelConfig, settings: StepSettings, session: Session, extra: int) -> Tensor:
    shape = (settings.rows, settings.segment_tokens + extra)
    return torch.randint(config.vocab_size, shape, device=session.device)


def _work(
    forward: Callable[[], Tensor],
    model: nn.Module,
    config: ModelConfig,
    settings: StepSettings,
    session: Session,
    note: str = "",
) -> Work:
    """One training step from the loss of `forward`."""
    optimizer: torch.optim.Optimizer | None = None
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=session.device.type == "cuda")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward().backward()
        if optimizer is not None:
            optimizer.step()

    return Work(
        call=step,
        tokens=settings.rows * settings.segment_tokens,
        costs=_costs(config, settings, session.dtype),
        parameters=num_parameters(model),
        note=note,
    )


def _costs(config: ModelConfig, settings: StepSettings, dtype: torch.dtype) -> list[Cost]:
    return step_costs(config, settings.rows, settings.segment_tokens, dtype.itemsize)
