"""`longspan bench block-recurrent`: the serial part of a recurrent layer alone, and the whole mixer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from longspan.kernels import backend
from longspan.kernels.block_recurrent.scan import scan_states
from longspan.kernels.block_recurrent.state_path import StatePath, project_state, write_state
from longspan.modeling import state as states
from longspan.modeling.config import BlockRecurrentConfig
from longspan.modeling.mixers.block_recurrent import BlockRecurrent
from longspan.trainer.bench.contender import Contender, Session, Unavailable, Work
from longspan.trainer.bench.floors import chain_costs, layer_costs
from longspan.trainer.bench.measured import Measured, speed_ratios
from longspan.trainer.bench.result import OURS
from longspan.trainer.bench.settings import ChainSettings


def measure(settings: ChainSettings, session: Session) -> Measured:
    """The chain at each number of rows, then the mixer at each shape; peers after ours."""
    contenders = [
        Contender(name, _chain_title(rows), partial(_chain, name, rows, settings, session))
        for rows in settings.chain_rows
        for name in (OURS, *settings.peers)
    ]
    contenders += [
        Contender(name, _mixer_title(shape), partial(_mixer, name, shape, settings, session))
        for shape in settings.mixer_shapes
        for name in (OURS, *(peer for peer in settings.peers if peer == "eager"))
    ]
    rows = session.race(contenders)
    ratios = speed_ratios(rows, settings.peers)
    layer = _layer(settings)
    notes = [
        f"{settings.model.name}: gate {layer.gate}, mode {layer.mode}, {layer.num_states} states, W = "
        f"{settings.model.window_tokens}. Times of the chain are of one block, of {settings.chain_blocks}."
    ]
    return Measured(rows, ratios, notes)


def _chain_title(rows: int) -> str:
    return f"chain, B = {rows}, forward, a block"


def _mixer_title(shape: tuple[int, int]) -> str:
    return f"mixer, {shape[0]} x {shape[1]}, forward+backward"


def _layer(settings: ChainSettings) -> BlockRecurrentConfig:
    return next(layer for layer in settings.model.layers if isinstance(layer, BlockRecurrentConfig))


def _build(settings: ChainSettings, session: Session) -> BlockRecurrent:
    torch.manual_seed(0)
    with session.device:
        mixer = BlockRecurrent(settings.model, _layer(settings), settings.model.window_tokens)
    return mixer.to(session.dtype)


def _chain(name: str, rows: int, settings: ChainSettings, session: Session) -> Work:
    config, layer = settings.model, _layer(settings)
    mixer = _build(settings, session)
    path = mixer.recurrent.weights()
    tokens = settings.chain_blocks * config.window_tokens
    shape = (rows, config.window_tokens + tokens, config.num_heads, config.head_dim)
    keys, values = (torch.randn(shape, device=session.device, dtype=session.dtype) for _ in range(2))
    keys = normalize(keys, dim=-1)
    state = path.initial.detach().float().expand(rows, -1, -1).contiguous()
    reset = torch.zeros(rows, settings.chain_blocks, dtype=torch.bool, device=session.device)
    call: Callable[[], object]
    if name == OURS:
        fast = backend.choose("block_recurrent", keys) == "triton"
        call = partial(scan_states, state, keys, values, reset, path, config.window_tokens, fast=fast)
    else:
        call = partial(_loop, state, keys, values, path, config.window_tokens)
    if name == "graph":
        call = _captured(call, session)
    costs = chain_costs(config, layer, rows, session.dtype.itemsize)
    return Work(torch.no_grad()(call), rows * tokens, costs, parts=settings.chain_blocks)


def _loop(state: Tensor, keys: Tensor, values: Tensor, path: StatePath, window: int) -> Tensor:
    """The state after the last block, block by block; what tokens read of the states is computed and dropped."""
    stacked = path.stacked()
    for begin in range(0, keys.shape[1] - window, window):
        k, v = (x[:, begin : begin + 2 * window].transpose(1, 2) for x in (keys, values))
        state = write_state(state, project_state(state, path, stacked), k, v, path)
    return state


def _captured(call: Callable[[], object], session: Session) -> Callable[[], object]:
    if session.device.type != "cuda":
        raise Unavailable("not supported", "CUDA graphs need a CUDA device")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in a first call, which must not be captured
            call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            call()
    return graph.replay


def _mixer(name: str, shape: tuple[int, int], settings: ChainSettings, session: Session) -> Work:
    rows, tokens = shape
    config = settings.model
    mixer = _build(settings, session).train()
    x = torch.randn(rows, tokens, config.dim, device=session.device, dtype=session.dtype, requires_grad=True)
    gradient = torch.randn_like(x)
    state = states.detach(mixer.init_state(rows, session.device))
    reset = torch.zeros(rows, -(-tokens // config.window_tokens), dtype=torch.bool, device=session.device)
    plain = name != OURS

    def call() -> None:
        mixer.zero_grad(set_to_none=True)
        x.grad = None
        with backend.forced("reference") if plain else contextlib.nullcontext():
            y, _, _ = mixer(x, state, reset=reset)
            y.backward(gradient)

    costs = layer_costs(config, _layer(settings), rows * tokens, tokens, session.dtype.itemsize)
    # the layer's last two products are its feed-forward network, which is not part of the mixer
    return Work(call, rows * tokens, costs[:-2])
