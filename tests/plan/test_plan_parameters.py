"""Parameter counts by formula against the built model, for every recipe and every variant of a layer."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from longspan.modeling.config import ModelConfig
from longspan.modeling.model import build_model
from longspan.modeling.parameters import num_parameters
from longspan.modeling.parameters import paper_count as built_paper_count
from longspan.trainer.plan.parameters import count_parameters, paper_count, total_parameters
from longspan.trainer.recipes import read_recipe

RECIPES = sorted(path.stem for path in Path(__file__).resolve().parents[2].glob("configs/model/*.yaml"))
TINY = {"vocab_size": 30, "dim": 24, "num_heads": 2, "head_dim": 8, "ffn_dim": 40, "window_tokens": 4}
PAPER = {
    ("fixed", "skip"): 160_433_152,
    ("fixed", "dual"): 168_822_784,
    ("fixed", "single"): 170_918_912,
    ("lstm", "skip"): 164_628_480,
    ("lstm", "dual"): 181_407_744,
    ("lstm", "single"): 179_308_544,
}


def recipe(name: str) -> dict:
    return read_recipe(f"configs/model/{name}.yaml")["model"]


def check(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = build_model(config)
    assert total_parameters(config) == num_parameters(model)
    assert paper_count(config) == built_paper_count(model)
    assert sum(count_parameters(config).values()) == total_parameters(config)


@pytest.mark.parametrize("name", RECIPES)
def test_counts_equal_the_built_model(name: str) -> None:
    check(ModelConfig(**recipe(name)))


@pytest.mark.parametrize(("gate", "mode"), PAPER, ids=lambda value: value)
def test_paper_counts_of_the_recurrent_rows(gate: str, mode: str) -> None:
    config = recipe("rec_fixed_skip_12l")
    config["layers"][1] |= {"gate": gate, "mode": mode}
    assert paper_count(ModelConfig(**config)) == PAPER[gate, mode]


@pytest.mark.parametrize(
    ("gate", "mode", "update"), list(product(("fixed", "lstm"), ("skip", "dual", "single"), ("trained", "frozen")))
)
def test_counts_of_every_recurrent_variant(gate: str, mode: str, update: str) -> None:
    layer = {"mixer": "block_recurrent", "gate": gate, "mode": mode, "update": update, "num_states": 6}
    check(ModelConfig(**TINY, layers=[{"mixer": "sliding_window", "repeat": 2}, layer]))


@pytest.mark.parametrize(
    "extra",
    [
        {"layers": [{"mixer": "linear_attention"}, {"mixer": "full_attention", "context_tokens": 4}]},
        {"layers": [{"mixer": "sliding_window"}], "memory": {"num_tokens": 3}},
        {"layers": [{"mixer": "sliding_window", "positions": "rope"}]},
        {"layers": [{"mixer": "sliding_window"}, {"mixer": "block_recurrent", "num_states": 6}], "feedback": True},
    ],
    ids=["linear and full", "memory", "rotary", "feedback"],
)
def test_counts_of_other_models(extra: dict) -> None:
    check(ModelConfig(**TINY, **extra))
