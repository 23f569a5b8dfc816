"""`longspan bench window-attention`: the kernel of the ordinary layers beside torch's attentions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from longspan.kernels.window_attention.api import window_attention
from longspan.trainer.bench.contender import Contender, Session, Work
from longspan.trainer.bench.floors import window_costs
from longspan.trainer.bench.measured import Measured, speed_ratios
from longspan.trainer.bench.result import OURS, Row
from longspan.trainer.bench.settings import WindowSettings

Shape = tuple[int, int]
DIRECTIONS = ("forward", "forward+backward")
FULL = ("cudnn", "flash")  # these look at all earlier tokens


def measure(settings: WindowSettings, session: Session) -> Measured:
    """Every contender at each shape, forward and then with backward."""
    contenders = [
        Contender(name, _title(shape, direction), partial(_work, name, shape, direction, settings, session))
        for shape in settings.shapes
        for direction in DIRECTIONS
        for name in (OURS, *settings.peers)
    ]
    rows = session.race(contenders)
    ratios = speed_ratios(rows, settings.peers)
    notes = [
        f"W = {settings.window_tokens}, {settings.num_heads} heads of {settings.head_dim}. Ours includes normalising "
        "queries and keys, T5 bias, learned scales, cache and document starts; peers as their notes say.",
        *_host_notes(rows, session.device),
    ]
    return Measured(rows, ratios, notes)


def _host_notes(rows: list[Row], device: torch.device) -> list[str]:
    """What the host takes, since times on a GPU do not show it."""
    issued = ", ".join(f"{row.host_ms:.2f} ({row.case})" for row in rows if row.contender == OURS and row.host_ms)
    if device.type != "cuda" or not issued:
        return []
    return [f"Times with the host ahead, as in a training step. To issue a call of ours it takes, in ms: {issued}."]


def _title(shape: Shape, direction: str) -> str:
    return f"{shape[0]} x {shape[1]} {direction}"


def _work(name: str, shape: Shape, direction: str, settings: WindowSettings, session: Session) -> Work:
    torch.manual_seed(0)
    rows, tokens = shape
    backward = direction != "forward"
    if name == OURS:
        run, leaves, note = _ours(shape, settings, session)
    else:
        from longspan.trainer.bench.peers import attention  # torch's flex_attention takes seconds to load

        q, k, v = (
            torch.randn(rows, tokens, settings.num_heads, settings.head_dim, device=session.device, dtype=session.dtype)
            for _ in range(3)
        )
        # as the layer gives them: [B, T, H, Dh] in memory, seen as [B, H, T, Dh]; unit length as after normalising
        leaves = [
            torch.nn.functional.normalize(q, dim=-1).transpose(1, 2).requires_grad_(),
            torch.nn.functional.normalize(k, dim=-1).transpose(1, 2).requires_grad_(),
            v.transpose(1, 2).requires_grad_(),
        ]
        run, extra, note = attention.PEERS[name](leaves, settings.window_tokens)
        leaves = [*leaves, *extra]
    visible = tokens / 2 if name in FULL else min(settings.window_tokens, tokens)
    width = settings.num_heads * settings.head_dim
    return Work(
        call=_call(run, leaves, backward),
        tokens=rows * tokens,
        costs=window_costs(rows, tokens, int(visible), width, session.dtype.itemsize, backward),
        small=True,
        note=note,
    )


def _call(run: Callable[[], Tensor], leaves: list[Tensor], backward: bool) -> Callable[[], None]:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                run()

        return forward

    gradient: list[Tensor] = []

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        out = run()
        if not gradient:
            gradient.append(torch.randn_like(out))
        out.backward(gradient[0])

    return both


def _ours(shape: Shape, settings: WindowSettings, session: Session) -> tuple[Callable[[], Tensor], list[Tensor], str]:
    rows, tokens = shape
    heads, width, window = settings.num_heads, settings.head_dim, settings.window_tokens

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=session.device, dtype=session.dtype)

    qkv = random(rows, tokens, 3, heads, width).requires_grad_()
    keys = torch.nn.functional.normalize(random(rows, window, heads, width), dim=-1)
    values = random(rows, window, heads, width)
    table = random(heads, 32).requires_grad_()
    scale = random(heads).requires_grad_()
    reset = torch.zeros(rows, tokens, dtype=torch.bool, device=session.device)

    def run() -> Tensor:
        return window_attention(qkv, keys, values, table, scale, reset=reset, reset_grid=window)[0]

    return run, [qkv, table, scale], ""
