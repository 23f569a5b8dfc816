"""Parameter counts of the paper's table (law 9), operations per token, and the shipped model recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longspan.modeling.config import ModelConfig
from longspan.modeling.flops import layer_flops_per_token, state_write_flops, train_flops_per_token
from longspan.modeling.model import build_model
from longspan.modeling.parameters import num_parameters, paper_count
from longspan.trainer.recipes import read_recipe

MODEL_RECIPES = sorted(path.name for path in Path(__file__).resolve().parents[2].glob("configs/model/*.yaml"))
ORDINARY_LAYER = 12_582_912
PAPER = {
    ("fixed", "skip"): 160_433_152,
    ("fixed", "dual"): 168_822_784,
    ("fixed", "single"): 170_918_912,
    ("lstm", "skip"): 164_628_480,
    ("lstm", "dual"): 181_407_744,
    ("lstm", "single"): 179_308_544,
}


def recipe(name: str) -> dict:
    return read_recipe(f"configs/model/{name}")["model"]


def meta_model(config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(ModelConfig(**config))


@pytest.mark.parametrize(("gate", "mode"), PAPER, ids=lambda value: value)
def test_counts_of_the_recurrent_rows(gate: str, mode: str) -> None:
    config = recipe("rec_fixed_skip_12l.yaml")
    config["layers"][1] |= {"gate": gate, "mode": mode}
    assert paper_count(meta_model(config)) == PAPER[gate, mode]


@pytest.mark.parametrize("layers", [12, 13])
def test_counts_of_the_window_rows(layers: int) -> None:
    config = recipe("slide_12l.yaml")
    config["layers"][0]["repeat"] = layers
    assert paper_count(meta_model(config)) == layers * ORDINARY_LAYER


def test_all_parameters_count_the_tied_embedding_once() -> None:
    config = recipe("slide_12l.yaml")
    per_layer = ORDINARY_LAYER + 2 * 1024 + 8 + 8 * 32  # norms, attention scales, position table
    assert num_parameters(meta_model(config)) == 12 * per_layer + 384 * 1024 + 1024


@pytest.mark.parametrize("name", MODEL_RECIPES)
def test_recipes_build_and_bear_their_file_name(name: str) -> None:
    config = recipe(name)
    assert config["name"] == name.removesuffix(".yaml")
    meta_model(config)


@pytest.mark.parametrize("name", ["rec_fixed_skip_quickstart.yaml", "slide_quickstart.yaml"])
def test_quickstart_models_have_about_a_million_parameters(name: str) -> None:
    assert 0.7e6 < num_parameters(meta_model(recipe(name))) < 1.3e6


def test_flops_of_the_dense_part_are_two_a_parameter() -> None:
    config = ModelConfig(**recipe("slide_12l.yaml"))
    window = 4 * config.window_tokens * 1024
    assert layer_flops_per_token(config, config.layers[0]) - window == 2 * ORDINARY_LAYER
    forward = 12 * (2 * ORDINARY_LAYER + window) + 2 * 384 * 1024
    assert train_flops_per_token(config, 4096) == pytest.approx(3 * forward)


def test_flops_of_the_serial_part_at_the_base_size() -> None:
    """9.7 of a block's 27 GFLOP are serial."""
    config = ModelConfig(**recipe("rec_fixed_skip_12l.yaml"))
    layer = config.layers[1]
    serial = state_write_flops(config, layer) + 2 * 512 * 2 * 1024 * 1024
    assert serial == pytest.approx(9.66e9, rel=1e-2)
    assert 512 * layer_flops_per_token(config, layer) == pytest.approx(26.8e9, rel=1e-2)


def test_flops_know_that_the_last_write_of_a_segment_has_no_backward_pass() -> None:
    config = ModelConfig(**recipe("rec_fixed_skip_12l.yaml"))
    short, long = (train_flops_per_token(config, n) for n in (1024, 4096))
    assert long - short == pytest.approx(2 * state_write_flops(config, config.layers[1]) * (1 / 1024 - 1 / 4096))


def test_flops_of_a_frozen_state_and_of_memory() -> None:
    config = recipe("rec_fixed_skip_12l.yaml")
    config["layers"][1] |= {"update": "frozen"}
    frozen = ModelConfig(**config)
    assert state_write_flops(frozen, frozen.layers[1]) == 0
    plain = ModelConfig(**recipe("hybrid_12l.yaml"))
    memory = ModelConfig(**(recipe("hybrid_12l.yaml") | {"memory": {"num_tokens": 8}}))
    assert train_flops_per_token(memory, 4096) > 1.03 * train_flops_per_token(plain, 4096)
