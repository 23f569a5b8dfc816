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
FEEDBACK = 11 * 2 * 1024 * 1024  # of each of the other layers: a query, and an output projection twice as wide
PAPER = {
    "xl_512": 150_994_944,
    "xl_1024": 150_994_944,
    "xl_2048": 150_994_944,
    "slide_12l": 150_994_944,
    "slide_13l": 163_577_856,
    "rec_fixed_skip_12l": 160_433_152,
    "rec_fixed_dual_12l": 168_822_784,
    "rec_fixed_single_12l": 170_918_912,
    "rec_lstm_skip_12l": 164_628_480,
    "rec_lstm_dual_12l": 181_407_744,
    "rec_lstm_single_12l": 179_308_544,
    "feedback_fixed_skip_12l": 160_433_152 + FEEDBACK,
    "feedback_lstm_single_12l": 179_308_544 + FEEDBACK,
}
# name -> (millions of the ordinary layers alone by the paper's naming, layers, recurrent layers among them)
SIZES = {
    "40m": (37.7, 12, 1),
    "80m": (75.5, 12, 1),
    "300m": (302.0, 12, 1),
    "650m": (604.0, 24, 2),
    "1300m": (1208.0, 24, 2),
}


def recipe(name: str) -> dict:
    return read_recipe(f"configs/model/{name}")["model"]


def meta_model(config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(ModelConfig(**config))


@pytest.mark.parametrize("row", PAPER)
def test_counts_of_the_papers_rows(row: str) -> None:
    config = recipe(f"{row}.yaml")
    sizes = {name: config[name] for name in ("dim", "num_heads", "head_dim", "ffn_dim")}
    assert sizes == {"dim": 1024, "num_heads": 8, "head_dim": 128, "ffn_dim": 4096}
    assert paper_count(meta_model(config)) == PAPER[row]


@pytest.mark.parametrize("size", SIZES)
def test_counts_of_the_other_sizes(size: str) -> None:
    """By what each part of a layer has, from the sizes alone."""
    millions, layers, recurrent = SIZES[size]
    config, slide = recipe(f"rec_fixed_skip_{size}.yaml"), recipe(f"slide_{size}.yaml")
    dim, width, ffn = config["dim"], config["num_heads"] * config["head_dim"], config["ffn_dim"]
    ordinary = 4 * dim * width + 2 * dim * ffn
    assert layers * ordinary == pytest.approx(millions * 1e6, rel=2e-3)
    # query and output of the read, four projections of the state, its output, ids and initial value, gate
    added = (2 + 4 + 2) * dim * width + 2 * 512 * dim + dim
    model = meta_model(config)
    assert paper_count(model) == layers * ordinary + recurrent * added
    assert paper_count(meta_model(slide)) == (layers + recurrent) * ordinary
    places = [index for index, layer in enumerate(model.config.expanded_layers()) if layer.mixer == "block_recurrent"]
    assert places == [9, 19][:recurrent]  # layers 10 and 20


@pytest.mark.parametrize("row", PAPER)
def test_every_row_has_two_small_sizes(row: str) -> None:
    """The same kinds of layers in the same order, and windows of as many blocks."""
    large = ModelConfig(**recipe(f"{row}.yaml"))
    for size, window, layers in (("gpu_quick", 256, 8), ("quickstart", 64, 4)):
        name = row.replace("12l", size)
        if row.startswith("xl"):
            name = f"xl_{large.window_tokens * window // 512}_{size}"
        if row.startswith("slide"):
            name = SLIDES[row, size]
        small = ModelConfig(**recipe(f"{name}.yaml"))
        assert small.window_tokens * 512 == large.window_tokens * window
        assert small.feedback == large.feedback
        assert len(small.expanded_layers()) == layers + (row == "slide_13l")
        for ours, theirs in zip(small.layers, large.layers, strict=True):
            same = {"repeat", "num_states"}
            assert ours.model_dump(exclude=same) == theirs.model_dump(exclude=same)


SLIDES = {
    ("slide_12l", "gpu_quick"): "slide_8l_gpu_quick",
    ("slide_13l", "gpu_quick"): "slide_gpu_quick",
    ("slide_12l", "quickstart"): "slide_quickstart",
    ("slide_13l", "quickstart"): "slide_5l_quickstart",
}


def test_a_subword_vocabulary_adds_rows_of_the_embedding() -> None:
    config = recipe("rec_fixed_skip_12l.yaml")
    bytes_, words = meta_model(config), meta_model(config | {"vocab_size": 32128})
    assert paper_count(words) == paper_count(bytes_)
    assert num_parameters(words) - num_parameters(bytes_) == (32128 - 384) * 1024


def test_all_parameters_count_the_tied_embedding_once() -> None:
    config = recipe("slide_12l.yaml")
    per_layer = ORDINARY_LAYER + 2 * 1024 + 8 + 8 * 32  # norms, attention scales, position table
    assert num_parameters(meta_model(config)) == 12 * per_layer + 384 * 1024 + 1024


@pytest.mark.parametrize("name", MODEL_RECIPES)
def test_recipes_build_and_bear_their_file_name(name: str) -> None:
    config = recipe(name)
    assert config["name"] == name.removesuffix(".yaml")
    meta_model(config)


@pytest.mark.parametrize("name", [name for name in MODEL_RECIPES if "quick" in name])
def test_small_models_have_about_a_million_and_26_million_parameters(name: str) -> None:
    millions = num_parameters(meta_model(recipe(name))) / 1e6
    assert 0.7 < millions < 1.5 if "quickstart" in name else 24 < millions < 40


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
