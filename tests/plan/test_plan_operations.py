"""Counted operations against torch's counter, against the count of a whole step, and against the plan's own parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longspan.kernels.backend import forced
from longspan.modeling.config import ModelConfig
from longspan.modeling.flops import head_operation, layer_operations, train_flops_per_token
from longspan.modeling.model import build_model
from longspan.trainer.plan.hardware import load_hardware
from longspan.trainer.plan.setting import Setting
from longspan.trainer.plan.timing import plan_step
from longspan.trainer.recipes import read_recipe

RECIPES = sorted(path.stem for path in Path(__file__).resolve().parents[2].glob("configs/model/*.yaml"))
TINY = {"vocab_size": 48, "dim": 32, "num_heads": 2, "head_dim": 8, "ffn_dim": 64, "window_tokens": 16, "dropout": 0.0}
RECURRENT = {"mixer": "block_recurrent", "num_states": 8}
ROWS, TOKENS = 2, 64


def _in_place_product(total: list[int], a: list[int], b: list[int], *args: object, **options: object) -> int:
    """`addmm_`, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def forward_products(config: ModelConfig) -> dict[str, int]:
    """Operations of one forward pass on the CPU, by kind of product: "mm" of weights, everything else."""
    model = build_model(config)
    tokens = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    reset = torch.zeros(ROWS, TOKENS // model.quantum, dtype=torch.bool)
    further = {torch.ops.aten.addmm_: _in_place_product}
    with FlopCounterMode(display=False, custom_mapping=further) as counter, forced("reference"), torch.no_grad():
        model(tokens, model.init_state(ROWS), reset=reset, labels=tokens)
    counts = counter.get_flop_counts()["Global"]
    dense = sum(n for operation, n in counts.items() if str(operation) in ("aten.mm", "aten.addmm", "aten.addmm_"))
    return {"dense": dense, "other": sum(counts.values()) - dense}


def counted(config: ModelConfig) -> dict[str, float]:
    operations = [operation for layer in config.expanded_layers() for operation in layer_operations(config, layer)]
    dense = [operation.flops for operation in operations if operation.kind == "dense"]
    other = [operation.flops for operation in operations if operation.kind != "dense"]
    return {
        "dense": ROWS * TOKENS * (sum(dense) + head_operation(config).flops),
        "other": ROWS * TOKENS * sum(other),
    }


@pytest.mark.parametrize(
    "layers",
    [
        [{"mixer": "sliding_window", "repeat": 2}],
        [{"mixer": "linear_attention"}, {"mixer": "full_attention", "context_tokens": 16}],
        [{"mixer": "sliding_window"}, RECURRENT],
        [RECURRENT | {"mode": "dual"}],
        [RECURRENT | {"mode": "single"}],
        [RECURRENT | {"gate": "lstm"}],
        [RECURRENT | {"gate": "lstm", "mode": "dual"}],
        [RECURRENT | {"gate": "lstm", "mode": "single"}],
    ],
    ids=["window", "linear and full", "skip", "dual", "single", "lstm skip", "lstm dual", "lstm single"],
)
def test_forward_products_of_weights_are_exact(layers: list[dict]) -> None:
    config = ModelConfig(**TINY, layers=layers)
    assert forward_products(config)["dense"] == counted(config)["dense"]


def test_forward_products_of_weights_are_exact_with_feedback() -> None:
    config = ModelConfig(**TINY, layers=[{"mixer": "sliding_window"}, RECURRENT], feedback=True)
    # the plain form projects the state once more, for the layers that read it
    extra = ROWS * (TOKENS // 16) * 8 * 2 * 32 * 2 * 16
    assert forward_products(config)["dense"] == counted(config)["dense"] + extra


def test_attention_counts_the_visible_half_of_the_plain_form() -> None:
    """The plain form computes 2W scores a token, of which exactly W can be seen."""
    config = ModelConfig(**TINY, layers=[{"mixer": "sliding_window"}])
    assert forward_products(config)["other"] == 2 * counted(config)["other"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_plan_executes_at_least_the_counted_operations(name: str) -> None:
    config = ModelConfig(**read_recipe(f"configs/model/{name}.yaml")["model"])
    segment = 4 * config.window_tokens
    step = plan_step(Setting(config, 2, segment, 1, "bf16", "none", "none", 0), load_hardware("h100"))
    assert step.model_flops == pytest.approx(2 * segment * train_flops_per_token(config, segment))
    executed = sum(part.flops for part in step.parts.values())
    assert 0.97 * step.model_flops < executed < 1.6 * step.model_flops
    assert all(part.forward >= 0 and part.backward >= 0 for part in step.parts.values())
