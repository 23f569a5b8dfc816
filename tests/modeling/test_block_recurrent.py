"""The Block-Recurrent layer against an independent oracle, its two forms against each other, its gradient facts."""

from __future__ import annotations

from dataclasses import replace

import brt_oracle
import pytest
import torch
from test_laws import parameters_without_gradient
from tiny_models import WINDOW, no_reset, random_tokens, tiny_model
from torch import Tensor

from longspan.errors import ShapeError
from longspan.kernels.block_recurrent.api import FORMS
from longspan.kernels.block_recurrent.inputs import BlockRecurrentInputs, BlockRecurrentOutputs
from longspan.modeling.config import BlockRecurrentConfig, ModelConfig
from longspan.modeling.mixers import block_recurrent as mixer_module
from longspan.modeling.mixers.block_recurrent import BlockRecurrent

VARIANTS = [(gate, mode) for gate in ("fixed", "lstm") for mode in ("skip", "dual", "single")]
HEADS, STATES, DIM = 4, 6, 32


def make(gate: str, mode: str, window: int, update: str = "trained") -> BlockRecurrent:
    """A mixer with scales of both signs and gates away from one half."""
    torch.manual_seed(0)
    layer = BlockRecurrentConfig(gate=gate, mode=mode, num_states=STATES, update=update)
    model = ModelConfig(
        dim=DIM, num_heads=HEADS, head_dim=8, ffn_dim=48, window_tokens=window, dropout=0.0, layers=[layer]
    )
    mixer = BlockRecurrent(model, layer, window).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.endswith("scale"):
                parameter.copy_(2 + 4 * torch.rand_like(parameter))
                if "norm" not in name:
                    parameter[0].neg_()
            if "bias" in name:
                parameter.mul_(5)
    return mixer


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BlockRecurrentInputs, BlockRecurrentOutputs]]:
    """Every call of the kernel."""
    calls: list[tuple[BlockRecurrentInputs, BlockRecurrentOutputs]] = []
    right = mixer_module.block_recurrent

    def record(inputs: BlockRecurrentInputs) -> BlockRecurrentOutputs:
        calls.append((inputs, right(inputs)))
        return calls[-1][1]

    monkeypatch.setattr(mixer_module, "block_recurrent", record)
    return calls


@pytest.mark.parametrize(("gate", "mode"), VARIANTS, ids=lambda value: value)
def test_equals_the_oracle(gate: str, mode: str, recorded: list) -> None:
    window, blocks = 8, 8
    mixer = make(gate, mode, window)
    x = torch.randn(2, window * blocks, DIM, dtype=torch.float64)
    with torch.no_grad():
        y, state, _ = mixer(x, mixer.init_state(2), reset=torch.zeros(2, blocks, dtype=torch.bool))
    parameters = {name: parameter.detach().numpy() for name, parameter in mixer.named_parameters()}
    for row in range(2):
        want, states = brt_oracle.layer(parameters, mode, x[row].numpy(), HEADS, window)
        assert abs(y[row].numpy() - want).max() < 1e-12
        assert abs(recorded[0][1].states[row].numpy() - states).max() < 1e-12
        assert abs(state["state"][row].numpy() - states[-1]).max() < 1e-12


def test_a_dropout_mask_on_another_device_is_named(recorded: list) -> None:
    mixer = make("fixed", "skip", 8)
    mixer(torch.randn(2, 8, DIM).double(), mixer.init_state(2), reset=torch.zeros(2, 1, dtype=torch.bool))
    inputs, drop = recorded[0][0], torch.ones(HEADS, 8, 16, dtype=torch.float64)
    replace(inputs, drop=drop).check()
    with pytest.raises(ShapeError, match="drop is on meta, qkv on cpu"):
        replace(inputs, drop=drop.to("meta")).check()


@pytest.mark.parametrize("tokens", [3, 8, 27, 32], ids=lambda tokens: f"T{tokens}")
@pytest.mark.parametrize(("gate", "mode"), VARIANTS, ids=lambda value: value)
def test_both_forms_agree_with_gradients(gate: str, mode: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    window = 8
    mixer = make(gate, mode, window)
    x = torch.randn(2, tokens, DIM, dtype=torch.float64)
    reset = torch.zeros(2, -(-tokens // window), dtype=torch.bool)
    reset[1, reset.shape[1] // 2] = True
    _, before, _ = mixer(torch.randn(2, 2 * window, DIM).double(), mixer.init_state(2), reset=reset.new_zeros(2, 2))
    before = {name: tensor.detach() for name, tensor in before.items()}
    results: list[list[Tensor]] = []
    for form in FORMS:
        monkeypatch.setattr(mixer_module, "block_recurrent", FORMS[form])
        leaf = x.clone().requires_grad_()
        y, state, _ = mixer(leaf, before, reset=reset)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + sum(s.sum() for s in state.values())
        grads = torch.autograd.grad(loss, [leaf, *mixer.parameters()], allow_unused=True)
        grads = [torch.zeros(()) if g is None else g for g in grads]
        results.append([y, *(state[name] for name in sorted(state)), *grads])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["fixed_skip", "fixed_dual", "fixed_single", "lstm_skip", "lstm_dual", "lstm_single"])
def test_one_block_never_trains_the_write(name: str) -> None:
    """N = W: exactly the write has no gradient; ks, vs, ids, norm and the initial state have some."""
    model = tiny_model(name)
    write = {path for path, _ in model.named_parameters() if ".recurrent.write." in path}
    initial = {path for path, _ in model.named_parameters() if path.endswith("recurrent.initial")}
    assert parameters_without_gradient(model, WINDOW, starts=True) == write
    assert parameters_without_gradient(model, 2 * WINDOW, starts=True) == set()
    assert parameters_without_gradient(model, 2 * WINDOW, starts=False) == initial


def test_a_frozen_state_is_nothing_to_reset() -> None:
    model = tiny_model("frozen")
    tokens = random_tokens(2, 4 * WINDOW)
    reset = no_reset(model, *tokens.shape)
    _, state, _ = model(tokens, model.init_state(2), reset=reset)
    carried = model(tokens, state, reset=reset)[0]
    rows = torch.tensor([True, True])
    assert torch.equal(carried, model(tokens, model.reset_rows(state, rows, ("recurrent",)), reset=reset)[0])
    assert not torch.equal(carried, model(tokens, model.reset_rows(state, rows), reset=reset)[0])


def test_resetting_a_trained_state_matters() -> None:
    model = tiny_model("fixed_skip")
    tokens = random_tokens(2, 4 * WINDOW)
    reset = no_reset(model, *tokens.shape)
    _, state, _ = model(tokens, model.init_state(2), reset=reset)
    carried = model(tokens, state, reset=reset)[0]
    one = model(tokens, model.reset_rows(state, torch.tensor([True, False]), ("recurrent",)), reset=reset)[0]
    assert (one[0] - carried[0]).abs().max() > 1e-6
    assert torch.equal(one[1], carried[1])
