"""Predictions next to steps that were measured: forward and backward, no optimizer, no dropout, 32,128 tokens known.

One NVIDIA H100 80GB HBM3, power-throttled (680 to 739 TFLOP/s at 8192 cubed in the same processes), torch 2.11.0+cu130,
triton 3.6.0, 2026-11-22, by

    longspan bench step --rows ROWS --segment-tokens TOKENS --model MODEL --activation-checkpointing POLICY \\
        --dropout 0.0 --optimizer none

Memory is the largest `max_memory_allocated` of a warm call. These calls were made before layers kept what `KEPT_SINCE`
names; its bytes are added as they are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from longspan.modeling.config import ActivationCheckpointing, ModelConfig
from longspan.trainer.plan.hardware import load_hardware
from longspan.trainer.plan.memory import saved
from longspan.trainer.plan.report import make_plan
from longspan.trainer.plan.setting import Setting
from longspan.trainer.recipes import read_recipe


@dataclass(frozen=True)
class Measured:
    """One row of the benchmark's table."""

    model: str
    rows: int
    tokens: int
    policy: ActivationCheckpointing
    milliseconds: float
    peak_gib: float


KEPT_SINCE = ("normalised queries and keys", "bits of the ReLU")
TABLE = (
    Measured("rec_fixed_skip_12l", 8, 4096, "none", 84.03, 11.90),
    Measured("slide_13l", 8, 4096, "none", 83.25, 11.91),
    Measured("rec_fixed_skip_12l", 1, 131_072, "none", 335.76, 41.35),
    Measured("slide_13l", 1, 131_072, "none", 325.87, 41.34),
    Measured("rec_fixed_skip_12l", 1, 1_048_576, "layer", 3441.6, 51.01),
)


@pytest.mark.parametrize("measured", TABLE, ids=lambda row: f"{row.model}-{row.rows}x{row.tokens}-{row.policy}")
def test_predictions_are_near_what_was_measured(measured: Measured) -> None:
    raw = read_recipe(f"configs/model/{measured.model}.yaml")["model"]
    config = ModelConfig(**{**raw, "vocab_size": 32_128, "dropout": 0.0})
    setting = Setting(config, measured.rows, measured.tokens, 1, "bf16", measured.policy, "none", 0)
    plan = make_plan(setting, load_hardware("h100"))
    since = sum(saved(setting, layer)[name] for layer in config.expanded_layers() for name in KEPT_SINCE) / 2**30
    assert plan["memory"]["total_gib"] == pytest.approx(measured.peak_gib + since, rel=0.15)
    assert 1e3 * plan["step"]["seconds"] == pytest.approx(measured.milliseconds, rel=0.20)
