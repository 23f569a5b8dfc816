"""Residual sums in place: the numbers of the sums in new tensors, only in memory that a stack itself has made."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from tiny_models import WINDOW, no_reset, random_tokens, tiny_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.kernels.backend import forced
from longspan.modeling import stack
from longspan.modeling.config import ActivationCheckpointing
from longspan.modeling.model import LanguageModel
from longspan.modeling.state import State

POLICIES = get_args(ActivationCheckpointing)
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
pytestmark = pytest.mark.filterwarnings("ignore:window_attention", "ignore:block_recurrent", "ignore:full_attention")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs run one after another: four of two warps."""
    monkeypatch.setattr("longspan.kernels.norm.triton.BACKWARD_WARPS", 8)


def in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "adds_in_place", lambda *tensors: False)


def step(model: LanguageModel) -> list[Tensor]:
    """Losses and gradients of two segments."""
    torch.manual_seed(3)
    tokens, state, nll = random_tokens(2, 2 * WINDOW), model.init_state(2), []
    for _ in range(2):
        one, state, _ = model(tokens, state, reset=no_reset(model, *tokens.shape), labels=tokens.roll(-1, 1))
        nll.append(one)
    return [*nll, *torch.autograd.grad(sum(nll).sum(), list(model.parameters()), materialize_grads=True)]


def assert_near(ours: list[Tensor], want: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert (a.double() - b.double()).norm() <= 2e-5 * b.double().norm() + 1e-9, number


@needs_interpreter
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "name",
    [
        "sliding_window",
        "fixed_skip",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("lstm_dual", "feedback", "hybrid", "memory", "frozen")
        ),
    ],
)
def test_sums_in_place_are_the_sums_in_new_tensors(
    name: str, policy: ActivationCheckpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name, torch.float32).train()
    model.set_activation_checkpointing(policy)
    with forced("reference"):
        want = step(tiny_model(name).train())
    with forced("triton"):
        ours = step(model)
        in_new_tensors(monkeypatch)
        old = step(model)
    assert_near(ours, want)
    assert_near(old, want)
    # neither of them runs the other's code
    assert all(torch.equal(a, b) for a, b in zip(ours, old, strict=True)) == (policy == "layer")


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "policy", "dropout", "sums"),
    [
        ("sliding_window", "none", 0.0, 1),  # of two layers the first one's mixer, whose input is the caller's
        ("sliding_window", "mixer", 0.0, 2),  # what runs twice must not add
        ("fixed_skip", "none", 0.0, 1),
        ("full_attention", "none", 0.0, 2),  # behind each mixer
        ("sliding_window", "none", 0.2, 3),
        ("sliding_window", "layer", 0.0, 4),  # each layer's own, made again in the backward pass
    ],
)
def test_which_sums_are_left_to_norms(
    name: str, policy: ActivationCheckpointing, dropout: float, sums: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    right = stack.add_rms_norm
    monkeypatch.setattr(stack, "add_rms_norm", lambda *a, **options: made.append(1) or right(*a, **options))
    model = tiny_model(name, torch.float32, dropout=dropout).train()
    model.set_activation_checkpointing(policy)
    tokens = random_tokens(1, WINDOW)
    with forced("triton"):
        nll, _, _ = model(tokens, model.init_state(1), reset=no_reset(model, 1, WINDOW), labels=tokens)
        nll.sum().backward()
    assert len(made) == sums


@needs_interpreter
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_inputs_stay_as_they_are(policy: ActivationCheckpointing, grad: bool) -> None:
    """A layer's, with and without a second summand, and a stack's."""
    model = tiny_model("fixed_skip", torch.float32)
    model.set_activation_checkpointing(policy)
    layers, tokens = model.backbone, 2 * WINDOW
    x, delta = torch.randn(2, 1, tokens, 16).requires_grad_(grad)
    before = x.detach().clone(), delta.detach().clone()
    with forced("triton"), torch.set_grad_enabled(grad):
        for index, layer in enumerate(layers.layers):
            reset = torch.zeros(1, -(-tokens // layer.quantum), dtype=torch.bool)
            state = layer.init_state(1)
            alone, _, _ = layer(x + 0 if index else x, state, reset=reset)
            again, _, _ = layer(x, state, reset=reset)
            assert torch.equal(alone, again)
            layer(x, state, reset=reset, delta=delta)
        layers(x, layers.init_state(1), reset=no_reset(model, 1, tokens))
    assert torch.equal(x, before[0]) and torch.equal(delta, before[1])


@needs_interpreter
@pytest.mark.parametrize("name", ["fixed_skip", "feedback", "hybrid"])
def test_evaluation_sums_in_place_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(1, 2 * WINDOW)

    def logits(dtype: torch.dtype) -> Tensor:
        model = tiny_model(name, dtype).eval()
        found: Tensor = model(tokens, model.init_state(1), reset=no_reset(model, *tokens.shape))[0]
        return found

    with torch.no_grad():
        with forced("triton"):
            ours = logits(torch.float32)
        with forced("reference"):
            want = logits(torch.float64)
    assert_near([ours], [want])


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.filterwarnings("ignore:.*fp64")
def test_other_types_sum_in_new_tensors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("sliding_window", dtype)
    layer, x = model.backbone.layers[0], torch.zeros(1, 4, 16, dtype=dtype)
    with forced("triton"):
        assert not layer._sums_in_place(x)
        assert layer.float()._sums_in_place(x.float())
    assert not layer._sums_in_place(x.float())


@needs_interpreter
def test_an_overwritten_stream_that_is_needed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake planted here, norms that keep the stream, must be an error and not a wrong gradient."""
    right = stack.residual_rms_norm
    monkeypatch.setattr(stack, "residual_rms_norm", lambda *a, from_output=False: right(*a))
    with forced("triton"), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(tiny_model("sliding_window", torch.float32).train())


@needs_interpreter
def test_a_reentrant_checkpoint_around_the_last_layer_gives_the_same_gradients() -> None:
    """It saves what the layer was given only after the layer has run, so that no version could tell."""
    model = tiny_model("sliding_window", torch.float32).train()
    tokens = random_tokens(2, 2 * WINDOW)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        nll, _, _ = model(tokens, model.init_state(2), reset=no_reset(model, *tokens.shape), labels=tokens.roll(-1, 1))
        nll.sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    layer = model.backbone.layers[-1]
    run = layer.forward

    def checkpointed(x: Tensor, state: State, *, delta: Tensor | None = None, **named: Any) -> Any:
        others: list[Any] = []

        def again(x: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
            both, *others[:] = run(x, state, delta=delta, **named)
            return tuple(part for part in both if part is not None)

        both = checkpoint(again, x, delta, use_reentrant=True)
        return (both if len(both) == 2 else (*both, None)), *others

    with forced("triton"):
        want = gradients()
        layer.forward = checkpointed
        ours = gradients()
    assert_near(ours, want)
