"""Equality with the authors' code: outputs, states, caches and gradients, over two segments, in every form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from golden_model import GATES, RECURRENT_LAYER, authors_name, golden_model, golden_state, load, to_ours

from longspan.kernels.backend import forced, interpreting
from longspan.kernels.block_recurrent.api import block_recurrent
from longspan.kernels.window_attention.reference import t5_buckets
from longspan.modeling.mixers import block_recurrent as block_recurrent_mixer
from longspan.modeling.model import LanguageModel
from longspan.modeling.state import State, pack

TOLERANCE = 1e-5
CASES = [
    ("swa", "anywhere"),
    ("swa", "windows"),
    ("bias_skip_S8", "two_phase"),
    ("bias_skip_S8", "sequential"),
    ("bias_skip_S8", "three_phase"),
    ("lstm_dual_S8", "two_phase"),
    ("lstm_dual_S8", "sequential"),
    ("lstm_dual_S8", "three_phase"),
]
Case = tuple[LanguageModel, dict[str, np.ndarray]]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    name, form = request.param
    model, data = golden_model(name)
    if form in ("two_phase", "sequential", "three_phase"):
        monkeypatch.setattr(block_recurrent_mixer, "block_recurrent", partial(block_recurrent, form=form))
    for layer in model.backbone.layers:
        if hasattr(layer.mixer, "reset_grid") and form == "windows":
            layer.mixer.reset_grid = 8
    return model, data


def arguments(case: Case, segment: str) -> dict[str, Any]:
    """Tokens, authors' state before the segment, document starts and labels, as the model takes them."""
    model, data = case
    reset = torch.zeros(2, 32 // model.quantum, dtype=torch.bool)
    reset[:, 0] = torch.from_numpy(data[f"{segment}/start_of_sequence"])
    mask = torch.from_numpy(data[f"{segment}/loss_mask"]) > 0
    return {
        "tokens": torch.from_numpy(data[f"{segment}/tokens"]).long(),
        "state": model.init_state(2) if segment == "seg1" else golden_state(data, "seg1"),
        "reset": reset,
        "labels": torch.from_numpy(data[f"{segment}/targets"]).long().masked_fill(~mask, -100),
    }


def run(case: Case, segment: str) -> tuple[torch.Tensor, torch.Tensor, State]:
    """(logits, token losses, new state) of a segment, from the authors' state before it."""
    model, given = case[0], arguments(case, segment)
    losses, state, _ = model(**given)
    logits, _, _ = model(**given | {"labels": None})
    return logits, losses, state


def assert_near(ours: torch.Tensor, theirs: np.ndarray, what: str, tolerance: float = TOLERANCE) -> None:
    gap = (ours.detach() - torch.from_numpy(theirs)).abs().max().item()
    assert gap <= tolerance, f"{what}: largest difference {gap}"


def assert_losses_and_state(losses: torch.Tensor, state: State, data: dict[str, np.ndarray], segment: str) -> None:
    assert_near(losses, data[f"{segment}/token_losses"], "token losses")
    theirs = pack(golden_state(data, segment))
    assert theirs.keys() == pack(state).keys()
    for name, tensor in pack(state).items():
        assert_near(tensor, theirs[name].numpy(), name)


def assert_gradients(losses: torch.Tensor, case: Case, segment: str) -> None:
    """Of the mean loss, every parameter's."""
    model, data = case
    loss = losses.sum() / float(data[f"{segment}/loss_count"])
    assert abs(loss.item() - float(data[f"{segment}/loss_mean"])) < TOLERANCE
    loss.backward()
    for name, parameter in model.named_parameters():
        path = authors_name(name)
        theirs = to_ours(data[f"{segment}/grad/{path}"], path)
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_near(ours, theirs.numpy(), name, 1e-5 + 1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("segment", ["seg1", "seg2"])
def test_outputs_and_state(case: Case, segment: str) -> None:
    logits, losses, state = run(case, segment)
    assert_near(logits, case[1][f"{segment}/logits"], "logits")
    assert_losses_and_state(losses, state, case[1], segment)


@pytest.mark.parametrize("segment", ["seg1", "seg2"])
def test_layer_outputs(case: Case, segment: str) -> None:
    model, data = case
    outputs: list[torch.Tensor] = []
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda module, args, result: outputs.append(sum(result[0])))
    run(case, segment)
    for index in range(3):
        assert_near(outputs[index], data[f"{segment}/layer_out/transformer{index}"], f"layer {index}")


@pytest.mark.parametrize("segment", ["seg1", "seg2"])
@pytest.mark.parametrize("name", ["bias_skip_S8", "lstm_dual_S8"])
@pytest.mark.parametrize("form", ["two_phase", "sequential"])
def test_block_states(name: str, form: str, segment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def recorded(inputs):  # type: ignore[no-untyped-def]
        outputs = block_recurrent(inputs, form=form)
        seen.append(outputs.states)
        return outputs

    monkeypatch.setattr(block_recurrent_mixer, "block_recurrent", recorded)
    case = golden_model(name)
    run(case, segment)
    assert_near(seen[0], case[1][f"{segment}/block_states"], "states after every block")


@pytest.mark.parametrize("segment", ["seg1", "seg2"])
def test_gradients(case: Case, segment: str) -> None:
    assert_gradients(run(case, segment)[1], case, segment)


KERNELS = [
    pytest.param(name, segment, marks=() if (name, segment) == ("bias_skip_S8", "seg2") else pytest.mark.long)
    for name in GATES
    for segment in ("seg1", "seg2")
]


@pytest.mark.skipif(not interpreting(), reason="Triton's interpreter is not on")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log2(0) of what is not used
@pytest.mark.parametrize(("name", "segment"), KERNELS)
def test_kernels(name: str, segment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models in Triton, embedding, norms and loss included; what has no kernel at this size runs beside them."""
    monkeypatch.setattr("longspan.kernels.norm.triton.BACKWARD_WARPS", 8)  # interpreted one after another
    case = golden_model(name)
    with forced("triton"):
        losses, state, _ = case[0](**arguments(case, segment))
        assert_losses_and_state(losses, state, case[1], segment)
        assert_gradients(losses, case, segment)


BREAKS: dict[str, Callable[[LanguageModel], object]] = {
    "scale sign": lambda model: model.backbone.layers[0].mixer.scale.data.neg_().add_(1e-2),
    "state ids": lambda model: model.backbone.layers[RECURRENT_LAYER].mixer.recurrent.ids.data.zero_(),
    "gate": lambda model: model.backbone.layers[RECURRENT_LAYER].mixer.recurrent.write.gate.bias.data.neg_(),
    "read scale": lambda model: model.backbone.layers[RECURRENT_LAYER].mixer.state_scale.data.fill_(1.0),
}


@pytest.mark.parametrize("rule", BREAKS)
def test_a_broken_rule_is_seen(rule: str) -> None:
    case = golden_model("bias_skip_S8")
    BREAKS[rule](case[0])
    logits, _, _ = run(case, "seg2")
    gap = (logits - torch.from_numpy(case[1]["seg2/logits"])).abs().max().item()
    assert gap > 100 * TOLERANCE


def test_every_golden_gate_is_a_different_one() -> None:
    assert {gate for gate in GATES.values() if gate} == {("fixed", "skip"), ("lstm", "dual")}


def test_t5_buckets() -> None:
    data = load("t5_buckets")
    assert np.array_equal(t5_buckets(torch.from_numpy(data["distance"]).long()).numpy(), data["buckets"])
