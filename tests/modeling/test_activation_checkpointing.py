"""Activation checkpointing: the same numbers to the last bit, random draws included, and less that is kept."""

from __future__ import annotations

import threading
from typing import Any, get_args

import pytest
import torch
from tiny_models import MODELS, WINDOW, no_reset, random_tokens, tiny_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longspan.kernels import backend
from longspan.modeling.config import ActivationCheckpointing
from longspan.modeling.model import LanguageModel
from longspan.modeling.state import pack
from longspan.trainer.config import TrainingConfig

POLICIES = get_args(ActivationCheckpointing)
every_model = pytest.mark.parametrize("name", MODELS)


def step(model: LanguageModel, segments: int = 2) -> dict[str, Tensor]:
    """Losses, states, gradients through several segments, and what the random generator gives afterwards."""
    torch.manual_seed(7)
    model.train()
    model.zero_grad()
    tokens = random_tokens(2, 4 * WINDOW)
    reset = no_reset(model, *tokens.shape)
    reset[1, 2 * WINDOW // model.quantum] = True
    state, total = model.init_state(2), torch.zeros((), dtype=torch.float64)
    found = {}
    for segment in range(segments):
        nll, state, aux = model(tokens, state, reset=reset, labels=tokens.roll(-1, 1))
        total = total + nll.sum() + sum(aux.values())
        found[f"nll {segment}"] = nll
    total.backward()
    found |= {f"state {path}": tensor for path, tensor in pack(state).items()}
    found |= {f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {"next draw": torch.rand(4)}


@every_model
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_every_policy_gives_the_same_bits(name: str, dropout: float) -> None:
    model = tiny_model(name, dropout=dropout)
    want = step(model)
    for policy in POLICIES[1:]:
        model.set_activation_checkpointing(policy)
        ours = step(model)
        assert ours.keys() == want.keys()
        for what, tensor in want.items():
            assert torch.equal(ours[what], tensor), f"{policy}: {what}"


def test_dropout_would_differ_without_the_generators_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mistake that the test above must notice."""
    from longspan.modeling import stack

    right = stack.checkpoint
    monkeypatch.setattr(stack, "checkpoint", lambda *a, **kw: right(*a, **(kw | {"preserve_rng_state": False})))
    model = tiny_model("sliding_window", dropout=0.2)
    want = step(model)
    model.set_activation_checkpointing("layer")
    ours = step(model)
    assert torch.equal(ours["nll 0"], want["nll 0"])
    assert any(not torch.equal(ours[what], want[what]) for what in want if what.startswith("gradient"))


def test_a_forced_backend_holds_in_the_thread_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    right = backend.choose

    def spy(*args: Any, **kwargs: Any) -> backend.Backend:
        chosen.append(right(*args, **kwargs))
        return chosen[-1]

    model = tiny_model("sliding_window")
    model.set_activation_checkpointing("layer")
    tokens = random_tokens(1, 2 * WINDOW)
    monkeypatch.setenv(backend.VARIABLE, "triton")  # what another thread would choose
    with backend.forced("reference"):
        nll, _, _ = model(tokens, model.init_state(1), reset=no_reset(model, *tokens.shape), labels=tokens)
    monkeypatch.setattr(backend, "choose", spy)
    thread = threading.Thread(target=nll.sum().backward)
    thread.start()
    thread.join()
    assert set(chosen) == {"reference"}


def kept_numbers(model: LanguageModel) -> int:
    """Numbers that the backward pass keeps, parameters left out, each memory once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = random_tokens(2, 8 * WINDOW)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, model.init_state(2), reset=no_reset(model, *tokens.shape), labels=tokens)
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())


@pytest.mark.parametrize("name", ["sliding_window", "fixed_skip", "hybrid"])
def test_each_policy_keeps_less(name: str) -> None:
    model = tiny_model(name)
    found = []
    for policy in POLICIES:
        model.set_activation_checkpointing(policy)
        found.append(kept_numbers(model))
    assert found[0] > 1.2 * found[1] > 1.4 * found[2]


def test_evaluation_computes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.modeling import stack

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("checkpoint was called")

    monkeypatch.setattr(stack, "checkpoint", refuse)
    model = tiny_model("hybrid")
    tokens = random_tokens(1, 2 * WINDOW)
    for policy in POLICIES[1:]:
        model.set_activation_checkpointing(policy)
        with torch.no_grad():
            model(tokens, model.init_state(1), reset=no_reset(model, *tokens.shape))
        with pytest.raises(AssertionError, match="was called"):
            model(tokens, model.init_state(1), reset=no_reset(model, *tokens.shape))


def test_the_training_configuration_names_the_policies() -> None:
    assert TrainingConfig(steps=1).activation_checkpointing == "none"
    for policy in POLICIES:
        assert TrainingConfig(steps=1, activation_checkpointing=policy).activation_checkpointing == policy


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="use one of none, mixer, layer"):
        tiny_model("fixed_skip").set_activation_checkpointing("lyer")  # type: ignore[arg-type]
