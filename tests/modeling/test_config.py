"""What is wrong with a model's configuration is said at once, with the value and what to do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from longspan.errors import ConfigError
from longspan.modeling.config import ModelConfig
from longspan.trainer import recipes

SLIDING: dict[str, Any] = {"mixer": "sliding_window"}
RECURRENT: dict[str, Any] = {"mixer": "block_recurrent"}
PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "no states": (
        {"layers": [RECURRENT | {"num_states": 0}]},
        "model.layers.0.num_states = 0: input should be greater than or equal to 1.",
    ),
    "unknown gate": ({"layers": [RECURRENT | {"gate": "gru"}]}, "gate = 'gru': input should be 'fixed' or 'lstm'."),
    "unknown mode": (
        {"layers": [RECURRENT | {"mode": "triple"}]},
        "mode = 'triple': input should be 'skip', 'dual' or 'single'.",
    ),
    "tanh with the fixed gate": (
        {"layers": [RECURRENT | {"candidate": "tanh"}]},
        "candidate = 'tanh': has no effect with gate fixed and mode skip: the fixed gate writes without a tanh",
    ),
    "tanh in mode single": (
        {"layers": [RECURRENT | {"gate": "lstm", "mode": "single", "candidate": "tanh"}]},
        "has no effect with gate lstm and mode single",
    ),
    "feedback without a state": (
        {"layers": [SLIDING], "feedback": True},
        "model.feedback = True: no layer has a state that the others could read. Add a block_recurrent layer, or use "
        "feedback: false.",
    ),
    "feedback to a layer that cannot read": (
        {"layers": [{"mixer": "linear_attention"}, RECURRENT], "feedback": True},
        "linear_attention cannot read the state of another layer, only sliding_window can.",
    ),
    "feedback without readers": ({"layers": [RECURRENT], "feedback": True}, "has no effect: every layer is recurrent"),
    "rotary positions on odd heads": (
        {"layers": [SLIDING | {"positions": "rope"}], "head_dim": 7},
        "sliding_window with rotary positions turns pairs of a head, and head_dim = 7 is odd. Use an even head_dim.",
    ),
    "full attention on odd heads": (
        {"layers": [{"mixer": "full_attention"}], "head_dim": 7},
        "full_attention with rotary positions turns pairs of a head, and head_dim = 7 is odd.",
    ),
    "layers by number": ({"layers": {"3": RECURRENT}}, "model.layers: input should be a list."),
    "no layers": ({"layers": []}, "model.layers: list should have at least 1 items, not 0."),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problem(case: str) -> None:
    model, words = PROBLEMS[case]
    with pytest.raises(ConfigError) as caught:
        recipes.validate(Whole, {"model": model}, "recipe")
    assert str(caught.value).startswith("1 problem in recipe:\n")
    assert words in str(caught.value)


class Whole(BaseModel):
    """A recipe of a model alone."""

    model: ModelConfig


def test_several_problems_at_once() -> None:
    model = {
        "layers": [SLIDING, RECURRENT | {"num_states": -1, "candidate": "tanh"}],
        "window_tokens": 0,
        "dim": "wide",
    }
    with pytest.raises(ConfigError, match="4 problems"):
        recipes.validate(Whole, {"model": model}, "recipe")


@pytest.mark.parametrize("num_states", [1, 128, 2048])
@pytest.mark.parametrize("gate", ["fixed", "lstm"])
@pytest.mark.parametrize("mode", ["skip", "dual", "single"])
def test_any_number_of_recurrent_layers_anywhere(gate: str, mode: str, num_states: int) -> None:
    recurrent = RECURRENT | {"gate": gate, "mode": mode, "num_states": num_states}
    config = ModelConfig(layers=[recurrent, SLIDING | {"repeat": 2}, recurrent | {"repeat": 2}], window_tokens=384)
    assert [layer.mixer == "block_recurrent" for layer in config.expanded_layers()] == [True, False, False, True, True]
    assert config.quantum == 384 and config.is_recurrent
