"""Whole models against the NumPy oracle: logits, states, caches, and gradients by finite differences; fp64.

Documents start in mid-segment and go on over segments of three blocks, of one block, and of blocks and a half.
"""

from __future__ import annotations

import brt_oracle
import numpy as np
import pytest
import torch
from tiny_models import MODELS, RECURRENT, ROTARY, SLIDING, WINDOW, random_tokens, tiny_model

from longspan.modeling.model import LanguageModel
from longspan.modeling.state import State

BEYOND = {"linear_attention", "full_attention", "hybrid", "memory", "memory_hybrid"}
MORE = {
    "rotary": {"layers": [ROTARY, ROTARY]},
    "more_states_than_window": {"layers": [SLIDING, RECURRENT | {"num_states": 9}]},
    "feedback_frozen": {"layers": [SLIDING, RECURRENT | {"update": "frozen"}], "feedback": True},
    "one_state": {"layers": [RECURRENT | {"num_states": 1, "gate": "lstm", "mode": "dual", "candidate": "tanh"}]},
}
CASES = {name: {} for name in MODELS if name not in BEYOND} | MORE
SEGMENTS = [3 * WINDOW, WINDOW, 2 * WINDOW + 2]
LENGTH = sum(SEGMENTS)
# (row, first token, last token + 1) of each document
DOCUMENTS = [(0, 0, LENGTH), (1, 0, 2 * WINDOW), (1, 2 * WINDOW, 5 * WINDOW), (1, 5 * WINDOW, LENGTH)]


def built(name: str) -> LanguageModel:
    return tiny_model(name if name in MODELS else "fixed_skip", **CASES[name])


def in_segments(model: LanguageModel, tokens: torch.Tensor) -> tuple[torch.Tensor, State]:
    """(logits [2, LENGTH, V], last state), gradient through all segments."""
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, first, _ in DOCUMENTS:
        starts[row, first] = True
    state, logits = model.init_state(2), []
    for part, flags in zip(tokens.split(SEGMENTS, 1), starts.split(SEGMENTS, 1), strict=True):
        y, state, _ = model(part, state, reset=flags[:, :: model.quantum])
        logits.append(y)
    return torch.cat(logits, 1), state


def oracle(model: LanguageModel, tokens: torch.Tensor, shift: dict[str, np.ndarray] | None = None):  # type: ignore[no-untyped-def]
    """(logits [2, LENGTH, V], what the layers remember of each document), parameters moved by `shift`."""
    parameters = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    if shift is not None:
        parameters = {name: value + shift[name] for name, value in parameters.items()}
    config = model.config.model_dump()
    logits, memories = np.zeros((2, LENGTH, model.config.vocab_size)), []
    for row, first, end in DOCUMENTS:
        logits[row, first:end], memory = brt_oracle.model(parameters, config, tokens[row, first:end].numpy())
        memories.append(memory)
    return logits, memories


@pytest.mark.parametrize("name", CASES)
def test_logits_states_and_caches(name: str) -> None:
    model, tokens = built(name), random_tokens(2, LENGTH)
    with torch.no_grad():
        logits, state = in_segments(model, tokens)
    want, memories = oracle(model, tokens)
    assert np.abs(logits.numpy() - want).max() < 1e-11
    for row, memory in ((0, memories[0]), (1, memories[3])):
        for index, of_layer in enumerate(memory):
            ours = state[f"layer{index}"]
            for kept, seen in (("keys", of_layer.keys), ("values", of_layer.values)):
                padded = [np.zeros_like(seen[0])] * WINDOW + seen
                assert np.abs(ours[kept][row].numpy() - np.stack(padded[-WINDOW:])).max() < 1e-12
            if "state" in ours:
                assert np.abs(ours["state"][row].numpy() - of_layer.state).max() < 1e-11


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_slope_of_the_oracle(name: str) -> None:
    """Along a random direction of all parameters at once."""
    model, tokens = built(name), random_tokens(2, LENGTH)
    draws = np.random.default_rng(0)
    weights = draws.standard_normal((2, LENGTH, model.config.vocab_size))
    direction = {path: draws.standard_normal(tuple(p.shape)) for path, p in model.named_parameters()}
    (in_segments(model, tokens)[0] * torch.from_numpy(weights)).sum().backward()
    ours = sum((p.grad * torch.from_numpy(direction[path])).sum().item() for path, p in model.named_parameters())
    step = 1e-8  # small: a kink of a ReLU must not lie between
    up, down = (
        (oracle(model, tokens, {path: sign * step * d for path, d in direction.items()})[0] * weights).sum()
        for sign in (1, -1)
    )
    assert ours == pytest.approx((up - down) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("rule", ["feedback", "candidate"])
def test_the_oracle_sees_an_option_that_does_nothing(rule: str) -> None:
    model, tokens = built({"feedback": "feedback", "candidate": "lstm_skip_tanh"}[rule]), random_tokens(2, LENGTH)
    want, _ = oracle(model, tokens)
    with torch.no_grad():
        if rule == "feedback":
            for path, parameter in model.named_parameters():
                if path.endswith("layers.0.mixer.state_query.weight"):
                    parameter.neg_()
        else:
            model.backbone.layers[0].mixer.recurrent.write.gate.tanh = False
        logits, _ = in_segments(model, tokens)
    assert np.abs(logits.numpy() - want).max() > 1e-3
